"""The paper's eight benchmarks: what they ask, as their authors lay it out, and how they score it.

    questions = load(config)                     of --benchmark, from --data; every row is checked
    score("vsibench", questions, texts, "official")      name -> (share right, questions)
    tally(questions, answers)                    missing, undecodable, unanswered, unreadable

official   the benchmark's own rule, with as many letters as the question has options
family     Video-R1's: the letter and nothing else inside <answer>, else in all of the output

Nothing here imports torch. Departures from the authors: an empty or unreadable answer is wrong,
never a random letter (LongVideoBench), never right (MVBench) and never left out (LVBench,
Video-MMMU); MMVU's multiple choice goes by rule, not by judge, and so do TempCompass' answers, also
where its rules read none; an answer that stands in <answer> is read there, without the blanks
around it. docs/evaluation.md has the list.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Protocol

import numpy as np

from reward import accuracy, check_gold, choice, mra, number, parse_answer
from runs import read_json, read_rows

TITLES = {"mmvu": "MMVU", "vsibench": "VSI-Bench", "videommmu": "VideoMMMU",
          "holmes": "Video-Holmes", "longvideobench": "LongVideoBench", "lvbench": "LVBench",
          "mvbench": "MVBench", "tempcompass": "TempCompass"}
REASONING = tuple(TITLES)[:4]  # the paper's video reasoning benchmarks; the others are general ones
CONVENTIONS = ("official", "family")


# ---------------------------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: str
    text: str
    options: tuple[str, ...]  # "A. red"; as many letters as there are
    answer: str  # a letter, a number or a text
    kind: str  # one of reward.KINDS
    groups: tuple[str, ...] = ()  # the sub-scores that it counts for
    media: str = ""
    media_type: str = "video"
    span: tuple[float, float] | None = None  # the seconds that are shown
    evidence: tuple[dict, ...] = ()  # where to look, for the annotated teacher
    accepted: tuple[str, ...] = ()  # what else the official rule reads: gold numbers, raw options
    judged: bool = False  # only a judge can score it


class Flags(Protocol):
    """The flags of evaluate.py that say which questions are asked."""

    benchmark: str
    data: str
    video_root: str
    frames: int
    subtitles: bool
    uncut: bool
    question_only: bool


def load(config: Flags) -> list[Question]:
    """Return all questions of a benchmark; ValueError where a row is not as its rows are."""
    loaders = {"mmvu": mmvu, "vsibench": vsibench, "videommmu": videommmu, "holmes": holmes,
               "longvideobench": longvideobench, "lvbench": lvbench, "mvbench": mvbench,
               "tempcompass": tempcompass, "family": family_json}
    where = f"--data {config.data}"
    try:
        questions = loaders[config.benchmark](config, Videos(config.video_root))
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{where}: a row is not as in {config.benchmark}: "
                         f"{type(error).__name__} {error}") from None
    if not questions:
        raise ValueError(f"{where} holds no questions of {config.benchmark}")
    for q in questions:
        try:
            check_gold(q.kind, q.answer, q.options)
            if q.kind == "multiple choice" and q.answer not in list(_letters(q)):
                raise ValueError(f"the answer {q.answer!r} is none of {len(q.options)} letters")
        except ValueError as error:
            raise ValueError(f"sample {q.id}: {error}") from None
    id, times = Counter(q.id for q in questions).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{where}: {times} questions have the id {id}")
    return questions


class Videos:
    """Where the files are: at a path below the root, or by their name alone."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).absolute() if root else None
        if root and not self.root.is_dir():
            raise ValueError(f"--video_root {root} is not a folder")

    def at(self, *paths: str) -> str:
        """Return the first of the paths that exists below the root, its videos/ or video/."""
        if self.root is None:
            return paths[0]
        tried = [base / path for path in paths
                 for base in (self.root, self.root / "videos", self.root / "video")]
        return str(next((path for path in tried if path.exists()), tried[0]))

    def named(self, stem: str) -> str:
        """Return the file of this name, wherever it is below the root."""
        return self.root and self._stems.get(stem) or self.at(f"{stem}.mp4")

    @cached_property
    def _stems(self):
        found = (Path(folder, name) for folder, _, names in os.walk(self.root, followlinks=True)
                 for name in names)
        kinds = {".mp4", ".mkv", ".webm", ".avi", ".mov"}
        return {path.stem: str(path) for path in sorted(found, reverse=True)
                if path.suffix.lower() in kinds}


