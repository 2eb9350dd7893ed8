"""What runs of evaluate.py leave, and what is printed about them: everything from files alone.

    run = read_run("runs/mmvu-M-16-0")       settings, questions, answers, verdicts of one run
    print(report(run))                       its figures by both conventions, the paper's beside
    print(table(["runs", "--paper", "2"]))   rows of eight benchmarks, both conventions

python evaluate.py table RUN... prints the last. The paper's rows are in paper_tables.json.

Shares are in 0..1 here and in percent where they are printed. Spread over seeds divides by n, which
gives the paper's Table 17 from its seeds, to a rounding.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.questions import (CONVENTIONS, REASONING, TITLES, Question, cell, headline,
                                  knowledge, readable, score, tally, values, weights)
from reward import GRADED_KINDS
from runs import digest, read_json, read_log, read_rows, require

# ---------------------------------------------------------------------------------------------
# The folder of a run


@dataclass
class Run:
    """What a run left: settings, questions, and rows by question id."""

    folder: Path
    config: SimpleNamespace  # the flags, and `label`, how a table calls the run's row
    questions: list[Question]
    answers: dict
    patched: dict
    verdicts: dict | None


Rows = dict[str, dict[str, dict[int, Run]]]  # a table's: {row's label: {benchmark: {seed: run}}}


def merged(folder: Path, name: str) -> dict[str, dict]:
    """Return rows by id from the files of all processes: the last one of each id.

    No error replaces an answer.
    """
    found = {}
    for path in sorted(folder.glob(f"{name}*.jsonl")):
        for row in read_log(path):
            if not row.get("error") or found.get(row["id"], row).get("error"):
                found[row["id"]] = row
    return found


def read_run(folder: Path | str) -> Run:
    """Return a run from its files.

    Its verdicts are those on answers that are still there, by their digests; None without a judge.
    """
    folder = Path(folder)
    try:
        older = {"direct": False, "label_blind": ""}  # what runs had that knew no such flags
        config = SimpleNamespace(**older | read_json(folder / "config.json"))
        questions = [Question(**{name: tuple(v) if isinstance(v, list) else v
                                 for name, v in row.items()})
                     for row in read_rows(folder / "questions.jsonl")]
    except (OSError, TypeError) as error:
        raise ValueError(f"{folder} is no folder of a run: {error}") from None
    answers = merged(folder, "answers")
    verdicts = {id: row["verdict"] for id, row in merged(folder, "verdicts").items()
                if row["of"] == digest(answers.get(id, {}).get("text", ""))}
    if not config.judge and not any(folder.glob("verdicts*.jsonl")):
        verdicts = None
    return Run(folder, config, questions, answers, merged(folder, "patched"), verdicts)


# ---------------------------------------------------------------------------------------------
# Tables


def percent(x: float | None) -> str:
    """Return a share in percent, a dash where there is none."""
    return "–" if x is None else f"{100 * x:.1f}"


def markdown(head: list[str], body: Iterable[list[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def texts_of(run: Run, patched: bool = False) -> dict[str, str]:
    """Return answers by id; with `patched`, those given with a patch replace the failed ones."""
    return {id: row["text"] for id, row in (run.answers | (run.patched if patched else {})).items()}


def column(run: Run) -> str:
    """Return the benchmark whose column a run fills; a file of the family's tells by its name.

    A file of one's own, one of the family's that is none of the eight, and --question_only have
    columns of their own.
    """
    stem = Path(run.config.data).stem
    if run.config.benchmark == "own":
        return f"own: {stem}"
    if run.config.benchmark != "family":
        return run.config.benchmark + ", question only" * run.config.question_only
    name = stem.lower()
    return next((b for b in TITLES if b in name), {"eval_lvb": "longvideobench"}.get(name, stem))


def overall(run: Run, convention: str, patched: bool = False,
            questions: Sequence[Question] | None = None) -> float | None:
    """Return the headline of a run, None where the convention scores none of the questions."""
    scored = values(run.config.benchmark, run.questions if questions is None else questions,
                    texts_of(run, patched), convention, run.verdicts)
    return headline(run.config.benchmark, scored, convention)[0] if scored else None


def passes(q: Question, value: float) -> bool:
    """Return z of Eq. 4 for a question's value: exact kinds pass at 1, graded ones from 0.5."""
    return value >= (0.5 if q.kind in GRADED_KINDS else 1.0)


def seen(run: Run) -> list[Question]:
    """Return the questions whose video was there and that the model has said something to."""
    return [q for q in run.questions if run.answers.get(q.id, {}).get("text", "").strip()]


