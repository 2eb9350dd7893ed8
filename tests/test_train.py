"""train.py as people run it: real processes, real kills, real files; small numbers."""

import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_video
from filelock import FileLock
from messages_server import MessagesServer
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
import evaluate
import ffr
import runs
import toy
import train
from model import ADAPTERS, Student
from patch import alignment
from teacher import Service
from processes import launch

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("seconds", "tokens_per_second", "peak_memory_gb")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Make a small toy world and a student that has just learned the answer format, warmed up by
    the real command.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "warm-world"
    with FileLock(f"{folder}.lock"):  # one world for all processes that the tests run on
        if not (folder / "ready").exists():
            toy.make(folder, train=24, heldout=6, warm=80, guessed=0.0, pretrained=False)
            finish(start(folder, "--method", "sft", "--model", "model", "--data", "warm.json",
                         "--steps", 60, "--batch_prompts", 16, "--lr", 3e-3, "--output", "warm"))
            (folder / "ready").touch()
    return folder


def start(folder, *flags, processes=1):
    """Start train.py in `folder` on its own data, as a process; flags given later win."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    common = ["--model", "warm/checkpoints/step-000060", "--data", "train.json",
              "--video_root", "videos", "--template", "template.txt", "--max_pixels", 56 * 56,
              "--max_completion", 40, "--decode_workers", 1, "--lr", 1e-4]
    command = list(map(str, [*launch, ROOT / "train.py", *common, *flags]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, code=0):
    """Return the output of a process that must end with `code`."""
    output = process.communicate(timeout=280)[0]
    assert process.returncode == code, output
    return output


def after_step(process, step):
    """Block until the progress bar shows that `step` steps are done."""
    seen = ""
    while f" {step}/" not in seen:
        character = process.stdout.read(1)
        assert character, seen
        seen += character
    return process


def untimed(path):
    return [{name: value for name, value in row.items() if name not in TIMINGS}
            for row in runs.read_log(path)]


def test_two_processes_equal_one_and_need_not_fail_alike(world):
    """Catches: a mean per rank, gradients averaged twice, a deadlock when one rank only has
    something to repair.
    """
    rows = json.loads((world / "train.json").read_text())
    for i, row in enumerate(rows):  # half of the samples have no evidence: no patch, no repair
        row["evidence"] = row["evidence"] if i % 2 else []
    (world / "half.json").write_text(json.dumps(rows))
    # a narrow nucleus has few borders at which rounding, other in another batch, could turn a draw
    flags = ("--data", "half.json", "--steps", 5, "--beta", 0.04, "--save_every", 100,
             "--top_p", 0.6, "--eval_data", "heldout.json")
    finish(start(world, *flags, "--output", "one", "--batch_prompts", 4))
    finish(start(world, *flags, "--output", "two", "--batch_prompts", 2, processes=2))
    one, two = (runs.read_log(world / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(two) == 5 and one[0]["grad_norm"] > 0
    for name in ("loss", "grad_norm", "entropy", "reward", "accuracy"):
        assert two[0][name] == pytest.approx(one[0][name], abs=1e-4), name
    ours, theirs = ([(row["sample"], row["slot"], row["status"])
                     for row in runs.read_log(world / name / "patches.jsonl")
                     if row["step"] == 0] for name in ("one", "two"))
    assert ours == theirs != [], "in one order: by rank, prompt and slot"
    ours, theirs = ([(row["step"], row["rank"], row["sample"])
                     for row in runs.read_log(world / name / "rollouts.jsonl")]
                    for name in ("one", "two"))
    assert [(step, sample) for step, _, sample in ours] == [
        (step, sample) for step, _, sample in theirs], "by step, rank and prompt"
    assert [rank for _, rank, _ in theirs] == 5 * [0, 0, 1, 1]
    asked = [row["problem_id"] for row in json.loads((world / "heldout.json").read_text())]
    for name in ("one", "two"):
        answers = runs.read_log(world / name / "eval_answers.jsonl")
        assert [(row["step"], row["id"]) for row in answers] == [
            (step, id) for step in (0, 5) for id in asked]
    (world / "pair.json").write_text(json.dumps([rows[0], rows[1]]))
    finish(start(world, *flags, "--output", "alone", "--data", "pair.json", "--batch_prompts", 1,
                 processes=2))
    patched = {row["sample"] for row in runs.read_log(world / "alone/patches.jsonl")
               if row["status"] == "patched"}
    assert patched == {rows[1]["problem_id"]}


def test_a_run_killed_before_its_last_evaluation_still_makes_it(world, tmp_path):
    """Catches: a finished run whose summary prints an earlier evaluation as the last."""
    config = config_of(world, tmp_path / "run", eval_data=str(world / "heldout.json"))
    run(config)
    evals, answers = tmp_path / "run/eval.jsonl", tmp_path / "run/eval_answers.jsonl"
    before, said = evals.read_text(), answers.read_text()
    evals.write_text(before.splitlines(True)[0])  # as if killed after the last checkpoint
    run(replace(config, resume=True))
    assert evals.read_text() == before
    assert answers.read_text() == said, "what a kill has left of an evaluation is not doubled"
    assert [row["step"] for row in runs.read_log(evals)] == [0, 2]


def test_sigterm_saves_and_stops(world):
    """Catches: a run that a scheduler's SIGTERM kills with an hour of work unsaved."""
    flags = ("--steps", 50, "--save_every", 1000, "--output", "terminated")
    process = after_step(start(world, *flags), 1)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 128 + signal.SIGTERM)
    done = len(runs.read_log(world / "terminated/metrics.jsonl"))
    assert 1 <= done < 50 and f"stopped after step {done}\n" in output
    assert runs.newest_checkpoint(world / "terminated").name == f"step-{done:06d}"