def pick(data: str, *patterns: str) -> list[Path]:
    """Return the question files: `data`, or a folder's, by the first pattern that finds any."""
    path = Path(data)
    if path.is_file():
        return [path]
    for pattern in patterns:
        if found := sorted(path.glob(pattern)):
            return found
    raise ValueError(f"--data {data} is no file, nor a folder with {' or '.join(patterns)}")


def read(path: Path | str) -> list | dict:
    """Return what a JSON, JSON lines or parquet file holds."""
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet  # slow to import, and most benchmarks come as JSON
        return pyarrow.parquet.read_table(path).to_pylist()
    return read_json(path) if path.suffix == ".json" else read_rows(path)


def rows(config: Flags, *patterns: str) -> list[dict]:
    """Return the rows of all question files."""
    return [row for path in pick(config.data, *patterns) for row in read(path)]


def lettered(texts: Iterable) -> tuple[str, ...]:
    """Return options with their letters, "A. red", also where they had them already."""
    texts = [str(text).strip() for text in texts]
    if texts and all(re.match(rf"\(?{x}[.):] ?", text) for x, text in zip(LETTERS, texts)):
        texts = [re.sub(r"^\(?[A-Z][.):] ?", "", text) for text in texts]
    return tuple(f"{LETTERS[i]}. {text}" for i, text in enumerate(texts))


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Return a question and the options in its last lines, "A. red" or "(A) red"."""
    stem, *parts = re.split(r"\n[ \t]*\(?([A-Z])[.)](?: |(?=[A-Z][a-z]))", text)  # or "C.Both"
    if not parts or "".join(parts[::2]) != LETTERS[:len(parts) // 2]:
        return text, ()
    return stem, lettered(parts[1::2])


# ---------------------------------------------------------------------------------------------
# Loaders: the layouts of the benchmarks' own repositories and hub pages


def members(groups: dict[str, str]) -> dict[str, str]:
    """Return {member: group} of {group: "member member ..."}."""
    return {member: group for group, listed in groups.items() for member in listed.split()}


DISCIPLINES = members({  # of MMVU's subjects
    "Science": "Biology Chemistry Modern_Physics Astronomy Geography Materials_Science"
               " Neurobiology Electromagnetism Thermodynamics Mechanics",
    "Engineering": "Civil_Engineering Electrical_Engineering Mechanical_Engineering"
                   " Biomedical_Engineering Electronics_and_Communication Computer_Science",
    "Healthcare": "Clinical_Medicine Basic_Medicine Preventive_Medicine Pharmacy Dentistry",
    "Humanities and Social Science": "Art Literature History Law Economics Management"})
FACULTIES = members({  # of Video-MMMU's subjects; the folders of its videos
    "Art": "Art Art_Theory Design Music",
    "Science": "Biology Chemistry Geography Math Physics",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics"
                   " Energy_and_Power Materials Mechanical_Engineering",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine"
                " Pharmacy Public_Health",
    "Business": "Accounting Economics Finance Manage Marketing"})
MVBENCH = members({  # the folders of its tasks' videos
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "sta/sta_video": "action_localization", "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action", "FunQA_test/test": "unexpected_action",
    "clevrer/video_validation": "object_existence moving_direction moving_count"
                                " moving_attribute counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "scene_qa/video": "scene_transition", "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation", "tvqa/frames_fps3_hq": "episodic_reasoning"})
BOUNDED = {"action_sequence", "action_prediction", "object_interaction", "action_localization",
           "episodic_reasoning"}  # MVBench's tasks about some seconds of a video
FORMATS = ("multi-choice", "yes_no", "caption_matching", "captioning")  # TempCompass' tasks
TRACKS = ("Perception", "Comprehension", "Adaptation")  # Video-MMMU's
MEDIA = {"video": "video", "frame": "video", "image": "image"}  # "frame": 200 rows of MVBench


def mmvu(config: Flags, videos: Videos) -> list[Question]:
    """Return MMVU's validation set: 625 multiple choice and 375 open questions."""
    questions = []
    for row in rows(config, "validation.json", "data/validation.json", "**/validation*.parquet"):
        path = row.get("video_path") or row["video"].split("/main/")[-1]  # a mirror's, or a URL
        closed = {"multiple-choice": True, "open-ended": False}[row["question_type"]]
        subject = path.split("/")[-2].replace(" ", "_")
        questions.append(Question(
            str(row["id"]), row["question"], lettered(row["choices"].values()) if closed else (),
            row["answer"], "multiple choice" if closed else "free-form",
            ("multiple choice" if closed else "open", DISCIPLINES.get(subject, subject)),
            videos.at(path, path.removeprefix("videos/")), judged=not closed))
    return questions


