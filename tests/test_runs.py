"""runs.py: flags, processes that end, logs that no text can break. Each test names its mistake."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
    runs.cut(path, 1)
    assert path.read_bytes() == b"".join(whole[:2])
    path.write_bytes(whole[1] + b'{"step": \n' + whole[2])
    with pytest.raises(ValueError, match=r"log.jsonl, line 2, is not JSON"):
        runs.read_log(path)
    assert runs.read_log(tmp_path / "nothing.jsonl") == []


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
    (("--model", "m", "--data", "nowhere.json"), 1, "nowhere.json")))
def test_of_two_processes_one_says_it(tmp_path, flags, code, sentence):
    """Catches: the same error from every process, or from none because torchrun was faster."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), *flags]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    ours = [line for line in ran.stderr.split("\n") if line.startswith("train.py:")]
    assert len(ours) == 1 and sentence in ours[0] and f"exitcode  : {code}" in ran.stderr