def report(run: Run) -> str:
    """Return all figures of one run as Markdown: counts, both conventions, the paper's numbers."""
    config, texts, counts = run.config, texts_of(run), tally(run.questions, run.answers)
    told = [q for q in seen(run) if readable(q, texts[q.id])]

    def figures(questions):
        return [score(config.benchmark, questions, texts, c, run.verdicts) for c in CONVENTIONS]

    official, family = figures(run.questions)
    names = list(dict.fromkeys([*official, *family]))
    body = [[name, *cells(official, name), *cells(family, name)] for name in names]
    body[1:1] = [[label, *(part for f in figures(some) for part in cells(f, "overall"))]
                 for label, some in (("overall, of those with a video and an answer", seen(run)),
                                     ("overall, of the readable ones among them", told))]
    if run.patched:
        got = sum(row.get("status") == "patched" for row in run.patched.values())
        body.append([f"upper bound: {got} of {len(run.patched)} failed ones again, with a patch",
                     *(part for c, f in zip(CONVENTIONS, (official, family)) for part in
                       (percent(overall(run, c, patched=True)), cells(f, "overall")[1]))])
    title = f"{TITLES.get(column(run), column(run))}, {config.label}, seed {config.seed}"
    own = "lenient" if config.benchmark in ("family", "own") else "official"
    parts = [f"## {title}", ", ".join(f"{n} {name}" for name, n in counts.items()),
             markdown(["", own, "n", "family", "n"], body)]
    if unjudged := len(run.questions) - official["overall"][1] if official else len(run.questions):
        parts.append(f"Left out of the official figures: {unjudged} questions that only a judge "
                     "can score (--judge).")
    if config.direct and (n := sum("<think>" in text for text in texts.values())):
        parts.append(f"{n} answers reason all the same: they hold <think>.")
    if row := paper_line(column(run)):
        parts.append(row)
    return "\n\n".join(parts)


def cells(figures: dict[str, tuple[float, int]], name: str) -> tuple[str, str]:
    """Return a figure and its number of questions, as cells."""
    return (percent(figures[name][0]), str(figures[name][1])) if name in figures else ("–", "–")


def paper() -> dict:
    """Return the paper's tables: {"columns", "tables": {number: {"title", "rows"}}}."""
    return read_json(Path(__file__).with_name("paper_tables.json"))


def paper_line(benchmark: str) -> str:
    """Return the paper's Table 2 for one benchmark, in a line."""
    found = paper()
    if benchmark not in found["columns"]:
        return ""
    place = found["columns"].index(benchmark)
    return "The paper's Table 2: " + " · ".join(
        f"{name} {row[place]:g}" for name, row in found["tables"]["2"]["rows"].items()
        if row[place] is not None)


def find_runs(folders: Iterable[str]) -> tuple[list[Run], list[Path]]:
    """Return the runs in the folders given or one level below them, and what there is no run."""
    found, others = {}, []
    for folder in map(Path, folders):
        inside = [folder] if (folder / "config.json").exists() else \
            sorted(path for path in folder.glob("*/") if path.is_dir())
        runs = [path for path in inside if path == folder or (path / "questions.jsonl").exists()]
        if not runs:
            raise ValueError(f"{folder} holds no run of evaluate.py, nor does a folder in it: "
                             "there is no questions.jsonl")
        found |= {path.resolve(): path for path in runs}  # one that is given twice counts once
        others += [path for path in inside if path not in runs]
    return [read_run(path) for path in found.values()], others


def by_row(runs: Iterable[Run]) -> Rows:
    """Return {row's label: {benchmark: {seed: run}}}."""
    table = {}
    for run in runs:
        seeds = table.setdefault(run.config.label, {}).setdefault(column(run), {})
        if run.config.seed in seeds:
            raise ValueError(f"{seeds[run.config.seed].folder} and {run.folder} are both "
                             f"{column(run)} of {run.config.label} with seed {run.config.seed}")
        seeds[run.config.seed] = run
    return table


def mean_std(xs: Sequence[float]) -> str:
    """Return the mean and, of several, the standard deviation (divided by n, as in Table 17)."""
    return percent(np.mean(xs)) + (f" ± {100 * np.std(xs):.1f}" if len(xs) > 1 else "")


