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


FIRST = {  # of direct, partial, clean: what the rules refused when they first met a set
    1: "22/24 16/24 5/24", 2: "21/21 12/21 3/21", 3: "31/34 19/34 8/34", 4: "20/20 20/20 5/20"}
LABELS = ("direct", "partial", "clean")
OTHER = ("es", "fr", "de", "zh", "ja")


def test_the_guard_on_labelled_patches(capsys):
    """Catches: a rule that lets direct leaks pass, or one that refuses good patches.

    Rules and labels have one author. The sets 1 and 2 are leaks worded as advice, 3 and 4 patches
    in the style of other models (terse, chatty, lists, Markdown, coordinates, questions), some in
    other languages. Each but the last was mended after it was met; 3 and 4 were written together.
    """
    rows = leak_rows()
    assert {row["query_kind"] for row in rows} == set(QUERY_KINDS)
    assert len({row["kind"] for row in rows}) == 5
    refused, total = Counter(), Counter()
    for row in rows:
        problem, number = found_leak(row), row["written"]
        other = row.get("style") in OTHER
        columns = [f"set {number}" + ", other languages" * other]
        columns += ["sets 0 to 2", row["query_kind"], row["kind"]] if number < 3 else []
        for column in columns:
            total[column, row["label"]] += 1
            refused[column, row["label"]] += problem != ""
        if other and not problem.startswith("direct"):
            assert problem.startswith(("unread", "partial")), row
    with capsys.disabled():
        print(f"\n{'refused':<28}" + "".join(f"{label:>12}" for label in LABELS) + "    at first")
        for column in dict.fromkeys(column for column, _ in total):
            cells = [f"{refused[column, label]}/{total[column, label]}" for label in LABELS]
            first = FIRST.get(column[4:].isdigit() and int(column[4:]), "")
            print(f"{column:<28}" + "".join(f"{cell:>12}" for cell in cells) + f"    {first}")
    share = {key: refused[key] / total[key] for key in total}
    assert {share[sets, "direct"] for sets in ("sets 0 to 2", "set 3", "set 4")} == {1}
    assert share["sets 0 to 2", "partial"] >= 0.95 and share["sets 0 to 2", "clean"] <= 0.05
    assert share["set 3", "partial"] >= 0.9 and share["set 3", "clean"] <= 0.1
    assert share["set 4", "partial"] >= 0.95 and share["set 4", "clean"] <= 0.3


def test_the_prompt_keeps_to_its_own_rules():
    """Catches: a permitted example that the guard refuses, a violation that it lets pass."""
    pairs = re.findall(r'- (\w+)\. Never: "(.*)"\n  Allowed: "(.*)"', NEGATIVE)
    assert [kind for kind, _, _ in pairs] == list(QUERY_KINDS)
    for kind, never, allowed in pairs:
        assert states(never) and not states(allowed), kind
    for text in WHERE_TO_LOOK.values():
        assert not states(text)


@pytest.mark.parametrize("text, stated", [
    ("**Where:** frames 0–6. **What:** write down each action.", False),
    ("1. Look at the door. 2. Compare the two moments.", False),
    ("Zoom: [0.55, 0.10, 0.90, 0.40], frames 6-10.", False),
    ("Have you looked at the scarf? Could you look once more?", False),
    ("When does each of the events start?", False),
    ("**Note:** the surface has a grain.", True), ("Barefoot.", True), ("- Scarf: blue", True),
    ("Can't you see his bare toes?", True), ("Is it really on top of anything?", True),
    ("Did you see the one behind the bench?", True), ("1. Look. 2. He sits down.", True)])
def test_advice_in_any_dress(text, stated):
    """Catches: Markdown and lists refused as statements, statements dressed as questions, lists or
    single words let pass.
    """
    assert states(guard._bare(text)) == stated


@pytest.mark.parametrize("text, problem", [
    ("Look at the table, at its left side.", ""), ("Zoom in.", ""),
    ("Watch the man at the Café de la Gare.", ""),
    ("Region x 0.6–0.8, y 0.4–0.7: zoom.", ""), ("Look at the sign that reads 出口.", "unread"),
    ("Mira la mano izquierda.", "unread"), ("Look again. Regardez la main.", "unread"),
    ("Observe que la camisa del hombre es azul.", "unread"),  # no English rule reads "azul"
    ("Schau auf die Tür und zähle die Gäste.", "unread"), ("看手。", "unread"),
    ("もう一度見てください。", "unread")])
def test_another_language_is_not_let_through(text, problem):
    """Catches: a patch that no rule can read let through, English refused over a name in it."""
    row = dict(query_kind="logic", kind="free-form", question="Why does he stop?", options=[],
               answer="It rains.", response="<answer>He is tired.</answer>", key_frames=[0, 9],
               regions=[], temporal_markers=[], guidance=text)
    assert found_leak(row).split(":")[0] == problem


def test_a_list_s_numbers_are_no_answer_and_an_answer_is_no_list():
    """Catches: advice in steps refused because a step has the number asked for; a number let pass
    because it stands where a list's would.
    """
    row = dict(query_kind="counting", kind="numerical", question="How many cups?", options=[],
               answer="2", response="<answer>3</answer>", key_frames=[0, 9], regions=[],
               temporal_markers=[])
    assert found_leak(row | dict(guidance="1. Scan the tray. 2. Count each cup.")) == ""
    assert found_leak(row | dict(guidance="2. Count each cup.")).startswith("direct")
    assert found_leak(row | dict(guidance="1. a red one 2. a blue one")).startswith("direct")


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
    rows = [row | dict(cache_write_tokens=100, cache_read_tokens=800) for row in audit_rows()]
    cheaper = guard.audit(rows, "3/15")["a_patch"]  # 100 in full, 100 at 1.25, 800 at a tenth
    assert cheaper["dollars"] == pytest.approx(2 * ((100 + 125 + 80) * 3 + 100 * 15) / 1e6)
    assert cheaper["input"] == 2000
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
        "direct": (0, 4), "partial": (0, 4), "unread": (0, 4), "blind test": (2, 4)}
    guard.print_audit(guard.audit(rows))
    assert re.search(r"leaks submitted\n.*\n.*\n.*\n  blind test +2 of 4 +50.0%",
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
