"""A small world that runs anywhere: video clips, questions with annotated evidence, a tiny student.

    python toy.py FOLDER [--seed 0 --train 480 --heldout 200 --warm 2000]
    python toy.py study [--jobs N --seeds 0,1,2 --only NAME,... --guessed 0.99,0.8 --report]

FOLDER/videos/*.mp4     H.264 clips of 8 s, in which 2 to 4 cards of different colours show up, one
                        after another, each for a second in one of four corners
FOLDER/train.json, heldout.json
                        Video-R1 rows with `evidence`: where to look, never what is there; in
                        train.json with a `process` that looks, for methods that imitate one
FOLDER/warm.json        rows with a `process` for the warm start, of two kinds: the student looks (a
                        row with evidence), or it guesses (a row without). About some questions
                        it mostly guesses; that habit is what there is to repair.
FOLDER/template.txt     the question's wording
FOLDER/model/           a Qwen2.5-VL of under a million weights, with tokenizer and processor

No clip is in two of the files. `study` trains on this world with every method and ablation, from
starts that guess more and less, one train.py process a run, and writes OUTPUT/study.md and plots;
finished runs are not repeated.

Dimensions: F frames of a clip; h, w pixels.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import av
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor)


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
WEIGHTS = Path(__file__).with_name("toy_student.safetensors")  # of a student that can look

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


def new_clip(rng):
    """A clip's script: for each second a card {colour, corner}, or None."""
    cards = rng.choice((2, 2, 3, 3, 4))
    clip = [None] * SLOTS
    for slot, colour in zip(rng.sample(range(SLOTS), cards), rng.sample(list(COLOURS), cards)):
        clip[slot] = {"colour": colour, "corner": rng.choice(list(CORNERS))}
    return clip


def draw(clip, rng):
    """The clip's frames, uint8 [F, h, w, 3]: squares on grey, a little off their place."""
    frames_Fhw3 = np.full((SLOTS * SLOT_FRAMES, SIZE, SIZE, 3), rng.randint(50, 70), np.uint8)
    for slot, card in enumerate(clip):
        if card is not None:
            x, y = (int(v * SIZE) + SIZE // 4 + rng.randint(-3, 3)
                    for v in CORNERS[card["corner"]][:2])
            shown = frames_Fhw3[slot * SLOT_FRAMES:(slot + 1) * SLOT_FRAMES]
            shown[:, y - CARD:y + CARD, x - CARD:x + CARD] = COLOURS[card["colour"]]
    return frames_Fhw3


def write_video(path, frames_Fhw3):
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
# function that guesses an answer.


def span(first, last=None):
    """Start and end in seconds of what is on screen from one second to another, both included."""
    last = first if last is None else last
    return {"start": first * SLOT_FRAMES / FPS, "end": ((last + 1) * SLOT_FRAMES - 1) / FPS}


def frames(slot):
    """How a trace names a second: the student's frames."""
    return f"frames {2 * slot} to {2 * slot + 1}"


def a_card(clip, rng):
    """One of the cards: which in order, its second, and all cards' seconds."""
    slots = [slot for slot, card in enumerate(clip) if card is not None]
    number = rng.randrange(len(slots))
    return ORDER[number], slots[number], slots


def a_colour(rng):
    return rng.choice(list(COLOURS))


def which_colour(clip, rng):
    number, slot, _ = a_card(clip, rng)
    colour, corner = clip[slot]["colour"], clip[slot]["corner"]
    return (f"What colour is the {number} card?", "free-form", colour,
            f"The {number} card is in {frames(slot)}. It is {colour}.",
            {**span(slot), "box": CORNERS[corner]}, a_colour)


def where(clip, rng):
    number, slot, _ = a_card(clip, rng)
    corner = clip[slot]["corner"]
    return (f"In which corner is the {number} card?", "free-form", corner,
            f"The {number} card is in {frames(slot)}. It is {corner}.",
            span(slot), lambda rng: rng.choice(list(CORNERS)))


def how_many(clip, rng):
    _, _, slots = a_card(clip, rng)
    return ("How many cards are shown?", "numerical", str(len(slots)),
            f"Cards are in {', '.join(map(frames, slots))}.", span(slots[0], slots[-1]), None)


def when(clip, rng):
    _, slot, _ = a_card(clip, rng)
    colour, corner = clip[slot]["colour"], clip[slot]["corner"]
    return (f"In which second is the {colour} card shown?", "numerical", str(slot),
            f"The {colour} card is in {frames(slot)}.",
            {**span(0, SLOTS - 1), "box": CORNERS[corner]}, None)  # the second would be the answer


