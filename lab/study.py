"""The study: many runs on the toy world, one table of what they say.

    python -m lab.study [--jobs N --seeds 0,1,2 --only NAME,... --guessed 0.99,0.8 --report]

Trains with every method and ablation, from starts that guess more and less, one train.py process a
run, and writes OUTPUT/study.md and, where matplotlib is installed, its plots. Finished runs are not
repeated: after an interruption the same command goes on.

OUTPUT/SHARE/NAME-SEED  a run; SHARE is the share of guesses in the warm start of its world
OUTPUT/SHARE/runs/toy   that world, with the warm student from which all its runs start
OUTPUT/study.md, *.svg  tables and plots, from the runs' files alone (`--report` does only this)

The runs of one start differ in what a condition's flags name and in the seed: data order and
rollouts. `ffr` is κ 0.3, evidence text, slot by slot, chosen tokens under their patch, in those
tables.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import toy
from runs import flag, one_sentence, parse, read_json, read_log, require

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
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
    ("ffr_ahead", "--method ffr --ahead 1", "methods"),
    ("ffr_lora", "--method ffr --lora 8 --lr 1.5e-3", "methods"),
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
PLOTTED = ("ffr", "sft_teacher", "grpo", "luffy", "visd", "ffr_plain", "ffr_visd")
COLUMNS = "teacher calls", "interventions, %", "repair rate, %", "zero advantages, %", "entropy"
LOOKS = (  # of PLOTTED, in its order: Okabe and Ito's colours, markers for who cannot tell them
    ("#d55e00", "s"), ("#0072b2", "v"), ("#000000", "o"), ("#56b4e9", "^"), ("#009e73", "D"),
    ("#e69f00", "P"), ("#cc79a7", "X"))



@dataclass(frozen=True)
class Config:
    """Every flag of the command line."""
    jobs: int = flag(os.cpu_count(), "runs at a time; the default is the number of cores")
    seeds: str = flag("0,1,2", "seeds of data order and rollouts")
    guessed: str = flag(",".join(STARTS), "shares of guesses to start from")
    only: str = flag(",".join(name for name, *_ in CONDITIONS), "conditions to run")
    output: str = flag("runs/study", "folder of all runs")
    report: bool = flag(False, "run nothing, write tables and plots")


Run = tuple[dict, list[dict], list[dict]]  # a finished run's config, evaluations and metrics
Start = dict[str, list[Run]]  # the runs of each condition from one start
UNDER_WAY = set()  # processes of train.py


# --- runs -----------------------------------------------------------------------------------------


def finished(folder: Path) -> bool:
    """Return whether a run has evaluated its last step."""
    evals = read_log(folder / "eval.jsonl")
    return bool(evals) and evals[-1]["step"] == read_json(folder / "config.json")["steps"]


def train(folder: Path, flags: list[str]) -> str:
    """Run train.py into `folder`, in the world of its parent, or go on; return how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] * (folder / "config.json").exists()
    with open(folder / "train.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *flags, "--output", folder.name, *resume], stdout=log,
            stderr=subprocess.STDOUT, cwd=folder.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
        UNDER_WAY.add(process)
        code = process.wait()
        UNDER_WAY.discard(process)
    said = (folder / "train.log").read_text(errors="replace").split("\n")
    last = next((line.split("\r")[-1] for line in reversed(said) if line.strip()), "no output")
    return f"exit code {code}: {last}"


def run_all(output: Path, starts: list[str], seeds: list[str], only: list[str], jobs: int) -> int:
    """Run what is not finished, `jobs` at a time; return how many runs failed.

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
    failed, begin, pool = 0, time.time(), ThreadPoolExecutor(jobs)
    try:
        for parent in dict.fromkeys(folder.parent for folder in wanted):
            make_start(parent)
        running = {pool.submit(train, folder, [*flags, "--eval_every", str(EVAL_EVERY)]): folder
                   for folder, flags in wanted.items()}
        for number, future in enumerate(as_completed(running), 1):
            folder, ended = running[future], finished(running[future])
            failed += not ended
            print(f"{number} of {len(wanted)}, {time.time() - begin:.0f} s: {folder.parent.name}/"
                  f"{folder.name} " + ("ended" if ended else f"FAILED, {future.result()}"),
                  flush=True)
    except KeyboardInterrupt as error:
        error.add_note("the same command goes on")
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(UNDER_WAY):
            process.terminate()
        for process in list(UNDER_WAY):  # it saves and stops
            process.wait()
        raise
    return failed


def make_start(parent: Path) -> None:
    """Make the world and the warm student of a start, before its runs would race for them."""
    begun, world = parent / "start", parent / "runs" / "toy"
    shutil.rmtree(begun, ignore_errors=True)
    if not (world / "heldout.json").exists():
        toy.make(world, guessed=float(parent.name))
    said = train(begun, "--method grpo --steps 1 --batch_prompts 1 --rollouts 2".split()
                 + ["--eval_data", ""])
    if not (begun / "metrics.jsonl").exists():
        raise OSError(f"making the warm start failed, {said}")


# --- the table ------------------------------------------------------------------------------------


def mean(values: Iterable) -> float | None:
    """Return the mean of what is not None, and None for nothing."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def shown(values: list, scale: float = 100, digits: int = 1) -> str:
    """Return numbers as "first → last", or one alone; a dash where there is none."""
    return " → ".join("–" if value is None else f"{scale * value:.{digits}f}" for value in values)


def load(folder: Path) -> Start:
    """Read the finished runs of each condition from a start's folder."""
    return {name: [(read_json(run / "config.json"), read_log(run / "eval.jsonl"),
                    read_log(run / "metrics.jsonl"))
                   for run in sorted(folder.glob(f"{name}-*")) if finished(run)]
            for name, *_ in CONDITIONS}


def accuracy(runs: list[Run], step: int) -> str:
    """Return the runs' held-out accuracy in percent at a step: mean ± sample deviation."""
    shares = [100 * e["accuracy"] for _, evals, _ in runs for e in evals if e["step"] == step]
    spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{mean(shares):.1f}{spread}" if shares else ""


def row(runs: list[Run]) -> tuple[str, ...]:
    """Return a condition's COLUMNS: means over its runs."""
    def quarters(key):
        parts = [(rows[:n], rows[-n:]) for *_, rows in runs for n in [max(1, len(rows) // 4)]]
        return [mean(mean(r[key] for r in part) for part in side) for side in zip(*parts)]

    if not runs:
        return ("",) * len(COLUMNS)
    calls = mean(sum(r["teacher"].get("calls", 0) for r in rows) for *_, rows in runs)
    zero = mean(mean(r["advantage_zero_fraction"] for r in rows) for *_, rows in runs)
    return (f"{calls:.0f}", shown(quarters("intervention_ratio")), shown(quarters("repair_rate")),
            shown([zero]), shown(quarters("entropy"), 1, 2))


def unlike(runs_of: Start) -> list[str]:
    """Name the runs that differ in a setting, or in accuracy before training, without a flag."""
    found = {}
    for name, flags, _ in CONDITIONS:
        for config, evals, _ in runs_of[name]:
            about = {k: v for k, v in config.get("about", {}).items() if k != "command"}
            same = {**config, "about": about, "accuracy before": evals[0]["accuracy"]}
            for key in same.keys() - {"method", "seed", "output", "resume"}:
                if f"--{key}" not in flags.split():
                    runs = found.setdefault(key, {}).setdefault(str(same[key]), [])
                    runs.append(f"{name}-{config['seed']}")
    return [f"{key} is {value or 'empty'} in {', '.join(runs)} only"
            for key, values in sorted(found.items())
            for value, runs in sorted(values.items(), key=lambda pair: -len(pair[1]))[1:]]


def tables(starts: dict[str, Start]) -> list[str]:
    """Return the caption and the tables of all starts, by their share of guesses."""
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


# --- the plots ------------------------------------------------------------------------------------


def curve(logs: list[list[dict]], key: str, half: int = 0) -> list[tuple[int, float]]:
    """Return [(step, percent)]: a key's mean over runs and all steps at most `half` away."""
    rows = [r for log in logs for r in log]
    points = ((step, mean(r[key] for r in rows if abs(r["step"] - step) <= half))
              for step in sorted({r["step"] for r in rows}))
    return [(step, 100 * value) for step, value in points if value is not None]


def plots(starts: dict[str, Start]) -> list[tuple[str, str, str, dict]]:
    """Return (file, title, label of y, curves by name) of each plot that has a curve.

    An accuracy's name says how it ends; a condition without runs keeps its place, with no points,
    so that each condition has one colour in all plots.
    """
    first = next(iter(starts.values()))
    helped = {label: curve([rows for *_, rows in first["ffr"]], key, half=3) for label, key in (
        ("intervention ratio", "intervention_ratio"), ("repair rate", "repair_rate"))}
    drawn = []
    for share, runs in starts.items():
        curves = {name: curve([evals for _, evals, _ in runs[name]], "accuracy")
                  for name in PLOTTED}
        drawn.append((f"accuracy-{share}", f"Held-out, from {100 * float(share):.0f} % guesses",
                      "accuracy, %",
                      {f"{name} {accuracy(runs[name], points[-1][0])}" if points else name: points
                       for name, points in curves.items()}))
    drawn.append(("repair", "FFR: tries that need help, repairs that work",
                  "share, %, mean of 7 steps", helped))
    return [one for one in drawn if any(one[-1].values())]


def plot(path: Path, title: str, y_label: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Write an SVG line plot of {name: [(step, percent)]}; the same curves give the same file.

    Needs matplotlib. The legend lists the curves by how high they end; few points are marked.
    """
    import matplotlib
    from matplotlib.figure import Figure
    style = {"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 11,
             "axes.spines.top": False, "axes.spines.right": False}
    steps = sorted({step for points in curves.values() for step, _ in points})
    marked = len(steps) <= 12
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.6), facecolor="white")
        axes = figure.subplots()
        drawn = [(name, points, look) for (name, points), look in zip(curves.items(), LOOKS)
                 if points]
        for name, points, (colour, marker) in sorted(drawn, key=lambda one: -one[1][-1][1]):
            axes.plot(*zip(*points), label=name, color=colour, linewidth=1.8,
                      marker=marker if marked else None, markersize=5)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.set_xlabel("training step")
        axes.set_ylabel(y_label)
        if marked:
            axes.set_xticks(steps)
        axes.grid(color="#e3e3e3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        figure.savefig(path, format="svg", bbox_inches="tight",
                       metadata={"Date": None, "Creator": None})


# --- all of it ------------------------------------------------------------------------------------


def report(output: Path) -> None:
    """Write study.md from the finished runs' files, with plots where matplotlib is installed."""
    starts = {share: load(output / share) for share in STARTS}
    starts = {share: runs for share, runs in starts.items() if any(runs.values())}
    if not starts:
        raise ValueError(f"--output {output} holds no finished run")
    parts = tables(starts) + [
        f"**Not comparable** at {share}: {sentence}."
        for share, runs in starts.items() for sentence in unlike(runs)]
    missing = [f"{share}/{name}" for share, runs in starts.items() for name in runs
               if not runs[name]]
    if missing:
        parts.append(f"Without a finished run: {', '.join(missing)}.")
    try:
        for name, title, label, curves in plots(starts):
            plot(output / f"{name}.svg", title, label, curves)
            parts.append(f"![{title}]({name}.svg)")
    except ModuleNotFoundError:
        print("No plots: they need `pip install -r requirements-dev.txt`.")
    (output / "study.md").write_text("# What the toy world says\n\n" + "\n\n".join(parts) + "\n")
    print(output / "study.md")


def main(argv: list[str] | None = None) -> None:
    """Run and report by the command line's flags; exit with 1 where a run failed."""
    config, _ = parse(Config, argv, __doc__.split("\n\n")[0])
    seeds, only, starts = (text.split(",") for text in (config.seeds, config.only, config.guessed))
    with one_sentence("lab.study"):
        unknown = sorted(set(only) - {name for name, *_ in CONDITIONS})
        require(not unknown, f"--only: no condition is called {', '.join(unknown)}")
        require(all(seed.isdigit() for seed in seeds), "--seeds takes numbers like 0,1,2")
        require(config.jobs > 0, "--jobs must be above 0")
        require(set(starts) <= set(STARTS), f"--guessed takes {', '.join(STARTS)}")
        output = Path(config.output)
        failed = 0 if config.report else run_all(output, starts, seeds, only, config.jobs)
        report(output)
        if failed:
            raise OSError(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