def vsibench(config: Flags, videos: Videos) -> list[Question]:
    """Return VSI-Bench's test set.

    It has six types of multiple choice in four tasks, and four numerical tasks.
    """
    questions = []
    for row in rows(config, "test.jsonl", "**/test*.parquet"):
        options, path = row["options"], f"{row['dataset']}/{row['scene_name']}.mp4"
        task = re.sub("_(easy|medium|hard)$", "", row["question_type"])
        questions.append(Question(
            str(row["id"]), row["question"], lettered(options or ()), str(row["ground_truth"]),
            "multiple choice" if options else "regression",
            ("multiple choice" if options else "numerical",
             *dict.fromkeys((task, row["question_type"]))), videos.at(path)))
    return questions


def videommmu(config: Flags, videos: Videos) -> list[Question]:
    """Return Video-MMMU: 300 videos, each with a question of each of its three tracks.

    The tracks are perception, comprehension and adaptation.
    """
    questions = []
    for path in pick(config.data, "data/*_video.json", "*_video.json", "*/*.parquet"):
        found, track = read(path), path.parent.name
        if isinstance(found, dict):  # the repository's copy: {"Perception": {"0": {...}}}
            (track, found), = found.items()
        if track not in TRACKS:
            raise ValueError(f"--data: {path} is in no folder {', '.join(TRACKS)}")
        for row in found.values() if isinstance(found, dict) else found:
            if track == "Adaptation" or not config.question_only:
                questions.append(_videommmu_question(row, track, videos, config.question_only))
    return questions


def _videommmu_question(row, track, videos, question_only):
    id, options = row["id"], lettered(row["options"] or ())
    faculty = FACULTIES.get("_".join(id.split("_")[1:-1]), "other subjects")
    golds = [gold.strip(" '\"[]") for gold in str(row["answer"]).split(",")] \
        if str(row["answer"]).startswith("[") else [str(row["answer"]).strip()]
    answer = next((gold for gold in golds if number(gold) is not None), golds[0])
    if not options and re.fullmatch("[A-D]", answer):  # two rows: the options are in the picture
        options = tuple(f"{letter}." for letter in "ABCD")
    text = re.sub("(?i)<image 1>", "(the image at the end of the video)", row["question"])
    kind = "multiple choice" if options else "free-form" if number(answer) is None else "numerical"
    if track == "Adaptation" and not question_only:
        text = "Apply what the video teaches to the question; its image ends the video.\n" + text
    elif not question_only:
        text += "\nA quiz shown in the last frame of the video is not part of this question."
    path = f"question_only/{id}_image.mp4" if question_only else f"{faculty}/{id}.mp4"
    return Question(f"{track}/{id}", text, options, answer, kind, (track, faculty),
                    videos.at(path, Path(path).name), accepted=() if options else tuple(golds))


def holmes(config: Flags, videos: Videos) -> list[Question]:
    """Return Video-Holmes' test set.

    Question ids restart with every video and may repeat even there.
    """
    questions, seen = [], Counter()
    for row in rows(config, "test_Video-Holmes.json", "**/test_Video-Holmes.json", "*test*.json"):
        id = f"{row['video ID']}/{row['Question ID']}"
        seen[id] += 1
        questions.append(Question(
            id if seen[id] == 1 else f"{id}#{seen[id]}", row["Question"],
            lettered(text for _, text in sorted(row["Options"].items())), row["Answer"],
            "multiple choice", (row["Question Type"],), videos.named(row["video ID"])))
    return questions


