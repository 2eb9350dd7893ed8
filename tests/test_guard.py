"""The leak guard on labelled patches, and the audit. Each test names its mistake."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from messages_server import MessagesServer, submit

import guard
import runs
from guard import leak, spelled, states
from patch import QUERY_KINDS, WHERE_TO_LOOK, Patch
from teacher import NEGATIVE, Service, TeacherConfig

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


def refused(capsys, *arguments):
    """Return the sentence with which an audit is refused, without its line break."""
    with pytest.raises(SystemExit) as end:
        guard.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("guard.py: ")
    return said.err[len("guard.py: "):-1]


@pytest.mark.parametrize("content", (None, "", '{"step": 2, "sam'))
def test_a_run_without_patches_is_one_sentence(tmp_path, capsys, content):
    """Catches: a traceback, or a table of zeros, for a run of --method grpo."""
    if content is not None:
        (tmp_path / "patches.jsonl").write_text(content)
    sentence = f"{tmp_path / 'patches.jsonl'} holds no diagnoses: in this run nobody was asked for"
    assert refused(capsys, tmp_path).startswith(sentence)
    assert not (tmp_path / "audit.json").exists()
    assert refused(capsys, tmp_path / "no") == f"{tmp_path / 'no'} does not exist"


@pytest.mark.parametrize("line, problem", (
    ('{"step": 1, "sta\n', "is not JSON"), ("[1]\n", "is not an object"),
    ("[" * 100_000 + "\n", "is not JSON"), ('{"step": 1}\n', "is no diagnosis: it has no "
                                                     "status"),
    ('{"status": "patched", "reason": ""}\n', "is no diagnosis: it has no error_type")))
def test_a_damaged_line_is_named(tmp_path, capsys, line, problem):
    """Catches: an audit that ends in a traceback, or leaves out lines and says nothing."""
    path = tmp_path / "patches.jsonl"
    first, *rest = (json.dumps(row) + "\n" for row in audit_rows())
    path.write_text("".join([first, line, *rest]))
    for argument in (tmp_path, path):
        assert refused(capsys, argument).startswith(f"{path}, line 2, {problem}")


def test_the_price_is_the_run_s_own(tmp_path, capsys):
    """Catches: a priced run that is said to cost nothing; dollars made up where no price is known.

    Six diagnoses of 1,000 tokens in and 100 out make three patches: 2,000 and 200 a patch.
    """
    for row in audit_rows():
        runs.append(tmp_path / "patches.jsonl", row)

    def dollars(*flags):
        guard.main([str(tmp_path), *flags])
        said, found = capsys.readouterr().out, json.loads((tmp_path / "audit.json").read_text())
        assert ("dollars" in said) == (found["a_patch"]["dollars"] is not None)
        return found["a_patch"]["dollars"]

    assert dollars() is None
    (tmp_path / "config.json").write_text('{"teacher_price": "3/15", "method": "ffr"}')
    assert dollars() == pytest.approx((2000 * 3 + 200 * 15) / 1e6)
    assert dollars("--price", "10/100") == pytest.approx((2000 * 10 + 200 * 100) / 1e6)
    (tmp_path / "config.json").write_text('{"teacher_price": ""}')
    assert dollars() is None
    assert "--price is IN/OUT in dollars" in refused(capsys, tmp_path, "--price", "3")
    (tmp_path / "config.json").write_text('{"teacher_')
    assert refused(capsys, tmp_path).startswith(f"{tmp_path / 'config.json'} is not JSON")


def test_what_the_blind_test_alone_refused_is_a_row_of_its_own(capsys):
    """Catches: a leak that no rule knows, counted nowhere and yet in the number of all."""
    blind = "blind test: the answer can be told from the patch alone"
    rows = [{**row, "reason": blind} if row["reason"].startswith("direct") else
            {**row, "reason": f"mended {blind}"} if row["reason"].startswith("mended") else row
            for row in audit_rows()]
    found = guard.audit(rows)["leaks_submitted"]
    assert {name: (n["count"], n["of"]) for name, n in found.items()} == {
        "direct": (0, 4), "partial": (0, 4), "blind test": (2, 4)}
    guard.print_audit(guard.audit(rows))
    assert re.search(r"leaks submitted\n.*\n.*\n  blind test +2 of 4 +50.0%",
                     capsys.readouterr().out)


def test_of_a_refused_diagnosis_the_first_submission_counts(monkeypatch):
    """Catches: the last version counted, which has been told what was wrong with the first."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    versions = iter(["The object rests on a table.", "Look at the red one.", "It is crimson."])
    clip = SimpleNamespace(times=(0.0, 0.5, 1.0, 1.5),
                           frames=torch.zeros(4, 3, 28, 28, dtype=torch.uint8))
    sample = SimpleNamespace(id="1", question="What colour is the object?", kind="multiple choice",
                             options=("A. red", "B. blue"), answer="A", clip=clip)
    with MessagesServer(lambda body: [submit(next(versions))]) as server:
        teacher = Service(TeacherConfig(url=server.url, rounds=1, tools=False))
        found = teacher.diagnose_full(sample, WRONG)
        teacher.close()
    assert found.status == "refused" and len(server.bodies) == 3
    assert found.reason == "partial: states what is to be seen"