def what_next(clip, rng):
    slots = a_card(clip, rng)[2]
    now, then = rng.choice(list(zip(slots, slots[1:])))
    before, after = clip[now]["colour"], clip[then]["colour"]
    return (f"Which colour comes after {before}?", "free-form", after,
            f"The {before} card is in {frames(now)}. The next is in {frames(then)}. It is {after}.",
            span(now, then), a_colour)


QUESTIONS = (which_colour, where, how_many, when, what_next)


def rows(split, count, rng, folder, guessed=None):
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


def new_tokenizer(texts):
    """Byte-level BPE over `texts`, mostly whole words and numbers, with Qwen's special tokens."""
    bpe = Tokenizer(models.BPE())
    pieces = r"<[^<>\s]*>| ?\(?\d+\.\d+[,)]*| ?\d+| ?[^\s\d<>.,:?]+|[.,:?]|\s+|[<>]"
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pieces), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", additional_special_tokens=SPECIAL)


def new_model(tokenizer):
    """A random Qwen2.5-VL: 3 text layers of width 128, one vision layer.

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
                  window_size=112, fullatt_block_indexes=[0], tokens_per_second=2,
                  initializer_range=0.06)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                              **ids)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def corpus():
    """What the tokenizer is trained on: the same for every world, since weights go with it."""
    rng, texts = random.Random("corpus"), []
    for _ in range(400):
        clip = new_clip(rng)
        for ask in QUESTIONS:
            question, _, answer, trace, *_ = ask(clip, rng)
            texts.append(f"system\nuser\nassistant\n{question} {TEMPLATE}\n<think>{trace}</think>\n"
                         f"<answer>{answer}</answer> I guess {answer}.")
    return texts + [wording.format(a=2 * i, b=2 * i + 1, s=i, e=i + 0.5)
                    for wording in PATCH_WORDING for i in range(SLOTS)] * 20


def save_student(folder, seed, pretrained):
    """Write model, tokenizer and processor as one checkpoint folder."""
    tokenizer = new_tokenizer(corpus())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(tokenizer)
    if pretrained:
        model.load_state_dict({name: w.float() for name, w in load_file(WEIGHTS).items()})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    pixels = dict(patch_size=14, temporal_patch_size=2, merge_size=2,
                  size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels), chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


# --- all of it ------------------------------------------------------------------------------------


def make(folder, seed=0, train=480, heldout=200, warm=2000, guessed=GUESSED, pretrained=True):
    """Write the world to `folder`; the same arguments give the same world. Prints what is in it."""
    folder, made = Path(folder), {}
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("heldout", heldout), ("warm", warm)):
        rng = random.Random(f"{seed} {split}")
        share = {"train": 0.0, "heldout": None, "warm": guessed}[split]
        made[split] = rows(split, count, rng, folder, share)
        clips = len({row["path"] for row in made[split]})
        print(f"{folder / split}.json: {count} questions on {clips} clips")
    (folder / "template.txt").write_text(TEMPLATE)
    save_student(folder / "model", seed, pretrained)
    for split, part in made.items():  # last, so that a world is complete where these files are
        (folder / f"{split}.json").write_text(json.dumps(part, indent=1))


# --- the study ------------------------------------------------------------------------------------
# A start's runs differ in what a condition's flags name and in the seed: data order and rollouts.
# `ffr` is κ 0.3, evidence text, slot by slot, chosen tokens under their patch, in those tables.

TRAIN = Path(__file__).with_name("train.py")
EVAL_EVERY = 15
GROUPS = {"methods": "Methods", "rate": "Learning rate", "kappa": "Patch tax κ",
          "evidence": "Evidence shown", "tokens": "Tokens trained", "loss": "Loss variants of GRPO"}
STARTS = {"0.99": "4e-4", "0.8": "1e-4"}  # share of guesses: GRPO's best learning rate
CONDITIONS = (  # name, flags of train.py, tables it is in
    *((f"{method}_lr_{lr}", f"--method {method} --lr {lr}", "rate")
      for method in ("grpo", "ffr") for lr in ("3e-5", "1e-4", "2e-4", "4e-4", "8e-4")),
    ("grpo", "--method grpo", "methods loss"),
    ("ffr", "--method ffr", "methods kappa evidence tokens"),
    ("ffr_plain", "--method ffr --score_under plain", "methods tokens"),
    ("ffr_visd", "--method ffr_visd", "methods"),
    ("sft", "--method sft", "methods"),
    ("sft_teacher", "--method sft_teacher", "methods"),
    # the length bonus' band is the same share of the longest completion as in Video-R1
    ("tgrpo", "--method tgrpo --length_low 15 --length_high 24", "methods"),
    ("luffy", "--method luffy", "methods"),
    ("replay", "--method replay", "methods"),
    ("vote", "--method vote", "methods"),
    ("judge", "--method judge", "methods"),
    ("rlsd", "--method rlsd", "methods"),
    ("visd", "--method visd", "methods"),
    *((f"kappa_{kappa}", f"--kappa {kappa}", "kappa")
      for kappa in ("0", "0.1", "0.5", "0.7", "1.0")),
    ("evidence_none", "--evidence none", "evidence"),
    ("evidence_frames", "--evidence frames", "evidence"),
    ("train_on_original", "--train_on original", "tokens"),
    ("select_best", "--select best", "tokens"),
    ("grpo_no_std", "--method grpo --no_std", "loss"),
    ("grpo_dynamic", "--method grpo --dynamic_sampling 3", "loss"))
PLOTTED = ("sft_teacher", "grpo", "luffy", "visd", "ffr", "ffr_plain", "ffr_visd")
COLUMNS = "teacher calls", "interventions, %", "repair rate, %", "zero advantages, %", "entropy"


def lines(path):
    """The objects of a JSONL file, without a last line torn by a kill."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def settings(folder):
    """A run's flags."""
    return json.loads((folder / "config.json").read_text())


