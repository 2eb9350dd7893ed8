"""A small world that runs anywhere: video clips, questions with annotated evidence, a tiny student.

    python toy.py FOLDER [--seed 0 --train 480 --heldout 200 --warm 2000 --family qwen2_5_vl]

FOLDER/videos/*.mp4     H.264 clips of 8 s, in which 2 to 4 cards of different colours show up, one
                        after another, each for a second in one of four corners
FOLDER/train.json, heldout.json
                        Video-R1 rows with `evidence`: where to look, never what is there; in
                        train.json with a `process` that looks, for methods that imitate one
FOLDER/warm.json        rows with a `process` for the warm start, of two kinds: the student looks (a
                        row with evidence), or it guesses (a row without). About some questions
                        it mostly guesses; that habit is what there is to repair.
FOLDER/template.txt     the question's wording
FOLDER/model/           a Qwen2.5-VL, or Qwen3.5, of under a million weights, with tokenizer and
                        processor

No clip is in two of the files. heldout.json is written last: where it is, the world is complete.

Dimensions: F frames of a clip; h, w pixels.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# --- the world's constants ------------------------------------------------------------------------

FPS, SLOTS, SLOT_FRAMES = 4, 8, 4  # a card stays one second: two of the student's 16 frames
SIZE = 112  # pixels a side; the student sees 56, so a corner is 28 x 28: one merged token
CARD = 17  # half the side of a card; a corner is 56 pixels wide
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 70, 230),
           "yellow": (235, 215, 30), "purple": (170, 50, 200), "white": (240, 240, 240)}
CORNERS = {"top left": (0.0, 0.0, 0.5, 0.5), "top right": (0.5, 0.0, 1.0, 0.5),
           "bottom left": (0.0, 0.5, 0.5, 1.0), "bottom right": (0.5, 0.5, 1.0, 1.0)}
ORDER = ("first", "second", "third", "fourth")
GUESSED = 0.99  # share of guesses among the warm start's rows of a kind that is ever guessed
WEIGHTS = {family: Path(__file__).with_name(name) for family, name in (  # of students that can look
    ("qwen2_5_vl", "toy_student.safetensors"), ("qwen3_5", "toy_student_qwen3_5.safetensors"))}

TEMPLATE = "{question} Think, then answer."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# What a tokenizer of this world should know besides questions and traces: evidence patches.
PATCH_WORDING = (
    "Evidence: a temporal error. Look again at frames {a} to {b} ({s:.1f} s to {e:.1f} s), "
    "region (0.00, 0.50) to (0.50, 1.00).",
    "Evidence: a spatial error. Evidence: a misconception. "
    "Count again, one by one, and leave out what was counted before. "
    "Follow the subject from frame to frame and compare its positions. "
    "Compare what comes earlier with what comes later. "
    "Check where things are in relation to each other. "
    "Look closely at what the question asks about.")


# --- clips ----------------------------------------------------------------------------------------


def new_clip(rng: random.Random) -> list[dict | None]:
    """Return a clip's script: for each second a card {colour, corner}, or None."""
    cards = rng.choice((2, 2, 3, 3, 4))
    clip = [None] * SLOTS
    for slot, colour in zip(rng.sample(range(SLOTS), cards), rng.sample(list(COLOURS), cards)):
        clip[slot] = {"colour": colour, "corner": rng.choice(list(CORNERS))}
    return clip


def draw(clip: list[dict | None], rng: random.Random) -> np.ndarray:
    """Return the clip's frames, uint8 [F, h, w, 3]: squares on grey, a little off their place."""
    frames_Fhw3 = np.full((SLOTS * SLOT_FRAMES, SIZE, SIZE, 3), rng.randint(50, 70), np.uint8)
    for slot, card in enumerate(clip):
        if card is not None:
            x, y = (int(v * SIZE) + SIZE // 4 + rng.randint(-3, 3)
                    for v in CORNERS[card["corner"]][:2])
            shown = frames_Fhw3[slot * SLOT_FRAMES:(slot + 1) * SLOT_FRAMES]
            shown[:, y - CARD:y + CARD, x - CARD:x + CARD] = COLOURS[card["colour"]]
    return frames_Fhw3