def table_row(label: str, columns: dict[str, dict[int, float]],
              others: Sequence[str] = ()) -> list[str]:
    """Return a row of eight benchmarks, two averages, and the other columns.

    columns: {benchmark: {seed: share right}}
    """
    def cells_of(names):
        return [mean_std(list(columns[b].values())) if columns.get(b) else "–" for b in names]

    row = [label, *cells_of(TITLES)]
    for part in (REASONING, tuple(TITLES)):
        seeds = [set(columns.get(b, ())) for b in part]
        if not all(seeds):
            row.append("–")
        elif all(s == seeds[0] for s in seeds):
            row.append(mean_std([np.mean([columns[b][s] for b in part]) for s in sorted(seeds[0])]))
        else:  # other seeds in other columns
            row.append(percent(np.mean([np.mean(list(columns[b].values())) for b in part])))
    return row + cells_of(others)


def main_table(rows_: Rows, convention: str, numbers: Sequence[str]) -> str:
    """Return the columns by one convention, the paper's tables of these numbers below."""
    body, others = [], sorted({b for columns in rows_.values() for b in columns} - set(TITLES))
    for label, columns in rows_.items():
        for patched in (False, True):
            found = {b: {seed: overall(run, convention, patched) for seed, run in seeds.items()
                         if run.patched or not patched} for b, seeds in columns.items()}
            found = {b: {seed: x for seed, x in seeds.items() if x is not None}
                     for b, seeds in found.items()}
            if any(found.values()):
                body.append(table_row(label + " + patches (upper bound)" * patched, found, others))
    for number in numbers:
        for name, values_ in paper()["tables"][number]["rows"].items():
            columns = {b: {0: x / 100} for b, x in zip(TITLES, values_) if x is not None}
            body.append(table_row(f"paper, Table {number}: {name}", columns, others))
    return markdown(["", *TITLES.values(), "average, reasoning", "average, all", *others], body)


def difference(first: dict[int, Run], second: dict[int, Run], convention: str,
               resamples: int = 2000) -> tuple[float, float, float, int] | None:
    """Return (mean of second − first, low, high, questions): a paired 95 % bootstrap interval.

    first, second: {seed: run} of one benchmark; seeds are averaged for each question. Questions are
    drawn anew within each cell of the headline, so that its weights stay.
    """
    shares = []
    for runs in (first, second):
        found = {}
        for run in runs.values():
            for q, v in values(run.config.benchmark, run.questions, texts_of(run), convention,
                               run.verdicts):
                found.setdefault(q.id, (q, []))[1].append(v)
        shares.append(found)
    both = [(q, np.mean(vs), np.mean(shares[1][id][1])) for id, (q, vs) in shares[0].items()
            if id in shares[1]]
    if not both:
        return None
    benchmark = next(iter(first.values())).config.benchmark
    places = [cell(benchmark, q, convention) for q, _, _ in both]
    change, weight = np.array([b - a for _, a, b in both]), weights(places)
    rng, totals = np.random.default_rng(0), np.zeros(resamples)
    for place in dict.fromkeys(places):
        inside = np.array([p == place for p in places])
        d, w = change[inside], weight[inside].sum()
        totals += [w * d[rng.integers(0, len(d), len(d))].mean() for _ in range(resamples)]
    low, high = np.percentile(totals, (2.5, 97.5))
    return float(weight @ change), float(low), float(high), len(both)


def comparison(rows_: Rows) -> str:
    """Return paired differences between the two rows of a table, benchmark by benchmark."""
    (a, first), (b, second) = rows_.items()
    body = []
    for benchmark in (name for name in first if name in second):
        for convention in CONVENTIONS:
            found = difference(first[benchmark], second[benchmark], convention)
            if found:
                change, low, high, n = (100 * x for x in found)
                body.append([f"{benchmark}, {convention}", f"{change:+.1f}",
                             f"{low:+.1f} to {high:+.1f}", f"{n / 100:.0f}"])
    return f"### {b} minus {a}\n\n" + markdown(["", "points", "95 % interval", "n"], body)


def without_video(runs: Sequence[Run]) -> list[str]:
    """Return a table of runs beside their student's blind runs, on what both score; or no table."""
    body, found = [], {(r.config.label, column(r), r.config.seed): r for r in runs}
    for (label, name, seed), run in found.items():
        blind = found.get((run.config.label_blind, name, seed), run)
        for convention in CONVENTIONS if blind is not run else ():
            right, told = ({q.id: passes(q, v) for q, v in values(
                r.config.benchmark, r.questions, texts_of(r), convention, r.verdicts)}
                for r in (run, blind))
            both = [q for q in run.questions if q.id in right and q.id in told]
            missed = [q for q in both if not told[q.id]]
            shares = (overall(r, convention, questions=part)
                      for r, part in ((run, both), (blind, both), (run, missed)))
            body.append([f"{label}, {name}, seed {seed}, {convention}", *map(percent, shares),
                         str(len(both)), str(len(missed))])
    head = ["", "accuracy", "blind", "where blind is wrong", "n", "n of these"]
    return ["### with and without the video\n\n" + markdown(head, body)] if body else []


