"""evaluate.py and its tables as people run them: processes, kills and files; a tiny student."""

import base64
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import miniature
import numpy as np
import pytest
import students
import torch
from conftest import make_video, sample
from messages_server import Fault, MessagesServer
from PIL import Image
from transformers import AutoTokenizer

import data
import evaluate
import ffr
import toy
from benchmarks import results
from benchmarks.questions import TITLES, load
from model import Student
from runs import parse, read_log
from video import Clip

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Make the miniatures of all eight benchmarks and a random student."""
    folder = miniature.make(tmp_path_factory.mktemp("world"))
    toy.save_student(folder / "student", 0, pretrained=False)
    (folder / "template.txt").write_text(toy.TEMPLATE)
    return folder


def flags(world, benchmark, output, **more):
    root = world / ("lvb" if benchmark == "longvideobench" else benchmark)
    given = dict(benchmark=benchmark, data=world / miniature.DATA[benchmark], video_root=root,
                 model=world / "student", output=output, frames=4, max_pixels=56 * 56,
                 max_completion=12, temperature=1.0, top_p=1.0, batch=2,
                 template=world / "template.txt", decode_workers=0) | more
    return [part for name, v in given.items() if v is not False and v is not None
            for part in ([f"--{name}"] if v is True else [f"--{name}", str(v)])]


def config(world, benchmark, output, **more):
    return settings(flags(world, benchmark, output, **more))


def settings(argv):
    return parse(evaluate.Config, argv, "")[0]


def start(arguments, processes=1, script=ROOT / "evaluate.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launch = torchrun if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0",
                   "TQDM_MINITERS": "1"}
    return subprocess.Popen([sys.executable, *launch, str(script), *map(str, arguments)],
                            env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process, code=0):
    output, errors = process.communicate(timeout=200)
    assert process.returncode == code, output + errors
    return output


def rows(folder, name="answers"):
    return results.merged(Path(folder), name)


@pytest.fixture(scope="session")
def plain(world, tmp_path_factory):
    """All eight, on one process."""
    folder = tmp_path_factory.mktemp("plain")
    for benchmark in TITLES:
        evaluate.evaluate(config(world, benchmark, folder / benchmark))
    return folder


def test_all_eight_run_and_fill_the_table(world, plain):
    """Catches: a benchmark that cannot be asked, a column that stays empty, a mean over seven."""
    for benchmark in TITLES:
        questions = load(config(world, benchmark, "x"))
        assert rows(plain / benchmark).keys() == {q.id for q in questions}
        assert all(row["tokens"] >= 1 and "error" not in row
                   for row in rows(plain / benchmark).values())
    text = results.table([str(plain), "--paper", "2,16"])
    label = f"| {world / 'student'}, 4 frames, max_pixels 3136"
    lines = [line for line in text.splitlines() if line.startswith(label)]
    cells = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    assert len(cells) == 10 and "–" not in cells
    shares = [float(cell) for cell in cells]
    assert shares[8] == pytest.approx(np.mean(shares[:4]), abs=0.11)
    assert shares[9] == pytest.approx(np.mean(shares[:8]), abs=0.11)
    assert ("| paper, Table 2: Video-R1-SFT + FFR | 68.5 | 38.9 | 54.6 | 52.3 | 55.3 | 38.1 | 68.8 "
            "| 75.6 | 53.6 | 56.5 |") in text


def test_two_processes_come_to_the_same_table(world, plain, tmp_path):
    """Catches: questions asked twice or never when processes share them, answers that depend on the
    batch or on how many processes there are, a process without questions that the others wait for,
    strips that are half written, or left over, where processes meet.
    """
    # one after another, as starting two processes takes longer than all of them
    (tmp_path / "all.py").write_text(
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate, runs\n"
        "for flags in json.load(open(sys.argv[1])):\n"
        "    evaluate.evaluate(runs.parse(evaluate.Config, flags, '')[0])\n")
    given = [flags(world, b, tmp_path / "two" / b, batch=3) for b in TITLES]
    (tmp_path / "flags.json").write_text(json.dumps(given))
    finish(start([tmp_path / "flags.json"], 2, tmp_path / "all.py"))
    for benchmark in TITLES:
        parts = {path.name for path in (tmp_path / "two" / benchmark).glob("answers*")}
        lines = [row for part in parts for row in read_log(tmp_path / "two" / benchmark / part)]
        assert parts == {"answers-0.jsonl", "answers-1.jsonl"}
        assert len(lines) == len(rows(plain / benchmark))
        for name in ("answers", "frames"):
            assert rows(tmp_path / "two" / benchmark, name) == rows(plain / benchmark, name)
        strips = [{path.name: path.read_bytes() for path in (folder / benchmark).glob("thumb*/*")}
                  for folder in (tmp_path / "two", plain)]
        assert strips[0] == strips[1] and all(name.endswith(".jpg") for name in strips[0])
    assert results.table([str(tmp_path / "two")]) == results.table([str(plain)])


def test_a_killed_run_resumes_to_the_same_table(world, plain, tmp_path):
    """Catches: answers or frames lost or asked twice by --resume, a torn line that is continued."""
    folder = tmp_path / "run"
    (tmp_path / "still.py").write_text(  # it stands still before its third question
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r}); import evaluate, video\n"
        "get = video.ClipLoader.get\n"
        "video.ClipLoader.get = lambda self, sample: get(self, sample) if 'vidA' in sample.media "
        "else threading.Event().wait()\n"
        "evaluate.main()\n")
    process = start(flags(world, "holmes", folder, batch=1), script=tmp_path / "still.py")
    seen = ""
    while " 2/4" not in seen:
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert rows(folder).keys() == {"vidA/1", "vidA/2"}
    for name, torn in (("answers", '{"id": "vidB/1", "te'), ("frames", '{"id": "vidB')):
        with open(folder / f"{name}.jsonl", "a") as file:
            file.write(torn)
    assert rows(folder).keys() == {"vidA/1", "vidA/2"}
    evaluate.evaluate(config(world, "holmes", folder, resume=True))
    assert rows(folder) == rows(plain / "holmes")
    assert rows(folder, "frames") == rows(plain / "holmes", "frames")
    assert len(read_log(folder / "answers.jsonl")) == 4
    assert results.table([str(folder)]) == results.table([str(plain / "holmes")])


def test_a_run_split_over_two_processes_goes_on_with_one(world, plain, tmp_path, monkeypatch):
    """Catches: resuming that asks by position among what is left, asks again what has an answer, or
    reads its own file only.
    """
    folder, asked, answer = tmp_path / "run", [], evaluate.Asked.answer

    def noted(self, questions, write):
        asked.extend(questions)
        answer(self, questions, write)

    monkeypatch.setattr(evaluate.Asked, "answer", noted)
    folder.mkdir()
    for path in ("config.json", "questions.jsonl"):
        (folder / path).write_text((plain / "vsibench" / path).read_text())
    lines = (plain / "vsibench/answers.jsonl").read_text().splitlines(True)
    (folder / "answers-0.jsonl").write_text("".join(lines[0:6:2]))
    (folder / "answers-1.jsonl").write_text("".join(lines[1:4:2]) + '{"id"')
    evaluate.evaluate(config(world, "vsibench", folder, resume=True))
    assert rows(folder) == rows(plain / "vsibench")
    assert len(read_log(folder / "answers.jsonl")) == len(asked) == 7


def test_other_seeds_answer_otherwise_and_other_settings_are_refused(world, plain, tmp_path):
    """Catches: a seed that seeds nothing, two settings or two question files mixed in one run."""
    evaluate.evaluate(config(world, "holmes", tmp_path / "run", seed=1))
    assert rows(tmp_path / "run") != rows(plain / "holmes")
    with pytest.raises(ValueError, match="already holds a run"):
        evaluate.evaluate(config(world, "holmes", tmp_path / "run", seed=1))
    with pytest.raises(ValueError, match="--seed 2: the run in .* has 1"):
        evaluate.evaluate(config(world, "holmes", tmp_path / "run", seed=2, resume=True))
    other = [json.loads(line)
             for line in (tmp_path / "run/questions.jsonl").read_text().splitlines()]
    (tmp_path / "run/questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in other[:-1]))
    with pytest.raises(ValueError, match="was about other questions"):
        evaluate.evaluate(config(world, "holmes", tmp_path / "run", seed=1, resume=True))


def test_a_damaged_video_is_named_and_used(world, tmp_path, capsys):
    """Catches: a film that breaks off taken for a shorter one, with nothing that says so."""
    root = tmp_path / "videos"
    miniature.clip(root / "vidA.mp4", world / "source.mp4")
    whole = Path(make_video(tmp_path / "whole.mkv", 24, (56, 56))).read_bytes()
    (root / "vidB.mp4").write_bytes(whole[:len(whole) * 8 // 10])
    report = evaluate.evaluate(config(world, "holmes", tmp_path / "run", video_root=root))
    assert "4 questions, 0 missing, 0 undecodable, 0 unanswered" in report
    assert f"{root / 'vidB.mp4'}: " in (said := capsys.readouterr().out)
    assert re.search(r"vidB.mp4: \d\.\d of 3\.0 s readable", said) and "vidA" not in said
    assert {row["reader"] for row in rows(tmp_path / "run").values()} <= {"pyav", "pyav in order"}


def test_missing_and_broken_videos_cost_their_questions_only(world, tmp_path, capsys):
    """Catches: a missing video that leaves the denominator, a broken one that ends its batch."""
    root = tmp_path / "videos"
    miniature.clip(root / "vidA.mp4", world / "source.mp4")
    (root / "vidB.mp4").write_bytes((world / "source.mp4").read_bytes()[:200])
    report = evaluate.evaluate(config(world, "holmes", tmp_path / "broken", video_root=root))
    assert "4 questions, 0 missing, 2 undecodable, 0 unanswered" in report
    assert rows(tmp_path / "broken")["vidB/1"]["error"].startswith("undecodable: ")
    assert "| overall, of those with a video and an answer |" in report
    assert "| overall | 0.0 | 4 | 0.0 | 4 |" in report
    assert evaluate.conclusion(config(world, "holmes", tmp_path / "broken"))[0] == 0
    (root / "vidA.mp4").write_bytes(b"no video")
    evaluate.evaluate(all_lost := config(world, "holmes", tmp_path / "lost", video_root=root))
    left, said = evaluate.conclusion(all_lost)
    assert left == 4 and said.startswith("not one question of ") and "undecodable" in said
    miniature.clip(root / "vidA.mp4", world / "source.mp4")
    (root / "vidB.mp4").unlink()
    report = evaluate.evaluate(config(world, "holmes", tmp_path / "gone", video_root=root))
    assert "4 questions, 2 missing, 0 undecodable" in report
    assert "2 of 4 questions have no video (SR 1, CTI 1): vidB/1" in capsys.readouterr().err
    miniature.clip(root / "vidB.mp4", world / "source.mp4")  # found again: they are asked now
    report = evaluate.evaluate(config(world, "holmes", tmp_path / "gone", video_root=root,
                                      resume=True))
    assert "4 questions, 0 missing, 0 undecodable, 0 unanswered" in report
    with pytest.raises(ValueError, match="not one video was found.*--video_root"):
        evaluate.evaluate(config(world, "holmes", tmp_path / "none",
                                 video_root=tmp_path / "broken"))


def test_patches_are_an_upper_bound_of_their_own(world, tmp_path):
    """Catches: repaired answers in the plain figures, patches for right answers or no evidence."""
    options = dict(output=tmp_path / "run")
    before = evaluate.evaluate(config(world, "lvbench", **options))
    path = tmp_path / "run/answers.jsonl"
    kept = path.read_text()
    lines = rows(tmp_path / "run")
    lines["56"]["text"] = "<answer>A</answer>"  # right
    path.write_text("".join(json.dumps(row) + "\n" for row in lines.values()))
    evaluate.evaluate(config(world, "lvbench", **options, resume=True, with_patches="annotated"))
    assert rows(tmp_path / "run", "patched").keys() == {"55"}
    path.write_text(kept)
    report = evaluate.evaluate(config(world, "lvbench", **options, resume=True,
                                      with_patches="annotated"))
    assert "upper bound: 2 of 2 failed ones again" in report and "upper bound" not in before
    headlines = {line for line in before.splitlines() if line.startswith("| overall")}
    assert headlines <= set(report.splitlines())
    patched = rows(tmp_path / "run", "patched")
    assert patched.keys() == {"55", "56"}
    assert {row["status"] for row in patched.values()} == {"patched"}
    assert all(patched[id]["text"] != row["text"] for id, row in rows(tmp_path / "run").items())
    assert "+ patches (upper bound)" in results.table([str(tmp_path / "run")])
    with pytest.raises(ValueError, match="--evidence none: the run in .* has text"):
        evaluate.evaluate(config(world, "lvbench", **options, resume=True, with_patches="annotated",
                                 evidence="none"))
    run = results.read_run(tmp_path / "run")
    run.patched["55"]["text"] = "<answer>D</answer>"
    assert results.overall(run, "family") == 0.0
    assert results.overall(run, "family", patched=True) == 0.5


def written(folder, config, questions, texts):
    """Return the run of a folder with these answers, which it writes."""
    config = replace(config, output=str(folder))
    evaluate.open_run(config, questions)
    lines = (json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items())
    (folder / "answers.jsonl").write_text("".join(lines))
    return results.read_run(folder)


def test_the_paper_s_rows_have_the_paper_s_averages():
    """Catches: a wrong digit in paper_tables.json.

    Qwen3-VL-32B's printed average, 66.2, is not its row's, 66.6: None here.
    """
    printed = {"9": (57.3, 63.1, None, 68.3), "11": (47.8, 50.7, 54.0, 54.0, 55.8, 56.5),
               "12": (54.4, 56.5, 53.5, 53.4, 54.0), "14": (34.6, 44.6, 43.0, 45.7),
               "15": (62.5, 62.8, 65.1, None, 68.3), "16": (56.5, 56.8, 57.7),
               "17": (56.5, 56.8, 56.2)}
    for number, averages in printed.items():
        found = results.paper()["tables"][number]["rows"]
        assert len(found) == len(averages)
        for (name, row), average in zip(found.items(), averages):
            assert average is None or abs(np.mean(row) - average) <= 0.0501, (number, name)


def test_seeds_give_the_paper_s_mean_and_deviation(world):
    """Catches: the deviation of a sample (n - 1), which is not the paper's.

    Table 17 prints these but for 38.6 and 0.1.
    """
    table = results.paper()["tables"]["17"]["rows"].values()
    columns = {b: {i: row[k] / 100 for i, row in enumerate(table)} for k, b in enumerate(TITLES)}
    cells = results.table_row("FFR", columns)[1:]
    assert cells[:8] == ["68.8 ± 0.2", "38.7 ± 0.3", "54.8 ± 0.4", "51.9 ± 0.5", "55.6 ± 0.3",
                         "38.0 ± 1.3", "68.7 ± 0.1", "75.6 ± 0.0"]
    assert cells[9].startswith("56.5")


def test_seeds_frames_and_averages_of_runs(world, tmp_path):
    """Catches: runs of other frames or flags in one row, seeds that overwrite each other."""
    questions = load(config(world, "holmes", "x"))
    gold = {q.id: f"<answer>{q.answer}</answer>" for q in questions}
    for frames, seed, k in ((16, 0, 2), (16, 1, 3), (32, 0, 4)):
        texts = {id: text if i < k else "<answer>E</answer>"
                 for i, (id, text) in enumerate(gold.items())}
        written(tmp_path / f"{frames}-{seed}",
                config(world, "holmes", "x", frames=frames, seed=seed), questions, texts)
    text = results.table([str(tmp_path)])
    line = {frames: next(line for line in text.splitlines()
                         if line.startswith(f"| {world / 'student'}, {frames} frames"))
            for frames in (16, 32)}
    assert "| 62.5 ± 12.5 |" in line[16] and "| 100.0 |" in line[32]
    assert line[16].endswith("| – | – |")
    assert "+37.5" in text and "minus" in text  # (0.5 + 0.75)/2 to 1
    written(tmp_path / "again", config(world, "holmes", "x", frames=32, seed=0), questions, gold)
    with pytest.raises(ValueError, match="are both holmes"):
        results.table([str(tmp_path)])


def test_paired_differences_hold_the_binomial_interval(world, tmp_path):
    """Catches: an unpaired interval, one over seeds, a difference in the wrong direction, weights
    lost in resampling.
    """
    questions = [replace(load(config(world, "holmes", "x"))[0], id=str(i), answer="C")
                 for i in range(400)]
    first = {str(i): "<answer>C</answer>" if i < 200 else "<answer>A</answer>" for i in range(400)}
    second = {str(i): "<answer>C</answer>" if i < 240 else "<answer>A</answer>" for i in range(400)}
    runs = [written(tmp_path / str(k), config(world, "holmes", "x", seed=k), questions, texts)
            for k, texts in enumerate((first, second))]
    change, low, high, n = results.difference({0: runs[0]}, {0: runs[1]}, "family")
    spread = 1.96 * np.sqrt(0.1 * 0.9 / 400)  # 40 of 400 changed, all the same way
    assert (change, n) == (pytest.approx(0.1), 400)
    assert low == pytest.approx(0.1 - spread, abs=0.004)
    assert high == pytest.approx(0.1 + spread, abs=0.004)
    assert results.difference({0: runs[1]}, {0: runs[0]}, "family")[0] == pytest.approx(-0.1)


def test_paired_differences_weigh_as_the_headline_does(world, tmp_path):
    """Catches: an interval of the micro mean around a difference of means of means."""
    letter, number = (next(q for q in load(config(world, "vsibench", "x")) if q.kind == kind)
                      for kind in ("multiple choice", "regression"))
    questions = [replace(letter, id=f"l{i}") for i in range(10)] \
        + [replace(number, id=f"n{i}") for i in range(30)]
    runs = [written(tmp_path / str(k), config(world, "vsibench", "x", seed=k), questions,
                    {q.id: q.answer if k or q.kind == "regression" else "" for q in questions})
            for k in (0, 1)]
    # all ten letters and no number: half of two metrics
    found = results.difference({0: runs[0]}, {0: runs[1]}, "family")
    assert found == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5), 40)


OWN = [{"problem_id": "a", "problem": "Which?", "problem_type": "multiple choice",
        "options": ["A. red", "B. blue"], "solution": "<answer>B. blue</answer>",
        "data_type": "video", "path": "vidA.mp4", "data_source": "mine",
        "evidence": [{"start": 0, "end": 1}]},
       {"problem": "How long?", "problem_type": "regression", "solution": 4, "data_type": "video",
        "path": "vidA.mp4"},
       {"problem": "What stands there?", "problem_type": "OCR", "solution": "stop here",
        "data_type": "image", "path": "p.png"}]


def test_a_file_of_one_s_own_is_scored_as_training_scores_it(world, tmp_path):
    """Catches: a training file that cannot be evaluated, MRA for training's regression, a gold with
    its text that no letter meets, no column in the table, or that of a benchmark of its name.

    (B) is right but not the letter alone; 3 for 4 is 0.75, or 0.5 by MRA (0.50 to 0.70 hold); one
    word of two is 0.5: (1 + 0.75 + 0.5) / 3 and (0 + 0.5 + 0.5) / 3.
    """
    (tmp_path / "mmvu.json").write_text(json.dumps(OWN))
    answers = {"a": "(B)", "1": "3", "2": "stop"}
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps({"id": id, "text": text}) + "\n" for id, text in answers.items()))
    given = ["--benchmark", "own", "--data", str(tmp_path / "mmvu.json")]
    report = evaluate.evaluate(settings([*given, "--predictions", str(tmp_path / "p.jsonl"),
                                         "--output", str(tmp_path / "run")]))
    assert "## own: mmvu, p (predictions), seed 0" in report and "|  | lenient | n |" in report
    assert "| overall | 75.0 | 3 | 33.3 | 3 |" in report and "| mine | 100.0 | 1 |" in report
    table = results.table([str(tmp_path / "run")])
    assert "average, all | own: mmvu |" in table and "| – | – | 75.0 |" in table
    wrong = [{**OWN[0], "option": OWN[0]["options"], "options": None}]
    (tmp_path / "mmvu.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="sample a: a multiple choice question needs options"):
        evaluate.evaluate(settings([*given, "--predictions", str(tmp_path / "p.jsonl")]))


def test_a_file_of_one_s_own_is_asked(world, tmp_path):
    """Catches: an image that is decoded as a video or has no frame; rows that are not asked, or
    without a file.
    """
    miniature.clip(tmp_path / "videos/vidA.mp4", world / "source.mp4")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "videos/p.png")
    (tmp_path / "mine.json").write_text(json.dumps(OWN))
    given = replace(config(world, "holmes", tmp_path / "run"), benchmark="own",
                    data=str(tmp_path / "mine.json"), video_root=str(tmp_path / "videos"))
    report = evaluate.evaluate(given)
    assert "3 questions, 0 missing, 0 undecodable, 0 unanswered" in report
    assert rows(tmp_path / "run").keys() == {"a", "1", "2"}
    images = {i: len(row["times"]) for i, row in rows(tmp_path / "run", "frames").items()}
    assert images == {"a": 4, "1": 4, "2": 1}


def test_a_table_takes_what_it_can_name_and_says_what_it_leaves_out(world, tmp_path):
    """Catches: a training run's folder that ends the table, or is passed over in silence; a family
    file of another benchmark that does; one folder given twice, as two runs of one seed.
    """
    questions = load(config(world, "holmes", "x"))
    gold = {q.id: f"<answer>{q.answer}</answer>" for q in questions}
    given = config(world, "holmes", "x")
    written(tmp_path / "holmes", given, questions, gold)
    written(tmp_path / "mme", replace(given, benchmark="family", data="eval_videomme.json"),
            questions, gold)
    for name in ("ffr-1", "toy"):
        (tmp_path / name).mkdir()
    (tmp_path / "ffr-1/config.json").write_text("{}")
    text = results.table([str(tmp_path), str(tmp_path / "holmes/../holmes")])
    assert "average, all | eval_videomme |" in text and "| – | – | 100.0 |" in text
    assert text.endswith("Left out, as they hold no questions.jsonl: "
                         f"{tmp_path / 'ffr-1'}, {tmp_path / 'toy'}")
    with pytest.raises(ValueError, match="ffr-1 is no folder of a run"):
        results.table([str(tmp_path / "ffr-1")])
    with pytest.raises(ValueError, match="toy holds no run"):
        results.table([str(tmp_path / "toy")])


def test_annotated_patches_need_questions_that_say_where_to_look(world, tmp_path):
    """Catches: failed answers repeated as an upper bound where no question has evidence."""
    with pytest.raises(ValueError, match="--with_patches annotated: not one question of --data .*"
                       "test_Video-Holmes.json says where"):
        evaluate.evaluate(config(world, "holmes", tmp_path / "run", with_patches="annotated"))
    assert not (tmp_path / "run").exists()


def test_knowledge_gained_is_computed_from_two_runs(world, tmp_path):
    """Catches: Δknowledge over all tracks, or from the wrong side."""
    for only, right in ((True, 1), (False, 3)):
        given = config(world, "videommmu", "x", question_only=only)
        questions = load(given)
        adaptation = [q for q in questions if q.groups[0] == "Adaptation"]
        texts = {q.id: f"<answer>{q.answer}</answer>" if i < right else ""
                 for i, q in enumerate(adaptation)}
        written(tmp_path / str(only), given, questions, texts)
    assert ("Δknowledge +50.0 (Adaptation 20.0 without the lecture, 60.0 with it; wrong to right "
            "50.0 %, right to wrong 0.0 %)") in results.table([str(tmp_path)])


def test_predictions_need_no_torch_and_answers_may_be_missing(world, tmp_path):
    """Catches: torch imported to score a file, unknown ids dropped in silence, missing answers out
    of the denominator.
    """
    lines = [{"id": "0", "text": "<answer>2</answer>"}, {"id": 5, "text": "A"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    given = ["--benchmark", "vsibench", "--data", str(world / miniature.DATA["vsibench"]),
             "--predictions", str(tmp_path / "p.jsonl")]
    code = "import sys, evaluate; evaluate.main(sys.argv[1:]); " \
           "assert not {'torch', 'transformers'} & sys.modules.keys()"
    found = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, text=True,
                           capture_output=True)
    assert found.returncode == 0, found.stderr
    assert "12 questions, 0 missing, 0 undecodable, 10 unanswered" in found.stdout
    assert "| over questions | 16.7 | 12 | 16.7 | 12 |" in found.stdout
    assert "The paper's Table 2: GPT-4o 34" in found.stdout
    evaluate.evaluate(settings([*given, "--output", str(tmp_path / "run")]))
    # 0.5 + 1 of eight tasks
    assert "| p (predictions) | – | 18.8 |" in results.table([str(tmp_path / "run")])
    (tmp_path / "p.jsonl").write_text('{"id": "x", "text": ""}\n')
    with pytest.raises(ValueError, match="'x' is no question of vsibench; ids are like '0'"):
        evaluate.evaluate(settings(given))


@pytest.mark.parametrize("content, sentence", (
    ('{"id": 5, "text": "A"}\n{"id": "5", "text": "B"}\n',
     "row 2: a second answer to question '5'"),
    ('{"id": "5", "text": null}\n', "row 1: not an object with id and text"),
    ("", "holds no answers"), ("[]", "holds no answers"), ("[5]", "row 1: not an object")))
def test_predictions_that_leave_a_choice_are_refused(world, tmp_path, content, sentence):
    """Catches: the last of two answers to a question taken, no text scored as one, an empty file as
    5,000 wrong answers.
    """
    (tmp_path / "p.jsonl").write_text(content)
    given = ["--benchmark", "vsibench", "--data", str(world / miniature.DATA["vsibench"]),
             "--predictions", str(tmp_path / "p.jsonl")]
    with pytest.raises(ValueError, match=sentence):
        evaluate.evaluate(settings(given))


def test_predictions_of_windows_and_of_whole_json(world, tmp_path):
    """Catches: a byte order mark or a carriage return taken for part of an id or of an answer."""
    rows_ = [{"id": "3", "text": "8"}, {"id": 5, "text": "A"}]
    lines = b"\r\n".join(json.dumps(row).encode() for row in rows_)
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n\r\n")
    (tmp_path / "p.json").write_text(json.dumps(rows_))
    for name in ("p.jsonl", "p.json"):
        report = evaluate.evaluate(settings(
            ["--benchmark", "vsibench", "--data", str(world / miniature.DATA["vsibench"]),
             "--predictions", str(tmp_path / name)]))
        assert "10 unanswered" in report and "| over questions | 16.7 | 12 | 16.7 | 12 |" in report


def text_of(body):
    content = body["messages"][0]["content"]
    return "\n".join(block["text"] for block in content if block["type"] == "text")


def says(text):
    return [{"type": "text", "text": text}]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_stop_keeps_what_is_answered_and_says_how_to_go_on(world, tmp_path, monkeypatch, capsys,
                                                             number):
    """Catches: a traceback for Ctrl-C, a silent end, exit 0 for half an evaluation."""
    given, ready = flags(world, "vsibench", tmp_path / "run", batch=5), evaluate.decoded

    def stopping(*rest):
        for n, part in enumerate(ready(*rest)):
            if n:
                os.kill(os.getpid(), number)
            yield part

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *given])
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & turns it off
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "decoded", stopping)
        with pytest.raises(SystemExit) as left:
            evaluate.main(given)
    signal.signal(signal.SIGINT, heeded)
    assert left.value.code == 128 + number and len(rows(tmp_path / "run")) == 5
    said, again = capsys.readouterr().err, shlex.join(["evaluate.py", *given, "--resume"])
    assert said.endswith(f"\nevaluate.py: stopped; 7 of 12 questions in {tmp_path / 'run'} lack an "
                         f"answer or a verdict; to go on: python {again}\n")
    evaluate.main([*given, "--resume"])
    assert capsys.readouterr().out.endswith(
        f"\n\nfinished: {tmp_path / 'run'}; beside others: python evaluate.py table "
        f"{tmp_path / 'run'} RUN ...\n")
    (tmp_path / "run/answers.jsonl").write_text("")
    monkeypatch.setattr(evaluate, "answer", lambda *rest: None)  # as where an API gave none
    with pytest.raises(SystemExit, match="1"):
        evaluate.main([*given, "--resume"])
    assert "12 of 12 questions in" in capsys.readouterr().out.split("\n")[-2]


def test_the_key_is_in_no_message(world, tmp_path, monkeypatch, capsys):
    """Catches: a server's error that quotes the key, printed."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key-of-some-length")
    fault = Fault(status=400, body='{"error": {"message": "no a-key-of-some-length"}}')
    with MessagesServer(lambda body: fault) as server:
        evaluate.evaluate(config(world, "holmes", tmp_path / "run", model="anthropic:glm",
                                 api_url=server.url))
    said = capsys.readouterr().err
    assert "4 questions got no answer (BadRequestError" in said and "no ***" in said
    assert "a-key" not in said


