"""benchmarks/: layouts of the eight benchmarks, both conventions, and the traps of each."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest

import video
from benchmarks import results
from benchmarks.questions import CONVENTIONS, knowledge, load, read, score, tally, value, weights

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return miniature.make(tmp_path_factory.mktemp("miniature"))


def config(world, where, **flags):
    """Return the flags that load() reads; `where` says whose files."""
    root = world / ("lvb" if where == "longvideobench" else where)
    given = dict(benchmark=where, data=str(world / miniature.DATA[where]), video_root=str(root),
                 frames=4, subtitles=False, uncut=False, question_only=False)
    return SimpleNamespace(**given | flags)


def questions(world, benchmark, **flags):
    return load(config(world, benchmark, **flags))


def right(benchmark, q, text):
    """Return the (official, family) value of an answer."""
    return tuple(value(benchmark, q, text, convention) for convention in CONVENTIONS)


def tagged(letter):
    return f"<think>Let me see.</think><answer>{letter}</answer>"


@pytest.mark.parametrize("benchmark", miniature.DATA)
def test_every_row_of_every_benchmark_is_read_and_its_file_is_found(world, benchmark):
    """Catches: a row dropped, a path unlike the downloads', a gold that scores nothing."""
    found = questions(world, benchmark)
    count = dict(mmvu=3, vsibench=12, videommmu=7, holmes=4, longvideobench=2, lvbench=2, mvbench=4,
                 tempcompass=6)
    assert len(found) == count[benchmark] and len({q.id for q in found}) == len(found)
    for q in found:
        assert Path(q.media).exists(), q.media
        assert q.judged or right(benchmark, q, tagged(q.answer)) == (1.0, 1.0), q
        assert not q.options or q.answer in "ABCDEFGHIJKLMN"[:len(q.options)]


def test_ids_letters_and_groups_are_those_of_the_source(world):
    """Catches: Holmes' repeated ids merged, a 1-based choice, letters cut at F, options that have
    no letters or two.
    """
    assert [q.id for q in questions(world, "holmes")] == ["vidA/1", "vidA/2", "vidB/1", "vidB/1#2"]
    assert questions(world, "holmes")[0].options == tuple(f"{x}. person {x}" for x in "ABCDEF")
    assert [q.answer for q in questions(world, "longvideobench")] == ["A", "E"]
    mmmu = {q.id: q for q in questions(world, "videommmu")}
    finance = mmmu["Perception/validation_Finance_1"]
    assert finance.answer == "N" and len(finance.options) == 14
    assert mmmu["Comprehension/validation_Finance_1"].options == ("A. one", "B. two")
    # question_type null, ten options
    assert mmmu["Adaptation/dev_Art_Theory_3"].groups == ("Adaptation", "Art")
    assert mmmu["Adaptation/dev_Art_Theory_3"].kind == "multiple choice"
    assert mmmu["Adaptation/new_Physics_21"].options == ("A.", "B.", "C.", "D.")
    manage = mmmu["Adaptation/validation_Manage_4"]
    assert (manage.kind, manage.answer) == ("numerical", "3.429")
    assert not any("image 1" in q.text.lower() for q in mmmu.values())
    assert questions(world, "mmvu")[1].groups == ("multiple choice", "Healthcare")
    assert questions(world, "mmvu")[2].judged
    first = questions(world, "lvbench")[0]
    assert first.text == "What year?"
    assert first.options == ("A. 1636", "B. 1366", "C. 1363", "D. 1633")
    assert first.evidence == ({"start": 0, "end": 1},)
    assert questions(world, "lvbench")[1].evidence == ({"start": 1, "end": 2},)


def test_question_only_is_adaptation_on_the_short_clips(world):
    """Catches: Δknowledge measured with the lecture, or over the wrong track."""
    found = questions(world, "videommmu", question_only=True)
    assert {q.groups[0] for q in found} == {"Adaptation"} and len(found) == 5
    assert all("question_only" in q.media and Path(q.media).exists() for q in found)
    assert knowledge(40.0, 55.0) == pytest.approx(25.0)  # 15 of 60 points
    assert knowledge(50.0, 40.0) == pytest.approx(-20.0)


