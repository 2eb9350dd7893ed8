"""Makers of small real things for the tests: H.264 clips and Qwen processors, built on the spot.

from conftest import make_processor, make_video, sample
"""

import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)

PIXELS = 128 * 28 * 28  # of a frame, as the paper shows it
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHAT_TEMPLATE = (  # ChatML as Qwen writes it
    "{% if messages[0].role != 'system' %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

CORPUS = ["What colour is the ball that rolls from left to right at the end of the video?",
          "Write this reasoning between <think> and </think>, then <answer> and </answer>.",
          "You are a helpful assistant. system user assistant A. red B. green 1 2 3 4.5 seconds"]


def make_video(path, frames=24, size=(56, 84), fps=8, times=None):
    """Write an H.264 mp4 of plain grey frames; frame i has the value 8 i (mod 256).

    So a test can read off which frame it was given. size = (height, width); odd ones are stored in
    4:4:4. times: the frames' seconds, where they are not i / fps. Returns the path as a string.
    """
    import av
    import numpy as np
    (height, width), tick = size, Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4"})
        stream.height, stream.width, stream.codec_context.time_base = height, width, tick
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        for i in range(frames):
            pixels = np.full((height, width, 3), 8 * i % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base, frame.pts = tick, round(1000 * (times[i] if times else i / fps))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def make_processor(folder, family="qwen2_5_vl"):
    """Save a Qwen2.5-VL ("qwen2_5_vl") or Qwen3-VL ("qwen3_vl") processor, and return it loaded.

    Its tokenizer is a byte-level BPE trained on three sentences, with Qwen's special tokens; the
    image and video processors are the family's own, with its patches of 14 or 16 pixels.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *SPECIAL_TOKENS[3:]])
    if family == "qwen3_vl":
        processor = transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(patch_size=16), tokenizer,
            transformers.Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    else:
        processor = transformers.Qwen2_5_VLProcessor(
            transformers.Qwen2VLImageProcessor(), tokenizer,
            transformers.Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return transformers.AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """24 frames of 90 x 130 at 8 a second, 3 s."""
    return make_video(tmp_path_factory.mktemp("film") / "film.mp4", size=(90, 130))


def sample(media="", media_type="video", **changes):
    """Make a Sample."""
    from data import Sample
    fields = {"id": "7", "question": "What colour?", "options": (), "answer": "red",
              "kind": "free-form"} | changes
    return Sample(media=str(media), media_type=media_type, **fields)
