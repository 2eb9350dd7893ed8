"""The page of runs: each test names the mistake it would catch. Browser tests need Chromium."""

import base64
import json
import math
import random
import re
import shutil
import statistics
from html.parser import HTMLParser

import pytest

from benchmarks.results import overall, read_run
from lab import report
from reports import BOX, HEIGHT, KINDS, MARKUP, TIMES, WIDTH, lines, make_run, strip

ORANGE = (230, 159, 0)  # of Okabe and Ito: the patch's range and boxes


class Page(HTMLParser):
    """What a page holds: its text, its scripts by id, and all that it would load."""

    def __init__(self, path):
        super().__init__()
        self.source, self.inside, self.scripts = path.read_text(), None, {}
        self.texts, self.loads, self.tags = [], [], []
        self.feed(self.source)
        self.data, self.strips = (json.loads(self.scripts[name]) for name in ("data", "strips"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.inside = (tag, dict(attrs).get("id"))
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside and self.inside[0] in ("script", "style"):
            self.scripts[self.inside[1]] = data
        else:
            self.texts.append(data)


def page_of(folders, output, **more):
    return Page(report.write(folders, output, **more))


def rows(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def kept_slots(folder):
    return [(group, slot) for group in rows(folder / "rollouts.jsonl") for slot in group["slots"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "ffr-0")


@pytest.fixture(scope="module")
def page(run):
    return page_of([run], run.parent / "page.html")


# --- what the page holds --------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere(page):
    """Catches: a font, a script or a picture from the network."""
    assert all(re.match(r"#|data:,$", value) for value in page.loads), page.loads
    assert "default-src 'none'" in page.source and not re.search(r"url\(|@import", page.source)


def test_markup_in_data_stays_text(page):
    """Catches: a question, a command or a flag that ends a script or opens a tag."""
    assert page.tags.count("script") == 3 and "img" not in page.tags
    assert page.data["runs"][0]["groups"][0]["question"] == f"What colour? {MARKUP}"
    assert f"train.py {MARKUP}" in page.text.replace("'taken' ", "'taken'")
    assert "<script>document" not in page.source


def test_outcomes_are_those_of_the_files(page, run):
    """Catches: a refused patch counted as repaired, a wrong repair as right, a trace as a try."""
    slots = [slot for group in page.data["runs"][0]["groups"] for slot in group["slots"]]
    live = 4 * 3  # groups that hold one slot of every kind; the others are all right at once
    assert len(slots) == 4 * 4 * len(KINDS)
    found = {kind: sum(slot["outcome"] == kind for slot in slots) for kind in report.OUTCOMES}
    assert found == {"right": live + 4 * len(KINDS), "repaired": 2 * live, "failed": live,
                     "unpatched": 3 * live, "trace": live}
    assert sum(slot["leak"] for slot in slots) == 2 * live  # refused, and mended
    assert {slot["ended"] for slot in slots} == {
        "nobody asked", "patched", "refused, direct", "patched, mended partial",
        "budget, budget spent"}
    assert sum(group["dead"] for group in page.data["runs"][0]["groups"]) == 4


def test_each_strip_is_embedded_once_and_whole(page, run):
    """Catches: thumbnails repeated for each group; a group with another sample's frames."""
    assert len(page.strips) == 3
    for group in page.data["runs"][0]["groups"]:
        kept = next(row for row in rows(run / "rollouts.jsonl") if row["sample"] == group["sample"])
        data = base64.b64decode(page.strips[group["strip"]])
        assert data == (run / kept["thumbnails"]).read_bytes()


def test_curves_have_a_point_for_each_line(page, run):
    """Catches: curves that lose steps, or that shift where a value is null."""
    logged, drawn = rows(run / "metrics.jsonl"), page.data["runs"][0]["metrics"]
    assert drawn["step"] == [row["step"] for row in logged]
    assert drawn["repair_rate"][1] is None
    assert drawn["repair_rate/spatial"] == [None, 0.5, None, 0.5]
    for name in ("reward", "accuracy", "entropy", "repair_rate"):
        for shown, row in zip(drawn[name], logged, strict=True):
            assert (shown is None) == (row[name] is None)
            assert shown is None or math.isclose(shown, row[name], rel_tol=1e-4)


def test_the_head_says_what_was_done(page):
    """Catches: calls or dollars of the evaluation left out or mixed in, a hidden bad file."""
    assert "28 calls" in page.text and "$2.00 in all" in page.text  # 4 · 7; 4 · 0.25 + 2 · 0.50
    assert "1 samples could not be used as they are" in page.text
    assert "40.0 %" in page.text and "50.0 %" in page.text and "c0ffee" in page.text


def test_held_out_questions_have_their_fate(page):
    """Catches: a question right only in between called never right; graded kinds marked wrong."""
    table = page.data["runs"][0]["table"]
    assert {q["id"]: q["fate"] for q in table["questions"]} == {
        name: name for name in ("kept", "learned", "lost", "between", "never")}
    assert table["columns"] == ["step 0", "step 2", "step 4"]
    assert report.fate([True]) == "kept" and report.fate([False]) == "never"
    assert report.fate([None, True, False]) == "lost" and report.fate([None]) == "open"


def repair(reward, advantage, kappa=0.3, form=1.0, right=True):
    parts = {"accuracy": float(right), "format": form, "kappa": -kappa, "alignment": 0.0}
    return {"trained": "repair", "first": {"correct": False}, "repair": {"correct": right},
            "reward": reward, "advantage": advantage, "parts": parts}


def test_a_right_repair_with_negative_advantage_is_explained():
    """Catches: a sentence for other slots, another mean, κ named where it was not the reason."""
    right = {"trained": "first", "first": {"correct": True}, "repair": None, "reward": 2.0,
             "advantage": 0.4, "parts": {}}
    taxed = repair(1.7, -2.4)
    said = report.why_negative(taxed, [right, right, right, taxed])
    assert "1.70, 2.00 less κ = 0.3, lies below the mean of its group, 1.93" in said
    assert "3 of its 4 first tries were right at once and pay no κ" in said
    assert not report.why_negative(right, [right, taxed])
    assert not report.why_negative(repair(1.7, 0.7), [taxed, repair(0.7, -0.7, right=False)])
    assert not report.why_negative(repair(0.7, -0.7, right=False), [taxed])
    formless = repair(0.7, -0.7, form=0.0)
    said = report.why_negative(formless, [formless, repair(1.7, 0.7)])
    assert "1 of its 2 slots got more" in said and "format part is 0" in said


# --- its size -------------------------------------------------------------------------------------


def test_max_mb_holds_and_what_is_missing_is_said(tmp_path):
    """Catches: a page over the bound; frames or texts that are left out in silence."""
    run = make_run(tmp_path / "big", steps=6, samples=24, noisy=True, size=(128, 72),
                   words="It is red. " * 200)
    whole = page_of([run], tmp_path / "whole.html", max_mb=20)
    assert "To hold --max_mb" not in whole.text and len(whole.strips) == 24
    bound = 0.7
    small = page_of([run], tmp_path / "small.html", max_mb=bound)
    assert (tmp_path / "small.html").stat().st_size <= 1e6 * bound < len(whole.source)
    assert re.search(r"To hold --max_mb 0.7: \d+ texts of more than \d+ characters lack their "
                     r"middle; frames are shown at most \d+ pixels high", small.text)
    cut = [slot["first"]["text"] for group in small.data["runs"][0]["groups"]
           for slot in group["slots"] if slot["first"]["answer"]]
    assert all(" […] " in text and text.endswith("</answer>") for text in cut)
    least = page_of([run], tmp_path / "least.html", max_mb=0.2)
    assert (tmp_path / "least.html").stat().st_size <= 200_000
    shown = {group["step"] for group in least.data["runs"][0]["groups"]}
    assert 0 < len(shown) < 6
    assert f"rollouts are shown of {len(shown)} of the 6 steps" in least.text
    with pytest.raises(ValueError, match="--max_mb 0.01: without rollouts the page has"):
        report.write([run], tmp_path / "none.html", 0.01)
    assert not (tmp_path / "none.html").exists()


def test_frames_without_room_are_left_out_and_counted(tmp_path):
    """Catches: a strip more than there is room for; a group that points to one left out."""
    run = make_run(tmp_path / "run", samples=16, noisy=True, size=(128, 72))
    groups, room = report.training(run)["drawn"]["groups"], 12_000
    shown, said = report.thumbnails(groups, room)
    assert 0 < len(shown) < 16 and len(json.dumps(shown)) <= room
    assert said == ["frames are shown at most 32 pixels high",
                    f"{16 - len(shown)} strips of frames have no room"]


def test_damaged_strips_are_named(tmp_path):
    """Catches: half a JPEG embedded, or a page that cannot be written for it."""
    run = make_run(tmp_path / "run")
    first, second, _ = sorted((run / "thumbnails").glob("*"))
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    page = page_of([run], tmp_path / "page.html")
    assert "2 strips of frames are missing or damaged" in page.text and len(page.strips) == 1


# --- several runs, and runs that lack something ---------------------------------------------------


def test_flags_that_differ_and_seeds_that_are_pooled(tmp_path):
    """Catches: a flag missing or too much, seeds not pooled, runs pooled that differ."""
    runs = [make_run(tmp_path / name, seed=seed, kappa=kappa) for name, seed, kappa in (
        ("a", 0, 0.3), ("b", 1, 0.3), ("c", 0, 0.7))]
    assert report.differing([report.training(run) for run in runs]) == {
        "seed": [0, 1, 0], "kappa": [0.3, 0.3, 0.7]}
    page = page_of(runs, tmp_path / "page.html")
    assert page.data["rows"] == ["kappa 0.3", "kappa 0.7"]
    assert [run["row"] for run in page.data["runs"]] == [0, 0, 1]
    mean, spread = statistics.mean((50, 60)), statistics.stdev((50, 60))
    assert f"{mean:.1f} ± {spread:.1f}" in page.text
    shutil.copy(runs[0] / "metrics.jsonl", tmp_path / "kept")
    lines = (tmp_path / "kept").read_text().split("\n")
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")  # it stopped at step 2
    assert len(page_of(runs, tmp_path / "page.html").data["rows"]) == 3


def test_a_folder_of_runs_is_all_of_them(tmp_path):
    """Catches: checkpoints taken for runs; a page that overwrites that of its first run."""
    for name in ("one", "two"):
        make_run(tmp_path / name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": []}')
    assert [path.name for path in report.runs_in([tmp_path])] == ["one", "two"]
    assert report.write([tmp_path / "one", tmp_path / "two"]) == tmp_path / "report.html"
    assert report.write([tmp_path / "one"]) == tmp_path / "one" / "report.html"


def test_a_run_of_before_and_a_run_without_a_step_have_a_page(tmp_path):
    """Catches: a crash, or an empty section without a word, where files are missing."""
    run = make_run(tmp_path / "old")
    for name in ("rollouts.jsonl", "eval_answers.jsonl"):
        (run / name).unlink()
    old = page_of([run], tmp_path / "old.html")
    assert "no rollouts were kept" in old.text and "no held-out answers were kept" in old.text
    assert old.data["runs"][0]["metrics"]["step"] == [0, 1, 2, 3]
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(run / "config.json", new)
    (new / "metrics.jsonl").write_text('{"step": 0, "re')
    assert "no step has been finished" in page_of([new], tmp_path / "new.html").text
    (run / "config.json").unlink()
    assert "config.json is missing" in page_of([run], tmp_path / "lost.html").text
    page_of([run, new], tmp_path / "both.html")


def test_numbers_that_are_none_leave_the_json_valid(tmp_path):
    """Catches: NaN in the page, which no browser parses."""
    run = make_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"kl": 0.0', '"kl": NaN', 1))
    page = page_of([run], tmp_path / "page.html")
    assert page.data["runs"][0]["metrics"]["kl"] == [None, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("words, sentence", [
    ([], "which runs?"), (["nowhere"], "nowhere: there is no such folder"),
    (["."], "holds no run, nor does a folder in it"),
    (["run", "--max_mb", "0"], "--max_mb must be positive"),
    (["run", "--max_gb", "1"], "did you mean --max_mb")])
def test_what_cannot_be_shown_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, words,
                                                         sentence):
    """Catches: a traceback, or a page of nothing."""
    monkeypatch.chdir(tmp_path)
    if "run" in words:
        make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        report.main(words)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("**/report.html"))


def test_the_command_writes_and_replaces(tmp_path, capsys):
    """Catches: --output not heeded, a page of before that stays, a partial file left over."""
    run, output = make_run(tmp_path / "run"), tmp_path / "pages" / "page.html"
    for _ in range(2):
        report.main([str(run), "--output", str(output)])
    assert capsys.readouterr().out.split() == [str(output)] * 2
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


# --- runs of evaluate.py --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """Two runs of evaluate.py, the second made the blind one of the first."""
    import evaluate
    folder = tmp_path_factory.mktemp("evaluations")
    asked = [{"problem_id": f"q{i}", "problem": f"How many? {MARKUP}", "problem_type": kind,
              "options": [], "solution": f"<answer>{i}</answer>", "data_type": "video",
              "path": "a.mp4", "data_source": "toy"}
             for i, kind in enumerate(["numerical", "numerical", "regression", "regression"])]
    (folder / "data.json").write_text(json.dumps(asked))
    for name, right in (("plain", (0, 1, 2)), ("blind", (2,))):
        lines = [{"id": f"q{i}", "text": f"<think>{MARKUP}</think><answer>{i if i in right else 9}"
                  "</answer>"} for i in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        evaluate.main(["--benchmark", "own", "--data", str(folder / "data.json"), "--video_root",
                       str(folder), "--predictions", str(folder / f"{name}.jsonl"), "--output",
                       str(folder / name)])
        config = json.loads((folder / name / "config.json").read_text())
        config |= {"label": name, "label_blind": "blind"}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def test_evaluations_have_figures_blind_row_and_every_question(evaluations):
    """Catches: another figure than evaluate.py's, a blind run that is not set beside its own."""
    page = page_of([evaluations], evaluations / "page.html")
    shares = [100 * overall(read_run(evaluations / n), "official") for n in ("plain", "blind")]
    assert shares[0] > shares[1] and all(f"{share:.1f}" in page.text for share in shares)
    assert page.text.count("blind: the same without the videos") == 1
    table, = page.data["evaluations"]
    assert table["columns"] == ["blind", "plain"]
    assert [[cell["marks"] for cell in q["cells"]] for q in table["questions"]] == [
        [[False] * 2, [True] * 2], [[False] * 2, [True] * 2], [[True] * 2] * 2, [[False] * 2] * 2]
    assert [q["fate"] for q in table["questions"]] == ["learned", "learned", "kept", "never"]
    assert page.tags.count("script") == 3


@pytest.fixture(scope="module")
def shown(evaluations, tmp_path_factory):
    """Make the two runs and a third, all but the blind one with frames that two questions share."""
    folder, rng = tmp_path_factory.mktemp("shown") / "runs", random.Random(0)
    shutil.copytree(evaluations, folder)
    shutil.copytree(folder / "plain", folder / "third")
    for run, names in (("plain", "aabc"), ("third", "aad")):
        (folder / run / "thumbnails").mkdir()
        for name in sorted(set(names)):
            strip(folder / run / f"thumbnails/{name}.jpg", rng, (WIDTH, HEIGHT), noisy=True)
        lines(folder / run / "frames.jsonl", [
            {"id": f"q{i}", "times": TIMES, "thumbnails": f"thumbnails/{name}.jpg",
             "thumbnail_size": (WIDTH, HEIGHT)} for i, name in enumerate(names)], '{"id": "q3"')
    shutil.copy(folder / "plain/thumbnails/a.jpg", folder / "third/thumbnails/a.jpg")
    return folder


def test_questions_of_evaluations_have_the_frames_they_were_shown_with(shown, tmp_path):
    """Catches: frames of another question or run, a strip twice where it is shared, frames for a
    blind run, a count of what is kept that is wrong.
    """
    page = page_of([shown], tmp_path / "page.html")
    table, = page.data["evaluations"]
    assert table["columns"] == ["blind", "plain", "third"]
    found = [[cell["frames"] and cell["frames"][-5] for cell in q["cells"]]
             for q in table["questions"]]
    assert found == [[None, "a", "a"], [None, "a", "a"], [None, "b", "d"], [None, "c", None]]
    assert table["frames"].keys() == {f"thumbnails/{name}.jpg" for name in "abcd"}
    for name, one in table["frames"].items():
        run = "third" if name.endswith("d.jpg") else "plain"
        assert base64.b64decode(page.strips[one["strip"]]) == (shown / run / name).read_bytes()
        assert (one["times"], one["thumbnail_size"]) == (list(TIMES), [WIDTH, HEIGHT])
    assert len(page.strips) == 4
    assert "4 with frames" in page.text and "3 with frames" in page.text
    assert page.text.count("with frames") == 2


def test_frames_of_evaluations_are_within_the_bound_of_the_page(shown, tmp_path):
    """Catches: a page over --max_mb, or no page, because of an evaluation's frames."""
    runs, rng = tmp_path / "runs", random.Random(0)
    shutil.copytree(shown / "plain", runs)
    for name in "abc":
        strip(runs / f"thumbnails/{name}.jpg", rng, (256, 256), noisy=True)
    page = page_of([runs], tmp_path / "page.html", max_mb=0.15)
    assert (tmp_path / "page.html").stat().st_size <= 150_000
    assert "To hold --max_mb 0.15: frames are shown at most" in page.text
    (runs / "thumbnails/a.jpg").unlink()
    page = page_of([runs], tmp_path / "page.html")
    assert "1 strips of frames are missing or damaged" in page.text and len(page.strips) == 2


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; the tests are skipped where it or playwright is missing."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                    "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.skip("needs playwright: pip install -r requirements-dev.txt")
    if not chromium:
        pytest.skip("needs a chromium on the PATH: apt-get install chromium")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def seen(browser, page, run):
    """Open the page of `run` as a file, and keep what its console says."""
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.goto(f"file://{run.parent / 'page.html'}")
    yield tab
    tab.close()


def at(tab, fragment):
    """Go to a fragment, and wait until the page has followed."""
    tab.evaluate("""fragment => new Promise((done) => {
        addEventListener("hashchange", done, { once: true });
        if (location.hash === "#" + fragment) done();
        location.hash = fragment;
    })""", fragment)


def test_the_page_opens_without_an_error(seen):
    """Catches: a script that fails, markup of a question that runs, a policy that blocks ours."""
    assert seen.said == [] and seen.title() == "ffr-0"
    assert seen.locator(".question").first.inner_text() == f"What colour? {MARKUP}"


def test_every_curve_has_its_points(seen, run):
    """Catches: a drawn curve with fewer points than metrics.jsonl has values."""
    logged = rows(run / "metrics.jsonl")
    paths = seen.evaluate("""[...document.querySelectorAll('path.raw[data-curve]')].map(
        (path) => [path.dataset.curve, path.getAttribute('d').split(/[ML]/).length - 1])""")
    drawn = {}
    for name, points in paths:
        drawn.setdefault(name, []).append(points)
    for name in ("reward", "entropy", "repair_rate", "completion_length", "tokens_per_second"):
        assert drawn[name] == [sum(row[name] is not None for row in logged)]
    assert sorted(drawn["accuracy"]) == [2, 4]  # of eval.jsonl, of metrics.jsonl
    assert drawn["repair_rate/spatial"] == [2]
    layers = seen.locator("path.layer").evaluate_all("all => all.map((p) => p.dataset.points)")
    assert layers == ["4"] * 3  # load, decode, train; other took no time


def test_boxes_lie_where_the_patch_says_on_the_right_frames(seen, run):
    """Catches: a box on another frame, of another size, from another corner; frames mixed up."""
    from io import BytesIO

    from PIL import Image
    at(seen, "rollouts")
    frames = seen.locator(".group").first.locator(".frame")
    assert frames.count() == 6
    assert [i for i in range(6) if "marked" in frames.nth(i).get_attribute("class")] == [2, 3]
    assert frames.nth(3).locator("time").inner_text().split() == ["3", "1.5", "s"]
    strip = Image.open(run / rows(run / "rollouts.jsonl")[0]["thumbnails"])
    for i in range(6):
        shot = Image.open(BytesIO(frames.nth(i).locator(".picture").screenshot())).convert("RGB")
        w, h = shot.size
        kept = strip.getpixel((strip.width * (2 * i + 1) // 12, strip.height // 10))
        assert abs(shot.getpixel((w // 2, h // 10))[0] - kept[0]) < 6
        x1, y1, x2, y2 = (round(share * side) for share, side in zip(BOX, (w, h, w, h)))

        def orange(x, y, shot=shot):
            return all(abs(a - b) < 40 for a, b in zip(shot.getpixel((x, y)), ORANGE))

        edges = [(x1 + 1, h // 2), (x2 - 2, h // 2), (w // 2, y1 + 1), (w // 2, y2 - 2)]
        assert [orange(*place) for place in edges] == [i in (2, 3)] * 4
        away = [(w // 2, h // 2), (x1 - 5, h // 2), (x2 + 5, h // 2), (w // 2, y2 + 5)]
        assert not any(orange(*place) for place in away)


def test_filters_count_what_the_files_hold(seen, run):
    """Catches: a filter that lets others through, or whose link does not keep it."""
    slots = kept_slots(run)

    def count(fragment):
        at(seen, fragment)
        return int(seen.locator("#rollouts .count b").first.inner_text().replace(",", ""))

    assert count("rollouts") == len(slots)
    for error in ("temporal", "spatial", "misconception"):
        assert count(f"rollouts&error={error}") == sum(
            bool(s["patch"]) and s["patch"]["error_type"] == error for _, s in slots)
    right = [bool(s["repair"]) and s["repair"]["correct"] for _, s in slots]
    assert count("rollouts&outcome=repaired") == sum(right)
    assert count("rollouts&outcome=paradox") == sum(
        ok and s["advantage"] < 0 for ok, (_, s) in zip(right, slots))
    assert count("rollouts&ended=refused%2C%20direct") == sum(
        (s["diagnosis"] or {}).get("status") == "refused" for _, s in slots)
    assert count("rollouts&ended=leak") == sum(
        any(word in ((s["diagnosis"] or {}).get("reason") or "") for word in ("direct", "mended"))
        for _, s in slots)
    assert count("rollouts&sample=sample-1") == sum(g["sample"] == "sample-1" for g, _ in slots)
    assert count("rollouts&q=hm.") == sum(
        any(one and "Hm." in one["text"] for one in (s["first"], s["repair"])) for _, s in slots)
    assert count("rollouts&q=hm.&outcome=failed") == sum(
        bool(s["repair"]) and not s["repair"]["correct"]
        and any("Hm." in one["text"] for one in (s["first"], s["repair"])) for _, s in slots)
    seen.locator("#filter-error").select_option("spatial")
    assert "outcome=failed" in seen.evaluate("location.hash") and "error=spatial" in seen.url
    assert "outcome=failed" in seen.locator(".top nav a").first.get_attribute("href")
    seen.get_by_role("button", name="Clear").click()
    assert count("rollouts") == len(slots)


def test_a_click_on_a_group_and_the_keyboard_lead_to_a_slot(seen):
    """Catches: a cell that leads to another group; slots and curves that need a mouse."""
    at(seen, "steps")
    seen.locator(".steps a").first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        seen.keyboard.press(key)
    seen.keyboard.press("Enter")
    back = seen.get_by_text("all groups that match").first
    back.wait_for()
    keyed = seen.locator(".group .where").inner_text()
    at(seen, "steps")
    seen.locator(".step").nth(2).locator("a").nth(3).click()
    back.wait_for()
    assert seen.locator(".group .where").inner_text() == keyed
    assert seen.locator(".group .where").inner_text().startswith("Step 2, rank 1 · sample sample-2")
    chip = seen.locator(".chip[aria-selected=true]")
    before = chip.inner_text()
    chip.focus()
    seen.keyboard.press("ArrowRight")
    assert chip.inner_text() != before
    assert seen.evaluate("document.activeElement.className") == "chip"
    seen.locator("svg.plot").nth(1).focus()
    seen.keyboard.press("Home")
    seen.keyboard.press("ArrowRight")
    assert seen.locator("figcaption .at").nth(2).inner_text() == "step 1"
    assert seen.locator("figure", has_text="Repair rate by").locator("b").all_inner_texts() == [
        "50.0 %", "50.0 %"]


def test_an_opened_question_shows_its_frames(browser, shown, tmp_path):
    """Catches: frames that are in the page and not to be seen, without times, drawn once for each
    run that shows the same, squeezed into a column beside the answers, or under the name of a run
    that was shown others or none.
    """
    report.write([shown], tmp_path / "page.html")
    tab = browser.new_page()
    tab.on("pageerror", lambda error: pytest.fail(str(error)))
    tab.goto(f"file://{tmp_path / 'page.html'}")
    questions = tab.locator("details.asked")
    for place, told in ((0, ["plain, third"]), (2, ["plain", "third"]), (3, ["plain"])):
        questions.nth(place).locator("summary").click()
        strips = questions.nth(place).locator(".strip")
        strips.first.wait_for()
        assert strips.count() == len(told)
        boxes = strips.first.bounding_box(), questions.nth(place).bounding_box()
        assert boxes[0]["width"] > 0.8 * boxes[1]["width"]
        said = questions.nth(place).locator("p.small", has_text="shown in").all_inner_texts()
        assert said == [f"shown in {runs}" for runs in told]
        times = strips.first.locator("time span:last-child").all_inner_texts()
        assert times == [f"{seconds:.1f} s" for seconds in TIMES]
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, run, page, evaluations, scheme):
    """Catches: a table, a command or a word that is wider than the page; a forgotten colour."""
    others = [run, make_run(run.parent / f"other-{scheme}", kappa=0.9, data="x" * 300)]
    report.write([*others, evaluations], run.parent / "many.html")
    tab = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    tab.on("pageerror", lambda error: pytest.fail(str(error)))
    for name in ("page", "many"):
        tab.goto(f"file://{run.parent / name}.html")
        tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        width = tab.evaluate("document.documentElement.scrollWidth")
        assert width <= 400
    dark = "rgb(21, 23, 26)"
    background = "getComputedStyle(document.documentElement).backgroundColor"
    assert (tab.evaluate(background) == dark) == (scheme == "dark")
    tab.locator("#theme").click()
    assert (tab.evaluate(background) == dark) == (scheme == "light")
    tab.close()