def test_mvbench_cuts_bounded_tasks_and_reads_frame_folders(world):
    """Catches: text answers, whole films where seconds are asked for, clevrer's video_1 shown for
    perception's, pictures of TVQA not decoded, or numbered from 0 though sampled at 3 a second.
    """
    found = {q.groups[0]: q for q in questions(world, "mvbench")}
    assert {task: q.answer for task, q in found.items()} == dict(
        action_sequence="B", episodic_reasoning="E", moving_count="A", object_shuffle="C")
    assert found["action_sequence"].span == (1.0, 2.0) and found["object_shuffle"].span is None
    assert questions(world, "mvbench", uncut=True)[0].span is None
    assert "clevrer" in found["moving_count"].media
    assert "perception" in found["object_shuffle"].media
    folder = found["episodic_reasoning"]
    # pictures 0 to 6 of 12: grey 10 (i + 1)
    clip = video.decode(folder.media, "video", 4, 56 * 56, 28, folder.span)
    assert clip.indices == (0, 2, 4, 6) and clip.times == (0.0, 0.6667, 1.3333, 2.0)
    assert clip.total_frames == 7
    grey = [round(float(frame.float().mean())) for frame in clip.frames]
    assert grey == pytest.approx([10, 30, 50, 70], abs=2)
    film = video.decode(found["action_sequence"].media, "video", 4, 56 * 56, 28, (1.0, 2.0))
    assert film.indices == (8, 11, 13, 16) and film.times[0] == 1.0 and film.total_frames == 9
    # frame i is 8 i
    assert [round(float(frame.float().mean()) / 8) for frame in film.frames] == [8, 11, 13, 16]


def test_subtitles_are_those_of_the_frames_shown(world):
    """Catches: the clip's offset forgotten, so that no line or a wrong one comes first."""
    text = questions(world, "longvideobench", subtitles=True)[0].text
    assert "good morning" in text and "much later" not in text and text.endswith("What is held?")
    assert "good morning" not in questions(world, "longvideobench")[0].text


def test_mra_table_of_both_conventions(world):
    """Catches: "<" and "<=" exchanged: the whole table of off-by-one counts at a threshold."""
    q = next(q for q in questions(world, "vsibench") if q.kind == "regression")
    for pred, gold, official, family in (
            ("3", "2", 0.1, 0.0), ("5", "4", 0.6, 0.5), ("10", "8", 0.6, 0.5),
            ("1.1", "1.0", 0.9, 0.8), ("4", "3", 0.4, 0.4), ("7", "7", 1.0, 1.0)):
        found = right("vsibench", replace(q, answer=gold), tagged(pred))
        assert found == (pytest.approx(official), pytest.approx(family))


def test_vsi_reads_units_and_letters_as_each_convention_does(world):
    """Catches: "3 meters" a number for the family or none for the authors, who also take "B."."""
    found = {q.groups[-1]: q for q in questions(world, "vsibench")}
    room, route = found["room_size_estimation"], found["route_planning"]  # 3; C
    assert right("vsibench", room, tagged("3 meters")) == (1.0, 0.0)
    assert right("vsibench", room, "3.") == (1.0, 1.0)
    big = replace(room, answer="1000")
    assert right("vsibench", big, tagged("1,000")) == (0.0, 1.0)
    assert right("vsibench", room, tagged("about 3")) == (0.0, 0.0)
    assert right("vsibench", route, tagged("c.")) == (1.0, 0.0)
    assert right("vsibench", route, tagged("C. way 2")) == (1.0, 0.0)
    assert right("vsibench", route, "<think>x</think>C") == (0.0, 0.0)
    assert right("vsibench", route, "C") == (1.0, 1.0)


def test_vsi_headlines_are_three_different_means(world):
    """Catches: a micro mean for the macro one, direction counted as three tasks, the family's mean
    of two metrics lost.
    """
    found = questions(world, "vsibench")
    texts = {q.id: tagged(q.answer) for q in found}
    texts["0"], texts["5"], texts["8"], texts["9"] = tagged("3"), tagged("D"), tagged("A"), ""
    official = score("vsibench", found, texts, "official")
    # counting (0.1 + 1)/2; distance, size, room 1; rel_distance 0; direction (1 + 1 + 0)/3;
    # route, order 1
    assert official["overall"] == (pytest.approx((0.55 + 1 + 1 + 1 + 0 + 2 / 3 + 1 + 1) / 8), 12)
    assert official["object_rel_direction"] == (pytest.approx(2 / 3), 4)
    assert official["object_rel_direction_hard"] == (0.0, 2)
    family = score("vsibench", found, texts, "family")
    assert family["numerical"][0] == pytest.approx(4 / 5)
    assert family["multiple choice"][0] == pytest.approx(4 / 7)
    assert family["overall"][0] == pytest.approx((4 / 5 + 4 / 7) / 2)
    assert family["over questions"] == (pytest.approx(8 / 12), 12)