def finished(folder):
    """Whether a run has evaluated its last step."""
    evals = lines(folder / "eval.jsonl")
    return bool(evals) and evals[-1]["step"] == settings(folder)["steps"]


def train(folder, flags):
    """Run train.py into `folder`, in the world of its parent, or go on; returns how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] * (folder / "config.json").exists()
    with open(folder / "train.log", "a") as log:
        code = subprocess.run([sys.executable, TRAIN, *flags, "--output", folder.name, *resume],
                              check=False, stdout=log, stderr=subprocess.STDOUT, cwd=folder.parent,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    said = (folder / "train.log").read_text(errors="replace").split("\n")
    last = next((line.split("\r")[-1] for line in reversed(said) if line.strip()), "no output")
    return f"exit code {code}: {last}"


def run_all(output, starts, seeds, only, jobs):
    """Run what is not finished, `jobs` at a time; returns how many runs failed.

    starts: of STARTS; OUTPUT/SHARE is train.py's working folder, with a world of its own.
    """
    wanted = {output / start / f"{name}-{seed}":
              ["--lr", STARTS[start], *flags.split(), "--seed", seed]
              for start in starts for seed in seeds for name, flags, _ in CONDITIONS
              if name in only}
    wanted = {folder: flags for folder, flags in wanted.items() if not finished(folder)}
    if not wanted:
        return 0
    print(f"{len(wanted)} runs to do, {jobs} at a time")
    for parent in dict.fromkeys(folder.parent for folder in wanted):
        begun, world = parent / "start", parent / "runs" / "toy"  # before runs would race for it
        shutil.rmtree(begun, ignore_errors=True)
        if not (world / "heldout.json").exists():
            make(world, guessed=float(parent.name))
        said = train(begun, "--method grpo --steps 1 --batch_prompts 1 --rollouts 2".split()
                     + ["--eval_data", ""])
        if not (begun / "metrics.jsonl").exists():
            sys.exit(f"toy.py: making the warm start failed, {said}")
    failed, begin, pool = 0, time.time(), ThreadPoolExecutor(jobs)
    running = {pool.submit(train, folder, [*flags, "--eval_every", str(EVAL_EVERY)]): folder
               for folder, flags in wanted.items()}
    try:
        for number, future in enumerate(as_completed(running), 1):
            folder, ended = running[future], finished(running[future])
            failed += not ended
            print(f"{number} of {len(wanted)}, {time.time() - begin:.0f} s: {folder.parent.name}/"
                  f"{folder.name} " + ("ended" if ended else f"FAILED, {future.result()}"),
                  flush=True)
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        sys.exit("stopped; the same command goes on")
    return failed


def mean(values):
    """Mean of what is not null; None of nothing."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def shown(values, scale=100, digits=1):
    """Numbers as "first → last", or alone; a dash where there is none."""
    return " → ".join("–" if value is None else f"{scale * value:.{digits}f}" for value in values)


def load(folder):
    """Condition -> (config, eval rows, metrics rows) of each of its finished runs."""
    return {name: [(settings(run), lines(run / "eval.jsonl"), lines(run / "metrics.jsonl"))
                   for run in sorted(folder.glob(f"{name}-*")) if finished(run)]
            for name, *_ in CONDITIONS}


