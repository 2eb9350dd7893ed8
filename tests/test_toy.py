"""The toy world: each test names the mistake it would catch."""

import collections
import filecmp
import json
import random
from xml.etree import ElementTree

import decord
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor

import toy
from model import Student


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    toy.make(folder, train=40, heldout=20, warm=60)
    return folder


def rows_of(world, split):
    return json.loads((world / f"{split}.json").read_text())


def test_the_same_arguments_give_the_same_world(world, tmp_path):
    """Catches: figures that nobody can repeat."""
    toy.make(tmp_path, train=40, heldout=20, warm=60)
    names = [str(p.relative_to(world)) for p in world.rglob("*") if p.is_file()]
    same, different, errors = filecmp.cmpfiles(world, tmp_path, names, shallow=False)
    assert len(same) == len(names) > 30, (different, errors)


def test_clips_show_what_the_answers_say(world):
    """Catches: colours lost in the codec, evidence that points to another moment or place."""
    checked = 0
    for row in rows_of(world, "train"):
        reader = decord.VideoReader(str(world / "videos" / row["path"]))
        assert len(reader) == toy.SLOTS * toy.SLOT_FRAMES
        if row["problem"].startswith("What colour"):
            evidence, answer = row["evidence"][0], row["solution"][8:-9]
            first, last = (int(evidence[name] * toy.FPS) for name in ("start", "end"))
            x, y = ((a + b) / 2 for a, b in zip(evidence["box"][:2], evidence["box"][2:]))
            for i in (first, last):
                pixel = reader[i].asnumpy()[int(y * toy.SIZE), int(x * toy.SIZE)]
                nearest = min(toy.COLOURS, key=lambda name: abs(pixel - toy.COLOURS[name]).sum())
                assert nearest == answer
            outside = reader[(last + 1) % len(reader)].asnumpy()[int(y * toy.SIZE), int(x * toy.SIZE)]
            checked += abs(outside.astype(int) - toy.COLOURS[answer]).sum() > 60
    assert checked >= 6


def test_answers_cannot_be_told_from_the_question():
    """Catches: a world that a student could answer without looking."""
    rng, answers = random.Random(0), collections.defaultdict(collections.Counter)
    for _ in range(4000):
        clip = toy.new_clip(rng)
        for ask in toy.QUESTIONS:
            question, _, answer, *_ = ask(clip, rng)
            answers[question][answer] += 1
    for question, counts in answers.items():
        likeliest = counts.most_common(1)[0][1] / counts.total()
        assert likeliest < (0.45 if question.startswith("How many") else 0.35), (question, counts)


def test_evidence_says_where_to_look_only(world):
    """Catches: an annotation that holds the answer, or spans outside the clip."""
    for row in rows_of(world, "train") + rows_of(world, "heldout"):
        evidence, = row["evidence"]
        assert evidence.keys() <= {"start", "end", "box"}
        assert 0 <= evidence["start"] < evidence["end"] < toy.SLOTS * toy.SLOT_FRAMES / toy.FPS


def test_no_clip_is_in_two_splits(world):
    """Catches: held-out questions on clips that were trained on."""
    paths = [{row["path"] for row in rows_of(world, split)} for split in ("train", "heldout", "warm")]
    assert sum(map(len, paths)) == len(set.union(*paths)) and len(paths[0]) == 8


def test_the_warm_start_looks_or_guesses(world):
    """Catches: guesses that carry evidence (a patch would then teach guessing), traces elsewhere."""
    rows = rows_of(world, "warm")
    guessed = [row for row in rows if "I guess" in row["process"]]
    assert guessed and all(row["evidence"] == [] for row in guessed)
    assert all(row["evidence"] for row in rows if row not in guessed)
    assert not any("I guess" in row["process"] for row in rows_of(world, "train"))
    assert not any("process" in row for row in rows_of(world, "heldout"))


def test_the_student_loads_as_a_checkpoint(world):
    """Catches: a folder that only this project could read."""
    model, processor = (auto.from_pretrained(world / "model") for auto in (AutoModelForImageTextToText, AutoProcessor))
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert processor.tokenizer.eos_token == "<|im_end|>" and "<|video_pad|>" in processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


@pytest.mark.parametrize("sharded", (False, True))
def test_half_precision_leaves_the_rotary_frequencies_exact(world, sharded):
    """Catches: buffers cast with the weights: positions would turn by other angles than in training."""
    if sharded:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student = Student.load(world / "model", dtype=torch.bfloat16, trainable=False)
    finally:
        if sharded:
            dist.destroy_process_group()
    exact = dict(Student.load(world / "model").named_buffers())
    frequencies = [name for name in exact if name.endswith("inv_freq")]
    assert len(frequencies) >= 2 and {p.dtype for p in student.parameters()} == {torch.bfloat16}
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, exact[name]) and buffer.dtype == exact[name].dtype, name


