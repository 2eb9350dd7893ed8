"""A run is what its folder says: flags, locks, stops, damage. Each test names its mistake."""

import hashlib
import itertools
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import TIMINGS, after_step, config_of, finish, run, start, untimed
from test_train import world as world  # noqa: PLC0414, the fixture

import methods
import runs
import train

ROOT = Path(__file__).resolve().parent.parent


def fingerprint(folder):
    """Return a digest of every file below a folder, by name."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def go_on(folder, *flags, processes=1):
    """Do what README says: train.py --resume --output RUN, and nothing else."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] \
        if processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / "train.py"), "--resume", *map(str, flags)]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})


def test_a_killed_run_goes_on_with_its_own_flags(world):
    """Catches: flags that --resume does not read back: the toy's in their place, other results."""
    flags = ("--steps", 5, "--save_every", 2, "--batch_prompts", 2, "--kappa", 0.5, "--rollouts", 3,
             "--evidence", "frames", "--alignment_weight", 0.2, "--beta", 0.01, "--seed", 7,
             "--temperature", 1.2, "--loss_norm", "sequence", "--warmup_steps", 1)
    finish(start(world, *flags, "--output", "straight10"))
    killed = after_step(start(world, *flags, "--output", "killed10"), 3)
    killed.send_signal(signal.SIGKILL)
    finish(killed, -signal.SIGKILL)
    assert runs.newest_checkpoint(world / "killed10").name == "step-000002"
    with open(world / "killed10/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "torn')
    before = json.loads((world / "killed10/config.json").read_text())
    finish(go_on(world, "--output", "killed10"))
    for name in ("rollouts", "metrics", "patches"):
        found, wanted = (untimed(world / f"{which}/{name}.jsonl")
                         for which in ("killed10", "straight10"))
        assert found == wanted != [], name
    frames = [fingerprint(world / f"{which}/thumbnails") for which in ("killed10", "straight10")]
    assert frames[0] == frames[1] != {}
    assert [row["step"] for row in found] and any(
        row["grad_norm"] > 0 for row in runs.read_log(world / "straight10/metrics.jsonl"))
    weights = [world / f"{run}/checkpoints/step-000005/model.safetensors"
               for run in ("killed10", "straight10")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert json.loads((world / "killed10/config.json").read_text()) == before, "written once"


OTHER = {"model": "warm", "data": "heldout.json", "video_root": "videos2", "template": "rows.txt",
         "eval_data": "train.json", "eval_every": 1, "eval_patches": "no", "method": "grpo",
         "teacher": "anthropic", "evidence": "none", "teacher_model": "m", "steps": 7,
         "teacher_prompt": "tools", "loss_norm": "constant", "ratio": "sequence",
         "score_under": "plain", "select": "best", "train_on": "original", "attention": "sdpa",
         "dtype": "bfloat16", "teacher_url": "http://x", "teacher_price": "3/15",
         "teacher_cache": "c", "frame_cache": "f", "output": None, "resume": None,
         "track": "trackio"}


def test_every_flag_beside_resume_is_refused_or_harmless(world, tmp_path):
    """Catches: a run that goes on as another one; a refused command that has rewritten files."""
    folder = tmp_path / "run"
    run(config_of(world, folder, steps=1))
    before = fingerprint(folder)
    for f in fields(train.Config):
        value = OTHER.get(f.name, (f.default or 0) + 1 if f.type in (int, float) else True)
        if value is None:
            continue
        given = {f.name, "resume", "output"}
        config = replace(train.Config(), resume=True, output=str(folder), **{f.name: value})
        if f.name in train.FREE:
            assert getattr(runs.going_on(config, given, train.FREE), f.name) == value
        else:
            with pytest.raises(ValueError, match=f"^--{f.name} .* the run in .* has "):
                runs.going_on(config, given, train.FREE)
    assert fingerprint(folder) == before


@pytest.mark.parametrize("change, sentence", (
    (dict(data="heldout.json"), "--data .* is not what the run"),
    (dict(model="model"), "--model .* is not what the run"),
    (dict(template="other.txt"), "--template .* is not what the run")))
def test_other_contents_under_a_free_flag_are_refused(world, tmp_path, change, sentence):
    """Catches: another student, data set or wording taken for the run's own; files changed."""
    folder, name = tmp_path / "run", next(iter(change))
    config = config_of(world, folder, steps=1, save_every=1)
    run(config)
    (tmp_path / "other.txt").write_text("{question} Say why.")
    other = tmp_path / "other.txt" if name == "template" else world / change[name]
    if name == "model":  # the same weights, taken otherwise
        other = tmp_path / "other"
        shutil.copytree(world / "warm/checkpoints/step-000060", other)
        text = json.loads((other / "config.json").read_text())
        text["text_config"]["rms_norm_eps"] *= 10
        (other / "config.json").write_text(json.dumps(text))
    before = fingerprint(folder)
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        run(replace(config, resume=True, **{name: str(other)}))
    assert fingerprint(folder) == before


def test_a_flag_that_changes_nothing_is_refused():
    """Catches: an ablation whose rows are identical because a flag was not heeded."""
    kinds = [(method, teacher) for method in methods.METHODS
             for teacher in ("annotated", "anthropic")]

    def refused(flag):
        found = []
        for method, teacher in kinds:
            config = replace(train.Config(), method=method, teacher=teacher, model="m",
                             eval_data="e")
            try:
                train.refuse_useless(config, {flag})
            except ValueError as error:
                assert str(error).startswith(f"--{flag} changes nothing in this run: it is for ")
                found.append((method, teacher))
        return set(found)

    def all_but(names, teachers=("annotated", "anthropic")):
        return {(m, t) for m, t in kinds if m not in names.split() or t not in teachers}

    asking = "ffr sft sft_teacher luffy judge visd ffr_visd"
    comparing = " ".join(set(methods.METHODS) - {"sft", "sft_teacher"})
    service = ("anthropic",)
    table = {
        "teacher": all_but(asking), "no_gt": all_but("ffr sft judge visd ffr_visd", service),
        "teacher_prompt": all_but("ffr sft ffr_visd", service),
        "teacher_rounds": all_but("ffr sft ffr_visd", service),
        "blind_test": all_but("ffr sft ffr_visd", service),
        "evidence": all_but("ffr sft ffr_visd"), "eval_patches": all_but("ffr sft ffr_visd"),
        "pass_mark": all_but(comparing + " sft_teacher"), "shape_gamma": all_but("luffy replay"),
        "length_low": all_but("tgrpo"), "length_high": all_but("tgrpo"),
        "sd_sync": all_but("rlsd"), "sd_ema": all_but("visd"), "sd_topk": all_but("visd"),
        **{name: all_but(asking, service) for name in
           "teacher_url teacher_model teacher_cache teacher_price teacher_budget teacher_timeout "
           "teacher_step_timeout".split()},
        **{name: all_but("ffr ffr_visd") for name in
           "kappa alignment_weight train_on score_under ahead".split()},
        **{name: all_but(comparing) for name in
           "rollouts top_p select no_std dynamic_sampling beta".split()},
        **{name: all_but("") for name in ("clip_low", "clip_high", "ratio", "lora_alpha",
                                          "lora_vision", "merge")},
        **{name: all_but("replay") for name in ("replay_share", "replay_start")},
        **{name: all_but("rlsd visd ffr_visd") for name in "sd_lambda sd_horizon sd_clip".split()}}
    always = set("""model data samples video_root eval_data eval_every output method max_completion
        max_prompt frames max_pixels max_image_pixels temperature template loss_norm lr warmup_steps
        weight_decay max_grad_norm steps epochs batch_prompts updates_per_batch micro_tokens
        freeze_vision lora offload balance seed save_every keep_checkpoints resume attention dtype
        cuda_graphs decoder decode_workers decode_seconds frame_cache frame_cache_gb keep_rollouts
        keep_rollouts_mb no_report track plan""".split())
    for name in (f.name for f in fields(train.Config)):
        assert refused(name) == (set() if name in always else table[name]), name
    assert always | table.keys() == {f.name for f in fields(train.Config)}
    for changes, flag in ((dict(steps=5), "epochs"),
                          (dict(eval_data=""), "eval_every"), (dict(decode_workers=0),
                                                               "decode_seconds"),
                          (dict(train_on="original"), "score_under"),
                          (dict(keep_rollouts=0), "keep_rollouts_mb"),
                          (dict(updates_per_batch=2), "clip_high"), (dict(lora=8), "lora_alpha"),
                          (dict(ahead=1), "clip_high"), (dict(lora=8), "merge"),
                          (dict(lora=8), "freeze_vision"), (dict(lora=8), "offload"),
                          (dict(teacher="anthropic", teacher_prompt="negative"), "teacher_rounds")):
        config = replace(train.Config(), model="m", eval_data="e")
        heeded = [methods.useful(c)[flag][0] for c in (config, replace(config, **changes))]
        assert heeded[0] != heeded[1] or flag == "teacher_rounds" and not heeded[1], flag


@pytest.mark.parametrize("name, value, sentence", (
    ("kappa", 30.0, "at most 2"), ("kappa", float("nan"), "negative"), ("lr", float("nan"), "lr"),
    ("clip_low", 1.5, "at most 1"), ("pass_mark", 0.0, "positive"), ("beta", -1.0, "negative"),
    ("blind_test", -1, "negative"), ("samples", -1, "negative"),
    ("length_low", 600, "--length_high"), ("lora", -1, "negative"), ("lora_alpha", 0, "positive")))
def test_ranges_are_checked(name, value, sentence):
    """Catches: --kappa 30 where 0.30 was meant."""
    with pytest.raises(ValueError, match=sentence):
        train.check(replace(train.Config(), data="d", **{name: value}))


def test_a_run_with_adapters_resumes_to_the_same_or_not_at_all(world, tmp_path):
    """Catches: adapters, moments of AdamW or a method's copy of the adapters that a stop loses; the
    frozen weights in every training state; a base that is another one since.
    """
    shutil.copytree(world / "warm/checkpoints/step-000060", tmp_path / "base")
    config = config_of(world, tmp_path / "run", model=str(tmp_path / "base"), lora=4, lr=1e-2,
                       steps=5, save_every=2, rollouts=3, beta=0.1, method="rlsd", sd_sync=3,
                       lora_vision=True)
    rows, checkpoints = run(config), tmp_path / "run/checkpoints"
    assert rows[0]["kl"] == 0 < min(row["kl"] for row in rows[1:])
    straight = untimed(tmp_path / "run/metrics.jsonl")
    written = (checkpoints / "step-000005/adapter_model.safetensors").read_bytes()
    sizes = [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in
             (checkpoints / "step-000005/training_state", tmp_path / "base")]
    assert sizes[0] < sizes[1] / 4
    shutil.rmtree(checkpoints / "step-000005")
    base = tmp_path / "base/model.safetensors"
    weights, kept = load_file(base), base.read_bytes()
    weights["lm_head.weight" if "lm_head.weight" in weights else next(iter(weights))][0, 0] += 1
    save_file(weights, base, {"format": "pt"})
    with pytest.raises(ValueError, match="--model .*base is not what the run in .* was started"):
        run(replace(config, resume=True))
    base.write_bytes(kept)
    run(replace(config, resume=True))
    assert untimed(tmp_path / "run/metrics.jsonl") == straight
    assert (checkpoints / "step-000005/adapter_model.safetensors").read_bytes() == written


def test_ffr_that_would_be_grpo_is_refused(world, tmp_path):
    """Catches: data without evidence under the default teacher: GRPO by the name of FFR."""
    rows = json.loads((world / "train.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps([row | {"evidence": []} for row in rows]))
    config = config_of(world, tmp_path / "run", data=str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="no sample of .*bare.json has evidence"):
        run(config)
    assert not (tmp_path / "run").exists(), "a refused command leaves nothing behind"
    run(replace(config, method="grpo", steps=1))


@pytest.mark.parametrize("method", ["sft", "sft_teacher", "luffy"])
def test_imitation_of_bare_answers_is_said_or_refused(world, tmp_path, method, capsys):
    """Catches: a warm start on data without traces, which unlearns to reason, without a word;
    steps that train nothing.
    """
    rows = json.loads((world / "train.json").read_text())
    for left in (0, 2):
        some = [row | ({} if i < left else {"process": ""}) for i, row in enumerate(rows)]
        (tmp_path / "some.json").write_text(json.dumps(some))
        config = config_of(world, tmp_path / "run", data=str(tmp_path / "some.json"), method=method,
                           steps=1)
        if not left:
            with pytest.raises(ValueError, match="no sample of .*some.json has a process, so"):
                run(config)
    run(config)
    said = f"{len(rows) - 2} of {len(rows)} samples have no process to imitate"
    assert said + ": their bare answer is\n" * (method == "sft") in capsys.readouterr().out


def test_what_cannot_be_read_ends_a_run(world, tmp_path):
    """Catches: all steps made on nothing, saved, exit 0."""
    rows = json.loads((world / "train.json").read_text())[:4]
    for i, row in enumerate(rows):
        row["path"] = f"{i}.mp4"
        (tmp_path / f"{i}.mp4").write_bytes(b"no video")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = config_of(world, tmp_path / "run", data=str(tmp_path / "rows.json"),
                       video_root=str(tmp_path), steps=50)
    with pytest.raises(ValueError, match="not one of 4 files could be read; sample train-"):
        run(config)
    assert len(runs.read_log(tmp_path / "run/bad_samples.jsonl")) == 4
    with pytest.raises(ValueError, match="^not one file of the run could be read: .*samples.jsonl"):
        run(replace(config, output=str(tmp_path / "short"), steps=2))  # never comes to all four


def test_a_second_writer_is_refused(world, tmp_path):
    """Catches: two runs in one folder, their steps mixed; a lock that outlives its run."""
    config = config_of(world, tmp_path / "run", steps=1)
    folder = runs.Folder(tmp_path / "run", "config.json", resume=False)
    with pytest.raises(ValueError, match="is in use by another command"):
        run(config)
    folder.close()
    assert not (tmp_path / "run").exists()
    run(config)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output .*file cannot be used: Not a directory"):
        run(replace(config, output=str(tmp_path / "file")))


DAMAGES = {"truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
           "emptied": lambda path: path.write_bytes(b""), "missing": lambda path: path.unlink(),
           "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1])
                                                    + path.read_bytes()[1:])}


def test_every_damage_is_named_and_the_checkpoint_before_is_used(world, tmp_path, capsys):
    """Catches: a traceback from inside a library, bytes that changed unseen, a lost run."""
    config = config_of(world, tmp_path / "run", steps=3, save_every=1, keep_checkpoints=2)
    run(config)
    newest, before = (tmp_path / f"run/checkpoints/step-00000{n}" for n in (3, 2))
    assert runs.damage(newest) == "" and (newest.parent / "stray").touch() is None
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 8 and capsys.readouterr()
    for path in files:
        content = path.read_bytes()
        for how, spoil in DAMAGES.items():
            if content or how == "missing":
                spoil(path)
                reason = runs.damage(newest)
                assert reason and (path.name in reason), (path, how, reason)
                assert runs.undamaged_checkpoint(tmp_path / "run") == before
                said = capsys.readouterr().err
                assert said.count("\n") == 1 and "is damaged" in said and before.name in said
                path.write_bytes(content)
    assert runs.undamaged_checkpoint(tmp_path / "run") == newest
    straight = untimed(tmp_path / "run/metrics.jsonl")
    (newest / "model.safetensors").write_bytes(b"")
    run(replace(config, resume=True))
    assert untimed(tmp_path / "run/metrics.jsonl") == straight
    for folder in (newest, before):
        (folder / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint can be read: .*step-000003 is damaged"):
        run(replace(config, resume=True))


def test_a_checkpoint_that_cannot_be_written_is_a_sentence(world, tmp_path, monkeypatch):
    """Catches: a partial checkpoint that keeps the disk full, so that resuming fails too."""
    config = config_of(world, tmp_path / "run", steps=2, save_every=1)

    def full(run, partial):
        (partial / "training_state").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    run(replace(config, steps=2))
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "_write_checkpoint", full)
        with pytest.raises(OSError, match=r"checkpoint of step 2 could not be written to .*GiB"):
            run(replace(config, resume=True))
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    run(replace(config, resume=True))
    assert runs.newest_checkpoint(tmp_path / "run").name == "step-000002"


def test_a_stop_within_an_evaluation_is_heeded_and_made_up_for(world, tmp_path, monkeypatch):
    """Catches: a signal that waits for 28 seconds, and an evaluation lost or counted twice."""
    config = config_of(world, tmp_path / "run", eval_data=str(world / "heldout.json"),
                       eval_every=1, steps=2, save_every=100)
    monkeypatch.setattr(train.Run, "eval_prompts", 2)
    run(replace(config, output=str(tmp_path / "straight")))
    decoded, seen = train.Run.decoded, []

    def stopping(self, wanted):
        if self.step == 1 and wanted[0].id.startswith("heldout") and not seen:
            seen.append(os.kill(os.getpid(), signal.SIGTERM))
        return decoded(self, wanted)

    monkeypatch.setattr(train.Run, "decoded", stopping)
    device = torch.device("cpu")
    assert train.train(config, device, torch.float32) == signal.SIGTERM
    assert [row["step"] for row in runs.read_log(tmp_path / "run/eval.jsonl")] == [0]
    assert runs.newest_checkpoint(tmp_path / "run").name == "step-000001"
    assert train.train(replace(config, resume=True), device, torch.float32) == 0
    for name in ("eval", "eval_answers", "metrics", "patches", "rollouts"):
        found, wanted = (untimed(tmp_path / f"{run}/{name}.jsonl") for run in ("run", "straight"))
        assert found == wanted != [], name


SMALL = f"""
import functools, sys
sys.path.insert(0, {str(ROOT)!r})
import toy, train
toy.make = functools.partial(toy.make, train=20, heldout=10, warm=10)
train.TOY_WARMING |= dict(steps=2, batch_prompts=2, save_every=1, decode_workers=0)
train.TOY_STUDENT = train.TOY_WARM / "checkpoints/step-000002"
train.TOY |= dict(steps=4, batch_prompts=2, save_every=1, eval_every=1)
train.main()
"""  # python train.py, with a world of 8 clips and few steps
PLACES = ("world", "warm start", "step", "checkpoint", "evaluation")
LENGTHS = dict(zip(PLACES, (3.0, 3.0, 2.0, 0.2, 0.8)))  # seconds, about


def small(folder, *flags, processes=1, mark="none"):
    """Start SMALL in a folder; mark: what its processes, however deep, can be known by."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] \
        if processes > 1 else []
    folder.mkdir(exist_ok=True)
    (folder / "small.py").write_text(SMALL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "MARK": str(mark)}
    with open(folder / "said.txt", "ab") as said:
        return subprocess.Popen([sys.executable, *launch, "small.py", *map(str, flags)], cwd=folder,
                                env=environment, stdout=said, stderr=subprocess.STDOUT)


def place(folder):
    """Return what a run of SMALL is at, by its files."""
    output = folder / "runs/ffr"
    if not (folder / "runs/toy/heldout.json").exists():
        return "world"
    if not (output / "config.json").exists():
        return "warm start"
    if any(output.glob("checkpoints/*.partial")):
        return "checkpoint"
    saved = runs.newest_checkpoint(output)
    done = int(saved.name[5:]) if saved else 0
    steps = len(runs.read_log(output / "metrics.jsonl"))
    evaluated = {row["step"] for row in runs.read_log(output / "eval.jsonl")}
    return "evaluation" if steps == done and done not in evaluated else "step"


def kill_in(folder, wanted, victim, process, rng, mark):
    """Kill at a random moment of the wanted place; return the place that was hit, or None."""
    def wait(seconds):
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

    def environment(number):
        with suppress(OSError):  # it has ended
            return Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        return []

    def victims():
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        return [int(n) for n in path.read_text().split() if b"RANK=0" in environment(n)
                or b"RANK=1" in environment(n)] if victim == "rank" else [process.pid]

    while process.poll() is None and (place(folder) != wanted or not victims()):
        wait(0.01)
    wait(rng.uniform(0, LENGTHS[wanted]))
    found = victims() if process.poll() is None else []
    if found:
        os.kill(rng.choice(found), signal.SIGKILL)
    for number in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        if f"MARK={mark}".encode() in environment(number):
            with suppress(ProcessLookupError):
                poll = select.poll()
                poll.register(os.pidfd_open(number), select.POLLIN)
                assert poll.poll(120_000), f"process {number} is still there"
    assert process.wait() == 0 or found, (folder / "said.txt").read_text()
    return place(folder) if process.wait() else None


def same_files(hurt, whole):
    """Assert that two runs of SMALL have left the same."""
    logs = {name: [untimed(folder / f"runs/ffr/{name}.jsonl") for folder in (hurt, whole)]
            for name in ("metrics", "patches", "rollouts", "eval", "eval_answers", "bad_samples")}
    assert all(found == wanted for found, wanted in logs.values()), logs
    slots = [(row["step"], row["slot"]) for row in logs["patches"][0]]
    assert len(logs["metrics"][0]) == 4 and slots == sorted(slots, key=lambda pair: pair[0]) != []
    for name in ("samples.md", "checkpoints/step-000004/model.safetensors",
                 "checkpoints/step-000004/processor_config.json"):
        found, wanted = ((folder / "runs/ffr" / name).read_bytes() for folder in (hurt, whole))
        assert found == wanted, name
    frames = [fingerprint(folder / "runs/ffr/thumbnails") for folder in (hurt, whole)]
    assert frames[0] == frames[1] != {}
    worlds = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
               if path.suffix in (".mp4", ".safetensors") or path.parent == folder and
               path.suffix == ".json"} for folder in (hurt / "runs/toy", whole / "runs/toy")]
    assert worlds[0] == worlds[1] and len(worlds[0]) > 10


@pytest.mark.slow
def test_two_commands_make_the_toy_world_once(tmp_path):
    """Catches: two first commands that write one world at once, or train its warm start twice."""
    both = [small(tmp_path, "--steps", 1, "--eval_data", "", "--method", "grpo") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    assert said.count("making the toy world") == said.count("warming the student up") == 1
    assert said.count("waiting for another command, which is at work on runs/toy") <= 1
    first, second = (untimed(tmp_path / f"runs/grpo-{n}/metrics.jsonl") for n in (1, 2))
    assert first == second != [] and not (tmp_path / "runs/grpo-3").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victims", ("process " * 5, "rank torchrun"), ids=("one", "two"))
def test_random_kills_lose_nothing(tmp_path, victims):
    """Catches: a moment, in the world's making, a step, a checkpoint or an evaluation, at which a
    kill costs files or leaves a process behind; two writers of one run; rows in any order.

    KILLED in the environment: other victims, as in "rank rank torchrun"; KILLS_SEED.
    """
    victims, seed = os.environ.get("KILLED", victims).split(), os.environ.get("KILLS_SEED", "0")
    processes, rng = 1 + ("process" not in victims), random.Random(seed)
    fresh = ("--output", "runs/ffr", "--rollouts", 4, "--decode_workers", 2 - processes)
    again = ("--resume", "--output", "runs/ffr")
    assert small(tmp_path / "whole", *fresh, processes=processes).wait() == 0
    hits, rounds = [], itertools.count()
    while victims:
        folder = mark = tmp_path / f"hurt{next(rounds)}"
        places = sorted(rng.sample(PLACES, min(5, len(victims))), key=PLACES.index)
        while True:
            begun = (folder / "runs/ffr/config.json").exists()
            process = small(folder, *(again if begun else fresh), processes=processes, mark=mark)
            if not places:
                break
            hit = kill_in(folder, places.pop(0), victims[0], process, rng, mark)
            if hit is None:  # it was faster: there is nothing left to kill
                break
            hits.append(f"{victims.pop(0)} in {hit}")
            print(*hits, sep=", ", flush=True)
        assert process.wait() == 0, (folder / "said.txt").read_text()
        same_files(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_costs_no_checkpoint(world, tmp_path):
    """Catches: a traceback, a partial checkpoint that keeps the disk full, a run that cannot go on;
    a full cache that ends a run; a log whose line is torn unsaid.
    """
    small, cache = tmp_path / "small", tmp_path / "cache"
    for folder, size in ((small, "17m"), (cache, "100k")):
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder],
                                 capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        flags = ("--steps", 3, "--save_every", 1, "--keep_checkpoints", 1, "--frame_cache", cache)
        output = finish(start(world, *flags, "--output", small / "run"), 1)
        said = [line for line in output.split("\n") if line.startswith("train.py: ")]
        assert len(said) == 1 and "the checkpoint of step 2 could not be written" in said[0]
        assert "Traceback" not in output and "the frame cache cannot be written" in output
        left = runs.newest_checkpoint(small / "run")
        assert left.name == "step-000001" and runs.damage(left) == ""
        assert [path.name for path in left.parent.iterdir()] == [left.name]
        taken = sum(path.stat().st_blocks for path in small.rglob("*")) // 2 + 4
        subprocess.run(["mount", "-o", f"remount,size={taken}k", small], check=True)
        output = finish(go_on(world, "--output", small / "run"), 1)
        assert "Traceback" not in output and re.search(
            r"\ntrain.py: \S+\.(jsonl|jpg)\S* could not be written to .*run\S* \(No space "
            r"left.*; 0\.0 GiB are free there; .*run is saved up to step-000001; to go on: python "
            r".*train\.py --resume --output .*run\n$", output), output
        assert runs.damage(left) == ""
        subprocess.run(["mount", "-o", "remount,size=60m", small], check=True)
        finish(go_on(world, "--output", small / "run"))
        assert [row["step"] for row in runs.read_log(small / "run/metrics.jsonl")] == [0, 1, 2]
    finally:
        for folder in (small, cache):
            subprocess.run(["umount", folder], check=True)


def test_the_last_line_says_where_the_run_is_and_what_to_type(world, tmp_path, monkeypatch, capsys):
    """Catches: an end that leaves one looking for the run, a traceback for Ctrl-C, another code."""
    def end(name, code):
        """Return the last line on each of the two streams."""
        given = {"model": world / "warm/checkpoints/step-000060", "data": world / "train.json",
                 "video_root": world / "videos", "template": world / "template.txt",
                 "max_pixels": 56 * 56, "max_completion": 40, "decode_workers": 0, "steps": 2,
                 "rollouts": 2, "output": tmp_path / name}
        flags = [part for flag, value in given.items() for part in (f"--{flag}", str(value))]
        with pytest.raises(SystemExit) as left:
            train.main(flags)
            sys.exit(0)
        assert left.value.code == code
        return [text.rstrip("\n").rpartition("\n")[2] for text in capsys.readouterr()]

    def goes_on(name, step="its start"):
        return (f"{tmp_path / name} is saved up to {step}; to go on: python "
                + shlex.join([sys.argv[0], "--resume", "--output", str(tmp_path / name)]))

    def breaking(error):
        def update(run, *rest):
            if run.step == 1:
                raise error
            return done(run, *rest)
        return update

    done, newest = train.update, tmp_path / "run/checkpoints/step-000002"
    assert end("run", 0)[0] == f"finished: {tmp_path / 'run'}; to use it: --model {newest}"
    assert end("run", 2)[1] == (f"train.py: --output {tmp_path / 'run'} already holds a run: add "
                                "--resume to go on with it, or name another folder")
    monkeypatch.setattr(train, "update", lambda *rest: (os.kill(os.getpid(), signal.SIGTERM),
                                                        done(*rest))[1])
    assert end("stopped", 143)[0] == goes_on("stopped", "step-000001")
    for code, error in ((1, OSError("no space")), (130, KeyboardInterrupt()),
                        (1, FloatingPointError("not finite")), (2, ValueError("sample 3: wrong"))):
        monkeypatch.setattr(train, "update", breaking(error))
        name = type(error).__name__
        assert end(name, code)[1] == f"train.py: {str(error) or 'stopped'}; {goes_on(name)}"
    monkeypatch.setattr(train, "update", breaking(RuntimeError("unforeseen")))
    with pytest.raises(RuntimeError) as caught:  # its traceback ends with its notes
        end("unforeseen", 1)
    assert caught.value.__notes__ == [goes_on("unforeseen")]
    monkeypatch.setattr(train.Student, "load", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert end("never begun", 143)[1] == "train.py: stopped; the same command begins anew"
    assert not (tmp_path / "never begun").exists()


def test_a_bad_sample_is_told_once_and_counted_alike_after_a_stop(world, tmp_path, monkeypatch):
    """Catches: lines of bad_samples.jsonl lost or doubled by a stop, an evaluation's bad files in
    the count of training, a run that finds its first sample bad after --resume and gives up.
    """
    held, rows = (json.loads((world / f"{name}.json").read_text())[:4] for name in
                  ("heldout", "train"))
    for row, path in ((held[0], "held"), (rows[1], "bad"), (rows[2], "gone")):
        row["path"] = str(tmp_path / f"{path}.mp4")
    rows[3]["evidence"] = [{"start": 500, "end": 501}]
    for name in ("held", "bad"):
        (tmp_path / f"{name}.mp4").write_bytes(b"no video")
    for name, content in (("rows", rows), ("held", held)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    config = config_of(world, tmp_path / "straight", data=str(tmp_path / "rows.json"), save_every=1,
                       eval_data=str(tmp_path / "held.json"), steps=6, eval_every=1, rollouts=2,
                       batch_prompts=3, seed=3)
    run(config)
    log, done = runs.read_log(tmp_path / "straight/bad_samples.jsonl"), train.update
    assert sorted((row["id"], row["step"]) for row in log) == sorted(
        (row["problem_id"], step) for row, step in ((rows[2], -1), (held[0], 0), *(
            (row, next(made["step"] for made in log if made["id"] == row["problem_id"]))
            for row in (rows[1], rows[3]))))
    for at in (0, 4):
        def stopping(run, *rest, at=at):
            if run.step == at:
                raise OSError("killed")
            return done(run, *rest)

        monkeypatch.setattr(train, "update", stopping)
        with pytest.raises(OSError, match="killed"):
            run(replace(config, output=str(tmp_path / "hurt"), resume=at > 0))
    monkeypatch.setattr(train, "update", done)
    run(replace(config, output=str(tmp_path / "hurt"), resume=True))
    for name in ("bad_samples", "metrics", "eval"):
        hurt, straight = (untimed(tmp_path / f"{which}/{name}.jsonl")
                          for which in ("hurt", "straight"))
        assert hurt == straight != [], name


def test_a_checkpoint_says_what_it_was_trained_to_be_asked_with(world, tmp_path, monkeypatch,
                                                                capsys):
    """Catches: trained with one wording and size, evaluated with others: format 0, accuracy 0."""
    run(config_of(world, tmp_path / "run", steps=1, frames=4))
    model = str(runs.newest_checkpoint(tmp_path / "run"))
    saved = json.loads((Path(model) / "student.json").read_text())
    assert saved.pop("positions").startswith("as in vLLM")
    assert saved == {"frames": 4, "max_pixels": 56 * 56, "max_image_pixels": 401408,
                     "max_completion": 40, "template": (world / "template.txt").read_text()}
    capsys.readouterr()
    plain = replace(train.Config(), model=model)
    asked = runs.asked_with(plain, {"model", "max_completion"})
    assert (asked.frames, asked.max_pixels, asked.max_completion) == (4, 56 * 56, 1024)
    assert capsys.readouterr().out == (f"as {model} was trained: --frames 4, --max_pixels 3136, "
                                       "its wording\n")
    assert runs.wording(asked) == (world / "template.txt").read_text()
    assert runs.asked_with(replace(plain, model="hub/name"), set()) == replace(plain,
                                                                                model="hub/name")


@pytest.mark.parametrize("path, sentence", (
    ("both", "has whole weights and an adapter"),
    ("run", "is a run's folder: its newest checkpoint is .*step-000001"), ("/nowhere", "no such"),
    ("empty", "is no checkpoint: it has no config.json"), ("a b", "no such folder")))
def test_a_model_that_is_none_is_refused_at_once(world, tmp_path, path, sentence):
    """Catches: a traceback of 25 lines, and a folder that then refuses the corrected command."""
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)
    for name, files in (("empty", ()), ("both", ("config.json", "adapter_config.json"))):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    with pytest.raises(ValueError, match=f"--model .*{sentence}"):
        runs.check_model(path if path[0] in "/a" else str(tmp_path / path))


def test_a_sample_twice_in_a_step_is_not_tried_alike(world, tmp_path):
    """Catches: fewer samples than prompts: the same rollouts twice, and twice their weight."""
    rows = json.loads((world / "train.json").read_text())[:1]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    config = config_of(world, tmp_path / "run", data=str(tmp_path / "one.json"), batch_prompts=2,
                       temperature=1.5)
    made = train.Run(config, torch.device("cpu"), torch.float32)
    groups = made.method.fill(made, 0, runs.Phases(made.device))
    first, second = ([slot.first.ids_C.tolist() for slot in group.slots] for group in groups)
    assert groups[0].sample.id == groups[1].sample.id and first != second


@pytest.mark.parametrize("formats, reasons, said", (
    ((0.0, 0.0), {}, "no completion of 2 steps kept"), ((None, None), {}, ""), ((0.0, 0.1), {}, ""),
    ((1.0, 1.0), {"time limit": 3}, "6 of 8 diagnoses brought no patch, mostly: time limit"),
    ((1.0, 1.0), {"time limit": 1}, "")))
def test_the_first_steps_say_what_is_wrong(capsys, formats, reasons, said):
    """Catches: a warning where nothing is sampled (sft), silence where formats or patches fail."""
    train.warn([{"format": form, "teacher": {"calls": 4}, "unpatched_by_reason": reasons}
                for form in formats])
    found = capsys.readouterr().out
    assert said in found and bool(found) == bool(said)


def test_metrics_have_the_same_keys_for_all_methods(world, tmp_path):
    """Catches: scripts that break on a method that asks no teacher."""
    keys = {}
    for method in ("ffr", "grpo"):
        row, = run(config_of(world, tmp_path / method, method=method, steps=1))
        keys[method] = {name: sorted(v) if name == "teacher" else None for name, v in row.items()}
    assert keys["ffr"] == keys["grpo"] and len(keys["grpo"]["teacher"]) > 10


def test_clipping_is_counted_over_all_updates(world, tmp_path):
    """Catches: clip_fraction of the first update, where the ratio is 1 and nothing is clipped."""
    row, = run(config_of(world, tmp_path / "run", steps=1, updates_per_batch=4, clip_low=1e-3,
                         clip_high=1e-3, lr=1e-3))
    assert row["clip_fraction"] > 0


def two_files(world, folder):
    """Write the toy's rows as two files whose rows go by the same numbers; one has no media."""
    rows = json.loads((world / "train.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "problem_id"} for row in rows]
    rows[20]["path"] = "nowhere.mp4"
    shutil.copytree(world / "videos", folder / "videos")
    for name, part in (("a", rows[:10]), ("b", rows[10:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    ids = [f"1/{i}" for i in range(10)] + [f"2/{i}" for i in range(14)]
    return f"{folder}/a.json,{folder}/b.json", dict(zip(ids, rows))


def test_samples_of_several_files_are_drawn_by_the_seed_and_written_down(world, tmp_path):
    """Catches: the first N rows; rows of two files with one id; a drawn row without its media; a
    list that cannot be trained on again, or from which other samples or rollouts come.
    """
    paths, rows = two_files(world, tmp_path)
    drawn = {}
    for name, more in (("one", {}), ("again", {}), ("other", dict(seed=1))):
        config = config_of(world, tmp_path / name, data=paths, samples=12, save_every=1,
                           video_root=str(tmp_path / "videos"), **more)
        run(config)
        drawn[name] = runs.read_log(tmp_path / name / "data.jsonl")
    assert drawn["one"] == drawn["again"] != drawn["other"]
    for found in drawn.values():
        ids = [row.pop("problem_id") for row in found]
        assert found == [rows[id] for id in ids] and len(set(ids)) == 12
        assert ids == sorted(ids, key=list(rows).index) != list(rows)[:12] and "2/10" not in ids
        assert {id[0] for id in ids} == {"1", "2"}
    assert [row["reason"] for row in runs.read_log(tmp_path / "one/bad_samples.jsonl")] == [
        "no such file"]
    config = config_of(world, tmp_path / "whole", data=str(tmp_path / "one/data.jsonl"),
                       video_root=str(tmp_path / "videos"))
    assert [untimed(tmp_path / name / "metrics.jsonl") for name in ("one", "again")] == 2 * [
        [{k: v for k, v in row.items() if k not in TIMINGS} for row in run(config)]]
    with pytest.raises(ValueError, match="--samples 24: only 23 samples of --data .* have a media"):
        run(replace(config, data=paths, samples=24, output=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="--data .*c.json: there is no such file"):
        run(replace(config, data=f"{paths},{tmp_path}/c.json", output=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="^--data is missing"):
        run(replace(config, data=",", output=str(tmp_path / "none")))


@pytest.mark.parametrize("samples", (0, 12))
def test_a_run_on_several_files_resumes_to_the_same_or_not_at_all(world, tmp_path, samples):
    """Catches: another subset or order after a stop, because a medium has come or gone since."""
    paths, rows = two_files(world, tmp_path)
    config = config_of(world, tmp_path / "run", data=paths, samples=samples, steps=3, save_every=1,
                       video_root=str(tmp_path / "videos"))
    run(config)
    straight = untimed(tmp_path / "run/metrics.jsonl")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000003")
    before, gone = fingerprint(tmp_path / "run"), rows["1/0"]["path"]
    (tmp_path / "videos" / gone).rename(tmp_path / gone)
    with pytest.raises(ValueError, match="--video_root .* is not what the run in"):
        run(replace(config, resume=True))
    (tmp_path / gone).rename(tmp_path / "videos" / gone)
    assert fingerprint(tmp_path / "run") == before
    run(replace(config, resume=True))
    assert untimed(tmp_path / "run/metrics.jsonl") == straight