def test_holmes_official_parser_prefers_early_letters(world):
    """Catches: a better parser than the authors' under their name, the first of two answers."""
    q = questions(world, "holmes")[0]  # C
    assert right("holmes", q, "Answer: C") == (0.0, 0.0)  # the A of "Answer"
    assert right("holmes", q, tagged("C: it was he")) == (1.0, 0.0)
    assert right("holmes", q, tagged("C. A man")) == (0.0, 0.0)  # "A "
    assert right("holmes", q, "<answer>A</answer> no, <answer>C</answer>") == (1.0, 0.0)
    # of three options none is D
    assert right("holmes", replace(q, options=q.options[:3]), "D or C")[0] == 1.0


def test_videommmu_rules(world):
    """Catches: letters beyond F unread, the first letter taken, open answers read as letters."""
    found = {q.id: q for q in questions(world, "videommmu")}
    q = found["Perception/validation_Finance_1"]  # N of 14
    assert right("videommmu", q, tagged("(N)")) == (1.0, 0.0)
    assert right("videommmu", q, "First M. but then N. For sure")[0] == 1.0
    assert right("videommmu", q, "N. was wrong, M. is it")[0] == 0.0
    two = found["Comprehension/validation_Finance_1"]  # the option's text, in six words or more
    assert right("videommmu", two, "we would say that it must be two")[0] == 1.0
    assert right("videommmu", two, "it is two")[0] == 0.0
    # I is one of fourteen letters, and not the right one
    assert right("videommmu", q, "I think so")[0] == 0.0
    for text, letter in (  # worked out by the authors' order of marks
            ("The answer is C because of the DNA in there", "C"), ("A. it is, not B: which", "A"),
            ("B: or C: then", "C"), ("NASA BBC said", "A"), ("now (D) or (B)", "B")):
        assert right("videommmu", replace(q, answer=letter), text)[0] == 1.0, text
    dogs = replace(two, options=("A. a dog", "B. a dog runs"), answer="A")
    # both begin there: the first
    assert right("videommmu", dogs, "we see that here a dog runs")[0] == 1.0
    number = found["Adaptation/test_Math_2"]  # 12.5
    assert right("videommmu", number, tagged("12.50")) == (1.0, 1.0)
    assert right("videommmu", number, tagged("It is 3 and the answer is 12.5 m")) == (1.0, 0.0)
    assert right("videommmu", number, tagged("12")) == (0.0, 0.0)
    # any line
    assert right("videommmu", number, "The answer is 12.5\nSo I have told all there is.")[0] == 1.0
    # behind the last such word
    assert right("videommmu", number, "It is 12.5, not 3, so 3")[0] == 0.0
    assert right("videommmu", replace(number, answer="0.5", accepted=("0.5",)), "x = .5")[0] == 1.0
    words = replace(number, kind="free-form", answer="red wine", accepted=("red wine",))
    assert right("videommmu", words, "It is Red wine, I think")[0] == 1.0
    assert right("videommmu", words, "It is wine")[0] == 0.0
    several = found["Adaptation/validation_Manage_4"]  # ['24/7', '3.429', '3.43]
    assert right("videommmu", several, tagged("24/7")) == (1.0, 0.0)
    assert right("videommmu", several, tagged("3.43")) == (1.0, 1.0)