# --- the study ------------------------------------------------------------------------------------

STUB = """
import json, pathlib, sys

def write(name, *rows):
    (folder / name).write_text("".join(json.dumps(row) + "\\n" for row in rows))

flags = sys.argv[1:]
folder = pathlib.Path.cwd() / (flags[flags.index("--output") + 1])
with open(folder.parent / "calls", "a") as calls:
    calls.write(" ".join([folder.name] + ["--resume"] * ("--resume" in flags)) + "\\n")
if "--lr" in flags:
    (folder.parent / "rates").write_text(flags[flags.index("--lr") + 1])
if "3e-5" in flags:
    sys.exit("step 1\\nstep 2 \\rno space left\\n")
write("config.json", {"steps": 4, "batch_prompts": 1, "rollouts": 2, "seed": 0})
write("metrics.jsonl", {"step": 3, "intervention_ratio": None, "repair_rate": None,
                        "advantage_zero_fraction": 0.5, "entropy": 1.0, "teacher": {}})
write("eval.jsonl", *({"step": step, "n": 10, "accuracy": 0.5} for step in (0, 4)))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A command in train.py's place, which notes that it was called; learning rate 3e-5 fails."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(toy, "TRAIN", tmp_path / "stub.py")
    monkeypatch.setattr(toy, "make", lambda folder, guessed: (tmp_path / f"made-{guessed}").touch())
    return tmp_path / "study"


def study(output, *more):
    toy.main(["study", "--seeds", "0,1", "--jobs", "1", "--guessed", "0.99", "--output", str(output), *more])


def calls(output):
    called = (output / "0.99" / "calls").read_text().splitlines()
    (output / "0.99" / "calls").unlink()
    return called


def test_finished_runs_are_not_started_again(stub):
    """Catches: a second call that trains everything anew; a broken-off run from its start."""
    study(stub, "--only", "grpo,ffr")
    assert calls(stub) == ["start", "grpo-0", "ffr-0", "grpo-1", "ffr-1"]
    assert (stub / "0.99" / "rates").read_text() == toy.STARTS["0.99"] == "4e-4"
    assert (stub.parent / "made-0.99").exists()
    (stub / "0.99" / "ffr-1" / "eval.jsonl").write_text('{"step": 0, "accuracy": 0.5}\n{"step": 4, "ac')
    study(stub, "--only", "grpo,ffr")
    assert calls(stub) == ["start", "ffr-1 --resume"]
    study(stub, "--only", "grpo,ffr")
    study(stub, "--report")
    assert not (stub / "0.99" / "calls").exists()


def test_a_failing_run_is_named_and_the_others_go_on(stub, capsys):
    """Catches: one crash that ends the study, or that nobody hears of; a misspelt --only."""
    with pytest.raises(SystemExit, match="2 runs failed"):
        study(stub, "--only", "grpo_lr_3e-5,grpo")
    assert "0.99/grpo_lr_3e-5-0 FAILED, exit code 1: no space left\n" in capsys.readouterr().out
    assert calls(stub) == ["start", "grpo_lr_3e-5-0", "grpo-0", "grpo_lr_3e-5-1", "grpo-1"]
    table = (stub / "study.md").read_text()
    assert "| grpo | `--method grpo` | 2 |  | 50.0 ± 0.0 |" in table
    assert "Without a finished run: 0.99/grpo_lr_3e-5, 0.99/" in table
    with pytest.raises(SystemExit):
        study(stub, "--only", "gpro")
    assert "no condition is called gpro" in capsys.readouterr().err


def write_run(output, name, after, metrics, evaluated=(0, 4, 8), **settings):
    """A finished run of 8 steps; metrics: interventions, repairs, zeros, entropy, calls a step."""
    folder = output / name
    folder.mkdir(parents=True)
    keys = ("intervention_ratio", "repair_rate", "advantage_zero_fraction", "entropy")
    rows = [{"step": step, **dict(zip(keys, values)), "teacher": calls and {"calls": calls}}
            for step, (*values, calls) in enumerate(metrics)]
    evals = [{"step": step, "n": 200, "accuracy": {0: 0.5, 4: after - 0.1, 8: after}[step]}
             for step in evaluated]
    config = {"steps": 8, "batch_prompts": 1, "rollouts": 2, "lr": 1e-4, "kappa": 0.3,
              "seed": int(name[-1]), **settings}
    for file, part in (("config.json", [config]), ("eval.jsonl", evals), ("metrics.jsonl", rows)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in part))


def test_the_table_says_what_the_files_say(tmp_path, monkeypatch):
    """Catches: the deviation of a population (1.6 for 2.0), one start's runs in the other's column,
    a later evaluation for one that was not made, halves for quarters, the mean of calls in place of
    their sum, null counted as zero, unlike runs that are compared without a word.

    Accuracies 70, 72, 74: mean 72, deviation sqrt((4 + 0 + 4) / 2) = 2. Interventions of the first
    two of 8 steps 0.5, 0.3, mean 40 %; of the last two 0.2, 0.1: 15 %. Repair rates 0.6, null:
    60 %; 0.5, 0.4: 45 %. Entropy 2, 1: 1.5; 0.5, 0.2: 0.35. Calls: 8 steps of 4, 5 or 6, mean 40.
    Zero advantages: 0.2 in two of 8 steps: 5 %.
    """
    monkeypatch.setattr(toy, "EVAL_EVERY", 4)
    for seed, after in enumerate((0.70, 0.72, 0.74)):
        metrics = [(0.5, 0.6, 0.2, 2.0), (0.3, None, 0.2, 1.0), *[(0.9, 0.9, 0.0, 9.0)] * 4,
                   (0.2, 0.5, 0.0, 0.5), (0.1, 0.4, 0.0, 0.2)]
        write_run(tmp_path / "0.99", f"ffr-{seed}", after,
                  [(*values, 4 + seed) for values in metrics])
    alone = [(None, None, 0.5, 1.0, {})] * 8
    write_run(tmp_path / "0.99", "kappa_0-0", 0.6, alone, kappa=0.0)
    for name, after in (("ffr-0", 0.61), ("ffr-1", 0.63)):
        write_run(tmp_path / "0.8", name, after, alone)
    write_run(tmp_path / "0.8", "sft-0", 0.8, alone, evaluated=(0, 8))
    study(tmp_path, "--report")
    table = (tmp_path / "study.md").read_text()
    assert ("| 0.99 guessed: step 4 | 0.99 guessed: step 8 | 0.8 guessed: step 4 "
            "| 0.8 guessed: step 8 | teacher calls |") in table
    line = ("| ffr | `--method ffr` | 3/2 | 62.0 ± 2.0 | 72.0 ± 2.0 | 52.0 ± 1.4 | 62.0 ± 1.4 | 40 "
            "| 40.0 → 15.0 | 60.0 → 45.0 | 5.0 | 1.50 → 0.35 |")
    assert table.count(line) == 4 and "Not comparable" not in table
    assert "before: 50.0 (0.99), 50.0 (0.8)" in table
    assert ("| kappa_0 | `--kappa 0` | 1/0 | 50.0 | 60.0 |  |  | 0 | – → – | – → – | 50.0 "
            "| 1.00 → 1.00 |") in table
    assert "| sft | `--method sft` | 0/1 |  |  |  | 80.0 |  |  |  |  |  |" in table
    assert "## Evidence shown" in table and "## Loss variants" not in table
    write_run(tmp_path / "0.99", "grpo-0", 0.6, alone, lr=4e-4)
    study(tmp_path, "--report")
    assert ("**Not comparable** at 0.99: lr is 0.0004 in grpo-0 only."
            in (tmp_path / "study.md").read_text())


def test_the_plots_show_the_means(tmp_path):
    """Catches: an axis upside down, a curve of one seed, a moving average that drops the ends.

    Held-out 50 % at step 0, (70 + 80) / 2 = 75 % at step 8: on an axis from 50 to 80 the curve
    starts at the bottom left corner and ends at the right, half way between 70 and 80.
    """
    rows = [{"step": step, "x": x} for step, x in enumerate((0.1, None, 0.3, 0.8))]
    assert toy.curve([rows], "x", half=1) == [(0, pytest.approx(10)), (1, pytest.approx(20)),
                                              (2, pytest.approx(55)), (3, pytest.approx(55))]
    for seed, after in enumerate((0.70, 0.80)):
        write_run(tmp_path / "0.8", f"ffr-{seed}", after, [(0.4, 0.6, 0.0, 1.0, 1)] * 8)
    study(tmp_path, "--report")
    drawing, helped = (ElementTree.parse(tmp_path / f"{name}.svg").getroot()
                       for name in ("accuracy-0.8", "repair"))
    line, = drawing.findall("{*}polyline")
    start, _, end = (tuple(map(float, point.split(","))) for point in line.get("points").split())
    at = {text.text: (float(text.get("x")), float(text.get("y")))
          for text in drawing.findall("{*}text")}
    assert {"ffr", "50", "60", "70", "80", "0", "8", "training step", "accuracy, %"} <= at.keys()
    assert start[0] == at["0"][0] < end[0] == at["8"][0]
    assert at["80"][1] < at["50"][1]  # y points down
    labels = 4  # a label's baseline is that much below its line
    assert start[1] == pytest.approx(at["50"][1] - labels, abs=0.2)
    assert end[1] == pytest.approx((at["70"][1] + at["80"][1]) / 2 - labels, abs=0.2)
    assert len(helped.findall("{*}polyline")) == 2