def test_an_api_model_is_asked_with_frames_and_only_once(world, tmp_path, monkeypatch):
    """Catches: answers paid for twice, a failed request counted as a wrong answer."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key-of-some-length")
    failing = True

    def script(body):
        if failing and "Question 3?" in text_of(body):
            return Fault(status=400, body='{"error": {"message": "no"}}')
        return says("<think>I see.</think><answer>A</answer>")

    with MessagesServer(script) as server:
        def given(**more):
            return config(world, "vsibench", tmp_path / "run", model="anthropic:glm",
                          api_url=server.url, **more)
        report = evaluate.evaluate(given())
        assert "11 unanswered" not in report and "1 unanswered" in report and len(server.seen) == 12
        content = server.bodies[0]["messages"][0]["content"]
        assert sum(block["type"] == "image" for block in content) == 4
        assert server.bodies[0]["model"] == "glm"
        assert "Options:" in text_of(next(b for b in server.bodies if "Question 5?" in text_of(b)))
        failing = False
        report = evaluate.evaluate(given(resume=True))
        assert " 0 unanswered" in report and len(server.seen) == 13
        assert rows(tmp_path / "run")["5"] == {
            "id": "5", "text": "<think>I see.</think><answer>A</answer>", "tokens": 12,
            "reader": "pyav"}
        assert "anthropic:glm" in results.table([str(tmp_path / "run")])
        (tmp_path / "run/answers.jsonl").unlink()  # they are in the cache as well
        assert evaluate.evaluate(given(resume=True)) == report and len(server.seen) == 13


def test_the_frames_that_are_kept_are_those_that_were_sent(world, tmp_path, monkeypatch):
    """Catches: frames in the order of the video where another was shown, frames that were not
    shown, other times; a strip for every question; frames of a run that shows none.
    """
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")

    def greys(strip, n):
        image = Image.open(strip).convert("L")
        return [image.getpixel((image.width * (2 * i + 1) // (2 * n), 9)) for i in range(n)]

    def sent(body):
        content = body["messages"][0]["content"]
        pictures = [io.BytesIO(base64.b64decode(block["source"]["data"])) for block in content
                    if block["type"] == "image"]
        times = re.findall(r"frame \d+, ([\d.]+) s", text_of(body))
        return [greys(picture, 1)[0] for picture in pictures], [float(time) for time in times]

    with MessagesServer(lambda body: says("<answer>A</answer>")) as server:
        for name, more in (("plain", {}), ("shuffled", dict(frames_order="shuffled")), (
                "one", dict(frames_shown="one")), ("blind", dict(blind=True, video_root=None))):
            evaluate.evaluate(config(world, "vsibench", tmp_path / name, model="anthropic:glm",
                                     api_url=server.url, **more))
        bodies = {re.search(r"Question \d+\?", text_of(body))[0]: body
                  for body in server.bodies[12:24]}  # they come in any order
        asked = {"plain": 12 * [server.bodies[0]], "one": 12 * [server.bodies[24]], "shuffled": [
            bodies[re.search(r"Question \d+\?", q.text)[0]]
            for q in load(config(world, "vsibench", "x"))]}
    for name, those in asked.items():
        kept = rows(tmp_path / name, "frames")
        for i, body in enumerate(those):
            seen, times = sent(body)
            shown = greys(tmp_path / name / kept[str(i)]["thumbnails"], len(times))
            assert shown == pytest.approx(seen, abs=4)
            assert kept[str(i)]["times"] == pytest.approx(times, abs=0.006)
    assert sent(asked["plain"][0])[0] == pytest.approx([0, 64, 120, 184], abs=6)  # 64 a second
    strips = {name: len(list((tmp_path / name / "thumbnails").iterdir())) for name in asked}
    assert strips["plain"] == strips["one"] == 1 < strips["shuffled"] <= 12
    assert not rows(tmp_path / "blind", "frames") and not (tmp_path / "blind/thumbnails").exists()


def clips(n):
    """Return clips of noise, whose strips are of one size to a few bytes."""
    rng = np.random.default_rng(0)
    return [Clip(torch.from_numpy(rng.integers(0, 256, (2, 3, 56, 56), np.uint8)), (0.0, 1.0),
                 (0, 1), 1.0, 2.0, 2) for _ in range(n)]


def test_thumbnails_have_a_bound_that_all_questions_share(tmp_path, monkeypatch, capsys):
    """Catches: a disk that gets full, a bound forgotten by --resume, frames of the first questions
    only, a strip that is there and not used, silence or a line for every question.
    """
    from video import strip
    shown = clips(30)
    size = len(strip(shown[0].frames))
    monkeypatch.setattr(evaluate, "STRIPS_MB", 10.5 * size / 1e6)

    def keep(clips, asked):
        frames = evaluate.Frames(SimpleNamespace(output=str(tmp_path)), len(clips))
        for id, clip in zip(asked, clips):
            frames.keep(SimpleNamespace(id=id), clip)
        there = rows(tmp_path, "frames").keys()
        return [id for id in asked if id in there]

    kept = keep(shown, range(30))
    assert 9 <= len(kept) <= 11 and kept[0] == 0 and kept[-1] > 25
    assert capsys.readouterr().err.count("are too few for all thumbnails") == 1
    more = keep([*shown[:1], *clips(40)[30:]], range(100, 111))
    assert 100 in more and len(more) <= 2
    strips = [path.stat().st_size for path in (tmp_path / "thumbnails").iterdir()]
    assert sum(strips) < 12 * size


def test_processes_may_write_the_same_strip_at_once(tmp_path, monkeypatch):
    """Catches: two processes that write to one file, one of which then finds it gone."""
    import runs
    clip, = clips(1)
    given, append, turns = SimpleNamespace(output=str(tmp_path)), runs.append, ["first"]

    def meanwhile(path, data):
        append(path, data)
        if turns:  # once: what is written now is not under its name yet
            turns.clear()
            monkeypatch.setattr(evaluate, "rank", lambda: 1)
            other.keep(SimpleNamespace(id="b"), clip)

    first, other = (evaluate.Frames(given, 1) for _ in range(2))
    monkeypatch.setattr(runs, "append", meanwhile)
    first.keep(SimpleNamespace(id="a"), clip)
    path, = (tmp_path / "thumbnails").iterdir()
    assert path.suffix == ".jpg" and Image.open(path).size == (112, 56)
    assert rows(tmp_path, "frames").keys() == {"a", "b"}


def test_a_spent_budget_ends_an_api_run_and_more_goes_on(world, tmp_path, monkeypatch):
    """Catches: money spent past the limit, answers lost with it, advice that leads nowhere."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    monkeypatch.setattr(evaluate, "REQUESTS", 2)
    with MessagesServer(lambda body: says("<answer>A</answer>")) as server:
        given = dict(model="anthropic:glm", api_url=server.url, api_price="1000/1000")
        with pytest.raises(ValueError, match=r"budget of \$1 is spent \(--api_budget\)"):
            evaluate.evaluate(config(world, "vsibench", tmp_path / "run", api_budget=1, **given))
        asked = len(server.seen)
        report = evaluate.evaluate(config(world, "vsibench", tmp_path / "run", api_budget=1000,
                                          resume=True, **given))
        assert 2 <= asked <= 4 and " 0 unanswered" in report and len(server.seen) == 12


