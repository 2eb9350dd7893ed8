"""runs.py: flags, processes that end, logs that no text can break. Each test names its mistake."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import runs

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ('says "no"', "line\nbreak", "a\u2028b\u2029c\x85d", "half a pair \ud83d", "温度", "")


@pytest.mark.quick
def test_logs_hold_any_text(tmp_path):
    """Catches: a line that splits, is refused or comes back as other text; a writer that fails."""
    for text in TEXTS:
        runs.append(tmp_path / "log.jsonl", {"step": 1, "text": text})
    assert [row["text"] for row in runs.read_log(tmp_path / "log.jsonl")] == list(TEXTS)
    data = (tmp_path / "log.jsonl").read_bytes()
    assert len(data.decode().splitlines()) == len(TEXTS) and "温度" in data.decode()
    assert [json.loads(line)["text"] for line in data.decode().splitlines()] == list(TEXTS)


@pytest.mark.quick
def test_cut_drops_later_steps_and_torn_lines_only(tmp_path):
    """Catches: a kill inside a character that makes a run unreadable; lines that are rewritten."""
    path = tmp_path / "log.jsonl"
    whole = [b'{"step":  0, "text": "\xe6\xb8\xa9"}\n', b'{"step": 1}\n', b'{"step": 2}\n']
    path.write_bytes(b"".join(whole) + b'{"step": 2, "text": "\xe6\xb8')
    assert [row["step"] for row in runs.read_log(path)] == [0, 1, 2]
    runs.cut(path, range(2))
    assert path.read_bytes() == b"".join(whole[:2])
    path.write_bytes(whole[1] + b'{"step": \n' + whole[2])
    with pytest.raises(ValueError, match=r"log.jsonl, line 2, is not JSON"):
        runs.read_log(path)
    assert runs.read_log(tmp_path / "nothing.jsonl") == []


@pytest.mark.quick
def test_a_line_that_does_not_fit_is_an_error(tmp_path):
    """Catches: a disk that takes half a line, which is said by nobody and joins the next one."""
    path, before = tmp_path / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    runs.append(path, {"step": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        with pytest.raises(OSError, match=r"^log.jsonl could not be written to .*File too large"):
            runs.append(path, {"step": 1, "text": 60 * "a"})
        with pytest.raises(OSError, match="^whole.json.partial could not be .*GiB are free"):
            runs.write_whole(tmp_path / "whole.json", 60 * "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in runs.read_log(path)] == [0]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


DAMAGE = {  # bytes where JSON should stand -> what is said, and of which line
    b'{"a": ' + b"[" * 100_000: (1, "is nested too deeply"),
    b'{"a": 1}\n{"a": ' + b"9" * 5_000 + b"}": (2, "holds a number of too many digits"),
    b'{"a": 1}\n{"a"': (2, "is not JSON: "),
    '{"a": 1}'.encode("utf-16"): (1, "is not UTF-8 text"),
    b'{"a": 1}\n\x00\x00\x00 ftypisom\xff\xd8': (2, "is not UTF-8 text"),
    b'\x89PNG\r\n\x1a\n\x00': (1, "is not UTF-8 text"),
}


@pytest.mark.quick
@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_json_is_one_sentence_with_file_and_line(tmp_path, content):
    """Catches: RecursionError, UnicodeDecodeError or Python's own words about digits; no name."""
    line, problem = DAMAGE[content]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content + b"\n")
    for read in (runs.read_rows, runs.read_log):
        with pytest.raises(ValueError) as error:
            read(path)
        assert type(error.value) is ValueError and "\n" not in str(error.value)
        assert str(error.value).startswith(f"{path}, line {line}, {problem}")
    with pytest.raises(ValueError) as error:
        runs.read_json(path)
    assert type(error.value) is ValueError and str(error.value).startswith(str(path))


@pytest.mark.quick
def test_whole_files_of_json_are_read_as_ever(tmp_path):
    """Catches: a mark at the start or Windows' line ends refused, one object over lines too."""
    path, row = tmp_path / "rows.json", {"a": ["温度", 10**400]}
    for text, rows in ((json.dumps([row, row], indent=1), 2), (json.dumps(row, indent=1), 1),
                       (json.dumps(row) + "\n\n" + json.dumps(row), 2), ("", 0), ("[]", 0)):
        for mark, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")):
            path.write_bytes(mark + text.encode().replace(b"\n", end))
            assert runs.read_rows(path) == [row] * rows
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, indent=1).encode())
    assert runs.read_json(path) == row


@pytest.mark.quick
def test_a_log_holds_objects(tmp_path):
    """Catches: a line that is JSON and no row, which breaks whoever reads the log."""
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n3\n{"step": 2}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2, is not an object"):
        runs.read_log(tmp_path / "log.jsonl")


def keeping(folder, steps, begin=0):
    """Keep fabricated rows of steps `begin` to `steps` of 100; return the run."""
    run = SimpleNamespace(output=folder, step=begin, steps=100, kept=0, left_out=False,
                          config=SimpleNamespace(keep_rollouts_mb=1))
    runs.cut_logs(run)
    for run.step in range(begin, steps):
        rows = [{"step": run.step, "thumbnails": f"thumbnails/{(run.step + i) % 90}.jpg",
                 "strip": bytes(5_000), "text": (20_000 + 997 * run.step % 5_000) * "a"}
                for i in range(2)]
        kept = runs.keep_rollouts(run, rows)
        found = runs.read_log(folder / "rollouts.jsonl")
        assert kept == (bool(found) and found[-1]["step"] == run.step)
    return run