def test_bad_files_cost_their_samples_only(world, tmp_path):
    """Catches: one bad file that stops a run, is trained on as something else, or vanishes without
    a trace.
    """
    good = make_video(tmp_path / "good.mp4", 24, (56, 56))
    make_video(tmp_path / "short.mp4", 3, (56, 56))
    (tmp_path / "cut.mp4").write_bytes(Path(good).read_bytes()[:300])
    (tmp_path / "empty.mp4").touch()
    Image.new("RGB", (60, 50), "red").save(tmp_path / "picture.png")
    kinds = {"good.mp4": ("multiple choice", "B", ["A. red", "B. blue"]),
             "short.mp4": ("numerical", "3", None),
             "picture.png": ("OCR", "exit", None), "cut.mp4": ("free-form", "a dog", None),
             "empty.mp4": ("regression", "2.5", None), "gone.mp4": ("numerical", "1", None)}
    rows = [{"problem_id": path, "problem": "What is shown?",
             "data_type": "image" if path.endswith("png") else "video",
             "problem_type": kind, "options": options, "solution": f"<answer>{answer}</answer>",
             "path": "./" + path, "data_source": "mine", "evidence": [{"start": 0.5, "end": 1.0}]}
            for path, (kind, answer, options) in kinds.items()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = finish(start(world, "--data", tmp_path / "rows.json", "--video_root", tmp_path,
                          "--output", tmp_path / "run", "--epochs", 2, "--batch_prompts", 5,
                          "--rollouts", 2))
    bad = runs.read_log(tmp_path / "run/bad_samples.jsonl")
    assert "gone.mp4" in output
    outside = {row["id"]: row["reason"] for row in bad if "outside the clip" in row["reason"]}
    assert outside.keys() == {"short.mp4"}, "its evidence begins behind its end, and is told once"
    assert {row["id"] for row in bad} - outside.keys() == {"gone.mp4", "cut.mp4", "empty.mp4"}
    metrics = runs.read_log(tmp_path / "run/metrics.jsonl")
    assert [row["bad_samples"] for row in metrics] == [2, 4] and all(row["reason"] for row in bad)
    asked = {row["sample"] for row in runs.read_log(tmp_path / "run/patches.jsonl")}
    assert asked <= {"good.mp4", "short.mp4", "picture.png"} and len(asked) == 3


def test_a_saved_checkpoint_is_the_student(world):
    """Catches: weights saved under names or types that from_pretrained silently drops or rounds."""
    folder = world / "warm/checkpoints/step-000060"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer, student = AutoProcessor.from_pretrained(folder).tokenizer, Student.load(str(folder))
    ids = tokenizer("Think: in which corner is the cross?", return_tensors="pt").input_ids[0]

    def piece(ids):
        return data.Segment(ids, None, torch.zeros(0, 3, dtype=torch.long), torch.zeros(0))

    with torch.no_grad():
        logp, _ = student([piece(ids[:3])], [piece(ids[3:5])], [0], [ids[5:]])
        theirs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    assert len(logp) > 3
    assert (logp - theirs[4:-1].gather(-1, ids[5:, None])[:, 0]).abs().max() < 1e-5
    assert student.eos_ids == {tokenizer.eos_token_id}


def config_of(world, output, **changes):
    return train.Config(**{**dict(
        model=str(world / "warm/checkpoints/step-000060"), data=str(world / "train.json"),
        video_root=str(world / "videos"), template=str(world / "template.txt"), output=str(output),
        max_pixels=56 * 56, max_completion=40, decode_workers=0, steps=2, rollouts=4, lr=1e-4),
        **changes})


def run(config):
    train.train(config, torch.device("cpu"), torch.float32)
    return runs.read_log(Path(config.output) / "metrics.jsonl")


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(world, tmp_path, monkeypatch):
    """Catches: a run that goes on with NaN weights."""
    monkeypatch.setattr(ffr, "loss", lambda logp, batch, *rest: (logp.sum() * float("nan"), {}))
    with pytest.raises(FloatingPointError, match=r"samples: train-\d+"):
        run(config_of(world, tmp_path / "run"))
    saved = AutoModelForImageTextToText.from_pretrained(runs.newest_checkpoint(tmp_path / "run"))
    assert all(p.isfinite().all() for p in saved.parameters())


def test_a_run_says_what_read_its_files(world, tmp_path):
    """Catches: a file read in another way after an error, and nothing in the run that shows it."""
    rows = json.loads((world / "train.json").read_text())[:2]
    film = make_video(tmp_path / "untimed.avi", 8, (56, 56))
    data = [dict(rows[0], path=film, evidence=[]), rows[1]]
    (tmp_path / "data.json").write_text(json.dumps(data))
    row, = run(config_of(world, tmp_path / "run", data=str(tmp_path / "data.json"), steps=1,
                         batch_prompts=2, method="grpo"))
    assert row["readers"] == {"pyav in order": 1, "pyav": 1}
    row, = run(config_of(world, tmp_path / "decord", steps=1, batch_prompts=2, method="grpo",
                         decoder="decord"))
    assert row["readers"] == {"decord": 2}


def test_reference_and_policy_score_under_the_same_observation(world, tmp_path, monkeypatch):
    """Catches: a KL between π_θ under (x, c) and π_ref under x: before the first update it must be
    zero.
    """
    rows = run(config_of(world, tmp_path / "run", beta=0.1, steps=1))
    assert rows[0]["intervention_ratio"] > 0 and abs(rows[0]["kl"]) < 1e-9
    assert rows[0]["logp_mismatch"] < 1e-5 and rows[0]["clip_fraction"] == 0


def test_metrics_hold_every_promised_key(world, tmp_path):
    """Catches: a figure that is missing, phases that do not add up to the step, counts that
    contradict each other.
    """
    rows = run(config_of(world, tmp_path / "run", evidence="frames", updates_per_batch=2,
                         eval_data=str(world / "heldout.json")))
    promised = set("step reward accuracy format intervention_ratio repair_rate "
                   "repair_rate_by_error error_types chosen_accuracy alignment "
                   "advantage_zero_fraction kl entropy clip_fraction completion_length grad_norm "
                   "lr seconds tokens_per_second peak_memory_gb teacher".split())
    for row in rows:
        assert promised <= row.keys()
        phases = dict(row["seconds"])
        step = phases.pop("step")
        assert sum(phases.values()) == pytest.approx(step, abs=1e-6)
        failed = round(row["intervention_ratio"] * 4)
        assert sum(row["error_types"].values()) == row["teacher"]["calls"] == failed
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "eval.jsonl", "eval_answers.jsonl",
                     "rollouts.jsonl", "samples.md", "patches.jsonl", "checkpoints"}
    evals = runs.read_log(tmp_path / "run/eval.jsonl")
    assert [row["step"] for row in evals] == [0, 2]
    assert all(0 <= row["accuracy_with_patches"] <= 1 for row in evals)
    answers = runs.read_log(tmp_path / "run/eval_answers.jsonl")
    for row in evals:
        for name, total in {"accuracy": "accuracy",
                            "patched_accuracy": "accuracy_with_patches"}.items():
            found = [answer[name] for answer in answers if answer["step"] == row["step"]]
            assert len(found) == row["n"] and statistics.mean(found) == pytest.approx(row[total])