@pytest.mark.parametrize("status, sentence", (
    (401, "refuses the key: set ANTHROPIC_API_KEY"), (404, "knows no model glm")))
def test_what_fails_for_all_questions_ends_an_api_run_in_a_sentence(world, tmp_path, monkeypatch,
                                                                    status, sentence):
    """Catches: 5,000 requests with a wrong key, a traceback that quotes it."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key-of-some-length")
    fault = Fault(status=status, body='{"error": {"message": "a-key-of-some-length"}}')
    with MessagesServer(lambda body: fault) as server:
        with pytest.raises(ValueError, match=sentence) as caught:
            evaluate.evaluate(config(world, "holmes", tmp_path / "run", model="anthropic:glm",
                                     api_url=server.url))
    assert "a-key" not in str(caught.value)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    for more in (dict(model="anthropic:glm"), dict(judge="j"), dict(with_patches="anthropic")):
        with pytest.raises(ValueError, match="needs ANTHROPIC_API_KEY"):
            evaluate.evaluate(config(world, "holmes", tmp_path / "run2", **more))
    assert not (tmp_path / "run2").exists()


def test_the_judge_scores_what_no_rule_can(world, tmp_path, monkeypatch):
    """Catches: multiple choice sent to the judge, verdicts lost or kept for other answers, captions
    judged by wording.
    """
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")

    def script(body):
        text = text_of(body)
        right = "Yes." if "Answer: rubbing" in text else "no"
        return says("B" if "Description: " in text else right)

    for benchmark, id, answer in (("mmvu", "validation_2", "rubbing"),
                                  ("tempcompass", "captioning/1021/action/0", "a lid goes down")):
        path = tmp_path / f"{benchmark}.jsonl"
        path.write_text(json.dumps({"id": id, "text": answer}) + "\n")
        given = ["--benchmark", benchmark, "--data", str(world / miniature.DATA[benchmark]),
                 "--predictions", str(path)]
        report = evaluate.evaluate(settings(given))
        assert "Left out of the official figures: 1 questions" in report
        with MessagesServer(script) as server:
            judged = [*given, "--judge", "j", "--api_url", server.url, "--output",
                      str(tmp_path / benchmark)]
            report = evaluate.evaluate(settings(judged))
            assert len(server.seen) == 1 and "Left out" not in report
        group = {"mmvu": "open", "tempcompass": "captioning"}[benchmark]
        assert f"| {group} | 100.0 | 1 | – | – |" in report
    path = tmp_path / "mmvu/answers.jsonl"
    path.write_text(json.dumps({"id": "validation_2", "text": "another answer"}) + "\n")
    assert results.read_run(tmp_path / "mmvu").verdicts == {}


@pytest.mark.parametrize("reply, right", (
    ("Yes", 1), ("no.", 0), ("**Yes**", 1), ("Answer: yes", 1), ("**Answer:** No", 0), ("`no`", 0),
    ("<think>Is it no, or yes?</think>\n\nYes", 1), ("No, it says red.", 0), ("Yes — the same", 1),
    ('{"verdict": "yes"}', 1), ("<answer>no</answer>", 0), ("They agree.\n\n**Yes**", 1),
    (r"\boxed{yes}", 1), ("Final answer: NO!", 0), ("", None), ("Let me think about", None),
    ("<think>yes", None), ("No idea", None), ("There is no", None), ("Yes\nNo", None),
    ("yes and no", None), ("Not at all", None), ("Yesterday", None)))
def test_the_judge_s_word_is_a_lone_yes_or_no(reply, right):
    """Catches: "**Yes**" stored as no for good, a reply cut short or empty taken for a no."""
    assert evaluate.verdict(SimpleNamespace(accepted=(), answer="x"), reply) == right


@pytest.mark.parametrize("reply, right", (
    ("B", 1), ("**B**", 1), ("B. a lid goes down", 1), ("<think>A?</think>B", 1), ("A", 0),
    ("none", 0), ("None of them.", 0), ("", None), ("The description", None), ("<think>B", None)))
def test_the_judge_s_letter_is_an_option_or_none(reply, right):
    """Catches: an empty reply about a caption stored as a wrong caption."""
    q = SimpleNamespace(accepted=("Which?\nA. a lid goes up\nB. a lid goes down",), answer="B")
    assert evaluate.verdict(q, reply) == right


def test_a_reply_without_a_verdict_is_asked_again_and_never_stored(world, tmp_path, monkeypatch,
                                                                   capsys):
    """Catches: silence stored as a verdict, asked for without end, or replaced without a word."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    path = tmp_path / "mmvu.jsonl"
    path.write_text('{"id": "validation_2", "text": "rubbing"}\n')
    given = ["--benchmark", "mmvu", "--data", str(world / miniature.DATA["mmvu"]), "--predictions",
             str(path), "--judge", "j"]
    for replies, verdicts in (["Hm", "**Yes**"], [1]), (["", "So, let me see"], []):
        left, out = iter(replies), tmp_path / f"run{len(verdicts)}"
        with MessagesServer(lambda body, left=left: says(next(left))) as server:
            evaluate.evaluate(settings([*given, "--api_url", server.url, "--output", str(out)]))
            assert len(server.seen) == 2
        assert list(results.read_run(out).verdicts.values()) == verdicts
    assert "1 questions got no verdict (nothing that was asked for in 'So, let me" in \
        capsys.readouterr().err


