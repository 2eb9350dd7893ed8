"""One page to look at: a run's curves, every rollout with its frames, its evaluation; or several.

    python -m lab.report RUN [RUN ...] [--output FILE --max_mb 10]

RUN is what train.py or evaluate.py left, or a folder of such folders. The page is one HTML file
that opens anywhere: no network, no server, nothing loaded from elsewhere. Several runs lie over
each other; those that differ in the seed alone are pooled.

lab/report.html is template, style and script. It is given facts and tables, and as JSON what the
script draws: curves, groups of rollouts, held-out questions, and each strip of thumbnails once.
"""

import base64
import hashlib
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from benchmarks.questions import CONVENTIONS, TITLES, score, tally, value
from benchmarks.results import Run, column, merged, overall, paper_line, passes, read_run, texts_of
from reward import EXACT_KINDS, parse_answer
from runs import (flag, one_sentence, parse, read_json, read_log, require, require_positive,
                  write_whole)


@dataclass(frozen=True)
class Config:
    """Every flag of the command line."""
    output: str = flag("", "file to write; empty: report.html in the run's folder, or, of several "
                           "runs, beside the first")
    max_mb: float = flag(10.0, "most megabytes of the page: texts are shortened, thumbnails made "
                               "smaller until it holds them")


OUTCOMES = {"right": "right at once", "repaired": "repaired", "failed": "repair failed",
            "unpatched": "wrong, no patch", "trace": "a trace, no try"}
FATES = {"kept": "right first and last", "learned": "learned: wrong first, right last",
         "lost": "lost: right first, wrong last", "between": "right in between only",
         "never": "never right", "open": "not scored"}
MISSING = {"metrics.jsonl": "no step has been finished", "eval.jsonl": "no held-out evaluation",
           "rollouts.jsonl": "no rollouts were kept, so there are no steps and slots to look at",
           "eval_answers.jsonl": "no held-out answers were kept"}
QUARTERS = "intervention_ratio", "repair_rate"
SHORTER = 4000, 2000, 1200, 800, 500, 300, 150, 80  # characters of a text that are shown
SMALLER = (96, 70), (72, 60), (64, 50), (56, 45), (48, 40), (40, 35), (32, 30)  # height, quality


# --- a run of train.py ----------------------------------------------------------------------------


def outcome(slot: dict) -> str:
    """Return what became of a slot, one of OUTCOMES."""
    if slot["trained"] == "trace":
        return "trace"
    if slot["first"]["correct"] or slot["repair"] is None:
        return "right" if slot["first"]["correct"] else "unpatched"
    return "repaired" if slot["repair"]["correct"] else "failed"


def why_negative(slot: dict, slots: list[dict]) -> str:
    """Return why a right repair has a negative advantage (Eq. 8, Eq. 9); "" for any other slot."""
    if outcome(slot) != "repaired" or slot["advantage"] >= 0:
        return ""
    reward, tax = slot["reward"], -slot["parts"].get("kappa", 0.0)
    mean = statistics.fmean(other["reward"] for other in slots)
    if reward >= mean:
        return "Right, with a negative advantage that the rewards of its group do not explain."
    more = [other for other in slots if other["reward"] > reward + 1e-9]
    free = sum(outcome(other) == "right" for other in more)
    why = f"{len(more)} of its {len(slots)} slots got more"
    if tax and free:
        why = f"{free} of its {len(slots)} first tries were right at once and pay no κ"
    taxed = f", {reward + tax:.2f} less κ = {tax:g}," if tax else ""
    formless = "; its format part is 0" if slot["parts"].get("format") == 0 else ""
    return (f"Right, and yet its advantage is negative: its reward {reward:.2f}{taxed} lies below "
            f"the mean of its group, {mean:.2f}, since {why} (Eq. 8, Eq. 9){formless}.")


