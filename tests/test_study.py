"""The study: each test names the mistake it would catch. A stub stands in for train.py."""

import json
import sys
from xml.etree import ElementTree

import pytest

import toy
from lab import study

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
    """Put a command in train.py's place that notes that it was called; learning rate 3e-5 fails."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(study, "TRAIN", tmp_path / "stub.py")
    monkeypatch.setattr(toy, "make", lambda folder, guessed: (tmp_path / f"made-{guessed}").touch())
    return tmp_path / "study"


def run(output, *more):
    study.main(["--seeds", "0,1", "--jobs", "1", "--guessed", "0.99", "--output", str(output),
                *more])


def calls(output):
    called = (output / "0.99" / "calls").read_text().splitlines()
    (output / "0.99" / "calls").unlink()
    return called


def test_finished_runs_are_not_started_again(stub):
    """Catches: a second call that trains everything anew; a broken-off run from its start."""
    run(stub, "--only", "grpo,ffr")
    assert calls(stub) == ["start", "grpo-0", "ffr-0", "grpo-1", "ffr-1"]
    assert (stub / "0.99" / "rates").read_text() == study.STARTS["0.99"] == "4e-4"
    assert (stub.parent / "made-0.99").exists()
    torn = '{"step": 0, "accuracy": 0.5}\n{"step": 4, "ac'
    (stub / "0.99" / "ffr-1" / "eval.jsonl").write_text(torn)
    run(stub, "--only", "grpo,ffr")
    assert calls(stub) == ["start", "ffr-1 --resume"]
    run(stub, "--only", "grpo,ffr")
    run(stub, "--report")
    assert not (stub / "0.99" / "calls").exists()


def test_a_failing_run_is_named_and_the_others_go_on(stub, capsys):
    """Catches: one crash that ends the study, or that nobody hears of; a misspelt --only."""
    with pytest.raises(SystemExit, match="1"):
        run(stub, "--only", "grpo_lr_3e-5,grpo")
    said = capsys.readouterr()
    assert "0.99/grpo_lr_3e-5-0 FAILED, exit code 1: no space left\n" in said.out
    assert said.err == "lab.study: 2 runs failed; the same command tries them again\n"
    assert calls(stub) == ["start", "grpo_lr_3e-5-0", "grpo-0", "grpo_lr_3e-5-1", "grpo-1"]
    table = (stub / "study.md").read_text()
    assert "| grpo | `--method grpo` | 2 |  | 50.0 ± 0.0 |" in table
    assert "Without a finished run: 0.99/grpo_lr_3e-5, 0.99/" in table
    with pytest.raises(SystemExit):
        run(stub, "--only", "gpro")
    assert "no condition is called gpro" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(stub, "--onyl", "grpo")
    assert "unknown: --onyl; did you mean --only?" in capsys.readouterr().err


def write_run(output, name, after, metrics, evaluated=(0, 4, 8), **settings):
    """Write a finished run of 8 steps; metrics: interventions, repairs, zeros, entropy, calls."""
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
    monkeypatch.setattr(study, "EVAL_EVERY", 4)
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
    run(tmp_path, "--report")
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
    run(tmp_path, "--report")
    assert ("**Not comparable** at 0.99: lr is 0.0004 in grpo-0 only."
            in (tmp_path / "study.md").read_text())


def test_every_run_has_a_command_of_its_own(tmp_path):
    """Catches: runs called not comparable for the command that made them; another student not."""
    def run_of(name, about):
        return [({"lr": 1e-4, "seed": 0, "about": about}, [{"accuracy": 0.5}], [])]

    both = {name: [] for name, *_ in study.CONDITIONS}
    names = "ffr", "grpo", "sft"
    both |= {name: run_of(name, {"command": name, "student": "s"}) for name in names}
    assert study.unlike(both) == []
    both["grpo"] = run_of("grpo", {"command": "grpo", "student": "t"})
    assert any("'t'" in sentence and "grpo-0 only" in sentence for sentence in study.unlike(both))


def test_the_plots_show_the_means(tmp_path):
    """Catches: a curve of one seed, a moving average that drops the ends, null counted as zero, a
    condition that has another colour where others have no runs.

    Held-out 50 % at step 0, (60 + 70) / 2 = 65 at step 4, (70 + 80) / 2 = 75 at step 8, deviation
    of 70 and 80: sqrt(50) = 7.1.
    """
    rows = [{"step": step, "x": x} for step, x in enumerate((0.1, None, 0.3, 0.8))]
    assert study.curve([rows], "x", half=1) == [(0, pytest.approx(10)), (1, pytest.approx(20)),
                                                (2, pytest.approx(55)), (3, pytest.approx(55))]
    for seed, after in enumerate((0.70, 0.80)):
        write_run(tmp_path, f"ffr_plain-{seed}", after, [(0.4, 0.6, 0.0, 1.0, 1)] * 8)
    plots = study.plots({"0.8": study.load(tmp_path)})
    (file, title, _, curves), = plots  # nothing about ffr's repairs, as it has no run
    assert file == "accuracy-0.8" and "80 %" in title
    drawn, = (i for i, points in enumerate(curves.values()) if points)
    assert drawn == study.PLOTTED.index("ffr_plain")
    assert list(curves)[drawn] == "ffr_plain 75.0 ± 7.1"
    assert list(curves.values())[drawn] == [(0, 50), (4, pytest.approx(65)), (8, pytest.approx(75))]
    write_run(tmp_path, "ffr-0", 0.7, [(0.4, 0.6, 0.0, 1.0, 1)] * 8)
    helped = study.plots({"0.8": study.load(tmp_path)})[-1]
    assert helped[0] == "repair" and [points[5] for points in helped[-1].values()] == [
        (5, pytest.approx(40)), (5, pytest.approx(60))]


def test_a_plot_is_the_same_file_each_time(tmp_path):
    """Catches: plots that change in git without a change in data, letters drawn as shapes, a
    background that vanishes on a dark page, a curve of a condition without runs.
    """
    pytest.importorskip("matplotlib")
    curves = {"nobody": [], "low": [(0, 50.0), (8, 60.0)], "high": [(0, 50.0), (8, 75.0)]}
    for name in ("a.svg", "b.svg"):
        study.plot(tmp_path / name, "Title", "accuracy, %", curves)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and "dc:date" not in drawn
    root = ElementTree.fromstring(drawn)
    texts = ["".join(text.itertext()) for text in root.findall(".//{*}text")]
    assert {"Title", "training step", "accuracy, %", "0", "8", "low", "high"} <= set(texts)
    assert texts.index("high") < texts.index("low") and "nobody" not in texts
    assert "fill: #ffffff" in root.find(".//{*}path").get("style")
    assert all(study.LOOKS[i][0] in drawn for i in (1, 2)) and study.LOOKS[0][0] not in drawn
    write_run(tmp_path / "0.8", "ffr-0", 0.7, [(0.4, 0.6, 0.0, 1.0, 1)] * 8)
    run(tmp_path, "--report")
    linked = [f"({name}.svg)" in (tmp_path / "study.md").read_text() for name in
              ("accuracy-0.8", "repair") if (tmp_path / f"{name}.svg").exists()]
    assert linked == [True, True]


def test_tables_need_no_matplotlib(tmp_path, monkeypatch, capsys):
    """Catches: a report that fails for want of a plot, or that links to plots nobody drew."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_run(tmp_path / "0.99", "ffr-0", 0.7, [(0.4, 0.6, 0.0, 1.0, 1)] * 8)
    run(tmp_path, "--report")
    table = (tmp_path / "study.md").read_text()
    assert "| ffr | `--method ffr` | 1 |" in table and ".svg" not in table
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().out
