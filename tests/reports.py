"""Run folders as train.py leaves them, made up: what lab/report.py is to show, without a student.

    make_run(folder, steps=4, ranks=2, prompts=2, rollouts=4)

Every kind of slot occurs: right at once, repaired, failed, refused for a leak, nobody asked, a
trace; patches with ranges, with boxes, with neither; texts that would be markup.
"""

import json
import random
from pathlib import Path

from PIL import Image

from runs import digest

TIMES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
WIDTH, HEIGHT = 64, 36  # of a thumbnail
MARKUP = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> & \"quotes\""
BOX = (0.25, 0.25, 0.75, 0.75)


def lines(path, rows, torn=""):
    """Write rows as JSON lines, and behind them what a kill has left of one."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def strip(path, rng, size, noisy=False):
    """Write a strip of ever lighter frames as JPEG; noisy ones are several times as large."""
    width, height = size[0] * len(TIMES), size[1]
    image, darkest = Image.new("RGB", (width, height)), 40 + 2 * len(list(path.parent.iterdir()))
    for i in range(len(TIMES)):
        image.paste(3 * (darkest + 25 * i,), (i * size[0], 0, (i + 1) * size[0], height))
    if noisy:
        small = width // 4, height // 4
        image = Image.frombytes("RGB", small, rng.randbytes(3 * small[0] * small[1]))
        image = image.resize((width, height))
    image.save(path, "JPEG", quality=80)


def said(rng, right, words=""):
    """Return a rollout as rollouts.jsonl has it."""
    answer = "red" if right else rng.choice(("blue", "green", None))
    text = f"<think>{words or 'I look.'}</think>\n<answer>{answer}</answer>" if answer else "Hm."
    return {"text": text, "answer": answer, "accuracy": float(right), "format": float(bool(answer)),
            "correct": right, "tokens": rng.randint(8, 30), "finished": True}


def made_patch(error="temporal", frames=(2, 3), regions=(BOX,)):
    """Return a patch as asdict gives it."""
    return {"error_type": error, "query_kind": "attribute", "guidance": "Look closely.",
            "key_frames": frames, "times": frames and (TIMES[frames[0]], TIMES[frames[1]]),
            "temporal_markers": ["at the end"], "regions": regions}


def slot(rng, kind, kappa=0.3, words=""):
    """Return a slot of one kind; its advantage is the group's to compute."""
    patch = {"repaired": made_patch(), "failed": made_patch("spatial", (0, 1), ()),
             "mended": made_patch("misconception", None, (BOX, (0.0, 0.0, 0.5, 0.5)))}.get(kind)
    diagnosis = {"refused": {"status": "refused", "reason": "direct: the gold answer"},
                 "mended": {"status": "patched", "reason": "mended partial: a colour"},
                 "dear": {"status": "budget", "reason": "budget spent"}}.get(
        kind, patch and {"status": "patched", "reason": ""})
    first, repair = said(rng, kind in ("right", "trace"), words), None
    if patch:
        repair = said(rng, kind != "failed", words)
    chosen = repair or first
    parts = {"accuracy": chosen["accuracy"], "format": chosen["format"],
             "kappa": -kappa if repair else 0, "alignment": 0.0}
    trained = "trace" if kind == "trace" else "repair" if repair else "first"
    return {"first": first, "diagnosis": diagnosis, "patch": patch,
            "patch_text": patch and "\nEvidence: look again.", "repair": repair,
            "reward": sum(parts.values()), "parts": parts, "advantage": 0.0, "trained": trained,
            "entropy": 0.25, "log_ratio": -0.01, "staleness": 0}


KINDS = ("right", "repaired", "failed", "refused", "mended", "dear", "alone", "trace")


def group(rng, folder, step, rank, sample, kinds, words="", noisy=False, size=(WIDTH, HEIGHT)):
    """Return a line of rollouts.jsonl, its strip written where it is not there yet."""
    name = f"thumbnails/{digest(sample)}.jpg"
    if not (folder / name).exists():
        strip(folder / name, rng, size, noisy)
    slots = [slot(rng, kind, words=words) for kind in kinds]
    mean = sum(one["reward"] for one in slots) / len(slots)
    for one in slots:
        one["advantage"] = round(one["reward"] - mean, 6)
    return {"step": step, "rank": rank, "sample": sample, "question": f"What colour? {MARKUP}",
            "options": [], "kind": "free-form", "answer": "red", "media": "clips/0007.mp4",
            "media_type": "video", "times": TIMES, "thumbnails": name,
            "thumbnail_size": list(size), "slots": slots}