@pytest.mark.quick
def test_what_is_kept_has_a_bound_that_a_resume_does_not_move(tmp_path, capsys):
    """Catches: a disk that fills up; a long run that keeps its beginning alone; other steps after a
    resume, because of what the killed run had left.
    """
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = keeping(tmp_path / "whole", 100)
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert 900_000 < sum(path.stat().st_size for path in files) == whole.kept <= 1_000_000
    steps = sorted({row["step"] for row in runs.read_log(tmp_path / "whole/rollouts.jsonl")})
    assert steps[0] == 0 and steps[-1] > 90 and max(b - a for a, b in zip(steps, steps[1:])) < 12
    said = capsys.readouterr().out
    assert said == ("\nrollouts.jsonl leaves out step 1 and others, for which its share of "
                    "--keep_rollouts_mb 1 has no room\n")
    keeping(tmp_path / "killed", 70)
    (tmp_path / "killed/thumbnails/9.jpg.partial").touch()
    keeping(tmp_path / "killed", 100, begin=35)
    assert [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
            for folder in [tmp_path / "killed"]] == [
        {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in files}]


@pytest.mark.quick
def test_the_summary_sets_kinds_apart(tmp_path):
    """Catches: kinds mixed, of another evaluation, or of a run that kept no answers."""
    evals = [{"step": step, "n": 4, "accuracy": 0.5, "accuracy_with_patches": None}
             for step in (0, 3, 6)]
    answers = [{"step": step, "kind": kind, "accuracy": accuracy} for step, kind, accuracy in (
        (0, "OCR", 0.0), (0, "OCR", 0.5), (0, "numerical", 1.0), (3, "OCR", 1.0),
        (6, "OCR", 0.5), (6, "OCR", 1.0), (6, "numerical", 0.0))]
    line = "  by kind: OCR 25.0 to 75.0 %, numerical 100.0 to 0.0 %"
    rows = [{"intervention_ratio": 0.5, "repair_rate": None}]
    assert runs.summary(evals, rows, answers)[3] == line
    one = [row for row in answers if row["kind"] == "OCR"]
    for few in ([], one, answers[3:]):
        assert runs.summary(evals, rows, few) == [
            text for text in runs.summary(evals, rows, answers) if text != line]


@pytest.mark.quick
def test_trackio_is_called_as_it_is_meant(tmp_path, monkeypatch):
    """Catches: texts and lists sent as figures, a run begun anew by --resume or joined unasked."""
    called = []
    module = SimpleNamespace(
        init=lambda *names, **more: called.append((*names, more["resume"], more["config"])),
        log=lambda figures, step: called.append((step, figures)), Markdown=str, Image=Path)
    monkeypatch.setitem(sys.modules, "trackio", module)
    for resume in (False, True):
        tracker = runs.Tracker("trackio", tmp_path / "ffr-1", 2, {"resume": resume})
    tracker.send(3, {"step": 3, "kl": 0.5, "no": None, "who": "me", "a": {"b": {"c": 2}, "d": []}})
    tracker.send(4, {"kl": 0}, "said", tmp_path / "a.jpg")
    (project, name, first, _), (*names, second, flags), *sent = called
    assert names == [project, name] and name.startswith("ffr-1-") and flags == {"resume": True}
    assert (first, second) == ("never", "allow")
    assert sent == [(3, {"kl": 0.5, "a/b/c": 2}),
                    (4, {"kl": 0, "rollout": "said", "frames": tmp_path / "a.jpg"})]
    other = runs.Tracker("trackio", tmp_path / "other/ffr-1", 2, {"resume": True})
    assert other and called[-1][1] != name, "another folder's run"


@dataclass(frozen=True)
class Flags:
    """Two flags."""
    kappa: float = runs.flag(0.3, "a tax of 10 %")
    template: str = runs.flag("", "a file")
    no_gt: bool = runs.flag(False, "a switch")


@pytest.mark.quick
def test_flags_print_as_one_would_type_them(capsys):
    """Catches: flags left out of the line, a path with a blank that cannot be pasted back."""
    config, given = runs.parse(Flags, ["--template", "my file", "--no_gt", "--kappa", "0.3"], "")
    assert given == {"template", "no_gt", "kappa"}
    assert runs.changed(config) == "--template 'my file' --no_gt"
    with pytest.raises(SystemExit) as end:
        runs.parse(Flags, ["--tempalte=x"], "")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "did you mean --template?" in said and said.count("\n") == 1


@pytest.mark.quick
def test_a_world_size_without_torchrun_is_nobodys(monkeypatch):
    """Catches: a scheduler's WORLD_SIZE taken for processes that torchrun has started."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert runs.world_size() == 1 and runs.everyone("x") == ["x"]


@pytest.mark.parametrize("flags, code, sentence", (
    (("--modl", "m"), 2, "train.py: unknown: --modl; did you mean --model?"),
    (("--model", "m", "--data", "nowhere.json"), 2, "nowhere.json")))
def test_of_two_processes_one_says_it(tmp_path, flags, code, sentence):
    """Catches: the same error from every process, or from none because torchrun was faster."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), *flags]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    ours = [line for line in ran.stderr.split("\n") if line.startswith("train.py:")]
    assert len(ours) == 1 and sentence in ours[0] and f"exitcode  : {code}" in ran.stderr