def test_the_last_error_of_a_question_stands_and_no_error_replaces_an_answer(tmp_path):
    """Catches: a file counted as missing that is there by now and cannot be decoded, an answer lost
    to an old error.
    """
    lines = [{"id": "a", "text": "", "error": "missing: f"},
             {"id": "a", "text": "", "error": "undecodable: f"},
             {"id": "b", "text": "B"}, {"id": "b", "text": "", "error": "missing: f"}]
    (tmp_path / "answers-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = {id: row.get("error") for id, row in rows(tmp_path).items()}
    assert found == {"a": "undecodable: f", "b": None}


def test_silence_is_wrong_before_a_judge_too(world, tmp_path, monkeypatch):
    """Catches: open questions left out of a judged run because their model said nothing."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    path = tmp_path / "silent.jsonl"
    path.write_text('{"id": "validation_0", "text": "E"}\n{"id": "validation_2", "text": " "}\n')
    given = ["--benchmark", "mmvu", "--data", str(world / miniature.DATA["mmvu"]),
             "--predictions", str(path)]
    assert "| overall | 50.0 | 2 |" in evaluate.evaluate(settings(given))
    with MessagesServer(lambda body: says("yes")) as server:
        judged = [*given, "--judge", "j", "--api_url", server.url, "--output",
                  str(tmp_path / "run")]
        report = evaluate.evaluate(settings(judged))
        assert not server.seen and "| overall | 33.3 | 3 | 50.0 | 2 |" in report
        assert "Left out" not in report
    assert results.read_run(tmp_path / "run").verdicts == {}


@pytest.fixture(scope="session")
def controls(world, tmp_path_factory):
    """All eight without their videos, with frames out of order, with one frame, and directly."""
    folder, seen, prefill = tmp_path_factory.mktemp("controls"), {}, Student.prefill
    for name, more in (("blind", dict(blind=True, video_root=None)), ("direct", dict(
            direct=True, template=None)), ("shuffled", dict(frames_order="shuffled")),
            ("one", dict(frames_shown="one")), ("plain", {})):
        seen[name] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Student, "prefill", lambda self, prefixes, kept=seen[name]: (
                kept.extend(prefixes), prefill(self, prefixes))[1])
            for benchmark in TITLES:
                evaluate.evaluate(config(world, benchmark, folder / f"{name}-{benchmark}",
                                         max_completion=4, **more))
    return folder, seen


def test_controls_change_what_a_student_is_shown_and_nothing_else(world, controls):
    """Catches: --blind that still shows frames or asks otherwise; shuffled frames in order, or with
    times out of order; one frame that is not the middle one, or is shown as several; a direct
    answer that is asked for in the usual wording.
    """
    seen, mixed = controls[1], 0
    assert [len(seen[name]) for name in seen] == 5 * [40]
    for plain, blind, shuffled, one in zip(*(seen[n] for n in ("plain", "blind", "shuffled",
                                                               "one"))):
        ids, (t, h, w) = plain.ids.tolist(), plain.grids[0].tolist()
        pad = toy.SPECIAL.index("<|video_pad|>")
        start, end = ids.index(pad), len(ids) - ids[::-1].index(pad)
        assert blind.ids.tolist() == ids[:start - 1] + ids[end + 1:]  # without its tags too
        assert blind.pixels is None and len(blind.grids) == 0
        assert shuffled.ids.tolist() == ids and shuffled.pixels.shape == plain.pixels.shape
        assert shuffled.seconds_per_grid.tolist() == plain.seconds_per_grid.tolist()
        mixed += not torch.equal(shuffled.pixels, plain.pixels)
        assert one.grids.tolist() == [[1, h, w]] and (t, one.ids.tolist().count(pad)) == (
            2, ids.count(pad) // 2)
        # a patch of pixels is [colour, time, row, column]; the third of four frames, twice
        third, twice = plain.pixels.view(t, h * w, 3, 2, -1)[1], one.pixels.view(h * w, 3, 2, -1)
        assert torch.equal(twice, third[:, :, :1].expand(-1, -1, 2, -1))
    assert mixed > 0
    tokenizer, asked = AutoTokenizer.from_pretrained(world / "student"), {}
    for name in ("plain", "direct"):
        asked[name] = [tokenizer.decode(prefix.ids) for prefix in seen[name]]
    assert all("Think, then answer" in text for text in asked["plain"])
    assert all("Give the answer alone, without reasoning" in text and "Think" not in text
               for text in asked["direct"])


def test_controls_are_rows_of_their_own_and_stand_beside_the_blind_run(world, controls):
    """Catches: runs of different questions in one row, a column that stays empty, a blind run taken
    for that of another wording.
    """
    text = results.table([str(controls[0])])
    label = f"{world / 'student'}, 4 frames, max_pixels 3136, temperature 1.0, top_p 1.0"
    template = f"template {world / 'template.txt'}"
    blind = label.replace(", 4 frames, max_pixels 3136", "") + f", max_completion 4, {template}, "
    for row in (f"{label}, max_completion 4, {template}", blind + "blind",
                f"{label}, max_completion 4, direct",
                f"{label}, max_completion 4, {template}, frames_order shuffled",
                f"{label}, max_completion 4, {template}, frames_shown one"):
        lines = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
        assert len(lines) == 2 and "–" not in lines[0], row  # by two conventions
    beside = text.partition("### with and without the video\n\n")[2].splitlines()[2:]
    assert len(beside) == 2 * 8 * 3 and not any("direct" in line or "blind" in line
                                                for line in beside)


def test_accuracy_stands_beside_blind_accuracy_and_that_where_blind_is_wrong(world, tmp_path):
    """Catches: the blind run's own accuracy on what it missed, questions that only one of the two
    scores, the micro mean of VSI-Bench, graded answers that count as missed from 0.5 on.

    Holmes: three of four with the video, one without, and two of the three that it missed.
    VSI-Bench, official: counts of 2 and 4, answered 2 and 5.1 (MRA 1 and 0.5): 0.75; blind 2.72
    (MRA 0.3) and 4: 0.65, so it misses the first. One of two letters, another task, is right with
    the video, none without: (0.75 + 0.5)/2, (0.65 + 0)/2, (1 + 0.5)/2, where a mean over the
    questions is 2/3.
    """
    given = {name: config(world, "holmes", "x", blind=blind, template=None)
             for name, blind in (("holmes", False), ("blind", True))}
    questions = load(given["holmes"])
    for name, letters in (("holmes", "CAFE"), ("blind", "CEEE")):
        written(tmp_path / name, given[name], questions,
                {q.id: f"<answer>{x}</answer>" for q, x in zip(questions, letters)})
    other = replace(given["holmes"], frames=16, max_pixels=784)  # no matter to a blind run
    written(tmp_path / "other", other, questions, {q.id: "E" for q in questions})
    direct = replace(given["holmes"], direct=True)  # another wording, of which no blind run is here
    written(tmp_path / "direct", direct, questions, {q.id: "E" for q in questions})
    vsi = [replace(q, id=str(i), answer=gold) for i, (q, gold) in enumerate(
        (load(config(world, "vsibench", "x"))[k], gold) for k, gold in ((0, "2"), (0, "4"),
                                                                        (5, "A"), (5, "A")))]
    for name, texts, blind in (("vsi", ("2", "5.1", "A", "B"), False),
                               ("vsi-blind", ("2.72", "4", "B", "B"), True)):
        written(tmp_path / name, config(world, "vsibench", "x", blind=blind, template=None), vsi,
                dict(zip("0123", texts)))
    lines = [line.split(" | ") for line in results.table([str(tmp_path)]).partition(
        "with and without the video")[2].splitlines() if "official" in line]
    found = {(line[0].rpartition(", ")[0].split("student, ")[1][:8], line[0].split(", ")[-3]):
             line[1:] for line in lines}
    assert found == {("4 frames", "holmes"): ["75.0", "25.0", "66.7", "4", "3 |"],
                     ("16 frame", "holmes"): ["0.0", "25.0", "0.0", "4", "3 |"],
                     ("4 frames", "vsibench"): ["62.5", "32.5", "75.0", "4", "3 |"]}
    assert len(lines) == 3


def test_an_api_model_is_asked_without_the_video_or_directly(world, tmp_path, monkeypatch):
    """Catches: frames sent all the same, a blind run that wants the videos, the usual wording."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    with MessagesServer(lambda body: says("<answer>A</answer>")) as server:
        given = dict(model="anthropic:glm", api_url=server.url, template=None)
        for name, more in (("blind", dict(blind=True, video_root=None)), ("direct", dict(
                direct=True)), ("one", dict(frames_shown="one"))):
            evaluate.evaluate(config(world, "vsibench", tmp_path / name, **given | more))
        contents = [body["messages"][0]["content"] for body in server.bodies]
        images = [sum(block["type"] == "image" for block in content) for content in contents]
        assert images == 12 * [0] + 12 * [4] + 12 * [1]
        assert [("<think>" in text_of(body), "without reasoning" in text_of(body))
                for body in server.bodies[::12]] == [(True, False), (False, True), (True, False)]
        assert "frame 0, 1.88 s" in text_of(server.bodies[24])  # of 0, 1, 1.875 and 2.875 s


def test_every_question_has_an_order_of_its_own_that_the_seed_repeats():
    """Catches: one permutation for all videos, another one on resume or another process."""
    frames = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 28, 28)
    clip = Clip(frames, tuple(map(float, range(16))), tuple(range(16)), 1.0, 16.0, 16)

    def order(id, seed):
        given = evaluate.Config(frames_order="shuffled", seed=seed)
        changed = evaluate.controlled(given, sample(id=id, clip=clip)).clip
        assert (changed.times, changed.indices) == (clip.times, clip.indices)
        return tuple(changed.frames[:, 0, 0, 0].tolist())

    found = [order("a", 0), order("b", 0), order("a", 1)]
    assert len(set(found)) == 3 and order("a", 0) == found[0]
    assert all(sorted(one) == list(range(16)) for one in found)
    one = evaluate.controlled(evaluate.Config(frames_shown="one"), sample(clip=clip)).clip
    assert (one.times, one.indices, one.frames[:, 0, 0, 0].tolist()) == ((8.0,), (8,), [8])
    assert one.duration == 16.0


