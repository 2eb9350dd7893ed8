"""evaluate.py and its tables as people run them: processes, kills and files; a tiny student."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import miniature
import numpy as np
import pytest
from messages_server import Fault, MessagesServer

import evaluate
import toy
from benchmarks import results
from benchmarks.questions import TITLES, load
from runs import parse, read_log

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
    batch or on how many processes there are, a process without questions that the others wait for.
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
        assert rows(tmp_path / "two" / benchmark) == rows(plain / benchmark)
    assert results.table([str(tmp_path / "two")]) == results.table([str(plain)])


def test_a_killed_run_resumes_to_the_same_table(world, plain, tmp_path):
    """Catches: answers lost or asked twice by --resume, a torn line continued or counted."""
    root, folder = tmp_path / "videos", tmp_path / "run"
    miniature.clip(root / "vidA.mp4", world / "source.mp4")
    # nobody writes to it: the run stands still before its third question
    os.mkfifo(root / "vidB.mp4")
    process = start(flags(world, "holmes", folder, video_root=root, batch=1, decode_workers=1))
    seen = ""
    while " 2/4" not in seen:
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert rows(folder).keys() == {"vidA/1", "vidA/2"}
    with open(folder / "answers.jsonl", "a") as file:
        file.write('{"id": "vidB/1", "te')
    assert rows(folder).keys() == {"vidA/1", "vidA/2"}
    (root / "vidB.mp4").unlink()
    miniature.clip(root / "vidB.mp4", world / "source.mp4")
    evaluate.evaluate(config(world, "holmes", folder, video_root=root, resume=True))
    assert rows(folder) == rows(plain / "holmes")
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
    (root / "vidB.mp4").unlink()
    report = evaluate.evaluate(config(world, "holmes", tmp_path / "gone", video_root=root))
    assert "4 questions, 2 missing, 0 undecodable" in report
    assert "2 of 4 questions have no video: vidB/1" in capsys.readouterr().err
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
    said = json.dumps(rows(tmp_path / "run")["56"]["text"])
    path.write_text(kept.replace(said, '"<answer>A</answer>"'))  # 56 is right
    evaluate.evaluate(config(world, "lvbench", **options, resume=True, with_patches="annotated"))
    assert rows(tmp_path / "run", "patched").keys() == {"55"}
    path.write_text(kept)
    report = evaluate.evaluate(config(world, "lvbench", **options, resume=True,
                                      with_patches="annotated"))
    assert "upper bound" in report and "upper bound" not in before
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
            "id": "5", "text": "<think>I see.</think><answer>A</answer>", "tokens": 50}
        assert "anthropic:glm" in results.table([str(tmp_path / "run")])
        (tmp_path / "run/answers.jsonl").unlink()  # they are in the cache as well
        assert evaluate.evaluate(given(resume=True)) == report and len(server.seen) == 13


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
     "--subtitles is for --benchmark longvideobench"),
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
    (["table", "nowhere"], "nowhere holds no run"),
    (["table", ".", "--paper", "99"], "there are Tables 2, 3")))
def test_bad_flags_are_one_sentence(tmp_path, monkeypatch, capsys, given, sentence):
    """Catches: a typo that runs with the default, a traceback, an error after the model loaded."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(given)
    assert sentence in str(caught.value) + capsys.readouterr().err and caught.value.code != 0