def seen_slot(slot: dict, slots: list[dict]) -> dict:
    """Return a slot with what the page says of it and filters it by."""
    diagnosis = slot["diagnosis"] or {"status": "nobody asked", "reason": ""}
    kind = diagnosis["reason"].split(":")[0][:60]  # of a leak: what leaked, as guard.py names it
    leak = diagnosis["status"] == "refused" or kind.startswith("mended ")
    return slot | {"outcome": outcome(slot), "why": why_negative(slot, slots), "leak": leak,
                   "ended": ", ".join(filter(None, (diagnosis["status"], kind)))}


def series(rows: list[dict]) -> dict[str, list]:
    """Return {name: a value for each row, or None} of every number that the rows of a log hold."""
    def flat(row):
        found = {f"repair_rate/{k}": x for k, x in row.get("repair_rate_by_error", {}).items()}
        found |= {f"seconds/{k}": x for k, x in row.get("seconds", {}).items()}
        return found | {k: x for k, x in row.items() if isinstance(x, (int, float))}

    flats = [flat(row) for row in rows]
    names = dict.fromkeys(name for row in flats for name in row)
    return {name: [row.get(name) for row in flats] for name in names}


def fate(rights: Iterable[bool | None]) -> str:
    """Return what became of a question, one of FATES, from whether it was right each time."""
    rights = [right for right in rights if right is not None]
    if not rights:
        return "open"
    if rights[-1]:
        return "kept" if rights[0] else "learned"
    return "lost" if rights[0] else "between" if any(rights) else "never"


def held_out(rows: list[dict], pass_mark: float) -> dict:
    """Return all held-out questions with a cell for each evaluation, and what became of them.

    A cell: marks (right, right with a patch or None), the answers, the accuracy, the text.
    """
    steps, found = sorted({row["step"] for row in rows}), {}
    for row in rows:
        found.setdefault(row["id"], {})[row["step"]] = row

    def cell(row):
        mark = 1.0 if row["kind"] in EXACT_KINDS else pass_mark
        marks = [x if x is None else x >= mark for x in (row["accuracy"], row["patched_accuracy"])]
        return {"marks": marks, "answer": row["answer"], "other": row["patched_answer"],
                "value": row["accuracy"], "text": row["text"]}

    questions = []
    for id, by_step in found.items():
        row = next(iter(by_step.values()))
        cells = [cell(by_step[step]) if step in by_step else None for step in steps]
        questions.append({"id": id, "question": row["question"], "gold": row["gold"],
                          "groups": [row["kind"]], "cells": cells,
                          "fate": fate(one["marks"][0] for one in cells if one)})
    return {"columns": [f"step {step}" for step in steps], "questions": questions,
            "pair": ["without patch", "with patch"]}