def test_direct_answers_that_reason_are_counted_and_thinking_checkpoints_refused(world, tmp_path):
    """Catches: a row of direct answers that are none, without a word."""
    given = config(world, "holmes", "x", direct=True, template=None)
    questions = load(given)
    texts = ["<think>Hm.</think><answer>C</answer>", "<answer>A</answer>", "F", "C"]
    run = written(tmp_path / "run", given, questions, dict(zip((q.id for q in questions), texts)))
    assert "1 answers reason all the same" in results.report(run)
    assert "| overall | 75.0 | 4 |" in results.report(run)
    students.publish(tmp_path / "thinking", "qwen3_vl_thinking")
    with pytest.raises(ValueError, match="--direct: the chat template of .*thinking begins every "
                       "response with <think>: it always reasons"):
        evaluate.evaluate(replace(given, model=str(tmp_path / "thinking"), max_pixels=64 * 64,
                                  output=str(tmp_path / "none")))
    students.publish(tmp_path / "told", "qwen3_5")  # thinks unless told
    evaluate.evaluate(replace(given, model=str(tmp_path / "told"), max_pixels=64 * 64,
                              max_completion=4, output=str(tmp_path / "some")))
    answers = read_log(tmp_path / "some/answers.jsonl")
    assert len(answers) == len(questions) and not any("<think>" in row["text"] for row in answers)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Make a toy world of ten and five questions."""
    folder = tmp_path_factory.mktemp("toy")
    toy.make(folder, train=10, heldout=5, warm=5, pretrained=False)
    return folder


def own(folder, output, **more):
    given = dict(data=folder / "train.json", video_root=None, blind=True, model=folder / "model",
                 template=folder / "template.txt")
    return replace(config(folder, "holmes", output, **given | more), benchmark="own")


def test_the_rows_that_no_blind_try_answers_are_kept_as_they_are(small, tmp_path, monkeypatch):
    """Catches: the first try alone, tries that are one try, rows rewritten or out of order, figures
    over all tries, a training file written over.
    """
    rows_, kept = json.loads((small / "train.json").read_text()), tmp_path / "hard.jsonl"
    rows_[3] |= {"note of mine": [1.0, "é"], "problem_id": None}  # it goes by its number
    (tmp_path / "train.json").write_text(json.dumps(rows_))
    right = {"train-1": [1, 0, 0], "3": [0, 0, 1], "train-4": [0, 1, 1]}

    def find(student, cache, groups, header, score, diagnose, key, tries, sampling):
        for group in groups:
            told = [f"<answer>{group.sample.answer if hit else '?'}</answer>"
                    for hit in right.get(group.sample.id, [0, 0, 0])]
            assert tries == len(told)
            group.slots = [SimpleNamespace(first=SimpleNamespace(text=text, ids_C=[1],
                                                                 finished=True)) for text in told]

    given = own(small, tmp_path / "run", data=tmp_path / "train.json", tries=3, keep_failed=kept)
    with monkeypatch.context() as patched:
        patched.setattr(ffr, "find", find)
        report = evaluate.evaluate(given)
    assert "| overall | 10.0 | 10 |" in report and report.endswith(
        f"7 of 10 questions got no right answer in 3 tries without their video: {kept}")
    assert read_log(kept) == [row for i, row in enumerate(rows_) if i not in (1, 3, 4)]
    assert len(data.load_samples(read_log(kept), {"": small / "videos"})) == 7
    with pytest.raises(ValueError, match="hard.jsonl is there already"):
        evaluate.evaluate(replace(given, resume=True))
    kept.unlink()
    before = rows(tmp_path / "run")
    evaluate.evaluate(replace(given, resume=True))  # from the answers that are there
    assert len(read_log(kept)) == 7 and rows(tmp_path / "run") == before


def test_tries_differ(small, tmp_path):
    """Catches: the same answer G times, for which a question counts as tried G times."""
    seen, find = [], ffr.find

    def noted(student, cache, groups, *rest):
        find(student, cache, groups, *rest)
        seen.extend([slot.first.text for slot in group.slots] for group in groups)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ffr, "find", noted)
        evaluate.evaluate(own(small, tmp_path / "run", tries=3, keep_failed=tmp_path / "hard.json"))
    assert len(seen) == 10 and all(len(set(texts)) == 3 for texts in seen)
    assert [row["text"] for row in rows(tmp_path / "run").values()] == [texts[0] for texts in seen]
    evaluate.evaluate(own(small, tmp_path / "one"))
    assert [row["text"] for row in rows(tmp_path / "one").values()] == [texts[0] for texts in seen]


def test_no_rows_are_kept_while_answers_are_missing(small, tmp_path, monkeypatch):
    """Catches: a question whose request failed, kept as one that needs its video."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    failing = [Fault(status=400, body='{"error": {"message": "no"}}')]
    with MessagesServer(lambda body: failing.pop() if failing else says("<answer>?</answer>")) \
            as server:
        given = own(small, tmp_path / "run", model="anthropic:glm", api_url=server.url,
                    keep_failed=tmp_path / "hard.jsonl")
        assert "hard.jsonl is not written: 1 answers are missing" in evaluate.evaluate(given)
        assert not (tmp_path / "hard.jsonl").exists()
        assert "10 of 10 questions got no right answer in 1 tries" in evaluate.evaluate(
            replace(given, resume=True))
    assert len(read_log(tmp_path / "hard.jsonl")) == 10


