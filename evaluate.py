"""Evaluate a student, an API model or ready answers on the paper's eight benchmarks; print tables.

    python evaluate.py --benchmark vsibench --data test.jsonl --video_root V --model M
    torchrun --nproc_per_node 8 evaluate.py ... --output R --resume    goes on where it was killed
    python evaluate.py --benchmark vsibench --data test.jsonl --predictions P   loads no model
    python evaluate.py table RUN... --paper              Markdown over runs, the paper's rows beside

benchmarks.py has the questions and the two conventions by which they are scored, `official` and
`family`; results.py computes and prints. A run leaves config.json, questions.jsonl, answers.jsonl
(answers-0.jsonl, ... of several processes), a line a question, and patched.jsonl and verdicts.jsonl
where asked for; every figure is computed from these alone. A question whose file is missing or
cannot be decoded is wrong, and is counted. Sampling depends on nothing but seed and question id, so
not on the number of processes.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from benchmarks import TITLES, load, read, split_options, value
from results import Run, digest, merged, read_run, report, table
from reward import choice, parse_answer


def flag(default, text, choices=None):
    """A field of Config with its help."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every flag of the command line; the defaults are the paper's evaluation (appendix C.3)."""
    benchmark: str = flag("", "which benchmark; family: the Video-R1 family's evaluation JSON",
                          (*TITLES, "family"))
    data: str = flag("", "the question file, or the folder the benchmark was downloaded to")
    video_root: str = flag("", "folder of the videos")
    model: str = flag("", "checkpoint folder or hub name, or anthropic:NAME")
    predictions: str = flag("", "JSONL of id and text to score instead of asking a model")
    output: str = flag("", "folder of the run (runs/BENCHMARK-MODEL-FRAMES-SEED)")
    resume: bool = flag(False, "go on with the run in --output")
    frames: int = flag(16, "frames of a video: 16, 32, 64")
    max_pixels: int = flag(128 * 28 * 28, "pixels of a frame; Video-R1's own numbers: 200704")
    temperature: float = flag(0.1, "sampling temperature; 0 is greedy")
    top_p: float = flag(0.001, "nucleus of sampling")
    max_completion: int = flag(1024, "tokens of one answer")
    max_prompt: int = flag(32768, "tokens of one prompt; a question that may exceed it is refused")
    seed: int = flag(0, "of the sampling")
    template: str = flag("", "file with the question's wording: {question} and {answer_format}")
    subtitles: bool = flag(False, "LongVideoBench: with the lines spoken at the frames shown")
    uncut: bool = flag(False, "MVBench: whole videos, as the family shows, not the seconds asked")
    question_only: bool = flag(False, "Video-MMMU: Adaptation without the lecture, for Δknowledge")
    batch: int = flag(8, "questions answered together by one process")
    with_patches: str = flag("", "then answer failed questions again with this teacher's patch",
                             ("annotated", "anthropic"))
    evidence: str = flag("text", "what of a patch the student sees", ("none", "text", "frames"))
    teacher_model: str = flag("claude-sonnet-5", "model asked by --with_patches anthropic")
    judge: str = flag("", "model that judges open MMVU answers and TempCompass' captions")
    api_url: str = flag("", "server that speaks the Messages API; empty: Anthropic's")
    attention: str = flag("auto", "flash: the flash-attn package; sdpa: torch's own",
                          ("auto", "flash", "sdpa"))
    dtype: str = flag("auto", "compute type; auto: bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "bfloat16", "float32"))
    cuda_graphs: bool = flag(False, "answer with CUDA graphs (not yet tried on a GPU)")
    decode_workers: int = flag(2, "video decoding processes per rank")
    decode_seconds: float = flag(60.0, "time limit for decoding one file")
    frame_cache: str = flag("", "folder of decoded frames; empty: none are kept")


# Flags that do not change a plain answer, so that a run may go on with others; and a patched one.
FREE = {"data", "video_root", "output", "resume", "batch", "with_patches", "evidence", "judge",
        "teacher_model", "api_url", "cuda_graphs", "decode_workers", "decode_seconds",
        "frame_cache"}
PATCHING = {"with_patches", "evidence", "teacher_model"}
# Flags that name a row of the table; further ones are named where they are not the default.
NAMING = ("max_pixels", "temperature", "top_p", "max_completion", "template", "subtitles", "uncut")


def parse(argv):
    """Command line to Config; an unknown flag is an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in fields(Config):
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=f.default, help=text,
                            **({"action": "store_true"} if f.type is bool else kind))
    return Config(**vars(parser.parse_args(argv)))


def check(config):
    """Refuse settings that cannot work, each in one sentence naming the flag."""
    def require(condition, sentence):
        if not condition:
            raise ValueError(sentence)

    for name in ("benchmark", "data"):
        require(getattr(config, name), f"--{name} is missing")
    require(bool(config.model) != bool(config.predictions),
            "one of --model and --predictions is needed, and not both")
    require(config.predictions or config.video_root, "--video_root is missing: the videos' folder")
    for name in ("frames", "max_pixels", "max_completion", "max_prompt", "batch", "decode_seconds"):
        given = getattr(config, name)
        require(given > 0, f"--{name} must be positive, got {given}")
    require(config.frames % 2 == 0, f"--frames must be even, got {config.frames}")
    require(config.temperature >= 0 and 0 < config.top_p <= 1,
            "--temperature must be 0 or more and --top_p in (0, 1]")
    for name, benchmark in (("subtitles", "longvideobench"), ("uncut", "mvbench"),
                            ("question_only", "videommmu")):
        require(not getattr(config, name) or config.benchmark == benchmark,
                f"--{name} is for --benchmark {benchmark}")
    api = config.model.startswith("anthropic:")
    require(not (config.with_patches and (api or config.predictions)),
            "--with_patches needs a student, --model with a checkpoint")
    require(not (api and "RANK" in os.environ), "--model anthropic: runs without torchrun")
    asking = [flag_ for flag_, on in (("--model anthropic:", api), ("--judge", config.judge), (
        "--with_patches anthropic", config.with_patches == "anthropic")) if on]
    require(not asking or os.environ.get("ANTHROPIC_API_KEY"),
            f"{' and '.join(asking)} needs ANTHROPIC_API_KEY to be set (any word will do for a "
            "server of your own without keys)")


# ---------------------------------------------------------------------------------------------
# The folder of a run


def settings(config):
    """The flags as config.json keeps them, with the label of the run's row in a table.

    Model, frames, and the naming flags that are not at their defaults.
    """
    other = [f"{flag_} {getattr(config, flag_)}" for flag_ in NAMING
             if getattr(config, flag_) != getattr(Config, flag_)]
    label = f"{Path(config.predictions).stem} (predictions)" if config.predictions \
        else ", ".join([config.model.rstrip("/"), f"{config.frames} frames", *other])
    return {**asdict(config), "label": label}


def open_run(config, questions):
    """Start the folder of a run or, with --resume, see that it holds the same questions."""
    folder, written = Path(config.output), []
    for q in questions:
        row = {name: v for name, v in asdict(q).items() if name not in ("media", "evidence")}
        written.append(json.dumps(row) + "\n")
    if (folder / "questions.jsonl").exists():
        if not config.resume:
            raise ValueError(f"--output {folder} already holds a run: add --resume to go on with "
                             "it, or name another folder")
        before = json.loads((folder / "config.json").read_text())
        fixed = PATCHING if any(folder.glob("patched*.jsonl")) else set()
        for name, now in asdict(config).items():
            if before.get(name) != now and (name not in FREE or name in fixed):
                raise ValueError(f"--{name} {now}: the run in {folder} has {before.get(name)}")
        if (folder / "questions.jsonl").read_text() != "".join(written):
            raise ValueError(f"--data: the run in {folder} was about other questions")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings(config), indent=1))
    whole = folder / "questions.partial"  # renamed, so that the file is complete or absent
    whole.write_text("".join(written))
    whole.rename(folder / "questions.jsonl")


class Lines:
    """The file that a process appends its rows to, and the bar with the accuracy of its answers."""

    def __init__(self, config, name, mine, known):
        part = f"-{os.environ['RANK']}" if "RANK" in os.environ else ""
        path = Path(config.output) / f"{name}{part}.jsonl"
        if path.exists():  # a line that a kill has torn is not to be continued
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self.file = open(path, "a", buffering=1)
        self.benchmark, self.known, self.values = config.benchmark, known, []
        self.bar = tqdm(total=len(mine), desc=f"{config.benchmark} {name}",
                        disable=os.environ.get("RANK", "0") != "0")
        for q in mine:
            if q.id in known and not known[q.id].get("error"):
                self._show(q, known[q.id]["text"])

    def __call__(self, q, text="", **facts):
        row = {"id": q.id, "text": text, **facts}
        if self.known.get(q.id) != row:
            self.file.write(json.dumps(row) + "\n")
        self._show(q, text)

    def _show(self, q, text):
        right = value(self.benchmark, q, text, "official")
        self.values += [] if right is None else [right]
        if self.values:
            self.bar.set_postfix_str(f"acc {np.mean(self.values):.3f}", refresh=False)
        self.bar.update()

    def close(self):
        self.bar.close()
        self.file.close()


# ---------------------------------------------------------------------------------------------
# Answers of a student


def start_processes(config):
    """This process's device and compute type; torch.distributed where torchrun asks for it.

    A process waits at the end for the slowest one, however long that takes.
    """
    import torch
    import torch.distributed as dist
    cuda = torch.cuda.is_available()
    if config.cuda_graphs and not cuda:
        raise ValueError("--cuda_graphs needs a CUDA device")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=30))
    name = ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype
    return device, getattr(torch, name)


def meet():
    """Wait until every process is here."""
    if "RANK" in os.environ:
        import torch.distributed as dist
        dist.all_gather_object([None] * dist.get_world_size(), None)


def make_loader(config, factor):
    """The decoder of the videos, for sides that are multiples of `factor`."""
    import data
    cache = data.FrameCache(config.frame_cache) if config.frame_cache else None
    return data.ClipLoader(config.frames, config.max_pixels, factor, cache=cache,
                           workers=config.decode_workers, time_limit=config.decode_seconds)


def sample_of(q):
    """A question as the sample that loader, prompts and teacher read."""
    import data
    evidence = tuple(data.Evidence(e["start"], e["end"], tuple(e["box"]) if e.get("box") else None,
                                   e.get("note") or "") for e in q.evidence)
    return data.Sample(q.id, q.text, q.options, q.answer, q.kind, q.media, q.media_type,
                       evidence=evidence, span=q.span)


def decoded(loader, questions, batch, failed):
    """Yield batches of (question, sample with its clip); failed(question, error=...) for the rest.

    The next batch is decoded while this one is answered.
    """
    pairs = [(q, sample_of(q)) for q in questions]
    parts = [pairs[i:i + batch] for i in range(0, len(pairs), batch)]
    for part, following in zip(parts, parts[1:] + [[]]):
        loader.submit([sample for _, sample in part + following])
        ready = []
        for q, sample in part:
            sample, reason = loader.get(sample)
            if sample is None:
                failed(q, error=f"undecodable: {reason}")
            else:
                ready.append((q, sample))
        if ready:
            yield ready


class Asked:
    """A student with all it needs to answer questions."""

    def __init__(self, config, device, dtype, questions):
        import data
        import ffr
        from model import Student
        self.config = config
        self.student = Student.load(config.model, device, dtype, config.attention, trainable=False,
                                    cuda_graphs=config.cuda_graphs)
        template = Path(config.template).read_text() if config.template else None
        self.prompts = data.Prompts(self.student.processor, template)
        self.student.text = self.prompts.text
        self.sampling = ffr.Sampling(config.max_completion, config.temperature, config.top_p, 0.5)
        for q in questions:
            bound = self.prompts.prompt_bound(sample_of(q), config.frames, config.max_pixels)
            if bound > config.max_prompt:
                raise ValueError(f"sample {q.id}: its prompt may take {bound} tokens, more than "
                                 f"--max_prompt {config.max_prompt}")
        self.loader = make_loader(config, self.prompts.factor)

    def answer(self, questions, write):
        """Answer each question once, a batch at a time, and write it down."""
        import ffr
        key = f"{self.config.seed}/evaluate"
        for part in decoded(self.loader, questions, self.config.batch, write):
            groups = [ffr.Group(sample, self.prompts.prefix(sample)) for _, sample in part]
            cache = self.student.prefill([group.prefix for group in groups])
            ffr.find(self.student, cache, groups, self.prompts.header, unscored, None, key, 1,
                     self.sampling)
            for (q, _), group in zip(part, groups):
                first = group.slots[0].first
                write(q, first.text, tokens=len(first.ids_C), finished=first.finished)

    def repair(self, guide, questions, answers, write):
        """Answer each again with the teacher's (guide's) patch to its answer; an upper bound."""
        import ffr
        import teacher
        config, key = self.config, f"{self.config.seed}/evaluate"
        for part in decoded(self.loader, questions, config.batch, lambda q, error: None):
            asked = [guide.submit(sample, answers[q.id]["text"]) for q, sample in part]
            groups = [ffr.Group(sample, self.prompts.prefix(sample),
                                [ffr.Slot(None, diagnosis)])
                      for (_, sample), diagnosis in zip(part, asked)]
            ffr.fix(groups)
            cache = self.student.prefill([group.prefix for group in groups])
            ffr.reason(self.student, cache, groups, self.write_patch, unscored,
                       teacher.alignment, key, self.sampling)
            for (q, _), group in zip(part, groups):
                slot = group.slots[0]
                text = slot.repair.text if slot.repair else answers[q.id]["text"]
                write(q, text, status=slot.diagnosis.result().status)

    def write_patch(self, sample, patch):
        """A patch as the segment between question and completion."""
        import teacher
        images = teacher.patch_images(patch, sample.clip.frames, self.config.evidence)
        return self.prompts.suffix(teacher.render(patch, self.config.evidence), images)


def unscored(sample, text):
    """Nothing is verified while sampling: scores are computed from the files."""
    return 0.0, 0.0, True


def make_teacher(config):
    """The teacher of --with_patches."""
    import teacher
    if config.with_patches == "annotated":
        return teacher.Annotated()
    try:
        return teacher.Service(teacher.TeacherConfig(
            url=config.api_url, model=config.teacher_model, cache=f"{config.output}/teacher"))
    except RuntimeError as error:
        raise ValueError(f"--with_patches anthropic: {error}") from None


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


class Client:
    """A model asked through the anthropic SDK; the key is in the environment only."""

    def __init__(self, name, flag_name, url):
        import anthropic
        self.name, self.flag, self.where = name, flag_name, url or "the Anthropic API"
        self.key = os.environ["ANTHROPIC_API_KEY"]
        self.anthropic, self.server = anthropic, bool(url)
        self.client = anthropic.Anthropic(api_key=self.key, max_retries=4, timeout=180.0,
                                          base_url=re.sub(r"/v1/?$", "", url) or None)

    def ask(self, content, config, max_tokens):
        """(text, output tokens), or (None, reason) where this one request failed.

        What would fail for every question, a wrong key or name, is a ValueError. The API takes no
        sampling parameters, servers of one's own do.
        """
        extra = {"temperature": config.temperature, "top_p": config.top_p} if self.server else None
        try:
            raw = self.client.messages.with_raw_response.create(
                model=self.name, max_tokens=max_tokens, extra_body=extra,
                thinking={"type": "disabled"}, messages=[{"role": "user", "content": content}])
            answer = json.loads(raw.read())
            text = "".join(b["text"] for b in answer["content"] if b.get("type") == "text")
            return text, int((answer.get("usage") or {}).get("output_tokens") or 0)
        except (self.anthropic.AuthenticationError, self.anthropic.PermissionDeniedError):
            raise ValueError(f"{self.flag}: {self.where} refuses the key: set ANTHROPIC_API_KEY"
                             ) from None
        except self.anthropic.NotFoundError:
            raise ValueError(f"{self.flag}: {self.where} knows no model {self.name}") from None
        except self.anthropic.APIError as error:
            reason = f"{type(error).__name__}: {error}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"the answer is no message: {error}"
        if len(self.key) > 12:  # a shorter one is a made-up word, for a server without keys
            reason = reason.replace(self.key, "***")
        return None, " ".join(reason.split())[:200]


def answer_by_api(config, questions, write):
    """Put the questions to anthropic:NAME, frames as pictures; returns why some got no answer.

    These have no line, so that --resume asks them again.
    """
    import data
    import teacher
    client = Client(config.model.partition(":")[2], "--model anthropic:", config.api_url)
    template = Path(config.template).read_text() if config.template else data.TEMPLATE

    def ask(pair):
        q, sample = pair
        content = []
        for i, (time, frame) in enumerate(zip(sample.clip.times, sample.clip.frames)):
            source = {"type": "base64", "media_type": "image/jpeg", "data": teacher.jpeg(frame)}
            content += [{"type": "text", "text": f"frame {i}, {time:.2f} s"},
                        {"type": "image", "source": source}]
        options = ["Options:", *q.options] if q.options else []
        text = template.replace("{answer_format}", data.ANSWER_FORMATS[q.kind])
        text = text.replace("{question}", "\n".join([q.text, *options]))
        content.append({"type": "text", "text": text})
        return client.ask(content, config, config.max_completion)

    loader, failures = make_loader(config, 28), []
    with closing(loader), ThreadPoolExecutor(REQUESTS) as pool:
        for part in decoded(loader, questions, REQUESTS, write):
            for (q, _), (text, more) in zip(part, pool.map(ask, part)):
                if text is None:
                    failures.append(more)
                else:
                    write(q, text, tokens=more)
    return failures


def judge(config, questions, answers, known, write):
    """Verdicts on the answers that no rule can score; returns why some got none."""
    client, failures = Client(config.judge, "--judge", config.api_url), []
    open_ones = [q for q in questions if q.judged and q.id not in known
                 and answers.get(q.id, {}).get("text", "").strip()]

    def ask(q):
        said = (parse_answer(answers[q.id]["text"], fallback=True) or "")[:20_000]
        form, question = (JUDGE_CAPTION, q.accepted[0]) if q.accepted else (JUDGE_OPEN, q.text)
        text = form.format(question=question, answer=q.answer, said=said)
        return client.ask([{"type": "text", "text": text}], config, 20)

    with ThreadPoolExecutor(REQUESTS) as pool:
        for q, (reply, reason) in zip(open_ones, pool.map(ask, open_ones)):
            if reply is None:
                failures.append(reason)
                continue
            if q.accepted:
                right = choice(reply, split_options(q.accepted[0])[1]) == q.answer
            else:
                right = reply.strip().lower().startswith("yes")
            write({"id": q.id, "verdict": int(right), "of": digest(answers[q.id]["text"]),
                   "judge": config.judge})
    return failures


# ---------------------------------------------------------------------------------------------
# One run


def answer(config, questions):
    """Ask the model what has no answer yet; every process its share, whatever the others do."""
    rank, world = (int(os.environ.get(name, v)) for name, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    missing = [q for q in questions if not os.path.exists(q.media)]
    if len(missing) == len(questions):
        raise ValueError(f"not one video was found, such as {missing[0].media}: is --video_root "
                         f"{config.video_root} right?")
    device, dtype = (None, None) if is_api(config) else start_processes(config)
    folder, mine, absent = Path(config.output), questions[rank::world], {q.id for q in missing}
    known = merged(folder, "answers")  # before anybody writes, so that all know the same
    if rank == 0:
        open_run(config, questions)
        if missing:
            print(f"{len(missing)} of {len(questions)} questions have no video: "
                  + ", ".join(f"{q.id} ({q.media})" for q in missing[:30]), file=sys.stderr)
    meet()
    write = Lines(config, "answers", mine, known)
    for q in mine:
        if q.id in absent and q.id not in known:
            write(q, error=f"missing: {q.media}")
    left = {q.id for q in questions if q.id not in absent
            and (q.id not in known or known[q.id].get("error"))}
    todo = [q for q in mine if q.id in left]
    if is_api(config):
        report_failures("answer", answer_by_api(config, todo, write))
    elif left or config.with_patches:  # alike on every process: they share out the weights
        asked = Asked(config, device, dtype, todo)
        with closing(asked.loader), asked.student.gathered():
            asked.answer(todo, write)
            if config.with_patches:
                with closing(make_teacher(config)) as guide:
                    patch(config, asked, guide, mine)
    write.close()
    meet()


def patch(config, asked, guide, mine):
    """Answer this process's failed questions again; its figures never meet the plain ones."""
    folder = Path(config.output)
    answers, known = merged(folder, "answers"), merged(folder, "patched")
    failed = [q for q in mine if q.id not in known and not answers[q.id].get("error")
              and passed(config.benchmark, q, answers[q.id]["text"]) is False]
    write = Lines(config, "patched", failed, {})
    asked.repair(guide, failed, answers, write)
    write.close()


