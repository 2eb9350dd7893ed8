"""Evaluate a student, an API model or ready answers on the paper's eight benchmarks; print tables.

    python evaluate.py --benchmark vsibench --data test.jsonl --video_root V --model M
    torchrun --nproc_per_node 8 evaluate.py ... --output R --resume    goes on where it was killed
    python evaluate.py ... --blind                       the questions without their videos
    python evaluate.py --benchmark vsibench --data test.jsonl --predictions P   loads no model
    python evaluate.py table RUN... --paper              Markdown over runs, the paper's rows beside

benchmarks/questions.py has the questions and the two conventions by which they are scored,
`official` and `family`; benchmarks/results.py computes and prints. A run leaves config.json,
questions.jsonl, answers.jsonl (answers-0.jsonl, ... of several processes), a line a question, and
patched.jsonl and verdicts.jsonl where asked for; every figure is computed from these alone.
frames.jsonl and thumbnails/ have what was shown, for lab/report.py. A question whose file is
missing or cannot be decoded is wrong, and is counted. Sampling depends on seed and question id.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.questions import TITLES, Question, load, read, split_options, value
from benchmarks.results import Run, merged, overlap, passes, read_run, report, table
from guard import check_money
from patch import EVIDENCE_LEVELS, alignment, patch_images, render
from reward import choice, parse_answer
from runs import (BROKEN, Folder, append, asked_with, check_model, digest, everyone, flag,
                  one_sentence, parse, rank, read_folders, read_json, read_rows, require,
                  require_files, require_positive, start_processes, typed, wording, world_size,
                  write_whole)


@dataclass(frozen=True)
class Config:
    """Every flag of the command line; the defaults are the paper's evaluation (appendix C.3)."""
    benchmark: str = flag("", "which benchmark; family: the Video-R1 family's evaluation JSON; "
                          "own: any file in the training format", (*TITLES, "family", "own"))
    data: str = flag("", "the question file, or the folder the benchmark was downloaded to")
    video_root: str = flag("", "folder of the videos")
    model: str = flag("", "checkpoint folder or hub name, or anthropic:NAME")
    predictions: str = flag("", "JSONL of id and text to score instead of asking a model")
    output: str = flag("", "folder of the run; empty: runs/, named by benchmark, row and seed")
    resume: bool = flag(False, "go on with the run in --output")
    frames: int = flag(16, "frames shown of a video")
    max_pixels: int = flag(128 * 28 * 28, "most pixels of a frame; Video-R1's own numbers: 200704")
    temperature: float = flag(0.1, "sampling temperature; 0 is greedy")
    top_p: float = flag(0.001, "share of the probability that sampling draws from")
    max_completion: int = flag(1024, "most tokens of one answer")
    max_prompt: int = flag(32768, "most tokens of a prompt; a longer question is refused")
    seed: int = flag(0, "seed of the sampling")
    template: str = flag("", "file with the question's wording: {question} and {answer_format}")
    subtitles: bool = flag(False, "LongVideoBench: show the lines spoken at the frames shown")
    uncut: bool = flag(False, "MVBench: show whole videos, as the family, not the seconds asked")
    question_only: bool = flag(False, "Video-MMMU: Adaptation without the lecture, for Δknowledge")
    blind: bool = flag(False, "ask without the video; table says what that already answers")
    direct: bool = flag(False, "ask for the answer alone, without reasoning")
    frames_order: str = flag("time", "shuffled: the frames in another order, at the same times",
                             ("time", "shuffled"))
    frames_shown: str = flag("all", "one: the middle one of the frames alone", ("all", "one"))
    tries: int = flag(1, "answers to each question that --keep_failed looks at")
    keep_failed: str = flag("", "own, --blind: file for the rows of --data that no try answers")
    trained_on: str = flag("", "training file: say how much of the benchmark occurs in it")
    batch: int = flag(8, "questions that one process answers together")
    with_patches: str = flag("", "answer failed questions again, with this teacher's patch",
                             ("annotated", "anthropic"))
    evidence: str = flag("text", "how much of a patch the student sees", EVIDENCE_LEVELS)
    teacher_model: str = flag("claude-sonnet-5", "model asked by --with_patches anthropic")
    judge: str = flag("", "model that judges open MMVU answers and TempCompass' captions")
    api_url: str = flag("", "server that speaks the Messages API; empty: Anthropic's")
    api_price: str = flag("", "dollars for a million tokens in and out, as in 3/15")
    api_budget: float = flag(0.0, "dollars after which nothing more is asked; 0: no limit")
    attention: str = flag("auto", "kernel of scoring on CUDA; auto: flash-attn's if installed",
                          ("auto", "torch", "flash", "sdpa"))
    dtype: str = flag("auto", "compute type; auto: bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "bfloat16", "float32"))
    cuda_graphs: bool = flag(False, "answer with CUDA graphs (not yet tried on a GPU)")
    decoder: str = flag("pyav", "what reads videos; decord: refuses those it shows wrongly",
                        ("pyav", "decord"))
    decode_workers: int = flag(2, "processes of each rank that decode videos")
    decode_seconds: float = flag(60.0, "time limit for decoding one file, in seconds")
    frame_cache: str = flag("", "folder of decoded frames; empty: none are kept")


# Flags that do not change a plain answer, so that a run may go on with others; and a patched one.
FREE = {"data", "video_root", "output", "resume", "batch", "with_patches", "evidence", "judge",
        "teacher_model", "api_url", "api_price", "api_budget", "cuda_graphs", "decode_workers",
        "decode_seconds", "frame_cache", "keep_failed", "trained_on"}
PATCHING = {"with_patches", "evidence", "teacher_model"}
# Flags that name a row of the table; further ones are named where they are not the default.
NAMING = ("max_pixels", "temperature", "top_p", "max_completion", "template", "subtitles", "uncut",
          "blind", "direct", "frames_order", "frames_shown")
LOOKING = ("max_pixels", "uncut", "frames_order", "frames_shown")  # no matter to a blind run
STRIPS_MB = 50  # at most about so many of thumbnails a run
DIRECT = ("{question}\n\nGive the answer alone, without reasoning, between <answer> and </answer>. "
          "{answer_format}")


def check(config: Config) -> None:
    """Refuse settings that cannot work, each in one sentence naming the flag."""
    for name in ("benchmark", "data"):
        require(getattr(config, name), f"--{name} is missing")
    require(bool(config.model) != bool(config.predictions),
            "one of --model and --predictions is needed, and not both")
    require(config.predictions or config.video_root or config.blind,
            "--video_root is missing: the videos' folder")
    require_positive(config, "frames", "max_pixels", "max_completion", "max_prompt", "batch",
                     "decode_seconds", "tries")
    require(config.frames % 2 == 0, f"--frames must be even, got {config.frames}")
    require(config.temperature >= 0 and 0 < config.top_p <= 1,
            "--temperature must be 0 or more and --top_p in (0, 1]")
    require(config.output or not (config.judge and config.predictions),
            "--judge with --predictions needs --output: verdicts that were paid for are kept there")
    kept = Path(config.keep_failed)
    require(not config.keep_failed or kept.absolute().parent.is_dir() and not kept.exists(),
            f"--keep_failed {kept} is there already, or its folder is not")
    check_money(config.api_price, config.api_budget, "--api")
    api = config.model.startswith("anthropic:")
    if config.model and not api:
        check_model(config.model)
    require(not (config.with_patches and (api or config.predictions)),
            "--with_patches needs a student, --model with a checkpoint")
    require(not (api and "RANK" in os.environ), "--model anthropic: runs without torchrun")
    asking = [flag_ for flag_, on in (("--model anthropic:", api), ("--judge", config.judge), (
        "--with_patches anthropic", config.with_patches == "anthropic")) if on]
    if asking:
        from teacher import api_key
        api_key(" and ".join(asking))


def refuse_useless(config: Config, given: set[str]) -> None:
    """Refuse a flag that was given and changes nothing in this run, in one sentence."""
    asks = is_api(config) or config.judge or config.with_patches == "anthropic"
    student, looks = config.model and not is_api(config), config.model and not config.blind
    whole = looks and config.frames_shown == "all"
    for names, heeded, where in (
            ("max_completion blind direct", config.model, "--model"),
            ("template", config.model and not config.direct, "--model without --direct"),
            ("temperature top_p", student or config.api_url, "students and --api_url"),
            ("max_prompt batch attention dtype cuda_graphs", student, "students"),
            ("subtitles", config.model and config.benchmark == "longvideobench",
             "--benchmark longvideobench"),
            ("uncut", looks and config.benchmark == "mvbench", "--benchmark mvbench"),
            ("question_only", config.benchmark == "videommmu", "--benchmark videommmu"),
            ("frames", looks or config.subtitles, "--model without --blind"),
            ("max_pixels frames_shown decoder decode_workers frame_cache", looks,
             "--model without --blind"),
            ("frames_order", whole, "all frames of videos"),
            ("with_patches", whole and config.frames_order == "time", "videos as they are"),
            ("decode_seconds", looks and config.decode_workers, "--decode_workers above 0"),
            ("keep_failed", config.benchmark == "own" and config.blind,
             "--benchmark own with --blind"),
            ("tries", student and config.keep_failed and config.temperature and config.top_p >= 0.5,
             "--keep_failed with a student at --temperature 1 --top_p 0.95, as in training"),
            ("api_url api_price api_budget", asks, "--model anthropic:NAME, --judge and "
             "--with_patches anthropic"),
            ("teacher_model", config.with_patches == "anthropic", "--with_patches anthropic"),
            ("evidence", config.with_patches, "--with_patches")):
        for name in names.split():
            require(heeded or name not in given,
                    f"--{name} changes nothing in this run: it is for {where}")


def questions_of(config: Config) -> list[Question]:
    """Return the questions of a benchmark, or of a file in the training format (own)."""
    if config.benchmark != "own":
        return load(config)
    import data
    require_files(config, "data")
    folders, questions = read_folders(config.video_root) if config.video_root else {"": Path()}, []
    for s in data.load_samples(read_rows(config.data), folders):
        gold = s.options and choice(s.answer, s.options) or s.answer  # "B" of "B. blue"
        questions.append(Question(
            s.id, s.question, s.options, gold, s.kind, (s.kind, *[s.source] * bool(s.source)),
            s.media, s.media_type, evidence=tuple(map(asdict, s.evidence))))
    require(questions, f"--data {config.data} holds no questions")
    return questions


# ---------------------------------------------------------------------------------------------
# The folder of a run


def settings(config: Config) -> dict:
    """Return the flags as config.json keeps them, with the label of the run's row in a table.

    label_blind: the same student's without videos.
    """
    return {**asdict(config), "label": label(config),
            "label_blind": label(replace(config, blind=True))}


def label(config: Config) -> str:
    """Return model, frames, and the naming flags that are not at their defaults."""
    if config.predictions:
        return f"{Path(config.predictions).stem} (predictions)"
    frames = [f"{config.frames} frames"] * (config.subtitles or not config.blind)
    other = [name if value is True else f"{name} {value}" for name in NAMING
             if (value := getattr(config, name)) != getattr(Config, name)
             and not (config.blind and name in LOOKING)]
    return ", ".join([config.model.rstrip("/"), *frames, *other])


def open_run(config: Config, questions: list[Question]) -> Folder:
    """Start the folder of a run or, with --resume, see that it holds the same questions.

    The folder is held until it is closed, so that no other command writes to it.
    """
    held = Folder(Path(config.output), "questions.jsonl", config.resume)
    try:
        _start_run(config, questions)
    except ValueError:
        held.close()
        raise
    held.keep()
    return held


def _start_run(config, questions):
    folder, written = Path(config.output), []
    for q in questions:
        row = {name: v for name, v in asdict(q).items() if name not in ("media", "evidence")}
        written.append(json.dumps(row) + "\n")
    if (folder / "questions.jsonl").exists():
        before = read_json(folder / "config.json")
        fixed = PATCHING if any(folder.glob("patched*.jsonl")) else set()
        for name, now in asdict(config).items():
            require(before.get(name) == now or name in FREE and name not in fixed,
                    f"--{name} {now}: the run in {folder} has {before.get(name)}")
        require((folder / "questions.jsonl").read_text(encoding="utf-8") == "".join(written),
                f"--data: the run in {folder} was about other questions")
    write_whole(folder / "config.json", json.dumps(settings(config), indent=1))
    write_whole(folder / "questions.jsonl", "".join(written))


def own_file(config: Config, name: str) -> Path:
    """Return the file that this process appends its rows to, less a line that a kill has torn."""
    part = f"-{os.environ['RANK']}" if "RANK" in os.environ else ""
    path = Path(config.output) / f"{name}{part}.jsonl"
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path


class Frames:
    """What questions are shown with: a line each in frames.jsonl, each strip once in thumbnails/.

    Processes that meet write equal bytes. The room is shared out over this process's n questions.
    """

    def __init__(self, config, n):
        self.path, self.n, self.met, self.kept = own_file(config, "frames"), n, 0, 0
        there = sum(path.stat().st_size for path in self.path.parent.glob("thumbnails/*.jpg"))
        self.room, self.said = (1e6 * STRIPS_MB - there) / world_size(), rank() > 0

    def keep(self, q: Question, clip: Any) -> None:
        """Write down what a question is shown with, if there is room for its strip."""
        from video import strip, strip_size
        name = digest(clip.frames.numpy().tobytes(), clip.frames.shape, clip.times)
        path, self.met = self.path.parent / f"thumbnails/{name}.jpg", self.met + 1
        if not path.exists():
            if self.kept > self.room * self.met / self.n:
                if not self.said:
                    print(f"\n{STRIPS_MB} MB are too few for all thumbnails", file=sys.stderr)
                self.said = True
                return
            path.parent.mkdir(exist_ok=True)
            write_whole(own := path.with_suffix(f".{rank()}"), data := strip(clip.frames))
            own.replace(path)
            self.kept += len(data)
        append(self.path, {"id": q.id, "times": clip.times, "thumbnails": f"thumbnails/{name}.jpg",
                           "thumbnail_size": strip_size(clip.frames)})


class Lines:
    """The file that a process appends its rows to, and the bar with the accuracy of its answers."""

    def __init__(self, config, name, mine, known, frames=None):
        self.path, self.frames = own_file(config, name), frames
        self.benchmark, self.known, self.values = config.benchmark, known, []
        self.bar = tqdm(total=len(mine), desc=f"{config.benchmark} {name}", disable=rank() != 0)
        for q in mine:
            if q.id in known and not known[q.id].get("error"):
                self._show(q, known[q.id]["text"])

    def __call__(self, q: Question, text: str = "", sample: Any = None, **facts: Any) -> None:
        """Write a question's row, unless it stands there, and what it was shown with (sample)."""
        if sample and sample.clip:
            self.frames.keep(q, sample.clip)
        if sample:
            facts["reader"] = sample.clip.reader if sample.clip else ""
        row = {"id": q.id, "text": text, **facts}
        if self.known.get(q.id) != row:
            append(self.path, row)
        self._show(q, text)

    def _show(self, q, text):
        right = value(self.benchmark, q, text, "official")
        self.values += [] if right is None else [right]
        if self.values:
            self.bar.set_postfix_str(f"acc {np.mean(self.values):.3f}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


# ---------------------------------------------------------------------------------------------
# Answers of a student


def make_loader(config: Config, factor: int) -> Any:
    """Return the decoder of the videos, for sides that are multiples of `factor`."""
    from video import ClipLoader, FrameCache
    cache = FrameCache(config.frame_cache) if config.frame_cache else None
    return ClipLoader(config.frames, config.max_pixels, factor, cache=cache,
                      workers=config.decode_workers, time_limit=config.decode_seconds,
                      decoder=config.decoder)


def sample_of(q: Question) -> Any:
    """Return a question as the sample that loader, prompts and teacher read."""
    import data
    evidence = tuple(data.Evidence(e["start"], e["end"], tuple(e["box"]) if e.get("box") else None,
                                   e.get("note") or "") for e in q.evidence)
    return data.Sample(q.id, q.text, q.options, q.answer, q.kind, q.media, q.media_type,
                       evidence=evidence, span=q.span)


def decoded(config: Config, loader: Any, questions: list[Question], batch: int,
            failed: Callable) -> Iterator[list[tuple]]:
    """Yield batches of (question, sample as it is shown); failed(question, error=...) for the rest.

    The next batch is decoded while this one is answered; blind questions have no clip.
    """
    pairs = [(q, sample_of(q)) for q in questions]
    parts = [pairs[i:i + batch] for i in range(0, len(pairs), batch)]
    for part, following in zip(parts, parts[1:] + [[]]):
        loader.submit([sample for _, sample in part + following if sample.media_type])
        ready = []
        for q, sample in part:
            sample, reason = loader.get(sample) if sample.media_type else (sample, None)
            if sample is None:
                failed(q, error=f"undecodable: {reason}")
            else:
                if sample.clip and sample.clip.damage:
                    print(f"\n{q.media}: {sample.clip.damage}", flush=True)
                ready.append((q, controlled(config, sample)))
        if ready:
            yield ready


def controlled(config: Config, sample: Any) -> Any:
    """Return a sample with its frames as --frames_order and --frames_shown want them."""
    if config.frames_order == "shuffled":
        from methods import shuffled
        return shuffled(sample, f"{config.seed}/evaluate")
    if config.frames_shown == "one":
        clip, i = sample.clip, len(sample.clip.times) // 2
        return replace(sample, clip=replace(clip, frames=clip.frames[i:i + 1],
                                            times=clip.times[i:i + 1], indices=(clip.indices[i],)))
    return sample


class Asked:
    """A student with all it needs to answer questions."""

    def __init__(self, config, device, dtype, questions):
        import data
        import ffr
        from model import Student
        self.config = config
        self.student = Student.load(config.model, device, dtype, config.attention, trainable=False,
                                    cuda_graphs=config.cuda_graphs)
        words = DIRECT if config.direct else wording(config)
        self.prompts = data.Prompts(self.student.processor, words, not config.direct)
        require(not (config.direct and self.prompts.opened), f"--direct: the chat template of "
                f"{config.model} begins every response with {self.prompts.opened.strip()}: it "
                "always reasons")
        self.student.text = self.prompts.text
        self.sampling = ffr.Sampling(config.max_completion, config.temperature, config.top_p, 0.5)
        self.prompts.refuse_long([sample_of(q) for q in questions], config.max_prompt,
                                 config.frames, config.max_pixels)
        self.loader = make_loader(config, self.prompts.factor)

    def answer(self, questions: list[Question], write: Callable) -> None:
        """Answer each question once, a batch at a time, and write it down."""
        import ffr
        key = f"{self.config.seed}/evaluate"
        config = self.config
        for part in decoded(config, self.loader, questions, config.batch, write):
            groups = [ffr.Group(sample, self.prompts.prefix(sample)) for _, sample in part]
            cache = self.student.prefill([group.prefix for group in groups])
            ffr.find(self.student, cache, groups, self.prompts.header, unscored, None, key,
                     config.tries, self.sampling)
            for (q, sample), group in zip(part, groups):
                first, *others = (slot.first for slot in group.slots)
                right = [passed("own", q, one.text) for one in (first, *others) if others]
                write(q, first.text, sample, tokens=len(first.ids_C), finished=first.finished,
                      **{"right": sum(right)} if others else {})

    def repair(self, guide: Any, questions: list[Question], answers: dict, write: Callable) -> None:
        """Answer each again with the teacher's (guide's) patch to its answer; an upper bound."""
        import ffr
        config, key = self.config, f"{self.config.seed}/evaluate"
        for part in decoded(config, self.loader, questions, config.batch, lambda q, error: None):
            asked = [guide.submit(sample, answers[q.id]["text"]) for q, sample in part]
            groups = [ffr.Group(sample, self.prompts.prefix(sample),
                                [ffr.Slot(None, diagnosis)])
                      for (_, sample), diagnosis in zip(part, asked)]
            ffr.fix(groups, None)
            cache = self.student.prefill([group.prefix for group in groups])
            ffr.reason(self.student, cache, groups, self.write_patch, unscored, alignment, key,
                       self.sampling)
            for (q, _), group in zip(part, groups):
                slot = group.slots[0]
                text = slot.repair.text if slot.repair else answers[q.id]["text"]
                write(q, text, status=slot.diagnosis.result().status)

    def write_patch(self, sample: Any, patch: Any) -> Any:
        """Return a patch as the segment between question and completion."""
        images = patch_images(patch, sample.clip.frames, self.config.evidence)
        return self.prompts.suffix(render(patch, self.config.evidence), images)


def unscored(sample: Any, text: str) -> tuple[float, float, bool]:
    """Verify nothing while sampling: scores are computed from the files."""
    return 0.0, 0.0, True


def teacher_of(config: Config) -> Any:
    """Return the teacher of --with_patches."""
    from teacher import TeacherConfig, make_teacher
    return make_teacher(config.with_patches, TeacherConfig(
        who="--with_patches anthropic", url_flag="--api_url", url=config.api_url,
        model=config.teacher_model,
        cache=api_cache(config), price=config.api_price, budget=config.api_budget), ping=False)


def api_cache(config: Config) -> str:
    """Return the folder of answers paid for, "" where the run has no folder."""
    return config.output and f"{config.output}/teacher"


# ---------------------------------------------------------------------------------------------
# Answers and verdicts of a model behind the Messages API

REQUESTS = 16  # under way at once

JUDGE_OPEN = """\
A question about a video has been answered. Does the answer say the same as the reference, other
words, units or roundings of the same thing included?

Question: {question}
Reference: {answer}
Answer: {said}

Reply with one word, yes or no."""

JUDGE_CAPTION = """\
Somebody has watched a video and described it. You have only the description. Reply with the letter
of the option that it supports, and with nothing else; with "none" where it supports none.

Description: {said}

{question}"""


class Asker:
    """One model asked through the project's client of the Messages API.

    The API takes no sampling parameters, servers of one's own do.
    """

    def __init__(self, config: Config, name: str, who: str):
        from teacher import Messages
        self.name, self.settings = name, {"thinking": {"type": "disabled"}}
        if config.api_url:
            self.settings["extra_body"] = {"temperature": config.temperature, "top_p": config.top_p}
        self.api = Messages(who, config.api_url, timeout=180.0, cache=api_cache(config),
                            price=config.api_price, budget=config.api_budget, url_flag="--api_url")

    def ask(self, content: list[dict], max_tokens: int, read: Callable = str) -> tuple:
        """Return (what `read` finds in the answer, output tokens), or (None, why it has none)."""
        return self.api.ask({"model": self.name, "max_tokens": max_tokens, **self.settings,
                             "messages": [{"role": "user", "content": content}]}, read)

    def close(self) -> None:
        """End the client."""
        self.api.close()


def answer_by_api(config: Config, questions: list[Question], write: Callable) -> list[str]:
    """Put the questions to anthropic:NAME, frames as pictures; return why some got no answer.

    These have no line, so that --resume asks them again.
    """
    import data
    from video import jpeg
    client = Asker(config, config.model.partition(":")[2], "--model anthropic:")
    template = DIRECT if config.direct else wording(config) or data.TEMPLATE

    def ask(pair):
        (q, sample), content = pair, []
        shown = zip(sample.clip.times, sample.clip.frames) if sample.clip else ()
        for i, (time, frame) in enumerate(shown):
            source = {"type": "base64", "media_type": "image/jpeg", "data": jpeg(frame)}
            content += [{"type": "text", "text": f"frame {i}, {time:.2f} s"},
                        {"type": "image", "source": source}]
        options = ["Options:", *q.options] if q.options else []
        text = template.replace("{answer_format}", data.ANSWER_FORMATS[q.kind])
        text = text.replace("{question}", "\n".join([q.text, *options]))
        content.append({"type": "text", "text": text})
        return client.ask(content, config.max_completion)

    loader, failures = make_loader(config, 28), []
    with closing(loader), ThreadPoolExecutor(REQUESTS) as pool, closing(client):
        for part in decoded(config, loader, questions, REQUESTS, write):
            for (q, sample), (text, more) in zip(part, pool.map(ask, part)):
                if text is None:
                    failures.append(more)
                else:
                    write(q, text, sample, tokens=more)
    return failures


def judge(config: Config, questions: list[Question], answers: dict, known: dict,
          write: Callable) -> list[str]:
    """Ask for verdicts on the answers that no rule can score; return why some got none."""
    client, failures = Asker(config, config.judge, "--judge"), []
    open_ones = [q for q in questions if q.judged and q.id not in known
                 and answers.get(q.id, {}).get("text", "").strip()]

    def ask(q):
        said = (parse_answer(answers[q.id]["text"], fallback=True) or "")[:20_000]
        form, question = (JUDGE_CAPTION, q.accepted[0]) if q.accepted else (JUDGE_OPEN, q.text)
        text = form.format(question=question, answer=q.answer, said=said)
        return client.ask([{"type": "text", "text": text}], 20, lambda reply: verdict(q, reply))

    with ThreadPoolExecutor(REQUESTS) as pool, closing(client):
        for q, (right, reason) in zip(open_ones, pool.map(ask, open_ones)):
            if right is None:
                failures.append(reason)
                continue
            write({"id": q.id, "verdict": right, "of": digest(answers[q.id]["text"]),
                   "judge": config.judge})
    return failures


LONE = (r"^[^\w\n]*(?:(?:the|my|final|answer|verdict|is|boxed)[^\w\n]+)*(yes|no)"
        r"(?=[^\w\n]*$|[*_]* ?[.,;:!(–—-])")


def verdict(q: Question, reply: str) -> int | None:
    """Return a judge's verdict, 1 or 0; None for a reply without a lone yes or no, or option.

    It may stand in any dress, after a thought: "**Yes**", "Answer: no", {"verdict": "yes"}.
    """
    said = re.sub(r"<[^<>]*>", " ", reply.rpartition("</think>")[2])
    if "<think>" in reply and "</think>" not in reply:
        return None
    if q.accepted:
        letter = choice(said, split_options(q.accepted[0])[1])
        return int(letter == q.answer) if letter or re.search(r"\bnone\b", said, re.I) else None
    found = re.findall(LONE, said.lower(), re.M)
    sides = set(re.findall(r"\b(?:yes|no)\b", said.lower()))
    return int(found[0] == "yes") if found and len(sides) == 1 else None


# ---------------------------------------------------------------------------------------------
# One run


def answer(config: Config, questions: list[Question]) -> None:
    """Ask the model what has no answer yet; every process its share, whatever the others do."""
    missing = [q for q in questions if q.media_type and not os.path.exists(q.media)]
    require(len(missing) < len(questions), "not one video was found, such as "
            f"{questions[0].media}: is --video_root {config.video_root} right?")
    device = dtype = None
    if not is_api(config):  # a process waits at the end for the slowest one, however long
        device, dtype = start_processes(config.dtype, config.cuda_graphs,
                                        patience=timedelta(days=30))
    known = merged(Path(config.output), "answers")  # before anybody writes: all know the same
    with closing(open_run(config, questions)) if rank() == 0 else nullcontext():
        if missing and rank() == 0:
            tasks = Counter((*q.groups, q.kind)[0] for q in missing).items()
            print(f"{len(missing)} of {len(questions)} questions have no video ("
                  + ", ".join(f"{task} {n}" for task, n in tasks) + "): "
                  + ", ".join(f"{q.id} ({q.media})" for q in missing[:30]), file=sys.stderr)
        everyone(None)
        ask_the_rest(config, questions, known, {q.id for q in missing}, device, dtype)
        everyone(None)


def ask_the_rest(config: Config, questions: list[Question], known: dict, absent: set[str],
                 device: Any, dtype: Any) -> None:
    """Ask this process's share of the questions that have no answer; absent: without a video."""
    mine = questions[rank()::world_size()]
    left = {q.id for q in questions if q.id not in absent
            and (q.id not in known or known[q.id].get("error"))}
    todo = [q for q in mine if q.id in left]
    write = Lines(config, "answers", mine, known, Frames(config, len(todo)))
    for q in mine:
        if q.id in absent and q.id not in known:
            write(q, error=f"missing: {q.media}")
    if is_api(config):
        report_failures("answer", answer_by_api(config, todo, write))
    elif left or config.with_patches:  # alike on every process: they share out the weights
        asked = Asked(config, device, dtype, todo)
        with closing(asked.loader), asked.student.gathered():
            asked.answer(todo, write)
            if config.with_patches:
                with closing(teacher_of(config)) as guide:
                    patch(config, asked, guide, mine)
    write.close()


def patch(config: Config, asked: Asked, guide: Any, mine: list[Question]) -> None:
    """Answer this process's failed questions again; its figures never meet the plain ones."""
    folder = Path(config.output)
    answers, known = merged(folder, "answers"), merged(folder, "patched")
    failed = [q for q in mine if q.id not in known and not answers[q.id].get("error")
              and passed(config.benchmark, q, answers[q.id]["text"]) is False]
    write = Lines(config, "patched", failed, {})
    asked.repair(guide, failed, answers, write)
    write.close()


def passed(benchmark: str, q: Question, text: str) -> bool | None:
    """Return z of Eq. 4: right by the official rule, graded from 0.5; None without a judge."""
    right = value(benchmark, q, text, "official")
    return None if right is None else passes(q, right)


def is_api(config: Config) -> bool:
    """Return whether the model is asked through the Messages API."""
    return config.model.startswith("anthropic:")


def report_failures(what: str, failures: list[str]) -> None:
    """Say how many questions of this call still lack an answer or a verdict, and why."""
    if failures:
        print(f"{len(failures)} questions got no {what} ({failures[0]}); --resume asks them again",
              file=sys.stderr)


def predictions(config: Config, questions: list[Question]) -> dict[str, dict]:
    """Return answers made elsewhere as the rows of a run: JSONL of id and text."""
    path, known, found = config.predictions, {q.id for q in questions}, {}
    listed = read(path)
    for i, row in enumerate(listed if isinstance(listed, list) else [listed], start=1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"--predictions {path}, row {i}: not an object with id and text")
        if (id := str(row.get("id"))) not in known:
            raise ValueError(f"--predictions {path}, row {i}: {row.get('id')!r} is no question of "
                             f"{config.benchmark}; ids are like {questions[0].id!r}")
        if id in found:
            raise ValueError(f"--predictions {path}, row {i}: a second answer to question {id!r}")
        found[id] = {"id": id, "text": row["text"]}
    if not found:
        raise ValueError(f"--predictions {path} holds no answers")
    return found


def output_folder(config: Config) -> str:
    """Return the folder given, else one named by benchmark, row of the table and seed."""
    row = label(replace(config, model=Path(config.model).name))
    name = re.sub(r"[^\w.-]+", "-", f"{config.benchmark}-{row}-{config.seed}")
    return config.output or f"runs/{name}"


def evaluate(config: Config) -> str:
    """Answer and judge what is left to do, then return the run's report ("" but on rank 0)."""
    check(config)
    questions = [replace(q, media_type="") if config.blind else q for q in questions_of(config)]
    require(config.with_patches != "annotated" or any(q.evidence for q in questions),
            f"--with_patches annotated: not one question of --data {config.data} says where its "
            "answer is to be seen; --with_patches anthropic asks a teacher")
    if config.predictions:
        run = Run(Path(config.output), SimpleNamespace(**settings(config)), questions,
                  predictions(config, questions), {}, None)
        if config.output:
            with closing(open_run(config, questions)):
                write_whole(run.folder / "answers.jsonl",
                            "".join(json.dumps(row) + "\n" for row in run.answers.values()))
            run = read_run(config.output)
    else:
        config = replace(config, output=output_folder(config))
        answer(config, questions)
        if rank() != 0:
            return ""
        run = read_run(config.output)
    if config.judge:
        def write(row):
            run.verdicts[row["id"]] = row["verdict"]
            append(run.folder / "verdicts.jsonl", row)

        report_failures("verdict", judge(config, run.questions, run.answers, run.verdicts, write))
    more = [overlap(config.trained_on, questions)] if config.trained_on else []
    more += [keep_failed(config, run)] if config.keep_failed else []
    return "\n\n".join([report(run), *more])


def keep_failed(config: Config, run: Run) -> str:
    """Write the rows of --data that no try has answered to --keep_failed, and say how many."""
    rows, answers = read_rows(config.data), [run.answers.get(q.id) for q in run.questions]
    if None in answers:
        return f"{config.keep_failed} is not written: {answers.count(None)} answers are missing"
    kept = [row for row, q, said in zip(rows, run.questions, answers)
            if not said.get("right", passed("own", q, said["text"]))]
    write_whole(Path(config.keep_failed), "".join(json.dumps(row) + "\n" for row in kept))
    return f"{len(kept)} of {len(rows)} questions got no right answer in {config.tries} tries " \
           f"without their video: {config.keep_failed}"


def conclusion(config: Config) -> tuple[int, str]:
    """Return how many questions a run has not done with; where it is and what to type next."""
    if not config.output or not (Path(config.output) / "questions.jsonl").exists():
        return 0, "nothing is kept" + ": that takes --output FOLDER" * (not config.output)
    run = read_run(config.output)
    said = {id for id, row in run.answers.items() if row["text"].strip()}
    left = sum(bool(config.model and q.id not in run.answers or config.judge and q.judged
                    and q.id in said - run.verdicts.keys()) for q in run.questions)
    errors = [row["error"] for row in run.answers.values() if row.get("error")]
    if len(errors) == len(run.questions):
        return len(errors), f"not one question of {config.output} could be answered: {errors[0]}"
    again = typed(*sys.argv[1:], *["--resume"] * (not config.resume))
    table_of = f"beside others: python evaluate.py table {config.output} RUN ..."
    return left, f"{left} of {len(run.questions)} questions in {config.output} lack an answer or " \
        f"a verdict; to go on: {again}" if left else f"finished: {config.output}; {table_of}"


def main(argv: list[str] | None = None) -> None:
    """Evaluate what the command line says, or print a table over runs."""
    argv = sys.argv[1:] if argv is None else argv
    with one_sentence("evaluate.py", "more processes, --batch, --max_completion, --frames"):
        if argv[:1] == ["table"]:
            return print(table(argv[1:]), "each run's own figures: " + typed(*argv, "--details"),
                         sep="\n\n")
        config, given = parse(Config, argv, __doc__.split("\n\n")[0])
        check(config)
        refuse_useless(config, given)
        require_files(config, "template", "predictions", "trained_on")
        if config.model:
            own = {"template"} if config.direct else set()  # not the checkpoint's wording
            config = asked_with(config, given | own)
            config = replace(config, output=output_folder(config))
        try:
            text = evaluate(config)
        except (KeyboardInterrupt, OSError) as error:
            error.add_note(conclusion(config)[1])
            raise
        if text:
            left, last = conclusion(config)
            print(text, last, sep="\n\n", flush=True)
            if left:
                sys.exit(BROKEN)


if __name__ == "__main__":
    main()