def longvideobench(config: Flags, videos: Videos) -> list[Question]:
    """Return LongVideoBench's validation set; --subtitles puts their lines before the question."""
    questions, folder = [], Path(config.data).parent
    for row in rows(config, "lvb_val.json", "**/validation*.parquet"):
        if "candidates" in row:
            texts = row["candidates"]
        else:  # parquet pads with N/A
            texts = [row[f"option{i}"] for i in range(5) if row[f"option{i}"] not in ("N/A", None)]
        text = row["question"]
        if config.subtitles:
            bases = (Path(config.data), folder, Path(config.video_root))
            text = spoken(row, config.frames, [b / "subtitles" for b in bases]) + text
        questions.append(Question(
            str(row["id"]), text, lettered(texts), LETTERS[int(row["correct_choice"])],  # 0-based
            "multiple choice", (f"{row['duration_group']} s",
                                *([row["level"]] if "level" in row else ()),  # not in parquet
                                row["question_category"]), videos.at(row["video_path"])))
    return questions


def spoken(row: dict, frames: int, folders: Sequence[Path]) -> str:
    """Return the subtitles during which a frame is shown, with their times.

    Which ones these are is the authors' own rule.
    """
    path = next((f / row["subtitle_path"] for f in folders if (f / row["subtitle_path"]).exists()),
                None)
    if path is None:
        raise ValueError(f"--subtitles: sample {row['id']} has no file {row['subtitle_path']} in "
                         f"{' or '.join(map(str, folders))}")
    shown, kept = np.linspace(0, row["duration"], frames), []
    for line in read(path):
        start, end = line["timestamp"] if "timestamp" in line else (line["start"], line["end"])
        if "timestamp" in line and not isinstance(end, float):  # open: until the film ends
            end = row["duration"]
        start, end = (seconds(stamp) - row["starting_timestamp_for_subtitles"]
                      for stamp in (start, end))
        middle, half = (start + end) / 2, max(end - start, 1) / 2
        if (abs(shown - middle) < half).any():
            kept.append(f"[{middle:.0f} s] {line.get('line') or line.get('text')}")
    return "\n".join(["Subtitles:", *kept, "", ""]) if kept else ""


def seconds(stamp: str | float) -> float:
    """Return the seconds of "HH:MM:SS.mmm", "MM:SS" or a number."""
    return sum(float(part) * 60**i for i, part in enumerate(reversed(str(stamp).split(":"))))


def lvbench(config: Flags, videos: Videos) -> list[Question]:
    """Return LVBench: a line a video, options in the question; or the mirror's row a question."""
    questions = []
    for video in rows(config, "video_info.meta.jsonl", "**/*.parquet"):
        for row in video.get("qa") or [video]:
            text, options = split_options(row["question"])
            kinds = row.get("question_type") or ()
            questions.append(Question(
                str(row.get("uid", len(questions))), text, options or lettered(row["options"]),
                row["answer"], "multiple choice",
                tuple([kinds] if isinstance(kinds, str) else kinds),
                videos.at(row["video_path"]) if "video_path" in row else videos.named(video["key"]),
                evidence=_reference(row.get("time_reference"))))
    return questions


def _reference(text):
    """Return LVBench's "MM:SS-MM:SS", or with hours, as evidence.

    It says where the answer is; no model is shown it.
    """
    times = [seconds(part) for part in re.findall(r"\d+(?::\d+)+", text or "")]
    return ({"start": min(times), "end": max(times)},) if len(times) == 2 else ()