def quarters(rows: list[dict], name: str) -> list[float | None]:
    """Return a metric's mean over the first and over the last quarter of the steps."""
    n = max(1, len(rows) // 4)
    parts = [[r[name] for r in part if r.get(name) is not None] for part in (rows[:n], rows[-n:])]
    return [statistics.fmean(part) if part else None for part in parts]


def training(folder: Path, room: int = 10**9) -> dict:
    """Return what the page shows of a run of train.py, whatever of it is there.

    Of rollouts that are many times larger than the page may be, some steps alone are looked at.
    """
    path, logs = folder / "config.json", {name: read_log(folder / name) for name in MISSING}
    metrics, evals, rollouts, answers = logs.values()
    evals = [{"accuracy_with_patches": None, **row} for row in evals]
    config, bad = read_json(path) if path.exists() else {}, read_log(folder / "bad_samples.jsonl")
    taught = [row.get("teacher", {}) for row in [*metrics, *evals]]
    done, planned = metrics[-1]["step"] + 1 if metrics else 0, config.get("steps") or 0
    notes = [f"{why} ({name} is missing or empty)" for name, why in MISSING.items()
             if not logs[name]] + ["config.json is missing"] * (not config)
    notes += [f"{done} of {planned} steps are done"] * (0 < done < planned)
    steps = sorted({row["step"] for row in rollouts})
    size = (folder / "rollouts.jsonl").stat().st_size if steps else 0
    kept = set(steps[::1 + size // (4 * room)])
    groups = [row | {"slots": [seen_slot(slot, row["slots"]) for slot in row["slots"]],
                     "strip": row["thumbnails"] and str(folder / row["thumbnails"]),
                     "dead": not any(slot["advantage"] for slot in row["slots"])}
              for row in rollouts if row["step"] in kept and row["slots"]]
    return {
        "folder": folder, "config": config, "about": config.pop("about", {}), "notes": notes,
        "done": done, "bad": bad, "unread": len({row["id"] for row in bad}),
        "sides": [evals[0], evals[-1] if len(evals) > 1 else None] if evals else [None, None],
        "quarters": {name: quarters(metrics, name) for name in QUARTERS},
        "calls": sum(t.get("calls", 0) for t in taught[:len(metrics)]),
        "dollars": sum(t.get("dollars", 0) for t in taught),
        "seconds": sum(row.get("seconds", {}).get("step", 0) for row in metrics),
        "drawn": {"metrics": series(metrics), "evals": series(evals), "groups": groups,
                  "table": held_out(answers, config.get("pass_mark", 0.5)) if answers else None,
                  "steps": len(steps)}}


# --- several runs ---------------------------------------------------------------------------------


def differing(runs: list[dict]) -> dict[str, list]:
    """Return the flags, and facts of commit and machine, in which runs differ: each run's value."""
    facts = ("commit", "python", "torch", "transformers", "cards", "processes", "student",
             "frozen")
    sides = [{name: x for name, x in run["config"].items() if name not in ("output", "resume")}
             | {name: run["about"].get(name) for name in facts}
             | {f"contents of --{name}": x for name, x in run["about"].get("files", {}).items()}
             for run in runs]
    found = {name: [side.get(name) for side in sides]
             for name in dict.fromkeys(name for side in sides for name in side)}
    return {name: values for name, values in found.items() if any(x != values[0] for x in values)}


def mean_sd(values: Iterable) -> tuple[float, float | None] | None:
    """Return mean and sample standard deviation of what is not None; None for nothing."""
    known = [x for x in values if x is not None]
    spread = statistics.stdev(known) if len(known) > 1 else None
    return (statistics.fmean(known), spread) if known else None


def pooled(runs: list[dict]) -> list[dict]:
    """Return the rows of the comparison: runs alike but for the seed, and as far, are one.

    Gives every run the number of its row. Rows are called by their flags where these tell them
    apart in few words, else by their runs.
    """
    pools, others = {}, {k: x for k, x in differing(runs).items() if k != "seed"}
    for i, run in enumerate(runs):
        key = [x[i] for x in others.values()] + [e and e["step"] for e in run["sides"]]
        pools.setdefault(json.dumps([key, run["done"]]), []).append(run)
    rows = []
    for members in pools.values():
        flags = [f"{name} {x[runs.index(members[0])]}" for name, x in others.items()
                 if name in members[0]["config"]]
        for run in members:
            run["row"] = len(rows)
        figures = [mean_sd(run["sides"][i] and run["sides"][i][key] for run in members)
                   for key in ("accuracy", "accuracy_with_patches") for i in (0, 1)]
        figures += [mean_sd(run[key] for run in members) for key in ("calls", "dollars", "seconds")]
        rows.append({"names": ", ".join(run["name"] for run in members), "flags": flags,
                     "done": members[0]["done"], "n": len(members), "figures": figures})
    apart = len({str(row["flags"]) for row in rows}) == len(rows) > 1
    brief = apart and all(len(row["flags"]) <= 3 for row in rows)
    return [row | {"label": ", ".join(row["flags"]) if brief else row["names"]} for row in rows]


# --- runs of evaluate.py --------------------------------------------------------------------------


def answered(runs: list[Run]) -> dict:
    """Return what the page shows of one benchmark's runs: figures by category, every question.

    A cell: marks (right by the official rule, by the family's), the answer, the text, and which of
    `frames` it was given to. What became of a question goes by the first mark that scores it.
    """
    figures = [score(run.config.benchmark, run.questions, texts_of(run), c, run.verdicts)
               for run in runs for c in CONVENTIONS]
    names = dict.fromkeys(name for side in figures for name in side)
    found = {q.id: {"id": q.id, "question": q.text, "gold": q.answer, "options": q.options,
                    "groups": q.groups or [q.kind], "cells": [None] * len(runs)}
             for run in runs for q in run.questions}
    frames = {}  # by name: those of several questions or runs are there once
    for k, run in enumerate(runs):
        kept = merged(run.folder, "frames")
        frames |= {name: row | {"strip": str(run.folder / name)}
                   for row in kept.values() for name in [row["thumbnails"]]}
        for q in (q for q in run.questions if q.id in run.answers):
            found[q.id]["cells"][k] = judged(run, q, kept.get(q.id, {}).get("thumbnails"))
    for entry in found.values():
        marks = [one["marks"] for one in entry["cells"] if one]
        entry["fate"] = fate(next((m for m in pair if m is not None), None) for pair in marks)
    title, places = TITLES.get(column(runs[0]), column(runs[0])), [run.folder.name for run in runs]
    places = places if len({*places}) == len(places) else [str(run.folder) for run in runs]
    return {"title": title, "runs": [headlines(run, runs) for run in runs],
            "paper": paper_line(column(runs[0])), "columns": places,
            "categories": {name: [side.get(name) for side in figures] for name in names},
            "drawn": {"title": title, "columns": places, "pair": CONVENTIONS, "frames": frames,
                      "questions": list(found.values())}}


def headlines(run: Run, runs: list[Run]) -> dict:
    """Return a run's row of figures, its blind run's and its own with patches below it.

    A blind run is one whose label another run names as its own without the videos.
    """
    blind = next((other for other in runs if other is not run and other.config.label
                  == run.config.label_blind and other.config.seed == run.config.seed), None)
    rows = {run.config.label: [overall(run, c) for c in CONVENTIONS]}
    if blind:
        rows["blind: the same without the videos"] = [overall(blind, c) for c in CONVENTIONS]
    if run.patched:
        rows["with patches, an upper bound"] = [overall(run, c, True) for c in CONVENTIONS]
    counts = tally(run.questions, run.answers) | {"with frames": len(merged(run.folder, "frames"))}
    counts = {name: n for name, n in counts.items() if n}
    return {"folder": run.folder, "seed": run.config.seed, "rows": rows, "counts": counts}


def judged(run: Run, q: Any, frames: str | None) -> dict:
    """Return a question's answer as a cell, with whether it is right by each convention."""
    said = run.answers[q.id]
    found = [value(run.config.benchmark, q, said["text"], c, run.verdicts) for c in CONVENTIONS]
    return {"marks": [None if x is None else bool(passes(q, x)) for x in found], "value": found[0],
            "answer": parse_answer(said["text"]), "other": None, "frames": frames,
            "text": said["text"] or said.get("error", "")}


# --- the page -------------------------------------------------------------------------------------


def runs_in(folders: Iterable[Path | str]) -> list[Path]:
    """Return the folders of runs among these folders, or one level below them, each once."""
    def holds_run(path):
        config = path / "config.json"  # a checkpoint has one as well
        return (path / "metrics.jsonl").exists() or (path / "questions.jsonl").exists() \
            or config.exists() and "method" in read_json(config)

    found = {}
    for folder in map(Path, folders):
        require(folder.is_dir(), f"{folder}: there is no such folder")
        inside = [folder] if holds_run(folder) else \
            [path for path in sorted(folder.iterdir()) if path.is_dir() and holds_run(path)]
        require(inside, f"{folder} holds no run, nor does a folder in it: a run of train.py has "
                "config.json, one of evaluate.py questions.jsonl")
        found |= {path.resolve(): path for path in inside}
    return list(found.values())


def gather(folders: Iterable[Path | str], room: int) -> tuple[dict, dict]:
    """Return what the template shows of these folders, and what the script draws."""
    paths = runs_in(folders)
    asked = [path for path in paths if (path / "questions.jsonl").exists()]
    runs = [training(path, room) for path in paths if path not in asked]
    places = [run["folder"].resolve() for run in runs]
    for run, place in zip(runs, places):
        alone = [other.name for other in places].count(place.name) == 1
        run["name"] = place.name if alone else f"{place.parent.name}/{place.name}"
    benchmarks, several = {}, len(paths) > 1
    for run in map(read_run, asked):
        benchmarks.setdefault(column(run), []).append(run)
    page = {"title": f"{len(paths)} runs side by side" if several else paths[0].resolve().name,
            "several": several, "differing": differing(runs), "rows": pooled(runs), "runs": runs,
            "evaluations": [answered(group) for group in benchmarks.values()]}
    drawn = {
        "runs": [{"name": run["name"], "row": run["row"], **run.pop("drawn")} for run in runs],
        "rows": [row["label"] for row in page["rows"]], "outcomes": OUTCOMES, "fates": FATES,
        "evaluations": [found.pop("drawn") for found in page["evaluations"]]}
    return page, json.loads(json.dumps(drawn), parse_constant=lambda _: None,  # NaN is no JSON
                            parse_float=lambda digits: float(f"{float(digits):.5g}"))


def shorten(drawn: dict, size: Callable[[], int], room: int) -> list[str]:
    """Shorten texts, then leave out kept steps, until `size` is within `room`; say what was done.

    A text loses its middle: what counts is how it begins and what it answers.
    """
    tables = [*drawn["evaluations"], *(run["table"] for run in drawn["runs"] if run["table"])]
    holders = [one for run in drawn["runs"] for group in run["groups"] for slot in group["slots"]
               for one in (slot["first"], slot["repair"]) if one]
    holders += [one for table in tables for q in table["questions"] for one in q["cells"] if one]
    over, said = size() - room, []
    for limit in SHORTER if over > 0 else ():
        long = [one for one in holders if len(one["text"]) > limit + 40]
        if limit == SHORTER[-1] or sum(len(one["text"]) - limit - 5 for one in long) >= over:
            for one in long:
                begin, end = one["text"][:2 * limit // 3], one["text"][-limit // 3:]
                one["text"] = f"{begin} […] {end}"
            said = [f"{len(long)} texts of more than {limit} characters lack their middle"]
            break
    steps = sorted({group["step"] for run in drawn["runs"] for group in run["groups"]})
    kept = steps
    while kept and (now := size()) > room:  # evenly spread ones
        n = int(len(kept) * 0.97 * room / now)
        kept = [steps[i * len(steps) // n] for i in range(n)]
        for run in drawn["runs"]:
            run["groups"] = [group for group in run["groups"] if group["step"] in kept]
    there = sum(run["steps"] for run in drawn["runs"])
    shown = sum(len({group["step"] for group in run["groups"]}) for run in drawn["runs"])
    left = f"rollouts are shown of {shown} of the {there} steps of which they were kept"
    return said + [left] * (shown < there)


def smaller(data: bytes, width: int, level: tuple[int, int] | None) -> bytes:
    """Return a strip of frames of `width` with frames of at most a height, as JPEG of a quality."""
    if level is None:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    frames, scale = max(1, round(image.width / width)), min(1.0, level[0] / image.height)
    size = frames * max(1, round(width * scale)), max(1, round(image.height * scale))
    image.resize(size).save(file := io.BytesIO(), "JPEG", quality=level[1])
    return file.getvalue()


def thumbnails(groups: list[dict], room: int) -> tuple[dict[str, str], list[str]]:
    """Return the groups' strips as base64 by name, in `room` bytes, and what is missing of them.

    Puts the name of its strip in place of each group's path; None where there is none.
    """
    def size(data):
        return 4 * (len(data) + 2) // 3 + 20  # in base64, with its name

    strips, names = {}, {None: None}
    for group in groups:
        path, width = group["strip"], (group["thumbnail_size"] or [1])[0]
        if path not in names:
            data = Path(path).read_bytes() if Path(path).is_file() else b""
            whole = data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")
            names[path] = hashlib.sha256(data).hexdigest()[:12] if whole else None
            strips |= {names[path]: (data, width)} if whole else {}
        group["strip"] = names[path]
    shown, wanted, level = {}, list(strips.values()), None
    for level in (None, *SMALLER) if wanted else ():  # tried on all, then on a dozen of them
        some = wanted[::max(1, len(wanted) // 12)] if level else wanted
        if 1.05 * statistics.fmean(size(smaller(*s, level)) for s in some) * len(wanted) <= room:
            break
    for name, strip in strips.items():
        data = smaller(*strip, level)
        if size(data) <= room:
            shown[name], room = base64.b64encode(data).decode(), room - size(data)
    left, torn = len(strips) - len(shown), sum(name is None for name in names.values()) - 1
    said = [f"frames are shown at most {level[0]} pixels high"] if level else []
    said += [f"{left} strips of frames have no room"] * bool(left)
    return shown, said + [f"{torn} strips of frames are missing or damaged"] * bool(torn)


def embedded(x: Any) -> Markup:
    """Return a value as JSON in which no tag can end or open."""
    text = json.dumps(x, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


@cache
def template() -> jinja2.Template:
    """Return report.html, which escapes what it is given and lets no script but its own run."""
    text = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", text, re.S)[1]
    made = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    made.globals["allowed"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return made.from_string(text)


def write(folders: Sequence[Path | str], output: Path | str = "", max_mb: float = 10.0) -> Path:
    """Write the page of these runs and return its path; finished or not, as far as they are.

    It replaces a page of before in one go. ValueError where a folder holds no run, a line is
    damaged or `max_mb` is too small for the least page; OSError where it cannot be written.
    """
    def size():
        return shell + len(embedded(drawn).encode("utf-8", "backslashreplace"))

    base, room = Path(folders[0]), int(1e6 * max_mb)
    output = Path(output or (base if len(folders) == 1 else base.parent) / "report.html")
    page, drawn = gather(folders, room)
    shell = len(template().render(page, max_mb=max_mb).encode("utf-8", "backslashreplace")) + 500
    asked = [one for table in drawn["evaluations"] for one in table["frames"].values()]
    groups = asked + [group for run in drawn["runs"] for group in run["groups"]]
    paths = {group["strip"] for group in groups} - {None}
    strips = {path.name: path.stat().st_size for path in map(Path, paths) if path.is_file()}
    said = shorten(drawn, size, int(max(0.5 * room, room - 1.4 * sum(strips.values()))))
    least = size()
    require(least <= room, f"--max_mb {max_mb:g}: without rollouts the page has {least / 1e6:.2g}")
    groups = asked + [group for run in drawn["runs"] for group in run["groups"]]
    shown, more = thumbnails(groups, room - least)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, template().render(page, max_mb=max_mb, said=said + more,
                                          drawn=embedded(drawn), strips=embedded(shown)))
    return output


def main(argv: list[str] | None = None) -> None:
    """Write the page of the runs that the command line names."""
    argv = sys.argv[1:] if argv is None else argv
    folders = list(takewhile(lambda word: not word.startswith("-"), argv))
    config, _ = parse(Config, argv[len(folders):], __doc__.split("\n\n")[0])
    with one_sentence("lab.report"):
        require(folders, "which runs? python -m lab.report RUN [RUN ...], then flags")
        require_positive(config, "max_mb")
        print(write(folders, config.output, config.max_mb))


if __name__ == "__main__":
    main()