def test_how_much_was_trained_on_is_counted(small, world, tmp_path):
    """Catches: other folders taken for other files, lines that the loaders add, questions alike
    about other videos taken for the same.
    """
    def said(benchmark, folder, trained):
        report = evaluate.evaluate(evaluate.Config(
            benchmark=benchmark, data=str(folder), trained_on=str(trained),
            predictions=str(tmp_path / "p.jsonl")))
        return report.splitlines()[-1].partition("occur ")[2]

    heldout, train = small / "heldout.json", small / "train.json"
    (tmp_path / "p.jsonl").write_text('{"id": "heldout-0", "text": "red"}\n')
    asked = [{row["problem"] for row in json.loads(path.read_text())} for path in (heldout, train)]
    assert said("own", heldout, train) == f"0 of 1 files, by their names, and " \
        f"{len(asked[0] & asked[1])} of 5 questions, by their words, 0 with their file."
    assert said("own", heldout, heldout) == \
        "1 of 1 files, by their names, and 5 of 5 questions, by their words, 5 with their file."
    (tmp_path / "p.jsonl").write_text('{"id": "Adaptation/test_Math_2", "text": "red"}\n')
    (tmp_path / "t.json").write_text(json.dumps([
        {"path": "a/test_Math_2.webm", "problem": "<image> how many"},
        {"path": "b/video_1.mp4", "problem": "Which?"}, {"path": "b/c.mp4", "problem": "(?)"}]))
    assert said("videommmu", world / "videommmu", tmp_path / "t.json") == \
        "1 of 5 files, by their names, and 5 of 7 questions, by their words, 1 with their file."
    for content in ("[]", '[{"id": 1, "text": "x"}]', '{"data": [1]}'):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ValueError, match="--trained_on .*t.json is no training file"):
            said("videommmu", world / "videommmu", tmp_path / "t.json")