def overlap(path: str, questions: Sequence[Question]) -> str:
    """Return how much of a benchmark occurs in a training file: files by name, questions by words.

    What stands in brackets is no word; lines that are put around a question do not matter.
    """
    def words(text):
        return " ".join(re.findall(r"\w+", re.sub(r"\([^()]*\)|<[^<>]*>", " ", text.casefold())))

    rows_, alike, both = read_rows(path), 0, 0
    require(rows_ and all(isinstance(row, dict) and {"path", "problem"} <= row.keys()
                          for row in rows_), f"--trained_on {path} is no training file: it has "
            "no rows, or one without problem and path")
    trained = {(Path(str(row["path"])).stem, words(str(row["problem"]))) for row in rows_}
    names, texts = ({pair[i] for pair in trained} for i in (0, 1))
    for q in questions:
        parts = [q.text, q.text.partition("\n")[2], q.text.rpartition("\n")[0],
                 q.text.rpartition("\n\n")[2]]
        asked = set(map(words, parts)) & texts - {""}
        alike += bool(asked)
        both += any((Path(q.media).stem, text) in trained for text in asked)
    media = {Path(q.media).stem for q in questions}
    return f"In {path} occur {len(media & names)} of {len(media)} files, by their names, and " \
           f"{alike} of {len(questions)} questions, by their words, {both} with their file."


def gained_knowledge(rows_: Rows) -> list[str]:
    """Return lines on Δknowledge, where a row has Video-MMMU with and without the lecture."""
    lines = []
    for label, columns in rows_.items():
        before, after = (columns.get(b, {}) for b in ("videommmu, question only", "videommmu"))
        for seed in sorted(set(before) & set(after)):
            track = [{q.id: v for q, v in values("videommmu", run.questions, texts_of(run),
                                                 "official") if q.groups[0] == "Adaptation"}
                     for run in (before[seed], after[seed])]
            ids = [id for id in track[0] if id in track[1]]
            wrong, right = ([id for id in ids if bool(track[0][id]) is r] for r in (False, True))
            x, y = (100 * np.mean([part[id] for id in ids]) for part in track)
            gained, lost = (np.mean([track[1][id] != track[0][id] for id in part] or [0])
                            for part in (wrong, right))
            lines.append(f"{label}, seed {seed}: Δknowledge {knowledge(x, y):+.1f} (Adaptation "
                         f"{x:.1f} without the lecture, {y:.1f} with it; wrong to right "
                         f"{percent(gained)} %, right to wrong {percent(lost)} %)")
    return lines


def table(argv: Sequence[str]) -> str:
    """Return what `table RUN... --paper` prints: Markdown over runs, from their files alone."""
    parser = argparse.ArgumentParser(prog="evaluate.py table", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders of such folders")
    parser.add_argument("--paper", nargs="?", const="2", default="", metavar="TABLES",
                        help="add the paper's rows: Table 2, or these, as in 2,16,17")
    parser.add_argument("--details", action="store_true", help="add every run's own figures")
    options = parser.parse_args(argv)
    numbers = [number for number in options.paper.split(",") if number]
    for number in numbers:
        if number not in paper()["tables"]:
            raise ValueError(f"--paper {number}: there are Tables {', '.join(paper()['tables'])}")
    runs, skipped = find_runs(options.runs)
    rows_ = by_row(runs)
    parts = [f"### {c}\n\n{main_table(rows_, c, numbers)}" for c in CONVENTIONS]
    if any(run.config.benchmark in ("family", "own") for run in runs):
        parts.insert(1, "Here files of the family's and one's own are scored leniently, over all "
                        "questions.")
    body = [[f"{label}, {benchmark}, seed {seed}",
             *map(str, tally(run.questions, run.answers).values()),
             *(percent(overall(run, c, questions=some)) for c in CONVENTIONS
               for some in (run.questions, seen(run)))]
            for label, columns in rows_.items() for benchmark, seeds in columns.items()
            for seed, run in seeds.items()]
    parts.append("### answers\n\n" + markdown(
        ["", *tally([], {}), *(f"{c}{which}" for c in CONVENTIONS
                               for which in ("", ", of those answered"))], body))
    parts += gained_knowledge(rows_) + without_video(runs)
    if len(rows_) == 2:
        parts.append(comparison(rows_))
    if options.details:
        parts += map(report, runs)
    if skipped:
        parts.append("Left out, as they hold no questions.jsonl: " + ", ".join(map(str, skipped)))
    return "\n\n".join(parts)