def mvbench(config: Flags, videos: Videos) -> list[Question]:
    """Return MVBench's twenty tasks.

    Its answers are the options' texts, and TVQA's videos are folders of pictures.
    """
    questions = []
    for path in pick(config.data, "json/*.json", "*.json"):
        task = path.stem
        for i, row in enumerate(read(path)):
            name, bounded = row["video"], task in BOUNDED and not config.uncut
            folders = MVBENCH[task], f"data0613/{MVBENCH[task]}"  # a later archive has its own
            questions.append(Question(
                f"{task}/{i}", row["question"], lettered(row["candidates"]),
                dict(zip(row["candidates"], LETTERS))[row["answer"]], "multiple choice", (task,),
                videos.at(*(f"{folder}/{file}" for file in (name, f"{Path(name).stem}.mp4")
                            for folder in folders)),
                span=(row["start"], row["end"]) if bounded else None))
    return questions


def tempcompass(config: Flags, videos: Videos) -> list[Question]:
    """Return TempCompass: four formats of questions, five aspects of time.

    Yes or no and caption matching are asked with lettered options, so that one rule reads all.
    """
    found = []
    for path in pick(config.data, "questions/*.json", "*/test*.parquet", "*.json"):
        form = next((name for name in (path.stem, path.parent.name) if name in FORMATS), None)
        found += [(form, row) for row in _tempcompass_rows(read(path))] if form else []
    mc = {(row["video_id"], row["dim"]): row for form, row in reversed(found)
          if form == "multi-choice"}  # the first one of each
    questions, seen = [], Counter()
    for form, row in found:
        place = form, row["video_id"], row["dim"]
        first = mc.get(place[1:], {})  # the hub's captioning rows carry it along
        q = _tempcompass_question(form, row, row.get("mc_question") or first.get("question"),
                                  row.get("mc_answer") or first.get("answer"))
        questions.append(replace(
            q, id=f"{'/'.join(place)}/{seen[place]}", groups=(form, row["dim"],
                                                              f"{form}, {row['dim']}"),
            media=videos.at(f"{row['video_id']}.mp4")))
        seen[place] += 1
    return questions


def _tempcompass_rows(found):
    """Return the hub's rows as they are, the repository's {video: {aspect: [...]}} as such rows."""
    if isinstance(found, list):
        return found
    return [{**row, "video_id": video, "dim": aspect} for video, aspects in found.items()
            for aspect, listed in aspects.items() for row in listed]


def _tempcompass_question(form, row, mc_question, mc_answer):
    text, answer = row["question"], row["answer"].strip()
    if form == "captioning":
        if not mc_question:
            raise ValueError("--data: TempCompass' captioning is scored by its multi-choice "
                             "questions, which are not there")
        return Question("", text, (), mc_answer[0], "free-form", accepted=(mc_question,),
                        judged=True)
    if form == "yes_no":
        return Question("", text, ("A. yes", "B. no"), {"yes": "A", "no": "B"}[answer.lower()],
                        "multiple choice")
    if form == "multi-choice":
        return Question("", *split_options(text), answer[0], "multiple choice")
    lines = re.findall(r"(?m)^[ \t]*([A-Z]\w+ (?:\d|[A-Z])): *(.*\S)", text)  # Option 1, Caption A
    gold = next(i for i, (label, _) in enumerate(lines) if answer.startswith(label))
    return Question("", text[:text.index(lines[0][0])].strip(), lettered(t for _, t in lines),
                    LETTERS[gold], "multiple choice",
                    accepted=tuple(f"{label}: {t}" for label, t in lines))