def write_video(path: Path, frames_Fhw3: np.ndarray) -> None:
    """Write an H.264 mp4, little quantised: at this size chroma is coarse enough already."""
    options = {"crf": "12", "preset": "ultrafast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames_Fhw3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames_Fhw3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# --- questions ------------------------------------------------------------------------------------
# Each kind returns question, problem_type, answer, the reasoning of one who looks, evidence, and a
# function that guesses an answer (None where nobody guesses).


def span(first: int, last: int | None = None) -> dict:
    """Return start and end, in seconds, of what is on screen from second `first` through `last`."""
    last = first if last is None else last
    return {"start": first * SLOT_FRAMES / FPS, "end": ((last + 1) * SLOT_FRAMES - 1) / FPS}


def frames(slot: int) -> str:
    """Return a trace's name for a second: the frames in which the student sees it."""
    return f"frames {2 * slot} to {2 * slot + 1}"


def a_card(clip: list[dict | None], rng: random.Random) -> tuple[str, int, list[int]]:
    """Pick one of the cards; return which in order it is, its second, and all cards' seconds."""
    slots = [slot for slot, card in enumerate(clip) if card is not None]
    number = rng.randrange(len(slots))
    return ORDER[number], slots[number], slots


def a_colour(rng: random.Random) -> str:
    """Guess a colour."""
    return rng.choice(list(COLOURS))


def which_colour(clip: list[dict | None], rng: random.Random) -> tuple:
    """Ask for the colour of the first, second ... card."""
    number, slot, _ = a_card(clip, rng)
    colour, corner = clip[slot]["colour"], clip[slot]["corner"]
    return (f"What colour is the {number} card?", "free-form", colour,
            f"The {number} card is in {frames(slot)}. It is {colour}.",
            {**span(slot), "box": CORNERS[corner]}, a_colour)


def where(clip: list[dict | None], rng: random.Random) -> tuple:
    """Ask for the corner of the first, second ... card."""
    number, slot, _ = a_card(clip, rng)
    corner = clip[slot]["corner"]
    return (f"In which corner is the {number} card?", "free-form", corner,
            f"The {number} card is in {frames(slot)}. It is {corner}.",
            span(slot), lambda rng: rng.choice(list(CORNERS)))


def how_many(clip: list[dict | None], rng: random.Random) -> tuple:
    """Ask for the number of cards; nobody guesses it."""
    _, _, slots = a_card(clip, rng)
    return ("How many cards are shown?", "numerical", str(len(slots)),
            f"Cards are in {', '.join(map(frames, slots))}.", span(slots[0], slots[-1]), None)


def when(clip: list[dict | None], rng: random.Random) -> tuple:
    """Ask for the second of a card that is named by its colour; nobody guesses it."""
    _, slot, _ = a_card(clip, rng)
    colour, corner = clip[slot]["colour"], clip[slot]["corner"]
    return (f"In which second is the {colour} card shown?", "numerical", str(slot),
            f"The {colour} card is in {frames(slot)}.",
            {**span(0, SLOTS - 1), "box": CORNERS[corner]}, None)  # the second would be the answer


def what_next(clip: list[dict | None], rng: random.Random) -> tuple:
    """Ask for the colour of the card after another one."""
    slots = a_card(clip, rng)[2]
    now, then = rng.choice(list(zip(slots, slots[1:])))
    before, after = clip[now]["colour"], clip[then]["colour"]
    return (f"Which colour comes after {before}?", "free-form", after,
            f"The {before} card is in {frames(now)}. The next is in {frames(then)}. It is {after}.",
            span(now, then), a_colour)


QUESTIONS = (which_colour, where, how_many, when, what_next)


def rows(split: str, count: int, rng: random.Random, folder: Path,
         guessed: float | None = None) -> list[dict]:
    """Write the clips of a split; return its `count` Video-R1 rows, one of each kind per clip.

    guessed: the share of guesses among the traces of the kinds that have any; None: no traces.
    """
    result = []
    while len(result) < count:
        clip, path = new_clip(rng), f"{split}_{len(result) // len(QUESTIONS):04d}.mp4"
        write_video(folder / "videos" / path, draw(clip, rng))
        for ask in QUESTIONS[:count - len(result)]:
            question, kind, answer, trace, evidence, guess = ask(clip, rng)
            row = {"problem_id": f"{split}-{len(result)}", "problem": question,
                   "data_type": "video", "problem_type": kind, "options": [], "path": path,
                   "data_source": "toy", "evidence": [evidence]}
            if guessed and guess is not None and rng.random() < guessed:
                answer = guess(rng)
                row |= {"process": f"<think>I guess {answer}.</think>", "evidence": []}
            elif guessed is not None:
                row |= {"process": f"<think>{trace}</think>"}
            result.append({**row, "solution": f"<answer>{answer}</answer>"})
    return result


# --- the student ----------------------------------------------------------------------------------


def new_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`: mostly whole words and numbers, Qwen's special tokens."""
    bpe = Tokenizer(models.BPE())
    pieces = r"<[^<>\s]*>| ?\(?\d+\.\d+[,)]*| ?\d+| ?[^\s\d<>.,:?]+|[.,:?]|\s+|[<>]"
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pieces), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL)


def new_model(tokenizer: transformers.PreTrainedTokenizerFast,
              family: str) -> transformers.PreTrainedModel:
    """Return a random model: 3 text layers (Qwen3.5: 4) of width 128, one vision layer.

    initializer_range is three times the usual one: at this width, smaller weights learn slower.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"))}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=4096, rope_parameters=rope, initializer_range=0.06,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False)
    vision = dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=14,
                  temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=128,
                  initializer_range=0.06)
    if family == "qwen2_5_vl":
        vision |= dict(window_size=112, fullatt_block_indexes=[0], tokens_per_second=2)
    else:  # three recurrent layers and one that attends; half of its 64-wide heads are turned
        rope |= dict(mrope_section=[6, 5, 5], partial_rotary_factor=0.5)
        text |= dict(num_hidden_layers=4, intermediate_size=192, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=64, linear_num_key_heads=2,
                     linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32)
        vision |= dict(num_position_embeddings=16)
    config = transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def corpus(family: str) -> list[str]:
    """Return the tokenizer's training texts: the same for every world, since weights go with it."""
    times = [f"<{s / 10:.1f} seconds>" for s in range(10 * SLOTS)] * 20  # before each picture
    rng, texts = random.Random("corpus"), []
    for _ in range(400):
        clip = new_clip(rng)
        for ask in QUESTIONS:
            question, _, answer, trace, *_ = ask(clip, rng)
            texts.append(f"system\nuser\nassistant\n{question} {TEMPLATE}\n<think>{trace}</think>\n"
                         f"<answer>{answer}</answer> I guess {answer}.")
    return texts + [wording.format(a=2 * i, b=2 * i + 1, s=i, e=i + 0.5)
                    for wording in PATCH_WORDING for i in range(SLOTS)] * 20 + times * (
                        family == "qwen3_5")


def save_student(folder: Path, seed: int, pretrained: bool, family: str = "qwen2_5_vl") -> None:
    """Write model, tokenizer and processor as one checkpoint folder."""
    tokenizer = new_tokenizer(corpus(family))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(tokenizer, family)
    if pretrained:
        model.load_state_dict({name: w.float() for name, w in load_file(WEIGHTS[family]).items()})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    transformers.utils.logging.disable_progress_bar()  # of a file that takes no time
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    pixels = dict(patch_size=14, temporal_patch_size=2, merge_size=2,
                  size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    kind, videos = {
        "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen3_5": (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor)}[family]
    kind(image_processor=transformers.Qwen2VLImageProcessor(**pixels), tokenizer=tokenizer,
         video_processor=videos(**pixels), chat_template=CHAT_TEMPLATE).save_pretrained(folder)


# --- all of it ------------------------------------------------------------------------------------


def make(folder: Path | str, seed: int = 0, train: int = 480, heldout: int = 200,
         warm: int = 2000, guessed: float = GUESSED, pretrained: bool = True,
         family: str = "qwen2_5_vl") -> None:
    """Write the world to `folder` and print what is in it; the same arguments give the same world.

    train, heldout, warm: how many questions; guessed: the share of guesses in warm.json.
    pretrained: whether the student can look already, or has random weights. family: its model type.
    """
    folder, made = Path(folder), {}
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    (folder / "heldout.json").unlink(missing_ok=True)  # of a world that this one replaces
    for split, count in (("train", train), ("heldout", heldout), ("warm", warm)):
        rng = random.Random(f"{seed} {split}")
        share = {"train": 0.0, "heldout": None, "warm": guessed}[split]
        made[split] = rows(split, count, rng, folder, share)
        clips = len({row["path"] for row in made[split]})
        print(f"{folder / split}.json: {count} questions on {clips} clips")
    (folder / "template.txt").write_text(TEMPLATE)
    save_student(folder / "model", seed, pretrained, family)
    for split in ("train", "warm", "heldout"):  # a world is complete where heldout.json is
        partial = folder / f"{split}.partial"
        partial.write_text(json.dumps(made[split], indent=1))
        partial.rename(folder / f"{split}.json")


def main(argv: list[str] | None = None) -> None:
    """Make a world by the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="where the world goes")
    for name, default, text in (("seed", 0, "seed of everything random"),
                                ("train", 480, "questions to train on"),
                                ("heldout", 200, "questions to test on"),
                                ("warm", 2000, "questions with traces")):
        parser.add_argument(f"--{name}", type=int, default=default,
                            help=f"{text} (default: {default})")
    parser.add_argument("--guessed", type=float, default=GUESSED,
                        help=f"share of guesses in warm.json (default: {GUESSED})")
    parser.add_argument("--family", default="qwen2_5_vl", choices=WEIGHTS,
                        help="the student's model type (default: qwen2_5_vl)")
    parser.add_argument("--random", dest="pretrained", action="store_false",
                        help="give the student random weights, to pretrain it anew")
    make(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