def test_runs_have_folders_by_what_names_their_rows(world):
    """Catches: a blind run refused, or resumed, in the folder of the run with videos."""
    given = [config(world, "holmes", "", **more) for more in (
        {}, dict(blind=True), dict(direct=True, template=None), dict(frames_order="shuffled"),
        dict(frames=8), dict(seed=1))]
    assert len({evaluate.output_folder(one) for one in given}) == len(given)
    assert evaluate.output_folder(evaluate.Config(
        benchmark="mmvu", model="hub/M-7B", blind=True)) == "runs/mmvu-M-7B-blind-0"


ASKING = ["--benchmark", "mmvu", "--data", "d", "--video_root", "v", "--model", "m"]
OWN_BLIND = ["--benchmark", "own", "--data", "d", "--model", "m", "--blind"]


@pytest.mark.parametrize("given, sentence", (
    ([*ASKING, "--blind", "--frames", "8"], "--frames changes nothing"),
    ([*ASKING, "--blind", "--frames_order", "shuffled"], "--frames_order changes nothing"),
    ([*ASKING, "--blind", "--decode_workers", "1"], "--decode_workers changes nothing"),
    ([*ASKING, "--decode_workers", "0", "--decode_seconds", "1"], "--decode_seconds changes"),
    ([*ASKING, "--frames_shown", "one", "--frames_order", "shuffled"], "--frames_order changes"),
    ([*ASKING, "--direct", "--template", "t"], "--template changes nothing"),
    ([*ASKING, "--uncut"], "--uncut changes nothing in this run: it is for --benchmark mvbench"),
    ([*ASKING, "--question_only"], "--question_only changes nothing"),
    ([*ASKING, "--blind", "--keep_failed", "f"], "--benchmark own with --blind"),
    ([*ASKING, "--with_patches", "annotated", "--frames_shown", "one"], "--with_patches changes"),
    ([*ASKING, "--with_patches", "annotated", "--blind"], "--with_patches changes"),
    ([*OWN_BLIND, "--tries", "8", "--temperature", "1", "--top_p", "0.95"], "--tries changes"),
    ([*OWN_BLIND, "--tries", "8", "--keep_failed", "f"], "at --temperature 1 --top_p 0.95"),
    ([*OWN_BLIND, "--tries", "0", "--keep_failed", "f"], "--tries must be positive"),
    ([*OWN_BLIND, "--keep_failed", "."], "--keep_failed . is there already"),
    ([*OWN_BLIND, "--keep_failed", "no/f"], "--keep_failed no/f is there already, or its folder"),
    ([*OWN_BLIND, "--trained_on", "no"], "--trained_on no: there is no such file"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--blind"], "--blind changes"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--top_p", "1"], "--top_p"),
    ([*ASKING[:-1], "anthropic:m", "--batch", "2"], "--batch changes nothing"),
    ([*ASKING[:-1], "anthropic:m", "--top_p", "1"], "--top_p changes nothing")))