def metrics(rng, step, kinds):
    """Return a line of metrics.jsonl."""
    return {"step": step, "reward": rng.random(), "accuracy": rng.random(), "chosen_accuracy": 0.5,
            "intervention_ratio": 0.5, "repair_rate": None if step == 1 else rng.random(),
            "repair_rate_by_error": {kind: 0.5 for kind in kinds}, "error_types": {},
            "advantage_zero_fraction": 0.0, "kl": 0.0, "entropy": rng.random(),
            "clip_fraction": 0.0, "logp_mismatch": 1e-7, "completion_length": 20.0 + step,
            "tokens_per_second": 4000.0, "teacher": {"calls": 7, "dollars": 0.25},
            "seconds": {"load": 0.1, "decode": 0.3, "train": 0.6, "other": 0.0, "step": 1.0}}


def make_run(folder, steps=4, ranks=2, prompts=2, kinds=KINDS, samples=3, seed=0, words="",
             noisy=False, size=(WIDTH, HEIGHT), torn='{"step": 99, "ran', **flags):
    """Write a run's folder and return its path."""
    folder, rng = Path(folder), random.Random(seed)
    (folder / "thumbnails").mkdir(parents=True)
    config = {"method": "ffr", "model": "student", "data": "train.json", "eval_data": "held.json",
              "output": str(folder), "resume": False, "seed": seed, "steps": steps, "kappa": 0.3,
              "batch_prompts": prompts, "rollouts": len(kinds), "teacher": "annotated",
              "pass_mark": 0.5, "template": MARKUP, **flags}
    about = {"command": f"train.py {MARKUP} --output {folder}", "commit": "c0ffee",
             "python": "3.11", "torch": "2.15", "transformers": "5.23", "cards": [],
             "processes": ranks, "student": "s", "files": {}}
    (folder / "config.json").write_text(json.dumps(config | {"about": about}))
    names = [f"sample-{i}" for i in range(samples)]
    rows = []
    for step in range(steps):
        for place in range(ranks * prompts):
            order = list(kinds) if place else ["repaired", *(k for k in kinds if k != "repaired")]
            if place == 1:
                order = ["right"] * len(kinds)  # a dead group
            sample = names[(step * ranks * prompts + place) % samples]
            rows.append(group(rng, folder, step, place // prompts, sample, order, words, noisy,
                              size))
    lines(folder / "rollouts.jsonl", rows, torn)
    lines(folder / "metrics.jsonl", [metrics(rng, s, ("temporal", "spatial")[:1 + s % 2])
                                     for s in range(steps)], torn)
    evals = [{"step": step, "n": 5, "accuracy": accuracy, "accuracy_with_patches": 0.9,
              "teacher": {"calls": 2, "dollars": 0.5}}
             for step, accuracy in ((0, 0.4), (steps, 0.5 + seed / 10))]
    lines(folder / "eval.jsonl", evals, torn)
    fates = (("kept", 1, 1, 1), ("learned", 0, 0, 1), ("lost", 1, 0, 0), ("between", 0, 1, 0),
             ("never", 0, 0, 0))
    lines(folder / "eval_answers.jsonl", [
        {"step": step, "id": name, "kind": "numerical" if name == "lost" else "free-form",
         "answer": "3" if right else None, "gold": "3", "accuracy": float(right), "text": MARKUP,
         "patched_accuracy": 1.0, "patched_answer": "3", "question": f"{name}? {MARKUP}"}
        for i, step in enumerate((0, steps // 2, steps)) for name, *rights in fates
        for right in [rights[i]]], torn)
    lines(folder / "bad_samples.jsonl", [{"step": 0, "id": "bad-1", "media": "x.mp4",
                                          "reason": f"no such file {MARKUP}"}])
    return folder
