"""The toy world: each test names the mistake it would catch."""

import collections
import filecmp
import json
import random
from pathlib import Path

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


def test_a_world_that_was_begun_is_not_taken_for_whole(tmp_path, monkeypatch):
    """Catches: a kill among the JSON files that leaves a half-made world behind, which then breaks
    every start until the folder is removed by hand.
    """
    monkeypatch.setattr(toy, "save_student", lambda *arguments: None)
    real, counts = Path.write_text, dict(train=5, heldout=5, warm=5)

    def make(folder, kill_at=0):
        """Make a world; at the kill_at-th file half of it is written, then the process ends."""
        files = iter(range(1, 100))

        def write(path, text, **options):
            last = next(files) == kill_at
            real(path, text[:len(text) // 2] if last else text, **options)
            if last:
                raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_text", write)
        toy.make(folder, **counts)

    make(tmp_path / "whole")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.*")}
    assert sorted(wanted) == ["heldout.json", "template.txt", "train.json", "warm.json"]
    for number in range(1, 5):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            make(folder, kill_at=number)
        assert not (folder / "heldout.json").exists()
        make(folder)
        assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == wanted
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "whole", kill_at=1)  # another world in the place of a whole one
    assert not (tmp_path / "whole/heldout.json").exists()


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
            after = reader[(last + 1) % len(reader)].asnumpy()
            outside = after[int(y * toy.SIZE), int(x * toy.SIZE)]
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
    splits = "train", "heldout", "warm"
    paths = [{row["path"] for row in rows_of(world, split)} for split in splits]
    assert sum(map(len, paths)) == len(set.union(*paths)) and len(paths[0]) == 8


def test_the_warm_start_looks_or_guesses(world):
    """Catches: guesses that carry evidence (a patch would teach guessing), traces elsewhere."""
    rows = rows_of(world, "warm")
    guessed = [row for row in rows if "I guess" in row["process"]]
    assert guessed and all(row["evidence"] == [] for row in guessed)
    assert all(row["evidence"] for row in rows if row not in guessed)
    assert not any("I guess" in row["process"] for row in rows_of(world, "train"))
    assert not any("process" in row for row in rows_of(world, "heldout"))


def test_the_student_loads_as_a_checkpoint(world):
    """Catches: a folder that only this project could read."""
    model = AutoModelForImageTextToText.from_pretrained(world / "model")
    processor = AutoProcessor.from_pretrained(world / "model")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert processor.tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": [{"type": "video"}]}]
    assert "<|video_pad|>" in processor.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("sharded", (False, True))
def test_half_precision_leaves_the_rotary_frequencies_exact(world, sharded):
    """Catches: buffers cast with the weights: positions would turn by other angles than before."""
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