def passed(benchmark, q, text):
    """z of Eq. 4: right by the official rule, a number from 0.5; None without a judge."""
    right = value(benchmark, q, text, "official")
    return None if right is None else right >= (0.5 if q.kind == "regression" else 1.0)


def is_api(config):
    """Whether the model is asked through the Messages API."""
    return config.model.startswith("anthropic:")


def report_failures(what, failures):
    """Say how many questions of this call still lack an answer or a verdict, and why."""
    if failures:
        print(f"{len(failures)} questions got no {what} ({failures[0]}); --resume asks them again",
              file=sys.stderr)


def predictions(config, questions):
    """Answers made elsewhere, as the rows of a run: JSONL of id and text."""
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


def output_folder(config):
    """The folder given, else one named by benchmark, model, frames and seed."""
    name = re.sub(r"[^\w.-]+", "-", f"{config.benchmark}-{Path(config.model).name}-"
                                    f"{config.frames}-{config.seed}")
    return config.output or f"runs/{name}"


def evaluate(config):
    """Answer and judge what is left to do, then return the run's report ("" but on rank 0)."""
    check(config)
    questions = load(config)
    if config.predictions:
        run = Run(Path(config.output), SimpleNamespace(**settings(config)), questions,
                  predictions(config, questions), {}, {} if config.judge else None)
        if config.output:
            open_run(config, questions)
            (run.folder / "answers.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in run.answers.values()))
            run = read_run(config.output)
    else:
        config = replace(config, output=output_folder(config))
        answer(config, questions)
        if os.environ.get("RANK", "0") != "0":
            return ""
        run = read_run(config.output)
    if config.judge:
        def write(row):
            run.verdicts[row["id"]] = row["verdict"]
            if config.output:
                with open(run.folder / "verdicts.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")

        report_failures("verdict", judge(config, run.questions, run.answers, run.verdicts, write))
    return report(run)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if text := table(argv[1:]) if argv[:1] == ["table"] else evaluate(parse(argv)):
            print(text)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    finally:
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.modules["torch"].distributed.destroy_process_group()


if __name__ == "__main__":
    main()