def test_what_is_kept_of_a_step_is_what_was_done(world, tmp_path, monkeypatch):
    """Catches: a reward, ratio or entropy of another slot; parts that leave something out; frames
    that the student did not see; a package for --track that every run needs.
    """
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # an import of it would fail
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = config_of(world, tmp_path / "run", batch_prompts=3, alignment_weight=0.2, steps=2,
                       updates_per_batch=2, rollouts=8, micro_tokens=600)
    metrics, rows = run(config), runs.read_log(tmp_path / "run/rollouts.jsonl")
    patches = iter(runs.read_log(tmp_path / "run/patches.jsonl"))
    assert [row["step"] for row in rows] == [0, 0, 0, 1, 1, 1]
    for step, figures in enumerate(metrics):
        slots = [slot for row in rows[3 * step:3 * step + 3] for slot in row["slots"]]
        trained = [slot[slot["trained"]] for slot in slots]
        for name in ("accuracy", "format"):
            assert statistics.mean(s["first"][name] for s in slots) == pytest.approx(figures[name])
        assert statistics.mean(s["reward"] for s in slots) == pytest.approx(figures["reward"])
        assert statistics.mean(t["tokens"] for t in trained) == figures["completion_length"]
        nats = sum(t["tokens"] * s["entropy"] for s, t in zip(slots, trained))
        assert nats / sum(t["tokens"] for t in trained) == pytest.approx(figures["entropy"])
        assert all(abs(s["log_ratio"]) < 1e-5 for s in slots), "one policy sampled and scored"
        assert len({s["entropy"] for s in slots}) > 12
    for row in rows:
        rewards = [slot["reward"] for slot in row["slots"]]
        spread = statistics.stdev(rewards) + 1e-4
        for slot in row["slots"]:
            assert slot["advantage"] == pytest.approx(
                (slot["reward"] - statistics.mean(rewards)) / spread, abs=1e-5)
            assert sum(slot["parts"].values()) == pytest.approx(slot["reward"])
            repaired, chosen = slot["repair"] is not None, slot["repair"] or slot["first"]
            assert slot["trained"] == ("repair" if repaired else "first")
            assert slot["parts"]["kappa"] == (-0.3 if repaired else 0)
            assert (slot["parts"]["accuracy"], slot["parts"]["format"]) == (
                chosen["accuracy"], chosen["format"])
            assert repaired == (not slot["first"]["correct"])
            if repaired:
                asked = next(patches)
                assert (asked["response"], asked["guidance"]) == (
                    slot["first"]["text"], slot["patch"]["guidance"])
                assert slot["diagnosis"] == {"status": "patched", "reason": ""}
                assert slot["patch"]["guidance"] in slot["patch_text"]
            answer = re.findall("<answer>([^<]+)", chosen["text"])
            assert len(answer) != 1 or not chosen["format"] or chosen["answer"] == answer[0].strip()
    assert any(slot["parts"]["alignment"] > 0 for row in rows for slot in row["slots"])
    frames = {row["thumbnails"] for row in rows}
    assert len(frames) == len({row["sample"] for row in rows}) == len(
        list((tmp_path / "run/thumbnails").iterdir()))
    row, F = rows[0], len(rows[0]["times"])
    shown = data.Sample("x", "", (), "", "OCR", str(tmp_path / "run" / row["media"]), "video")
    clip = train.ClipLoader(16, 56 * 56, 28, workers=0).get(shown)[0].clip
    strip = Image.open(tmp_path / "run" / row["thumbnails"])
    assert strip.size == (F * row["thumbnail_size"][0], row["thumbnail_size"][1]) == (896, 56)
    seen = torch.cat(list(clip.frames), dim=2).permute(1, 2, 0).float()
    assert (torch.from_numpy(np.array(strip)).float() - seen).abs().mean() < 4
    assert row["times"] == list(clip.times)