def test_longvideobench_lvbench_and_mvbench_rules(world):
    """Catches: the empty answer that MVBench's rule counts as right, an article read otherwise than
    the authors' rule does.
    """
    q = questions(world, "longvideobench")[1]  # E of five
    assert right("longvideobench", q, "The answer is E") == (1.0, 0.0)
    assert right("longvideobench", q, tagged("A man, E")) == (0.0, 0.0)
    assert right("longvideobench", q, "Because F") == (0.0, 0.0)
    assert right("longvideobench", q, "Four of them: E")[0] == 1.0  # no F among five
    assert right("longvideobench", q, "Nobody. E")[0] == 1.0  # no N
    q = questions(world, "lvbench")[0]  # D
    assert right("lvbench", q, "It is (D) 1633") == (1.0, 0.0)
    assert right("lvbench", q, "D. 1633") == (1.0, 0.0)
    assert right("lvbench", q, "(D (or (C)")[0] == 1.0
    assert right("lvbench", q, "B (D) or (C)")[0] == 1.0
    q = {q.groups[0]: q for q in questions(world, "mvbench")}["action_sequence"]  # B
    assert right("mvbench", q, "B) a cup") == (1.0, 0.0)
    assert right("mvbench", q, "(b)") == (1.0, 0.0)
    for nothing in ("", " ", "()", ".", ")", "a cup"):
        assert right("mvbench", q, nothing)[0] == 0.0, nothing


def test_tempcompass_labels_and_judge(world):
    """Catches: "Option 2" and "Caption A" unread, captioning wrong or scored without a judge."""
    found = {q.id: q for q in questions(world, "tempcompass")}
    two, caption = (found[f"caption_matching/1021_reverse/direction/{i}"] for i in (0, 1))
    assert two.options == ("A. It opens.", "B. It closes.") and two.answer == "B"
    assert caption.answer == "A"
    for text in ("Option 2", "2", "Option 2: It closes.", "It closes.", "B", "B. It closes."):
        assert right("tempcompass", two, text)[0] == 1.0, text
    for text in ("Option 1", "A", "Caption B", "It opens"):
        assert right("tempcompass", two, text)[0] == 0.0, text
    assert right("tempcompass", caption, "Caption A")[0] == 1.0
    no = found["yes_no/1021/action/1"]
    assert no.answer == "B" and right("tempcompass", no, "No, it closes.") == (1.0, 0.0)
    assert right("tempcompass", no, "Yes")[0] == 0.0
    assert tally([no], {no.id: {"text": "No, it closes."}})["unreadable"] == 0
    free = found["captioning/1021/action/0"]
    assert free.options == () and free.judged
    assert right("tempcompass", free, "It closes.") == (None, None)
    texts = {q.id: tagged(q.answer) for q in found.values()}
    texts["multi-choice/1021/action/0"] = tagged("A")
    official = score("tempcompass", list(found.values()), texts, "official")
    assert official["overall"] == (pytest.approx(2 / 3), 5)
    assert official["over questions"][0] == pytest.approx(4 / 5)
    judged = score("tempcompass", list(found.values()), texts, "official", {free.id: 1})
    assert judged["overall"] == (pytest.approx(3 / 4), 6) and judged["action"][1] == 4


def test_mmvu_without_a_judge_is_multiple_choice_alone(world):
    """Catches: open questions counted as wrong, or by rule, where nobody judged them."""
    found = questions(world, "mmvu")
    texts = {q.id: "(E)" for q in found}
    assert score("mmvu", found, texts, "official")["overall"] == (0.5, 2)
    judged = score("mmvu", found, texts, "official", {"validation_2": 1})
    assert judged["overall"] == (pytest.approx(2 / 3), 3)
    assert score("mmvu", found, texts, "family", {"validation_2": 1})["overall"] == (0.0, 2)


def test_lvbench_counts_a_question_once_for_each_label(world):
    """Catches: a question of two labels that counts twice overall, or once below."""
    found = questions(world, "lvbench")
    figures = score("lvbench", found, {"55": "D", "56": "D"}, "official")
    assert figures["overall"] == (0.5, 2) and figures["reasoning"] == (0.5, 2)
    assert figures["key information retrieval"] == (1.0, 1)


def test_weights_are_those_of_means_of_means():
    """Catches: cells that weigh by their size."""
    cells = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "b")]
    assert weights(cells) == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2])
    assert weights([()] * 4) == pytest.approx([1 / 4] * 4)


@pytest.mark.parametrize("benchmark", miniature.DATA)
@pytest.mark.parametrize("text", (
    "", "  \n", "I cannot tell what happens there, honestly, so we will never know.",
    tagged("A, B, C, D, E, F"), "x" * 100_000, "<answer>" * 12_500, "A." * 50_000,
    "<answer>" + "9" * 100_000 + "</answer>", "\ud800 \x00 <answer>\u0661</answer>"))