def accuracy(runs, step):
    """Held-out accuracy of runs in percent after so many steps: mean ± sample deviation."""
    shares = [100 * e["accuracy"] for _, evals, _ in runs for e in evals if e["step"] == step]
    spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{mean(shares):.1f}{spread}" if shares else ""


def row(runs):
    """COLUMNS of a condition, means over its runs."""
    def quarters(key):
        parts = [(rows[:n], rows[-n:]) for *_, rows in runs for n in [max(1, len(rows) // 4)]]
        return [mean(mean(r[key] for r in part) for part in side) for side in zip(*parts)]

    if not runs:
        return ("",) * len(COLUMNS)
    calls = mean(sum(r["teacher"].get("calls", 0) for r in rows) for *_, rows in runs)
    zero = mean(mean(r["advantage_zero_fraction"] for r in rows) for *_, rows in runs)
    return (f"{calls:.0f}", shown(quarters("intervention_ratio")), shown(quarters("repair_rate")),
            shown([zero]), shown(quarters("entropy"), 1, 2))


def unlike(runs_of):
    """Settings in which runs differ though no flag of their conditions names them, or their start.
    """
    found = {}
    for name, flags, _ in CONDITIONS:
        for config, evals, _ in runs_of[name]:
            same = {**config, "accuracy before": evals[0]["accuracy"]}
            for key in same.keys() - {"method", "seed", "output", "resume"}:
                if f"--{key}" not in flags.split():
                    runs = found.setdefault(key, {}).setdefault(str(same[key]), [])
                    runs.append(f"{name}-{config['seed']}")
    return [f"{key} is {value or 'empty'} in {', '.join(runs)} only"
            for key, values in sorted(found.items())
            for value, runs in sorted(values.items(), key=lambda pair: -len(pair[1]))[1:]]


def plot(path, title, x_label, y_label, curves):
    """Write an SVG line plot of {name: [(x, y)]}, y in percent; Okabe and Ito's colours."""
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
    left, top, width, height = 62, 40, 430, 260
    xs, ys = zip(*(point for points in curves.values() for point in points))
    last, low = max(-(-max(xs) // 4) * 4, 4), min(ys) // 10 * 10  # four ticks, whole steps
    high = max(-(-max(ys) // 10) * 10, low + 10)

    def at(x, y):
        return left + width * x / last, top + height * (high - y) / (high - low)

    def text(x, y, words, more=""):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>')

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 150}" height="360" '
             'font-family="sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>']
    text(left, 24, title, 'font-size="15" font-weight="bold"')
    for y in range(int(low), int(high) + 1, 10 if high - low > 20 else 5):
        x0, y0 = at(0, y)
        parts.append(f'<path d="M{x0} {y0:.1f}h{width}" stroke="#dddddd"/>')
        text(x0 - 8, y0 + 4, y, 'text-anchor="end"')
    for x in (last * i / 4 for i in range(5)):
        text(at(x, 0)[0], top + height + 20, f"{x:.0f}", 'text-anchor="middle"')
    text(left + width / 2, top + height + 42, x_label, 'text-anchor="middle"')
    text(18, top + height / 2, y_label,
         f'text-anchor="middle" transform="rotate(-90 18 {top + height / 2:.0f})"')
    for i, ((name, points), colour) in enumerate(zip(curves.items(), colours)):
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + 12 + 22 * i
        parts.append(f'<path d="M{left + width + 14} {y}h22" stroke="{colour}" stroke-width="3"/>')
        text(left + width + 42, y + 4, name)
    path.write_text("\n".join(parts) + "\n</svg>\n")


def curve(tables, key, half=0):
    """[(step, percent)]: a key's mean over runs and the steps up to `half` before and after."""
    rows = [r for table in tables for r in table]
    points = ((step, mean(r[key] for r in rows if abs(r["step"] - step) <= half))
              for step in sorted({r["step"] for r in rows}))
    return [(step, 100 * value) for step, value in points if value is not None]


def report(output):
    """Write study.md and its plots from the files of the finished runs."""
    starts = {share: load(output / share) for share in STARTS}
    starts = {share: runs for share, runs in starts.items() if any(runs.values())}
    if not starts:
        sys.exit(f"toy.py: no finished run in --output {output}")
    parts = tables(starts) + [
        f"**Not comparable** at {share}: {sentence}."
        for share, runs in starts.items() for sentence in unlike(runs)]
    missing = [f"{share}/{name}" for share, runs in starts.items() for name in runs
               if not runs[name]]
    if missing:
        parts.append(f"Without a finished run: {', '.join(missing)}.")
    for name, title, label, curves in plots(starts):
        plot(output / f"{name}.svg", title, "training step", label, curves)
        parts.append(f"![{title}]({name}.svg)")
    (output / "study.md").write_text("# What the toy world says\n\n" + "\n\n".join(parts) + "\n")
    print(output / "study.md")


def tables(starts):
    """Caption and tables of {share of guesses: {condition: runs}}."""
    first = next(iter(starts.values()))
    config, evals, _ = next(runs[0] for runs in first.values() if runs)
    before = ", ".join(f"{accuracy(next(r[:1] for r in runs.values() if r), 0)} ({share})"
                       for share, runs in starts.items())
    steps = EVAL_EVERY, config["steps"]
    parts = [f"Held-out accuracy on {evals[-1]['n']} questions in percent, without patches, in "
             f"{config['steps']} steps of {config['batch_prompts']} prompts, {config['rollouts']} "
             "rollouts each: mean ± sample standard deviation over seeds, by the share of guesses "
             f"in the warm start; before: {before}. All else is from the start of "
             f"{next(iter(starts))}, a mean over seeds; teacher calls are summed over training, "
             "arrows go from its first to its last quarter, entropy is in nats per trained token. "
             "The annotated teacher is never shown the gold answer, so that there is no \"with and "
             "without gold\" here."]
    head = ("", "flags", "seeds", *(f"{share} guessed: step {step}" for share in starts
                                    for step in steps), *COLUMNS)
    for group, title in GROUPS.items():
        rows = [(name, f"`{flags}`", "/".join(str(len(runs[name])) for runs in starts.values()),
                 *(accuracy(runs[name], step) for runs in starts.values() for step in steps),
                 *row(first[name]))
                for name, flags, groups in CONDITIONS
                if group in groups.split() and any(runs[name] for runs in starts.values())]
        if rows:
            table = [head, ("---",) * len(head), *rows]
            parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in table))
    return parts


def plots(starts):
    """(file, title, label of y, curves) of each plot that has any."""
    first = next(iter(starts.values()))
    helped = {label: curve([rows for *_, rows in first["ffr"]], key, half=3) for label, key in (
        ("interventions", "intervention_ratio"), ("repair rate", "repair_rate")) if first["ffr"]}
    drawn = [(f"accuracy-{share}", f"Held-out, from {100 * float(share):.0f} % guesses",
              "accuracy, %", {name: curve([evals for _, evals, _ in runs[name]], "accuracy")
                              for name in PLOTTED if runs[name]})
             for share, runs in starts.items()]
    drawn.append(("repair", "FFR: need for help, what it brings (7 steps' mean)", "share, %",
                  helped))
    return [one for one in drawn if any(one[-1].values())]


def study_main(argv):
    """Parse `study`'s flags, run and report; exits with 1 where a run failed."""
    names = [name for name, *_ in CONDITIONS]
    parser = argparse.ArgumentParser(prog="toy.py study", description=run_all.__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (cores)")
    parser.add_argument("--seeds", default="0,1,2", help="of data order and rollouts")
    parser.add_argument("--guessed", default=",".join(STARTS), help="starts: shares of guesses")
    parser.add_argument("--only", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="of all runs")
    parser.add_argument("--report", action="store_true", help="no runs, table and plots only")
    args = parser.parse_args(argv)
    seeds, only, starts = (text.split(",") for text in (args.seeds, args.only, args.guessed))
    if unknown := set(only) - set(names):
        parser.error(f"--only: no condition is called {', '.join(sorted(unknown))}")
    if not all(seed.isdigit() for seed in seeds) or args.jobs < 1:
        parser.error("--seeds takes numbers like 0,1,2 and --jobs one above 0")
    if not set(starts) <= set(STARTS):
        parser.error(f"--guessed takes {', '.join(STARTS)}")
    failed = 0 if args.report else run_all(args.output, starts, seeds, only, args.jobs)
    report(args.output)
    if failed:
        sys.exit(f"toy.py: {failed} runs failed; the same command tries them again")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["study"]:
        return study_main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="or `study`: see toy.py study --help")
    for name, default, text in (("seed", 0, "of everything random"),
                                ("train", 480, "questions to train on"),
                                ("heldout", 200, "questions to test on"),
                                ("warm", 2000, "questions with traces")):
        parser.add_argument(f"--{name}", type=int, default=default,
                            help=f"{text} (default: {default})")
    parser.add_argument("--guessed", type=float, default=GUESSED,
                        help=f"share of guesses in warm.json (default: {GUESSED})")
    parser.add_argument("--random", dest="pretrained", action="store_false",
                        help="random weights, to pretrain anew")
    make(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
