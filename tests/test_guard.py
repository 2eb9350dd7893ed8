"""The leak guard on labelled patches, and the audit. Each test names its mistake."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import guard
from guard import leak, spelled, states
from patch import QUERY_KINDS, WHERE_TO_LOOK, Patch
from teacher import NEGATIVE

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
WRONG = "<think>I see it in frames 5 to 6.</think><answer>B</answer>"


def leak_rows():
    return [json.loads(line) for line in open(ROOT / "tests" / "leaks.jsonl")]


def found_leak(row):
    clip = SimpleNamespace(times=tuple(2.0 * i for i in range(16)))
    patch = Patch(
        error_type="temporal",
        query_kind=row["query_kind"],
        guidance=row["guidance"],
        key_frames=tuple(row["key_frames"]),
        times=(0.0, 1.0),
        temporal_markers=tuple(row["temporal_markers"]),
        regions=tuple(map(tuple, row["regions"])),
    )
    sample = SimpleNamespace(
        **{k: row[k] for k in ("question", "options", "answer", "kind")}, clip=clip
    )
    return leak(patch, sample, row["response"])


def test_the_guard_on_labelled_patches(capsys):
    """Catches: a rule that lets direct leaks pass, or one that refuses good patches.

    Rules and labels have one author. Of the patches written once the rules stood ("written" 1, 2;
    leaks worded as advice), the rules as they were refused 22 of 24 and 21 of 21 direct ones, 16
    of 24 and 12 of 21 partial ones, 5 of 24 and 3 of 21 clean ones; then they were mended. A
    paraphrase in new words is for the blind test.
    """
    rows = leak_rows()
    assert len(rows) >= 150 and {row["query_kind"] for row in rows} == set(QUERY_KINDS)
    assert len({row["kind"] for row in rows}) == 5
    refused, total = Counter(), Counter()
    for row in rows:
        for column in ("all", row["query_kind"], row["kind"]):
            total[row["label"], column] += 1
            refused[row["label"], column] += found_leak(row) != ""
    columns = [
        "all",
        *QUERY_KINDS,
        "multiple choice",
        "numerical",
        "free-form",
        "OCR",
        "regression",
    ]
    with capsys.disabled():
        print(f"\n{'refused of labelled patches':<28}{'direct':>12}{'partial':>12}{'clean':>12}")
        for column in columns:
            cells = [
                f"{refused[label, column]}/{total[label, column]}"
                for label in ("direct", "partial", "clean")
            ]
            print(f"{column:<28}" + "".join(f"{cell:>12}" for cell in cells))
    assert refused["direct", "all"] == total["direct", "all"]
    assert refused["partial", "all"] >= 0.95 * total["partial", "all"]
    assert refused["clean", "all"] <= 0.05 * total["clean", "all"]


def test_the_prompt_keeps_to_its_own_rules():
    """Catches: a permitted example that the guard refuses, a violation that it lets pass."""
    pairs = re.findall(r'- (\w+)\. Never: "(.*)"\n  Allowed: "(.*)"', NEGATIVE)
    assert [kind for kind, _, _ in pairs] == list(QUERY_KINDS)
    for kind, never, allowed in pairs:
        assert states(never) and not states(allowed), kind
    for text in WHERE_TO_LOOK.values():
        assert not states(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Twenty-four, a dozen", "24, a 12"),
        ("three and a half", "3.5"),
        ("one hundred and eighty-two", "182"),
        ("half a dozen", "6"),
        ("one by one, only one, look once more", "one by one, only 1, look once more"),
        ("S-T-O-P", "stop"),
    ],
)
def test_numbers_in_words(text, expected):
    """Catches: a count that slips through spelled out, a pronoun taken for a number."""
    assert spelled(text) == expected


# --- audit


def audit_rows():
    patch = dict(error_type="spatial", query_kind="attribute", guidance="Look at the hand.")
    patch |= dict(key_frames=[1, 3], times=[0.5, 1.5], temporal_markers=[], regions=[])
    row = dict(step=1, sample="s1", slot=0, question="What colour is it?", answer="A")
    row |= dict(options=["A. red", "B. blue"], response=WRONG, input_tokens=1000, output_tokens=100)
    none = row | dict(repaired=None)
    return [
        row | patch | dict(status="patched", reason="", repaired=True),
        row
        | patch
        | dict(status="patched", reason="mended partial: names a colour", repaired=False),
        row
        | patch
        | dict(status="patched", reason="", repaired=False, guidance="Look at the red one."),
        none | dict(status="refused", reason="direct: names the answer"),
        none | dict(status="failed", reason="time limit"),
        none | dict(status="budget", reason="budget spent"),
    ]


def test_audit_counts():
    """Catches: refused patches left out of the leak rate, or failures counted into it."""
    found = guard.audit(audit_rows(), price="10/100")
    assert (
        found["leaks_submitted"]["direct"]["count"]
        == 1
        == found["leaks_submitted"]["partial"]["count"]
    )
    assert found["leaks_submitted"]["direct"]["of"] == 4
    assert (
        found["leaks_shown"]["direct"]["count"] == 1 and found["leaks_shown"]["direct"]["of"] == 3
    )
    assert found["repair_rate"]["spatial"]["share"] == pytest.approx(1 / 3)
    assert found["reasons"] == {"direct: names the answer": 1, "time limit": 1, "budget spent": 1}
    assert found["a_patch"]["dollars"] == pytest.approx(6 * 0.02 / 3)
    assert guard.wilson(0, 200)[1] == pytest.approx(0.0188, abs=1e-4)  # 3.84 / 203.84
    assert guard.wilson(0, 0) == (0.0, 1.0)


def test_audit_command(tmp_path):
    """Catches: a torn last line that ends the audit; no JSON; nothing drawn."""
    lines = [json.dumps(row) for row in audit_rows()] + ['{"step": 2, "sam']
    (tmp_path / "patches.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "guard.py"), str(tmp_path), "--draw", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6 diagnoses: 3 patched" in ran.stdout and "33.3%" in ran.stdout
    assert json.loads((tmp_path / "audit.json").read_text())["diagnoses"] == 6
    assert (tmp_path / "patches_drawn.md").read_text().count("## step") == 2
