"""tests/gpu.py, rehearsed on the CPU: what a lent card will run must not fail for a typo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_section_goes_through_on_the_cpu(tmp_path):
    """Catches: minutes on a card lost to a section that breaks, or findings that are not kept."""
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--dry", "--out",
               str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=590)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert ran.returncode == 0, ran.stdout + logs[-5000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["sections"]) == 11 and found["about"]["commit"]
    ran = {name for name, how in found["sections"].items() if not how.startswith("left out")}
    kept = {row["section"] for row in found["findings"]}
    assert kept == ran >= set(found["sections"]) - {"trl"}, "every section must leave findings"
    assert all(row["right"] is not False for row in found["findings"])
    assert (tmp_path / "gpu.md").read_text().count("| right |") >= 5


def test_an_unknown_section_is_refused(tmp_path):
    """Catches: a typo in --only that runs nothing and exits 0."""
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--dry", "--only", "decod",
               "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and "no section is called decod" in ran.stderr