def family_json(config: Flags, videos: Videos) -> list[Question]:
    """Return the Video-R1 family's evaluation JSON, one file a benchmark, uniform rows."""
    questions, path = [], pick(config.data, "eval_*.json")[0]
    found = read(path)
    tasks = sorted(MVBENCH) if "mvbench" in path.stem and len(found) == 200 * len(MVBENCH) else ()
    for i, row in enumerate(found):
        parts = Path(row["path"]).parts  # "./Evaluation/MMVU/videos/..": any tail may be below root
        kind = row["problem_type"]
        group = tasks[i // 200] if tasks else row.get("original_question_type")
        questions.append(Question(
            str(row["problem_id"]), row["problem"],
            tuple(row.get("options") or ()) if kind == "multiple choice" else (),
            parse_answer(row["solution"], fallback=True) or "", kind, (group,) if group else (),
            videos.at(*("/".join(parts[k:]) for k in range(len(parts)))), MEDIA[row["data_type"]],
            evidence=tuple({**e, "start": float(e["start"]), "end": float(e["end"])}
                           for e in row.get("evidence") or ())))
    return questions


# ---------------------------------------------------------------------------------------------
# How right one answer is


def value(benchmark: str, q: Question, text: str, convention: str,
          verdicts: dict[str, int] | None = None) -> float | None:
    """Return how right an answer is, in [0, 1]; None where only a judge could tell and none has.

    verdicts: {question id: 0 or 1}, the judge's; None without a judge. Nothing said is wrong.
    """
    assert convention in CONVENTIONS, convention
    if q.judged:
        if convention == "family" or verdicts is None:
            return None
        return verdicts.get(q.id) if text.strip() else 0.0
    if convention == "family":
        return _family(q, text)
    rules = {"vsibench": _vsibench, "videommmu": _videommmu, "holmes": _holmes, "mvbench": _mvbench,
             "longvideobench": _longvideobench, "lvbench": _lvbench, "tempcompass": _tempcompass,
             "own": _verifier}
    return rules.get(benchmark, _lenient)(q, text)


def _said(text):
    return parse_answer(text, fallback=True) or ""


def _letters(q):
    return LETTERS[:len(q.options)]


def _family(q, text):
    """Score by exact letters, by numbers to two decimals, by MRA with "<"."""
    if q.kind == "regression":
        return mra(number(_said(text)), number(q.answer), "<")
    return accuracy(q.kind, text, q.answer, q.options, "strict", fallback=True)


def _verifier(q, text):
    """Score as training does, but that all of an output without <answer> is read."""
    return accuracy(q.kind, text, q.answer, q.options, "lenient", fallback=True)


def _lenient(q, text):
    """Score what a person takes for the answer: MMVU's and the family JSON's other convention."""
    if q.kind == "multiple choice":
        return float(_letter(q, _said(text)) == q.answer)
    return _vsibench(q, text) if q.kind == "regression" else _verifier(q, text)


def _letter(q, said):
    """Return the option named behind the last "final answer is", as MMVU asks, else in all."""
    asked = re.split("(?i)final answer is", said)[1:]
    behind = asked[-1].strip(" :\n").partition("\n")[0] if asked else ""
    return choice(behind, q.options) or choice(said, q.options)


def _vsibench(q, text):
    """Score the first word, its full stop aside: a letter, or a number for MRA with "<="."""
    word = _said(text).split(" ")[0].rstrip(".").strip()
    if q.kind == "regression":
        return mra(number(word) if "," not in word else None, number(q.answer), "<=")
    return float(word.upper() == q.answer)


# What MMMU's parser takes for the words before an answer, in its order, and for numbers: with
# commas, with an exponent, and plain. (?<!\d) is ours: it changes no match, but the time.
BEFORE = ("could be |so |is |thus |therefore |final |answer |result |are |in total |total "
          "|identify |recognize |calculated as |counted as |measured as |observed as |concluded as "
          "|found to be |equals |determined to be |number of |value is |adds up to |have |has "
          ).split("|")
NUMBERS = [re.compile(pattern) for pattern in (
    r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?(?<!\d)\d+(?:\.\d+)?e[+-]?\d+",
    r"-?(?:((?<!\d)\d+)?\.\d+|(?<!\d)\d+\b)(?!e[+-]?\d)(?![,\d])")]


def _videommmu(q, text):
    """Score as MMMU reads: the last of the letters that are marked; else an option's text."""
    said = _said(text)
    if q.kind != "multiple choice":
        return _videommmu_open(q, said)
    for mark in ",.!?;:'":  # in this order, so that of "B,." the comma stays
        said = said.strip(mark)
    said = f" {said} "
    for mark in ("{}.", "{}:", "({})", "{} "):
        if found := [x for x in _letters(q) if mark.format(x) in said]:
            place = " {} " if mark == "{} " else mark  # of several, not the end of "DNA "
            return float(max(found, key=lambda x: said.rfind(place.format(x))) == q.answer)
    texts = {x: option[3:].lower() for x, option in zip(_letters(q), q.options)}
    found = [x for x, t in texts.items() if t and t in said.lower() and len(said.split()) > 5]
    return float(max(found, key=lambda x: said.lower().rfind(texts[x]), default="") == q.answer)


def _videommmu_open(q, said):
    """Score a gold number, to two decimals, or text behind the last word like "is" of any line."""
    tails = _tails(said)
    found = {round(n, 2) for n in _numbers(tails)}
    return float(any(any(gold.lower() in tail for tail in tails) if number(gold) is None
                     else round(number(gold), 2) in found for gold in q.accepted or (q.answer,)))


def _tails(said):
    """Return what stands behind the words of each line; all of it where that is nothing."""
    lines, found = said.strip(".").lower().split("\n"), []
    for i, line in enumerate(lines, start=1):
        tail, last = "", ["="] * (i == len(lines))
        for behind in (line.split(word)[-1].strip() for word in BEFORE + last if word in line):
            tail = behind if not tail or len(behind) < len(tail) else tail
        found += [tail] * (tail not in ("", *":,.!?;'"))
    return found or ["\n".join(lines)]


def _numbers(tails):
    """Return the numbers that texts are or hold."""
    inside = [found[0] for text in tails for form in NUMBERS for found in form.finditer(text)]
    return [n for n in map(number, [*tails, *inside]) if n is not None]


def _holmes(q, text):
    """Score the last <answer>: the first letter of A, B, … marked there, else the first in it.

    The rule prefers early letters: "Answer: C" is an A. Letters alone are read as they should be.
    A blank at the end of an output without tags is a mark.
    """
    closed = text.split("</answer>")[:-1]
    inside = [part.partition("<answer>")[2].strip() for part in closed if "<answer>" in part]
    said = inside[-1] if inside else text
    marked = [x for x in _letters(q) if f"{x} " in said or f"{x}:" in said or f"[{x}" in said]
    bare = [x for x in _letters(q) if x in said]
    return float((marked or bare or [""])[0] == q.answer)


def _longvideobench(q, text):
    """Score the first capital that is a letter, the phrases aside that the authors drop."""
    said = _said(text)
    for phrase in ("The best answer is", "The correct answer is", "The answer is", "The answer",
                   "The best option is", "The correct option is", "Best answer:", "Best option:"):
        said = said.replace(phrase, "")
    return float(next((c for c in said if c in _letters(q)), "") == q.answer)


def _lvbench(q, text):
    """Score the first character of what stands before the first ")" and behind the first "("."""
    said = _said(text).partition(")")[0]
    said = said.split("(")[1] if "(" in said else said
    return float(said.strip()[:1] == q.answer)


def _mvbench(q, text):
    """Score the first line's first word, inside "(b)", full stops aside, or around it."""
    line, gold = _said(text).lower().partition("\n")[0], q.answer.lower()
    word = re.sub(r"^\( +", "(", line).split(" ")[0]  # "( b )" as "(b"
    bare = word.replace(".", "")
    return float(f"({gold})" in word or gold in bare and bare in f"({gold})")


def _tempcompass(q, text):
    return float(q.answer in _tempcompass_letters(q, _said(text)))


def _tempcompass_letters(q, said):
    """Return the options that an answer is in its format's own words, else by its letter.

    Caption matching reads an option, its label or the label's number, or its sentence, which may
    stand behind ") ": "B) It opens." is the option of this sentence, whatever B is.
    """
    said = said.replace("</s>", "").strip()
    if q.options == ("A. yes", "B. no") and (word := re.match("(?i)yes|no", said)):
        return ["AB"[word[0].lower() == "no"]]
    found = []
    for letter, option in zip(LETTERS, q.accepted):
        label, sentence = option.split(": ")[:2]
        if said in (option, sentence) or said.split(") ")[1:2] == [sentence] \
                or {said, said.replace(".", "")} & {label, label.split()[-1]}:
            found.append(letter)
    return found or re.findall(rf"\A([{_letters(q)}])(?:[.)]|\Z)", said)


def readable(q: Question, text: str) -> bool:
    """Return whether an answer can be told from the text at all, right or wrong."""
    said = _said(text)
    if not said or q.kind not in ("multiple choice", "numerical", "regression"):
        return bool(said)
    if q.kind == "multiple choice":
        return bool(_letter(q, said) or _tempcompass_letters(q, said))
    if q.kind == "numerical":
        return bool(_numbers(_tails(said)))
    return number(said.split()[0].rstrip(".")) is not None


# ---------------------------------------------------------------------------------------------
# Scores of a benchmark


def cell(benchmark: str, q: Question, convention: str) -> tuple:
    """Return where a question counts.

    The headline is the mean over the first entries' means, and so on down to the questions.

    VSI-Bench: official over eight tasks, one of them over three types; family over two metrics.
    TempCompass: official over formats. All others: over all questions.
    """
    if convention == "family":
        return (q.kind == "regression",) if benchmark in ("vsibench", "family") else ()
    return {"vsibench": q.groups[1:2] + q.groups[-1:], "tempcompass": q.groups[:1],
            "videommmu": q.groups[:1]}.get(benchmark, ())


def weights(cells: Sequence[tuple]) -> np.ndarray:
    """Return what each question counts for in the mean of means; they add up to 1."""
    children = Counter(prefix[:-1] for prefix in
                       {c[:depth] for c in cells for depth in range(1, len(c) + 1)})
    counts = Counter(cells)
    return np.array([1 / counts[c] / np.prod([children[c[:depth]] for depth in range(len(c))])
                     for c in cells])


def values(benchmark: str, questions: Sequence[Question], texts: dict[str, str], convention: str,
           verdicts: dict[str, int] | None = None) -> list[tuple[Question, float]]:
    """Return the questions that the convention scores, each with its value.

    A question without a text has been answered wrongly.
    """
    scored = ((q, value(benchmark, q, texts.get(q.id, ""), convention, verdicts))
              for q in questions)
    return [(q, v) for q, v in scored if v is not None]


def headline(benchmark: str, scored: Sequence[tuple[Question, float]],
             convention: str) -> tuple[float, int] | None:
    """Return (share right, questions) of questions with their values; None of no questions."""
    cells = [cell(benchmark, q, convention) for q, _ in scored]
    return (float(weights(cells) @ [v for _, v in scored]), len(scored)) if scored else None


def score(benchmark: str, questions: Sequence[Question], texts: dict[str, str], convention: str,
          verdicts: dict[str, int] | None = None) -> dict[str, tuple[float, int]]:
    """Return {name: (share right, questions)}.

    The names are "overall", "over questions" (all count alike), and every group's.
    """
    scored = values(benchmark, questions, texts, convention, verdicts)
    figures = {"overall": headline(benchmark, scored, convention)} if scored else {}
    if len({cell(benchmark, q, convention) for q, _ in scored}) > 1:
        figures["over questions"] = float(np.mean([v for _, v in scored])), len(scored)
    for group in dict.fromkeys(group for q, _ in scored for group in q.groups):
        part = [(q, v) for q, v in scored if group in q.groups]
        figures[group] = headline(benchmark, part, convention)
    return figures


def tally(questions: Sequence[Question], answers: dict[str, dict]) -> dict[str, int]:
    """Count the questions that got no answer, by reason; answers: {id: {"text", "error"}}."""
    counts = dict.fromkeys(("questions", "missing", "undecodable", "unanswered", "unreadable",
                            "without <answer>"), 0)
    for q in questions:
        row = answers.get(q.id)
        counts["questions"] += 1
        if row is None:
            counts["unanswered"] += 1
        elif row.get("error"):
            counts[row["error"].partition(":")[0]] += 1
        else:
            counts["unreadable"] += not readable(q, row["text"])
            counts["without <answer>"] += parse_answer(row["text"]) is None
    return counts


def knowledge(before: float, after: float) -> float:
    """Return Δknowledge = (after − before) / (100 − before) · 100 of Video-MMMU, in percent.

    Accuracies on Adaptation: `before` without the lecture (--question_only), `after` with it.
    """
    return 100.0 * (after - before) / (100.0 - before) if before < 100 else 0.0
