"""A small world that runs anywhere: video clips, questions with annotated evidence, a tiny student.

    python toy.py FOLDER [--seed 0 --train 480 --heldout 200 --warm 1600]

FOLDER/videos/*.mp4     H.264 clips of 8 s. Every second another card shows up in one of four corners: a shape with a
                        colour and 1 to 4 dots. A clip has one cross, one triangle and one square; all other cards are discs.
FOLDER/train.json, heldout.json, warm.json
                        Video-R1 rows with `evidence` (where to look, never what is there); no clip is in two of them.
                        warm.json also has the `process` traces of the warm start.
FOLDER/template.txt     the question's wording
FOLDER/model/           a random Qwen2.5-VL of under a million weights, with tokenizer and processor

Dimensions: F frames of a clip; h, w pixels.
"""

import argparse
import json
import random
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLProcessor,
                          Qwen2VLImageProcessor, Qwen2VLVideoProcessor)

import os
INIT, LAYERS, MLP, EMB = float(os.environ.get("INIT", ".06")), int(os.environ.get("LAYERS", "3")), int(os.environ.get("MLP", "256")), 1

# --- the world's constants ------------------------------------------------------------------------

FPS, SLOTS, SLOT_FRAMES = 4, 8, 4  # a card stays for SLOT_FRAMES: one second, two of the 16 frames that the student sees
SIZE = 112  # pixels a side of a clip; the student sees 56, so a corner is 28 x 28: one merged token
CARD = 20  # half the side of a card; a corner is 56 pixels wide
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 70, 230), "yellow": (235, 215, 30),
           "purple": (170, 50, 200), "white": (240, 240, 240)}
CORNERS = {"top left": (0.0, 0.0, 0.5, 0.5), "top right": (0.5, 0.0, 1.0, 0.5),
           "bottom left": (0.0, 0.5, 0.5, 1.0), "bottom right": (0.5, 0.5, 1.0, 1.0)}
SHAPES = ("cross", "triangle", "square")  # what questions ask about; everything else is a disc
DOTS = (1, 2, 3, 4)

TEMPLATE = "{question} Think, then answer."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# Sentences that a tokenizer of this world should know besides its questions and traces: those of evidence patches.
PATCH_WORDING = (
    "Evidence: a temporal error. Look again at frames {a} to {b} ({s:.1f} s to {e:.1f} s), region (0.00, 0.50) to (0.50, 1.00).",
    "Evidence: a spatial error. Evidence: a misconception. Count again, one by one, and leave out what was counted before. "
    "Follow the subject from frame to frame and compare its positions. Compare what comes earlier with what comes later. "
    "Check where things are in relation to each other. Look closely at what the question asks about.")


# --- clips ----------------------------------------------------------------------------------------


def new_clip(rng):
    """A clip's script: one card per slot, as dicts of shape, colour, corner, dots; SHAPES once each, none of them last."""
    shapes = ["disc"] * SLOTS
    for slot, shape in zip(rng.sample(range(SLOTS - 1), len(SHAPES)), SHAPES):
        shapes[slot] = shape
    return [{"shape": shape, "colour": rng.choice(list(COLOURS)), "corner": rng.choice(list(CORNERS)), "dots": rng.choice(DOTS)}
            for shape in shapes]