@pytest.mark.parametrize("every, steps", ((2, [0, 2]), (0, [])))
def test_every_kth_step_is_kept(world, tmp_path, every, steps):
    """Catches: an empty file, a folder or thumbnails of steps that are not to be kept."""
    run(config_of(world, tmp_path / "run", steps=3, keep_rollouts=every, method="grpo"))
    rows = runs.read_log(tmp_path / "run/rollouts.jsonl")
    assert [row["step"] for row in rows] == steps
    for name in ("rollouts.jsonl", "thumbnails", "samples.md"):
        assert (tmp_path / "run" / name).exists() == bool(steps)
    assert len(list((tmp_path / "run").glob("thumbnails/*"))) == len(steps)


def test_a_tracker_that_is_missing_is_refused_at_once(tmp_path, monkeypatch, capsys):
    """Catches: a traceback after the model has loaded; a folder made for a refused run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    for name in ("tensorboard", "trackio"):
        with pytest.raises(SystemExit) as end:
            train.main(["--track", name])
        assert end.value.code == 2 and not any(tmp_path.iterdir())
        assert capsys.readouterr().err == (f"train.py: --track {name}: the package is missing; pip "
                                           f"install {name}\n")


def test_tensorboard_has_a_resumed_run_once(world, tmp_path):
    """Catches: figures under other steps, a second run after --resume, an evaluation purged."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_of(world, tmp_path / "run", eval_data=str(world / "heldout.json"), steps=3,
                       eval_every=1, save_every=2, track="tensorboard", method="grpo")
    rows, checkpoints = run(config), tmp_path / "run/checkpoints"
    (checkpoints / "step-000003").rename(tmp_path / "gone")  # as if killed at the end
    assert run(replace(config, resume=True))[1] == rows[1]
    found = events.EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0})
    found.Reload()
    for name, value in (("reward", lambda row: row["reward"]), ("teacher/calls", lambda row: 0),
                        ("readers/pyav", lambda row: 1)):
        scalars = {event.step: event.value for event in found.Scalars(name)}
        assert scalars == pytest.approx({row["step"]: value(row) for row in rows})
    evals = runs.read_log(tmp_path / "run/eval.jsonl")
    assert [(event.step, event.value) for event in found.Scalars("eval/accuracy")] == [
        (row["step"], pytest.approx(row["accuracy"])) for row in evals]
    picture = Image.open(io.BytesIO(found.Images("frames")[0].encoded_image_string))
    assert picture.size == (896, 56)
    text = found.Tensors("rollout/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (tmp_path / "run/samples.md").read_text().startswith(text)


@pytest.mark.parametrize("changes", (
    dict(method="grpo"), dict(select="best"), dict(train_on="original"), dict(evidence="none"),
    dict(loss_norm="sequence"), dict(freeze_vision=True), dict(micro_tokens=200)))
def test_every_ablation_runs(world, tmp_path, changes):
    """Catches: a flag that breaks the loop."""
    rows = run(config_of(world, tmp_path / "run", steps=1, **changes))
    assert rows[0]["intervention_ratio"] > 0 or changes.get("method") == "grpo"


def test_an_adapter_is_evaluated_as_it_was_trained(world, tmp_path, capsys):
    """Catches: an evaluation of the base alone; a run that takes an adapter for whole weights."""
    held = str(world / "heldout.json")
    rows = {name: run(config_of(world, tmp_path / name, lora=4, lr=3e-2, steps=3, merge=merge,
                                method="grpo", eval_data=held))
            for name, merge in (("adapters", False), ("merged", True))}
    for ours, theirs in zip(*rows.values()):
        assert {k: v for k, v in ours.items() if k not in TIMINGS} == {
            k: v for k, v in theirs.items() if k not in TIMINGS}
    answers, base = {}, world / "warm/checkpoints/step-000060"
    for name in ("adapters", "merged", "base"):
        model = str(base if name == "base" else runs.newest_checkpoint(tmp_path / name))
        evaluate.main(["--benchmark", "own", "--data", held, "--video_root", str(world / "videos"),
                       "--model", model, "--output", str(tmp_path / "eval" / name),
                       "--decode_workers", "0"])
        answers[name] = [row["text"] for row in
                         runs.read_log(tmp_path / "eval" / name / "answers.jsonl")]
    assert answers["adapters"] == answers["merged"] != answers["base"]
    with pytest.raises(SystemExit) as end:
        train.main(["--model", str(runs.newest_checkpoint(tmp_path / "adapters")), "--data", held])
    assert end.value.code == 2 and "is an adapter: train whole weights" in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_on_two_processes_equal_one(world, tmp_path):
    """Catches: adapters that FSDP averages or casts otherwise than it should, a copy of them or a
    stop that mixes up shards; ranks that wait for each other where adapters are off.
    """
    def configs(name, processes, methods, **changes):
        settings = {"steps": 5, "save_every": 3, "lora": 4, "lora_vision": True, "lr": 3e-3,
                    "top_p": 0.6, "batch_prompts": 2 // processes, **changes}
        return [config_of(world, tmp_path / name / method, method=method, **settings)
                for method in methods]

    def file(name, method):
        return load_file(tmp_path / name / method / "checkpoints/step-000005" / ADAPTERS)

    assert launch(configs("one", 1, ("sft", "ffr", "visd"))) == [0]
    assert launch(configs("two", 2, ("sft", "ffr", "visd")), 2) == [0, 0]
    assert launch(configs("killed", 2, ("visd",)), 2, kill_after=3) == [-signal.SIGKILL] * 2
    assert launch(configs("killed", 2, ("visd",), resume=True), 2) == [0, 0]
    for method in ("sft", "ffr", "visd"):
        one, two = (untimed(tmp_path / name / method / "metrics.jsonl") for name in ("one", "two"))
        for ours, theirs in list(zip(one, two, strict=True))[:5 if method == "sft" else 1]:
            for key in ("loss", "grad_norm", "kl"):
                assert theirs[key] == pytest.approx(ours[key], abs=2e-4), (method, key)
        assert one[0]["grad_norm"] > 0 and (method == "sft") == (one[-1]["kl"] == 0)
    ours, theirs = (file(name, "sft") for name in ("one", "two"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)
    killed, whole = (file(name, "visd") for name in ("killed", "two"))
    assert killed.keys() == whole.keys() == ours.keys()
    assert all(torch.equal(killed[key], whole[key]) for key in whole)
    assert untimed(tmp_path / "killed/visd/metrics.jsonl") == two


@pytest.mark.slow
def test_a_recurrent_student_on_two_processes_equals_one_and_survives_a_kill(world, tmp_path):
    """Catches: layers whose weights FSDP has scattered when they are used, states or windows of
    another rank's rows, a checkpoint without what a recurrent layer has.
    """
    toy.save_student(tmp_path / "model", 0, True, "qwen3_5")

    def configs(name, processes, **changes):
        return [config_of(world, tmp_path / name / method, method=method, beta=0.04, steps=4,
                          model=str(tmp_path / "model"), save_every=2, top_p=0.6, lr=1e-3,
                          batch_prompts=2 // processes, **changes) for method in ("sft", "ffr")]

    assert launch(configs("one", 1)) == [0]
    assert launch(configs("two", 2), 2) == [0, 0]
    assert launch(configs("killed", 2)[1:], 2, kill_after=3) == [-signal.SIGKILL] * 2
    assert launch(configs("killed", 2, resume=True)[1:], 2) == [0, 0]
    for method, steps in (("sft", 4), ("ffr", 1)):
        one, two = (untimed(tmp_path / name / method / "metrics.jsonl") for name in ("one", "two"))
        for ours, theirs in list(zip(one, two, strict=True))[:steps]:
            for key in ("loss", "grad_norm", "kl"):
                assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=2e-4), (method, key)
        assert one[0]["grad_norm"] > 0
    whole, killed = (load_file(tmp_path / f"{name}/ffr/checkpoints/step-000004/model.safetensors")
                     for name in ("two", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert untimed(tmp_path / "killed/ffr/metrics.jsonl") == two


def test_a_broken_step_does_not_move_the_tries_found_ahead(world, tmp_path, monkeypatch):
    """Catches: a checkpoint within a step, after which the next step's tries are taken for it."""
    config = config_of(world, tmp_path / "run", steps=5, ahead=2, updates_per_batch=2, lr=1e-3)
    run(replace(config, output=str(tmp_path / "straight")))
    whole, calls = ffr.loss, []

    def broken(*args):
        calls.append(args)
        loss, sums = whole(*args)
        return loss * (float("nan") if len(calls) == 5 else 1.0), sums  # step 2's first update

    monkeypatch.setattr(ffr, "loss", broken)
    with pytest.raises(FloatingPointError, match="step 2, update 1"):
        run(config)
    monkeypatch.setattr(ffr, "loss", whole)
    rows = run(replace(config, resume=True))
    straight, resumed = ([(row["step"], row["sample"])
                          for row in runs.read_log(tmp_path / name / "rollouts.jsonl")]
                         for name in ("straight", "run"))
    assert straight == resumed and len(resumed) == 5
    ages = {slot["staleness"] for row in runs.read_log(tmp_path / "straight/rollouts.jsonl")
            for slot in row["slots"] if slot["trained"] == "first"}
    assert ages <= {0, 2, 4} and [row["step"] for row in rows] == list(range(5))


def test_a_slow_teacher_is_counted_in_full_where_tries_are_found_ahead(world, tmp_path,
                                                                       monkeypatch):
    """Catches: calls that end between two steps, of which no line of metrics.jsonl says a word."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    with MessagesServer() as server:
        rows = run(config_of(world, tmp_path / "run", teacher="anthropic", teacher_url=server.url,
                             ahead=1, steps=4, save_every=1))
        asked = len(server.bodies) - 1  # without the connection check
    assert sum(row["teacher"]["requests"] for row in rows) == asked > 0
    assert sum(row["teacher"]["calls"] for row in rows) == len(
        runs.read_log(tmp_path / "run/patches.jsonl"))


@pytest.mark.slow
def test_tries_found_ahead_on_two_processes_survive_a_kill(world, tmp_path):
    """Catches: one rank's tries restored on another; a rank that waits for one that samples."""
    def config(name, **changes):
        return config_of(world, tmp_path / name, steps=6, save_every=3, ahead=2, lr=1e-3, **changes)

    assert launch([config("whole")], 2) == [0, 0]
    assert launch([config("killed")], 2, kill_after=4) == [-signal.SIGKILL] * 2
    assert launch([config("killed", resume=True)], 2) == [0, 0]
    for log in ("metrics", "patches"):
        whole, killed = (untimed(tmp_path / name / f"{log}.jsonl") for name in ("whole", "killed"))
        assert whole == killed != [], log
    whole, killed = ((tmp_path / name / "checkpoints/step-000006/model.safetensors").read_bytes()
                     for name in ("whole", "killed"))
    assert whole == killed


def test_micro_batches_do_not_change_the_step(world, tmp_path):
    """Catches: a gradient that depends on how a step is cut into forwards."""
    changes = dict(steps=1, batch_prompts=2)
    whole, cut = (run(config_of(world, tmp_path / str(n), micro_tokens=n, **changes))[0]
                  for n in (10**6, 250))
    assert whole["grad_norm"] > 0
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-5)


@pytest.mark.parametrize("flags, sentence", (
    (["--model", "m", "--kapa", "0.1"], "unknown: --kapa; did you mean --kappa?"),
    (["--model", "m", "--frames", "15", "--data", "d"], "--frames must be even"),
    (["--model", "m"], "--data is missing"),
    (["--model", "m", "--data", "/dev/null"], "/dev/null holds no samples"),
    (["--model", "m", "--data", "d", "--rollouts", "1"], "--rollouts must be at least 2"),
    (["--method", "magic"], "invalid choice"),
    (["--cuda_graphs"], "--cuda_graphs needs a CUDA device"),
    (["--offload"], "--offload needs a CUDA device"),
    (["--lora", "8", "--freeze_vision"], "--freeze_vision changes nothing in this run: it is for "),
    (["--kappa", "30"], "--kappa must be at most 2"),  # before the toy world is made
    (["--epochs", "2"], "--epochs changes nothing in this run"),
    (["--video_root", "v"], "--data and --video_root need --model"),
    (["--model", "m", "--data", "nowhere.json"], "--data nowhere.json: there is no such file"),
    (["--model", "m", "--data", "/dev"], "--data /dev is a folder, not a file"),
    (["--model", "m", "--data", "/dev/null", "--eval_data", "/"], "--eval_data / is a folder"),
    (["--model", "m", "--data", "/dev/null", "--template", "no.txt"], "--template no.txt: "),
    (["--model", "m", "--data", "/dev/null", "--video_root", "v"], "--video_root v: there is no"),
))
def test_bad_flags_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys, flags, sentence):
    """Catches: a typo that runs with the default, an error found after the model has loaded."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:  # any other exception would be a traceback
        train.main(flags)
    assert end.value.code and sentence in capsys.readouterr().err + str(end.value.code)
    assert not any(tmp_path.iterdir()), "nothing is left behind by a run that never began"


def test_train_takes_the_step_that_ffr_spells_out(world, tmp_path, monkeypatch):
    """Catches: train.py going another way than ffr.step, which a reader takes for the method."""
    config = config_of(world, tmp_path / "run", batch_prompts=3, beta=0.04, max_grad_norm=1e9)
    first = train.Run(config, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(first.optimizer, "step", lambda: None)
    monkeypatch.setattr(first.optimizer, "zero_grad", lambda: None)
    phases = runs.Phases(first.device)
    sums = train.update(first, first.method.fill(first, 0, phases), phases)
    other = train.Run(replace(config, output=str(tmp_path / "other")), torch.device("cpu"),
                      torch.float32)
    loss = ffr.step(other.student, other.reference, other.fetch(0), other.prompts.header,
                    other.score, other.diagnose, other.write, alignment, "0/0", config.rollouts,
                    other.sampling)
    assert loss == pytest.approx(sums["loss"], abs=1e-6)
    pairs = [(a.grad, b.grad) for a, b in zip(first.student.parameters(),
                                              other.student.parameters()) if a.grad is not None]
    assert sum(a.abs().sum() for a, _ in pairs) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_a_folder_that_holds_a_run_is_not_overwritten(world, tmp_path):
    """Catches: two runs mixed in one metrics.jsonl."""
    config = config_of(world, tmp_path / "run", steps=1)
    run(config)
    with pytest.raises(ValueError, match="already holds a run"):
        run(config)


def test_a_prompt_that_may_be_too_long_is_refused_by_id(world, tmp_path):
    """Catches: a truncated video prompt."""
    with pytest.raises(ValueError, match=r"sample train-\d+: its prompt may take \d+ tokens"):
        run(replace(config_of(world, tmp_path / "run"), max_prompt=50))


# --- the service teacher in the loop


KEY = "sk-ant-a-key-that-must-not-be-written-anywhere"


def test_the_service_teacher_teaches_a_run(world, tmp_path, monkeypatch):
    """Catches: a teacher that works alone but not in the loop: tools unused, patches unread, a key
    in a file, teaching that starts only when every prompt has been sampled.
    """
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    order = []
    monkeypatch.setattr(ffr, "fix", lambda groups, ask, fix=ffr.fix:
                        (order.append("all sampled"), fix(groups, ask)))
    monkeypatch.setattr(Service, "submit", lambda self, *asked, submit=Service.submit:
                        (order.append("asked"), submit(self, *asked))[1])
    with MessagesServer() as server:
        rows = run(config_of(world, tmp_path / "run", teacher="anthropic", teacher_url=server.url,
                             batch_prompts=2, teacher_price="3/15"))
    assert rows[0]["intervention_ratio"] > 0 and rows[0]["teacher"]["dollars"] > 0
    assert all(row["teacher"]["calls"] == row["teacher"]["patched"] > 0 for row in rows)
    assert all(row["grad_norm"] >= 0 for row in rows)
    messages = [message for body in server.bodies for message in body["messages"]]
    tools = {block["name"] for message in messages if message["role"] == "assistant"
             for block in message["content"] if block["type"] == "tool_use"}
    assert {"get_frame", "zoom_region", "get_temporal_segment"} <= tools
    assert order[0] == "asked", "the first diagnosis must not wait until all rows are sampled"
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(KEY.encode() in path.read_bytes() for path in written)


@pytest.mark.slow
def test_a_killed_run_pays_for_no_diagnosis_twice(world, monkeypatch):
    """Catches: answers that die with the process that paid for them."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    with MessagesServer() as server:
        flags = ("--teacher", "anthropic", "--teacher_url", server.url, "--steps", 4,
                 "--output", "taught", "--save_every", 3)
        killed = after_step(start(world, *flags), 2)
        killed.send_signal(signal.SIGKILL)
        finish(killed, -signal.SIGKILL)
        before = len(server.bodies)
        finish(start(world, *flags, "--resume"))
        bodies = [json.dumps(body, sort_keys=True) for body in server.bodies]
    checks = [body for body in bodies if "Connection check" in body]
    assert before > 20 and len(checks) == 2 and len(bodies) - 2 == len(set(bodies) - set(checks))
    steps = [row["step"] for row in runs.read_log(world / "taught/metrics.jsonl")]
    assert steps == list(range(4))
    audit = subprocess.run([sys.executable, str(ROOT / "guard.py"), "taught"], cwd=world, text=True,
                           capture_output=True, check=True)
    assert "patched" in audit.stdout


def test_a_dead_teacher_is_found_out_before_the_model_loads(world, tmp_path, monkeypatch):
    """Catches: an hour of loading before a wrong address shows."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    with pytest.raises(ValueError, match="--teacher anthropic: .*"):
        run(config_of(world, tmp_path / "run", model="no such model", teacher="anthropic",
                      teacher_url="http://127.0.0.1:9"))


def test_tries_found_ahead_are_compared_with_the_policy_that_sampled_them(world, tmp_path,
                                                                          monkeypatch):
    """Catches: π_old by the present weights for older tries, or by older weights for repairs; a
    gradient that is not Eq. 10's.
    """
    weights, grads, batches, whole = [], [], [], {"loss": ffr.loss, "update": train.update}

    def update(run, *rest):
        weights.append({k: v.clone() for k, v in run.student.state_dict().items()})
        return whole["update"](run, *rest)

    def clip(parameters, norm):
        grads.append([p.grad.clone() for p in parameters if p.grad is not None])
        return torch.zeros(())

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(ffr, "loss", lambda logp_T, batch, *rest: (
        batches.append(batch), whole["loss"](logp_T, batch, *rest))[1])
    monkeypatch.setattr(train.Run, "score", lambda run, sample, text: (  # some right, some not
        float(len(text) % 2), float(len(text) % 3 == 0), True))
    config = config_of(world, tmp_path / "run", steps=4, ahead=1, beta=0.0, lr=1e-3,
                       batch_prompts=2, clip_low=0.1)
    rows = run(config)
    assert [row["staleness"] > 0 for row in rows] == [False, True, True, True]
    assert rows[0]["drift"] is None and rows[2]["drift"] > 0.01, "a large rate"
    now, then = (Student.load(config.model) for _ in "ab")
    kinds = set()
    for step, batch in enumerate(batches):
        now.load_state_dict(weights[step])
        then.load_state_dict(weights[max(step - 1, 0)])
        now.zero_grad()
        args = batch.prefixes, batch.suffixes, batch.owners, batch.completions
        logp_T = now(*args)[0]
        parts = []
        for (_, slot), new_C, old_C in zip(batch.members, *(
                x_T.detach().split([len(ids) for ids in batch.completions])
                for x_T in (logp_T, then(*args)[0]))):
            kinds.add((step > 0, slot.trained is slot.first))
            parts.append(old_C if slot.trained is slot.first else new_C)
        ratio_T = (logp_T - torch.cat(parts)).exp()
        A_T = batch.advantage_T
        kept_T = torch.minimum(ratio_T * A_T, ratio_T.clamp(0.9, 1.2) * A_T)
        (-(batch.weight_T * kept_T).sum()).backward()
        expected = [p.grad for p in now.parameters() if p.grad is not None]
        for found, wanted in zip(grads[step], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert (True, True) in kinds, "no first try was trained that was sampled ahead"


@pytest.mark.parametrize("ahead", (1, 2))
def test_a_run_that_samples_ahead_goes_on_exactly(world, tmp_path, monkeypatch, ahead):
    """Catches: tries sampled ahead that are lost, or sampled anew by other weights; diagnoses
    counted twice.
    """
    config = config_of(world, tmp_path / "straight", steps=6, ahead=ahead, save_every=3, lr=1e-3,
                       batch_prompts=2)
    run(config)
    whole = train.log

    def killed(run, *rest):
        if run.step == 4:
            raise KeyboardInterrupt
        return whole(run, *rest)

    monkeypatch.setattr(train, "log", killed)
    config = replace(config, output=str(tmp_path / "killed"))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(train, "log", whole)
    run(replace(config, resume=True))
    straight, resumed = (
        [[{k: v for k, v in row.items() if k not in TIMINGS}
          for row in runs.read_log(tmp_path / name / f"{log}.jsonl")]
         for log in ("metrics", "patches")] for name in ("straight", "killed"))
    assert straight == resumed and len(straight[0]) == 6
    last = [(tmp_path / name / "checkpoints/step-000006/model.safetensors").read_bytes()
            for name in ("straight", "killed")]
    assert last[0] == last[1]


def test_a_run_leaves_its_page(world, tmp_path, monkeypatch, capsys):
    """Catches: no page, or one of no steps; a page that ends a run; --no_report that is ignored."""
    from lab import report
    run(config_of(world, tmp_path / "run", steps=1))
    assert f"to look at: {tmp_path / 'run/report.html'}" in capsys.readouterr().out
    assert "</html>" in (tmp_path / "run/report.html").read_text()

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(report, "write", full)
    run(config_of(world, tmp_path / "full", steps=1))
    assert "no page: the disk is full" in (said := capsys.readouterr().out)
    assert "finished: " in said and "to look at" not in said
    monkeypatch.setattr(report, "write", lambda *_: pytest.fail("no page was wanted"))
    run(config_of(world, tmp_path / "none", steps=1, no_report=True))