def test_flags_that_change_nothing_are_refused(tmp_path, monkeypatch, capsys, given, sentence):
    """Catches: a control that is not heeded, so that its row shows no difference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    with pytest.raises(SystemExit) as caught:
        evaluate.main(given)
    assert sentence in capsys.readouterr().err and caught.value.code == 2


@pytest.mark.parametrize("given, sentence", (
    (["--benchmrk", "mmvu"], "unknown: --benchmrk; did you mean --benchmark?"),
    (["--benchmark", "mmu"], "invalid choice"),
    (["--benchmark", "mmvu"], "--data is missing"),
    (["--benchmark", "mmvu", "--data", "d"], "one of --model and --predictions"),
    (["--benchmark", "mmvu", "--data", "d", "--model", "m"], "--video_root is missing"),
    (["--benchmark", "mmvu", "--data", "d", "--model", "m", "--video_root", "v", "--frames", "15"],
     "--frames must be even"),
    (["--benchmark", "mmvu", "--data", "d", "--model", "m", "--video_root", "v", "--top_p", "0"],
     "--top_p in (0, 1]"),
    (["--benchmark", "mmvu", "--data", "d", "--model", "m", "--video_root", "v", "--subtitles"],
     "--subtitles changes nothing in this run: it is for --benchmark longvideobench"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--api_price", "3"],
     "--api_price is IN/OUT in dollars"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--api_budget", "3"],
     "--api_budget is in dollars and needs --api_price"),
    (["--benchmark", "mmvu", "--data", "d", "--model", "m", "--video_root", "nowhere"],
     "--video_root nowhere is not a folder"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--with_patches", "annotated"],
     "--with_patches needs a student"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--api_url", "http://x"],
     "--api_url changes nothing in this run: it is for --model anthropic:NAME, --judge and"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--evidence", "none"],
     "--evidence changes nothing in this run: it is for --with_patches"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--teacher_model", "m"],
     "--teacher_model changes nothing in this run"),
    (["--benchmark", "mmvu", "--data", "d", "--predictions", "p", "--judge", "j"],
     "--judge with --predictions needs --output: verdicts that were paid for"),
    (["table", "nowhere"], "nowhere holds no run"),
    (["table", ".", "--paper", "99"], "there are Tables 2, 3")))
def test_bad_flags_are_one_sentence(tmp_path, monkeypatch, capsys, given, sentence):
    """Catches: a typo that runs with the default, a traceback, an error after the model loaded."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(given)
    assert sentence in str(caught.value) + capsys.readouterr().err and caught.value.code != 0