def draw(clip, rng):
    """The clip's frames, uint8 [F, h, w, 3]."""
    grey = rng.randint(50, 70)
    frames_Fhw3 = np.full((SLOTS * SLOT_FRAMES, SIZE, SIZE, 3), grey, np.uint8)
    y_hw, x_hw = np.mgrid[:SIZE, :SIZE]
    for slot, card in enumerate(clip):
        left, top = (int(v * SIZE) + SIZE // 4 + rng.randint(-3, 3) for v in CORNERS[card["corner"]][:2])
        x, y = x_hw - left, y_hw - top
        inside = {"disc": x**2 + y**2 <= CARD**2, "square": np.maximum(abs(x), abs(y)) <= 0.85 * CARD,
                  "cross": (np.minimum(abs(x), abs(y)) <= 0.4 * CARD) & (np.maximum(abs(x), abs(y)) <= CARD),
                  "triangle": (y <= 0.8 * CARD) & (y >= 2 * abs(x) - 1.1 * CARD)}[card["shape"]]
        frame = frames_Fhw3[slot * SLOT_FRAMES]
        for camera, (left, top, _, _) in enumerate(CORNERS.values()):
            x0, y0 = int(left * SIZE), int(top * SIZE)
            frame[y0:y0 + 5, x0 + 7 * slot:x0 + 7 * slot + 7] = 255
            frame[y0 + 51:y0 + 56, x0 + 14 * camera:x0 + 14 * camera + 14] = 0
        frame[inside] = COLOURS[card["colour"]]
        for dot in range(card["dots"]):
            dx, dy = ((-4, -4), (4, 4), (4, -4), (-4, 4))[dot]
            frame[(abs(x - dx) <= 2) & (abs(y - dy) <= 2)] = 0
        frames_Fhw3[slot * SLOT_FRAMES + 1:(slot + 1) * SLOT_FRAMES] = frame
    return frames_Fhw3


def write_video(path, frames_Fhw3):
    """Write an H.264 mp4; little is quantised, since at this size chroma is coarse enough already."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = frames_Fhw3.shape[2], frames_Fhw3.shape[1], "yuv420p"
        for frame in frames_Fhw3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# --- questions ------------------------------------------------------------------------------------


def span(slot, last=None):
    """Start and end in seconds of what is on screen from `slot` to `last`."""
    last = slot if last is None else last
    return {"start": slot * SLOT_FRAMES / FPS, "end": ((last + 1) * SLOT_FRAMES - 1) / FPS}


def frames(slot):
    """How a trace names a slot: the student's frames."""
    return f"frames {2 * slot} to {2 * slot + 1}"


def which_colour(clip, slot):
    card = clip[slot]
    return (f"What colour is the {card['shape']}?", "free-form", card["colour"],
            f"{frames(slot)}, {card['corner']}: {card['colour']}",
            {**span(slot), "box": CORNERS[card["corner"]]})


def where(clip, slot):
    card = clip[slot]
    return (f"In which corner is the {card['shape']}?", "free-form", card["corner"],
            f"{frames(slot)}: {card['corner']}", span(slot))


def how_many(clip, slot):
    card = clip[slot]
    return (f"How many dots are on the {card['shape']}?", "numerical", str(card["dots"]),
            f"{frames(slot)}, {card['corner']}: {card['dots']}", {**span(slot), "box": CORNERS[card["corner"]]})


def what_next(clip, slot):
    card, following = clip[slot], clip[slot + 1]
    return (f"Which colour comes right after the {card['shape']}?", "free-form", following["colour"],
            f"{frames(slot)}, next: {following['colour']}", span(slot, slot + 1))


def when(clip, slot):
    card = clip[slot]
    return (f"In which second does the {card['shape']} appear?", "numerical", str(slot),
            f"{frames(slot)}, {card['corner']}: {slot}", {**span(0, SLOTS - 1), "box": CORNERS[card["corner"]]})


QUESTIONS = (which_colour, where, how_many, what_next, when)


def rows(split, count, rng, folder, traces=False):
    """Write the clips of a split, and return its `count` Video-R1 rows: one question of each kind per clip."""
    result = []
    while len(result) < count:
        clip, path = new_clip(rng), f"{split}_{len(result) // len(QUESTIONS):04d}.mp4"
        write_video(folder / "videos" / path, draw(clip, rng))
        for ask in QUESTIONS[:count - len(result)]:
            slot = next(i for i, card in enumerate(clip) if card["shape"] == rng.choice(SHAPES)) if False else \
                [card["shape"] for card in clip].index(rng.choice(SHAPES))
            question, kind, answer, trace, evidence = ask(clip, slot)
            row = {"problem_id": f"{split}-{len(result)}", "problem": question, "data_type": "video", "problem_type": kind,
                   "options": [], "solution": f"<answer>{answer}</answer>", "path": path, "data_source": "toy",
                   "evidence": [evidence]}
            result.append({**row, "process": f"<think>{trace}</think>"} if traces else row)
    return result


# --- the student ----------------------------------------------------------------------------------


def new_tokenizer(texts):
    """Byte-level BPE over `texts`, with Qwen's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"<[^<>\s]*>| ?\(?\d+\.\d+[,)]*| ?\d+| ?[^\s\d<>.,:?]+|[.,:?]|\s+|[<>]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL)


def new_model(tokenizer):
    """A random Qwen2.5-VL: 3 text layers of width 128, one vision layer."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"))}
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=MLP, num_hidden_layers=LAYERS, initializer_range=INIT, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=bool(int(os.environ.get("TIE", "0"))),
                rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0})
    vision = dict(initializer_range=INIT, depth=1, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=14, temporal_patch_size=2,
                  spatial_merge_size=2, out_hidden_size=128, window_size=112, fullatt_block_indexes=[0], tokens_per_second=2)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=bool(int(os.environ.get("TIE", "0"))), **ids)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def save_student(folder, texts, seed):
    """Write model, tokenizer and processor as one checkpoint folder."""
    tokenizer = new_tokenizer(texts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    pixels = dict(patch_size=14, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    Qwen2_5_VLProcessor(image_processor=Qwen2VLImageProcessor(**pixels), video_processor=Qwen2VLVideoProcessor(**pixels),
                        tokenizer=tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)


# --- all of it ------------------------------------------------------------------------------------


def make(folder, seed=0, train=480, heldout=200, warm=1600):
    """Write the whole world to `folder`; the same arguments give the same world. Prints one line of counts."""
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    made = {}
    for split, count in (("train", train), ("heldout", heldout), ("warm", warm)):
        made[split] = rows(split, count, random.Random(f"{seed} {split}"), folder, traces=split == "warm")
        (folder / f"{split}.json").write_text(json.dumps(made[split], indent=1))
    (folder / "template.txt").write_text(TEMPLATE)
    wording = [text.format(a=2 * i, b=2 * i + 1, s=i, e=i + 0.5) for text in PATCH_WORDING for i in range(SLOTS)]
    asked = [f"system\nuser\nassistant\nYou are a helpful assistant.{TEMPLATE} {row['problem']}\n{row.get('process', '')}\n"
             f"{row['solution']}" for part in made.values() for row in part]
    save_student(folder / "model", asked + wording * 20, seed)
    print(describe(folder, made))


def describe(folder, made):
    """One line: what is in the world."""
    clips = {split: len({row["path"] for row in part}) for split, part in made.items()}
    return f"{folder}: " + ", ".join(f"{split} {len(part)} questions on {clips[split]} clips" for split, part in made.items())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    for name, default, text in (("seed", 0, "of everything random"), ("train", 480, "questions to train on"),
                                ("heldout", 200, "questions to test on"), ("warm", 1600, "questions with traces")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    make(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