def test_no_answer_of_any_kind_breaks_a_scorer(world, benchmark, text):
    """Catches: a crash, a score outside [0, 1], an empty answer that is right."""
    found = questions(world, benchmark)
    for convention in CONVENTIONS:
        figures = score(benchmark, found, {q.id: text for q in found}, convention)
        assert all(0 <= share <= 1 for share, _ in figures.values())
        assert text.strip() or figures["overall"][0] == 0
    counts = tally(found, {q.id: {"id": q.id, "text": text} for q in found})
    assert counts["questions"] == len(found) and counts["unanswered"] == 0
    closed = sum(not q.judged for q in found)
    if not text.strip() or text.startswith(("I cannot", "<think>", "x")):
        # where one option is all there is
        assert counts["unreadable"] >= closed - (benchmark == "mvbench")


def test_tally_tells_why_there_is_no_answer(world):
    """Catches: a missing video that vanishes from the denominator."""
    found = questions(world, "vsibench")
    rows = {"0": {"id": "0", "text": "", "error": "missing: x.mp4"},
            "1": {"id": "1", "text": "", "error": "undecodable: y"},
            "2": {"id": "2", "text": tagged("1.0")}, "3": {"id": "3", "text": "no number"}}
    counts = tally(found, rows)
    assert counts == {"questions": 12, "missing": 1, "undecodable": 1, "unanswered": 8,
                      "unreadable": 1, "without <answer>": 1}
    family = score("vsibench", found, {"2": tagged("1.0")}, "family")
    assert family["over questions"] == (pytest.approx(1 / 12), 12)


def test_family_json_finds_doubled_folders_and_tasks(world, tmp_path):
    """Catches: "./Evaluation/" taken for a folder, frame rows dropped, MRA mixed into accuracy."""
    rows = [{"problem_id": 1, "problem": "Which?", "data_type": "frame",
             "problem_type": "multiple choice", "options": ["A. x", "B. y"],
             "original_question_type": "t", "solution": "<answer>B</answer>",
             "path": "./Evaluation/VSI/scannet/scene0000_00.mp4", "process": "",
             "data_source": "u"},
            {"problem_id": 5, "problem": "How many?", "data_type": "video",
             "problem_type": "regression", "options": None, "original_question_type": "n",
             "solution": "<answer>2</answer>",
             "path": "./Evaluation/VSI/scannet/scene0000_00.mp4"}]
    (tmp_path / "eval_vsibench.json").write_text(json.dumps(rows))
    found = load(config(world, "vsibench", benchmark="family",
                        data=str(tmp_path / "eval_vsibench.json")))
    assert [Path(q.media).exists() for q in found] == [True, True] and found[0].groups == ("t",)
    figures = score("family", found, {"1": tagged("B"), "5": tagged("3")}, "family")
    assert figures["overall"][0] == pytest.approx(0.5)
    assert score("family", found, {"1": "B.", "5": "2"}, "official")["overall"][0] == 1.0


def test_the_family_s_mvbench_has_its_tasks_by_position(world, tmp_path):
    """Catches: no figures for the twenty tasks, as no row names one, or tasks in another order."""
    row = {"problem": "?", "problem_type": "multiple choice", "options": ["A. x", "B. y"],
           "original_question_type": "", "solution": "<answer>B</answer>",
           "path": "./scannet/scene0000_00.mp4"}
    path = tmp_path / "eval_mvbench.json"
    path.write_text(json.dumps([{**row, "problem_id": i} for i in range(1, 4001)]))
    found = load(config(world, "vsibench", data=str(path), benchmark="family"))
    assert [found[200 * k].groups for k in (0, 4, 11, 15, 19)] == [
        ("action_antonym",), ("action_sequence",), ("moving_attribute",), ("object_interaction",),
        ("unexpected_action",)]
    path.write_text(json.dumps([{**row, "problem_id": i} for i in range(1, 401)]))
    # a part: unknown
    assert load(config(world, "vsibench", data=str(path), benchmark="family"))[399].groups == ()


def test_the_repository_s_own_copies_and_the_mirrors_are_read(world, tmp_path):
    """Catches: one layout only: Video-MMMU's JSON, LongVideoBench's and TempCompass' parquet,
    LVBench's mirror.
    """
    row = {"id": "new_Math_1", "question": "Which?", "options": ["x", "y"], "answer": "B"}
    miniature.dump(tmp_path / "mmmu/data/adaptation_video.json", {"Adaptation": {"0": row}})
    found = load(config(world, "videommmu", data=str(tmp_path / "mmmu")))
    assert found[0].id == "Adaptation/new_Math_1"
    miniature.dump(tmp_path / "lvb/validation-00000-of-00001.parquet", [
        {"id": "a", "video_path": "a_0.mp4", "question": "?", "option0": "x", "option1": "y",
         "option2": "N/A", "option3": "N/A", "option4": "N/A", "correct_choice": 1,
         "duration_group": 15, "level": "L1", "question_category": "S2A"}])
    found = load(config(world, "longvideobench", data=str(tmp_path / "lvb")))
    assert found[0].options == ("A. x", "B. y") and found[0].answer == "B"
    miniature.dump(tmp_path / "tc/captioning/test-00000-of-00001.parquet", [
        {"video_id": "1021", "question": "Describe.", "answer": "B. y", "dim": "order",
         "mc_question": "Which?\nA. x\nB. y", "mc_answer": "B. y"}])
    assert load(config(world, "tempcompass", data=str(tmp_path / "tc")))[0].answer == "B"
    miniature.dump(tmp_path / "lvbench/train.parquet", [
        {"question": "Which?", "options": ["x", "y"], "answer": "B", "video_path": "Cm7.mp4"}])
    found = load(config(world, "lvbench", data=str(tmp_path / "lvbench")))
    assert found[0].options == ("A. x", "B. y")


@pytest.mark.parametrize("rows, sentence", (
    ([{"id": 1}], "a row is not as in vsibench: KeyError 'options'"), ([], "holds no questions"),
    ('{"id": 1}\n{', "test.jsonl, line 2, is not JSON"),
    ([{"id": 1, "dataset": "d", "scene_name": "s", "question_type": "t", "question": "?",
       "ground_truth": "Z", "options": ["A. x", "B. y"]}],
     "sample 1: .*names none of the 2 options"),
    ([{"id": 1, "dataset": "d", "scene_name": "s", "question_type": "t", "question": "?",
       "ground_truth": "b", "options": ["A. x", "B. y"]}],
     "sample 1: the answer 'b' is none of 2 letters"),
    ([{"id": 1, "dataset": "d", "scene_name": "s", "question_type": "t", "question": "?",
       "ground_truth": "2", "options": None}] * 2, "2 questions have the id 1")))
def test_rows_that_are_not_the_benchmark_s_are_one_sentence(world, tmp_path, rows, sentence):
    """Catches: a traceback, or a wrong benchmark that is scored as if nothing were."""
    path = tmp_path / "test.jsonl"
    path.write_text(rows) if isinstance(rows, str) else miniature.dump(path, rows)
    with pytest.raises(ValueError, match=sentence):
        load(config(world, "vsibench", data=str(path)))
    with pytest.raises(ValueError, match="no file, nor a folder"):
        load(config(world, "vsibench", data=str(tmp_path / "gone")))


def test_lines_end_at_newlines_alone_and_only_the_last_answer_may_be_torn(tmp_path):
    """Catches: a text cut at U+2028, a torn answer counted, a damaged one passed over."""
    text = "one\u2028two\x85three"
    row = json.dumps({"id": "a", "text": text}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"{row}\n\n", encoding="utf-8")
    assert read(tmp_path / "rows.jsonl") == [{"id": "a", "text": text}]
    (tmp_path / "answers.jsonl").write_text(f'{row}\n{{"id": "b", "te', encoding="utf-8")
    assert results.merged(tmp_path, "answers") == {"a": {"id": "a", "text": text}}
    (tmp_path / "answers.jsonl").write_text(f'{{"id": "b", "te\n{row}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="answers.jsonl, line 1, is not JSON"):
        results.merged(tmp_path, "answers")


def test_a_folder_without_a_run_is_said_to_be_none(tmp_path):
    """Catches: a folder of a training run that is read as one without questions."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no folder of a run: .*questions.jsonl"):
        results.read_run(tmp_path)
