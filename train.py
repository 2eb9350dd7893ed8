"""Train a student with FFR (or a method it is compared with) and write down everything a run does.

    python train.py                                       the toy world, end to end on this machine
    torchrun --nproc_per_node 8 train.py --model M --data D --video_root V --teacher anthropic
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:PORT train.py ...

A step: the method (methods.py) fills groups of prompts, samples and repairs (no rank waits for
another meanwhile), `update` trains on the chosen rollouts. Ranks meet only in `everyone` and inside
FSDP, equally often on every rank. Every random number derives from (seed, step, sample), so that a
resumed run repeats the interrupted one.
"""

import json
import math
import os
import sys
from collections import Counter, OrderedDict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

import data
import ffr
import methods
import reward
import toy
from data import Sample
from guard import check_money
from lab.plan import planned
from model import ADAPTER, AdapterCopy, Completion, Student, local
from patch import EVIDENCE_LEVELS, Patch, alignment, outside_clip, patch_images, render
from prefix_tree import FAMILIES
from runs import (Folder, Phases, Stopper, Tracker, about, append, asked_with, changed, check_model,
                  cut_logs, digest, everyone, flag, going_on, jsonl, keep_rollouts,
                  measure, metrics, newest_checkpoint, one_sentence, parse, peak_memory, postfix,
                  rank, read_folders, read_json, read_log, read_rows, require, require_files,
                  require_positive, resume, save, say, start_processes, summary, typed,
                  waiting_for, wording, world_size, write_whole)
from teacher import STATS, Teacher, TeacherConfig, make_teacher
from video import MAX_IMAGE_PIXELS, Clip, ClipLoader, FrameCache, strip, strip_size


@dataclass(frozen=True)
class Config:
    """Every flag of the command line; the defaults are the paper's Table 8."""
    model: str = flag("", "checkpoint folder or hub name; without it, the toy world is trained on")
    data: str = flag("", "questions in Video-R1's format, JSON or JSONL; of several files: A,B")
    samples: int = flag(0, "how many of them to draw by --seed, of those with a file; 0: all")
    video_root: str = flag("", "folder of the media, or a JSON map from data_source to folder")
    eval_data: str = flag("", "held-out questions, answered greedily at the start and the end")
    eval_every: int = flag(0, "steps between further evaluations; 0: at the start and end only")
    eval_patches: str = flag("auto", "repair failed held-out answers too; auto: if annotated",
                             ("auto", "yes", "no"))
    output: str = flag("", "folder of the run; empty: runs/METHOD-1, runs/METHOD-2, ...")
    method: str = flag("ffr", "what to train with, see docs/methods.md", tuple(methods.METHODS))
    # the student's rollouts
    rollouts: int = flag(8, "G, first tries for each prompt")
    max_completion: int = flag(1024, "most tokens of one completion")
    max_prompt: int = flag(16384, "most tokens of a prompt; a sample that may exceed it is refused")
    frames: int = flag(16, "frames shown of a video")
    max_pixels: int = flag(128 * 28 * 28, "most pixels of a video frame")
    max_image_pixels: int = flag(MAX_IMAGE_PIXELS, "most pixels of an image")
    temperature: float = flag(1.0, "sampling temperature of the rollouts")
    top_p: float = flag(0.95, "share of the probability that sampling draws from")
    template: str = flag("", "file with the question's wording: {question} and {answer_format}")
    # the teacher
    teacher: str = flag("annotated", "who writes the patches: the data's evidence, or a model",
                        ("annotated", "anthropic"))
    evidence: str = flag("text", "how much of a patch the student sees", EVIDENCE_LEVELS)
    no_gt: bool = flag(False, "do not show the teacher the gold answer")
    teacher_url: str = flag("", "server that speaks the Messages API; empty: Anthropic's")
    teacher_model: str = flag(TeacherConfig.model, "name of the teacher's model")
    teacher_rounds: int = flag(TeacherConfig.rounds, "answers until the teacher has to submit")
    teacher_prompt: str = flag("analysis,negative,tools", "parts of the teacher's prompt (Table 5)")
    teacher_cache: str = flag("", "folder of answers already paid for; empty: OUTPUT/teacher")
    teacher_price: str = flag("", "dollars for a million tokens in and out, as in 3/15")
    teacher_budget: float = flag(0.0, "dollars after which teaching ends; 0: no limit")
    teacher_timeout: float = flag(TeacherConfig.timeout, "time limit for one diagnosis, in seconds")
    teacher_step_timeout: float = flag(TeacherConfig.step_timeout,
                                       "time limit for all diagnoses of one step, in seconds")
    blind_test: int = flag(0, "guesses without the video that check a patch for leaks; 0: none")
    # reward and loss
    kappa: float = flag(0.3, "κ, the patch tax of Eq. 8")
    alignment_weight: float = flag(0.0, "reward for a repair that refers to the patch's evidence")
    pass_mark: float = flag(0.5, "accuracy from which a graded answer counts as right")
    beta: float = flag(0.04, "weight of the KL to the reference copy; 0 keeps no copy")
    clip_low: float = flag(0.2, "ε below 1: how far a ratio may fall")
    clip_high: float = flag(0.2, "ε above 1: how far a ratio may rise")
    loss_norm: str = flag("token", "what the loss is averaged over; constant: --max_completion",
                          ("token", "sequence", "constant"))
    no_std: bool = flag(False, "do not divide advantages by the group's deviation (Dr. GRPO)")
    ratio: str = flag("token", "one ratio for each token, or for each completion (GSPO)",
                      ("token", "sequence"))
    dynamic_sampling: int = flag(0, "times a step tries fresh prompts for all-equal groups (DAPO)")
    score_under: str = flag("observation", "plain: teach without the patch what was found with it",
                            ("observation", "plain"))
    select: str = flag("slot", "slot: Eq. 7; best: train the group's best rollout only",
                       ("slot", "best"))
    train_on: str = flag("chosen", "original: train the failed tokens, as the authors' release",
                         ("chosen", "original"))
    # single methods
    length_low: int = flag(320, "tgrpo: tokens of the shortest answer with a length bonus")
    length_high: int = flag(512, "tgrpo: tokens of the longest answer with a length bonus")
    shape_gamma: float = flag(0.1, "luffy, replay: γ of r / (r + γ)")
    replay_share: float = flag(0.5, "replay: share of a step's prompts that the buffer gives")
    replay_start: float = flag(0.35, "replay: accuracy of a batch from which replay begins")
    sd_lambda: float = flag(0.5, "rlsd, visd, ffr_visd: λ, weight of the token credit at step 0")
    sd_horizon: int = flag(0, "steps until λ is 0; 0: 60 for rlsd, 600 for visd and ffr_visd")
    sd_clip: float = flag(0.2, "rlsd, visd, ffr_visd: largest change of a token's credit")
    sd_sync: int = flag(20, "rlsd: steps between copies of the policy")
    sd_ema: float = flag(0.01, "visd: share of the policy that the copy takes on each step")
    sd_topk: int = flag(16, "visd: tokens of the support; 0: the sampled token alone")
    # optimisation
    lr: float = flag(5e-6, "peak learning rate; a cosine takes it to zero")
    warmup_steps: int = flag(0, "steps of linear rise to the peak learning rate")
    weight_decay: float = flag(0.01, "weight decay of matrices; norms and biases have none")
    max_grad_norm: float = flag(5.0, "norm that gradients are clipped to")
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs needs")
    epochs: float = flag(1.0, "passes over the data")
    batch_prompts: int = flag(1, "prompts for each step and process")
    ahead: int = flag(0, "steps whose first tries are sampled while the teacher thinks; 0: none")
    updates_per_batch: int = flag(1, "updates for each batch; more than one makes the clip matter")
    balance: float = flag(0.0, "weight of the loss that spreads tokens over a model's experts")
    micro_tokens: int = flag(16384, "packed tokens of one forward and backward")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    lora: int = flag(0, "rank of adapters to train, the weights staying as they are; 0: none")
    lora_alpha: int = flag(32, "α of the adapters, which count α / rank; see docs/performance.md")
    lora_vision: bool = flag(False, "adapters for the vision tower too")
    merge: bool = flag(False, "save whole weights, not the adapters alone")
    offload: bool = flag(False, "train in the host's memory through FSDP (not yet tried on a GPU)")
    seed: int = flag(0, "seed of the data order and of every rollout")
    # the run
    keep_rollouts: int = flag(1, "every K-th step's rollouts go to rollouts.jsonl; 0: none")
    keep_rollouts_mb: int = flag(200, "most megabytes of them, shared out over the run's steps")
    no_report: bool = flag(False, "write no page to look at (docs/report.md)")
    track: str = flag("none", "send figures and rollouts to a tracker as well",
                      ("none", "tensorboard", "trackio"))
    save_every: int = flag(100, "steps between checkpoints")
    keep_checkpoints: int = flag(2, "how many of the newest checkpoints are kept")
    resume: bool = flag(False, "go on from the newest checkpoint of --output")
    plan: bool = flag(False, "take one step at the largest sizes, say what a run needs, and end")
    attention: str = flag("auto", "kernel of scoring on CUDA; auto: flash-attn's if installed",
                          ("auto", "torch", "flash", "sdpa"))
    dtype: str = flag("auto", "compute type; auto: bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "bfloat16", "float32"))
    cuda_graphs: bool = flag(False, "sample with CUDA graphs (not yet tried on a GPU)")
    decoder: str = flag("pyav", "what reads videos; decord: refuses those it shows wrongly",
                        ("pyav", "decord"))
    decode_workers: int = flag(2, "processes of each rank that decode videos")
    decode_seconds: float = flag(60.0, "time limit for decoding one file, in seconds")
    frame_cache: str = flag("", "folder of decoded frames; empty: OUTPUT/frames")
    frame_cache_gb: float = flag(20.0, "size limit of that folder, in GiB")


# What `python train.py` runs: flags not given on the command line take these.
TOY_FOLDER, TOY_WARM = Path("runs/toy"), Path("runs/toy/warm")
TOY_STUDENT = TOY_WARM / "checkpoints/step-000060"
TOY_WORLD = dict(data=f"{TOY_FOLDER}/train.json", eval_data=f"{TOY_FOLDER}/heldout.json",
                 video_root=f"{TOY_FOLDER}/videos", template=f"{TOY_FOLDER}/template.txt",
                 frame_cache=f"{TOY_FOLDER}/frames")
TOY_SEEN = dict(max_completion=48, frames=16, max_pixels=56 * 56)
TOY_WARMING = dict(model=f"{TOY_FOLDER}/model", data=f"{TOY_FOLDER}/warm.json",
                   output=str(TOY_WARM), method="sft", steps=60, batch_prompts=24, lr=1e-3,
                   warmup_steps=5, max_grad_norm=1.0, save_every=10**6, keep_rollouts=0,
                   no_report=True, **TOY_SEEN)
TOY = dict(steps=60, batch_prompts=8, lr=4e-4, beta=0.0, save_every=20, **TOY_SEEN)
FIRST_STEPS = 3  # after which is said what has gone wrong in all of them
PREFIX_BYTES = 2**30  # pixels of processed prompts kept in memory
LESS_MEMORY = ("--micro_tokens (down to one prompt and rollout), --freeze_vision, --lora, "
               "--offload, more processes, --batch_prompts, --max_completion, --frames, "
               "--max_pixels")


def check(config: Config) -> None:
    """Refuse settings that cannot work, each in one sentence naming the flag."""
    require_positive(config, "rollouts", "max_completion", "max_prompt", "frames", "max_pixels",
                     "max_image_pixels", "batch_prompts", "epochs", "lr", "updates_per_batch",
                     "micro_tokens", "save_every", "keep_checkpoints", "shape_gamma", "sd_sync",
                     "temperature", "top_p", "pass_mark", "clip_low", "clip_high", "max_grad_norm",
                     "teacher_rounds", "teacher_timeout", "teacher_step_timeout", "decode_seconds",
                     "length_low", "lora_alpha", "keep_rollouts_mb")
    for name in ("steps", "warmup_steps", "weight_decay", "beta", "kappa", "alignment_weight",
                 "dynamic_sampling", "sd_horizon", "sd_topk", "sd_clip", "blind_test", "eval_every",
                 "teacher_budget", "decode_workers", "frame_cache_gb", "seed", "replay_share",
                 "replay_start", "sd_lambda", "sd_ema", "samples", "ahead", "lora",
                 "keep_rollouts", "balance"):
        value = getattr(config, name)
        require(value >= 0, f"--{name} must not be negative, got {value}")
    for name, most in (("top_p", 1), ("pass_mark", 1), ("clip_low", 1), ("replay_share", 1),
                       ("replay_start", 1), ("sd_lambda", 1), ("sd_ema", 1), ("kappa", 2)):
        value = getattr(config, name)
        require(value <= most, f"--{name} must be at most {most}, got {value}")
    require(config.frames % 2 == 0,
            f"--frames must be even (temporal patches of two), got {config.frames}")
    require(config.length_low <= config.length_high, "--length_low must not exceed --length_high")
    require(listed(config.data), "--data is missing: a Video-R1 JSON or JSONL file")
    require(not methods.METHODS[config.method].compares or config.rollouts >= 2,
            "--rollouts must be at least 2: advantages compare a group's rollouts")
    check_money(config.teacher_price, config.teacher_budget, "--teacher")
    require(set(config.teacher_prompt.split(",")) <= {"analysis", "negative", "tools", ""},
            "--teacher_prompt is a list of analysis, negative and tools")
    require(config.track == "none" or find_spec(config.track), f"--track {config.track}: the "
            f"package is missing; pip install {config.track}")


def refuse_useless(config: Config, given: set[str]) -> None:
    """Refuse a flag that was given and changes nothing in this run, in one sentence."""
    for name, (heeded, where) in methods.useful(config).items():
        require(heeded or name not in given, f"--{name} changes nothing in this run: it is for "
                f"{where}")


# ---------------------------------------------------------------------------------------------
# A run


class Run:
    """What the functions below share: settings, data, teacher, student, optimizer, folder."""

    everyone, eval_prompts = staticmethod(everyone), 32  # decoded together in an evaluation

    def __init__(self, config, device, dtype):
        check(config)
        self.config, self.device, self.dtype = config, device, dtype
        for path in listed(config.data):
            require_files(replace(config, data=path), "data", "eval_data", "template")
        self.output, self.unusable = Path(config.output), []
        self.samples, self.drawn = self._drawn(*self._load(listed(config.data)))
        self.eval_samples = self._load([config.eval_data])[0] if config.eval_data else []
        self.method = methods.METHODS[config.method](config)
        self.teacher = teacher_of(config) if self.method.asks and not config.plan else None
        self.diagnose = self.teacher.submit if self.teacher and self.method.repairs else None
        self.eval_patches = config.eval_patches == "yes" or (
            config.eval_patches == "auto" and config.teacher == "annotated")
        self._count_annotations()
        self._load_student()
        self.sampling = ffr.Sampling(config.max_completion, config.temperature, config.top_p,
                                     config.pass_mark)
        per_step = config.batch_prompts * world_size()
        self.steps = config.steps or max(1, int(config.epochs * len(self.samples)) // per_step)
        self.prefixes, self.prefix_bytes = OrderedDict(), 0
        self.epoch, self.step, self.bad, self.stats = None, 0, 0, {}
        self.kept, self.left_out = 0, False  # bytes of rollouts.jsonl and thumbnails; a step of it
        files = {name: getattr(config, name) for name in ("eval_data", "template")}
        now = about(files, identity(self.student),
                    "" if config.plan else frozen(self.student, self.reference))
        now["files"] |= {  # which media there are decides on the order of samples
            "data": digest(*(Path(path).read_bytes() for path in listed(config.data))),
            "video_root": digest(*(s.id for s in [*self.samples, *self.eval_samples]))}
        if config.resume:
            self._refuse_other(now)
            resume(self)
        self.decoded_any = self.step > 0
        if rank() == 0:
            self._start_folder(now)
        everyone(None)
        self.tracker = None if rank() or config.track == "none" else \
            Tracker(config.track, self.output, self.step, asdict(config))
        self.loader = self._loader()
        self.stopper = Stopper()

    def _load(self, paths):
        """Return samples whose media exist, and all rows by id; the others are named and left out.

        In several files, ids begin with the number of theirs, from 1.
        """
        samples, rows_of, folders = [], {}, read_folders(self.config.video_root)
        for number, path in enumerate(paths, 1):
            rows, prefix = read_rows(path), f"{number}/" * (len(paths) > 1)
            found = data.load_samples(rows, folders, prefix)
            require(found, f"{path} holds no samples")
            samples += found
            rows_of |= {sample.id: row for sample, row in zip(found, rows)}
        for sample in samples:
            try:
                reward.check_gold(sample.kind, sample.answer, sample.options)
            except ValueError as error:
                raise ValueError(f"sample {sample.id}: {error}") from None
        missing = data.missing_media(samples)
        root, path = self.config.video_root, ",".join(paths)
        require(len(missing) < len(samples), f"{path}: not one media file was found, such as "
                f"{samples[0].media}: " + (f"is --video_root {root} right?" if root else
                                           "--video_root, the folder of the media, is missing"))
        if missing:
            say(f"{path}: left out of {len(samples)}: {data.missing_sentence(missing)}")
            for sample in missing:
                self.record_bad(sample, "no such file", step=-1)
        absent = {sample.id for sample in missing}
        return [sample for sample in samples if sample.id not in absent], rows_of

    def _drawn(self, samples, rows_of):
        """Return --samples of the samples, drawn by the seed, and their rows; or all, and none."""
        config, count = self.config, self.config.samples
        if not count:
            return samples, []
        require(count <= len(samples), f"--samples {count}: only {len(samples)} samples of --data "
                f"{config.data} have a media file")
        order = ffr.noise(f"{config.seed}/samples", 1, len(samples))[0].argsort().tolist()
        drawn = [samples[i] for i in sorted(order[:count])]
        return drawn, [rows_of[sample.id] | {"problem_id": sample.id} for sample in drawn]

    def _count_annotations(self):
        """Refuse what would be another method unsaid: FFR without patches, sft without traces."""
        method, annotated = self.config.method, self.config.teacher == "annotated"
        if method == "sft" or annotated and method in ("sft_teacher", "luffy"):
            n = sum(bool(sample.process) for sample in self.samples)
            require(n, f"--method {method}: no sample of {self.config.data} has a process, so "
                    "there is no reasoning to imitate")
            if n < len(self.samples):
                say(f"{len(self.samples) - n} of {len(self.samples)} samples have no process to "
                    "imitate" + (": their bare answer is" if method == "sft" else ""))
        elif self.method.repairs and annotated:
            n = sum(bool(sample.evidence) for sample in self.samples)
            require(n, f"--method {method} with --teacher annotated: no sample of "
                    f"{self.config.data} has evidence, so nothing would ever be repaired; use "
                    "--teacher anthropic, or --method grpo")
            say(f"{n} of {len(self.samples)} samples have evidence for the annotated teacher")

    def _refuse_other(self, now):
        """Refuse to go on with another student or other contents under the same flags."""
        path = self.output / "config.json"
        before = read_json(path).get("about", {}) if path.exists() else {}
        pairs = [("model", before.get(part), now[part]) for part in ("student", "frozen")]
        pairs += [(name, before.get("files", {}).get(name), found)
                  for name, found in now["files"].items()]
        for name, was, found in pairs:
            require(was is None or was == found, f"--{name} {getattr(self.config, name)} is not "
                    f"what the run in {self.output} was started with")

    def _start_folder(self, now):
        """Write down what the run is, once and as soon as it is known to be possible."""
        path = self.output / "config.json"
        if self.config.resume:
            cut_logs(self)
        if not path.exists():
            self.output.mkdir(parents=True, exist_ok=True)
            if self.drawn:  # what --data has to be to train on the same ones
                lines = "".join(json.dumps(row) + "\n" for row in self.drawn)
                write_whole(self.output / "data.jsonl", lines)
            write_whole(path, json.dumps({**asdict(self.config), "about": now}, indent=1))
        log = read_log(self.output / "bad_samples.jsonl")
        self.noted = {(row["id"], row["reason"]) for row in log}
        self.note_bad([self.unusable])

    def _loader(self):
        config = self.config
        cache = FrameCache(config.frame_cache or self.output / "frames",
                           int(config.frame_cache_gb * 2**30))
        return ClipLoader(config.frames, config.max_pixels, self.prompts.factor,
                          config.max_image_pixels, config.decode_workers, config.decode_seconds,
                          cache, config.decoder)

    def record_bad(self, sample: Sample, reason: str, step: int | None = None) -> None:
        """Keep a sample whose file cannot be used until the first process writes it down."""
        row = {"step": self.step if step is None else step, "id": sample.id}
        self.unusable.append(row | {"media": sample.media, "reason": reason})

    def note_bad(self, ranks: list[list[dict]]) -> None:
        """Write down what every rank has kept, a sample and its reason once a run."""
        self.unusable = []
        for row in (row for rows in ranks for row in rows if rank() == 0):
            if (row["id"], row["reason"]) not in self.noted:
                self.noted.add((row["id"], row["reason"]))
                append(self.output / "bad_samples.jsonl", row)

    def _load_student(self):
        config = self.config
        lora = config.lora, config.lora_alpha, config.lora_vision, config.seed
        load = partial(Student.load, config.model, self.device, self.dtype, config.attention,
                       recompute=self.device.type == "cuda", offload=config.offload)
        self.student = load(freeze_vision=config.freeze_vision, cuda_graphs=config.cuda_graphs,
                            lora=lora if config.lora else ())
        self.student.balances = config.balance > 0 and not config.plan
        require(not config.balance or FAMILIES[self.student.model.config.model_type].routed,
                f"--balance changes nothing in this run: {config.model} has no experts")
        self.reference = None
        if config.beta > 0 and self.method.compares:
            self.reference = self.student.at_start if config.lora else load(trainable=False)
        self.method.start(partial(AdapterCopy, self.student) if config.lora else
                          partial(load, trainable=False, master=True))
        self.prompts = data.Prompts(self.student.processor, wording(config))
        self.student.text = self.prompts.text
        self.prompts.refuse_long([*self.samples, *self.eval_samples], config.max_prompt,
                                 config.frames, config.max_pixels, config.max_image_pixels)
        self.optimizer = make_optimizer(self.student, config)

    # -- data

    def sample_at(self, position: int) -> Sample:
        """Return the sample at a place of the endless stream of shuffled epochs."""
        epoch, index = divmod(position, len(self.samples))
        if epoch != self.epoch:
            order = ffr.noise(f"{self.config.seed}/order/{epoch}", 1, len(self.samples))
            self.epoch, self.order = epoch, order[0].argsort().tolist()
        return self.samples[self.order[index]]

    def step_samples(self, step: int) -> list[Sample]:
        """Return this rank's samples of a step; all ranks' are the next ones of the stream."""
        first = (step * world_size() + rank()) * self.config.batch_prompts
        return [self.sample_at(first + b) for b in range(self.config.batch_prompts)]

    def fetch(self, step: int) -> list[ffr.Group]:
        """Return groups of a step's samples that could be decoded, and begin the next step's."""
        wanted = self.step_samples(step)
        self.loader.submit(wanted)
        if step + 1 < self.steps:
            self.loader.submit(self.step_samples(step + 1))
        groups = self.groups(wanted)
        first = step * world_size() * self.config.batch_prompts
        before = rank() * self.config.batch_prompts  # prompts of the step on earlier ranks
        seen = Counter(self.sample_at(first + b).id for b in range(before))
        for group in groups:  # fewer samples than prompts: each place has rollouts of its own
            group.place = f"#{seen[group.sample.id]}" if seen[group.sample.id] else ""
            seen[group.sample.id] += 1
        return groups

    def groups(self, samples: list[Sample]) -> list[ffr.Group]:
        """Return empty groups of the samples that can be decoded."""
        return [ffr.Group(sample, self.prefix(sample)) for sample in self.decoded(samples)]

    def others(self, groups: list[ffr.Group], count: int, key: str) -> list[ffr.Group]:
        """Return groups of `count` samples that are in none of `groups`, drawn by `key`."""
        seen = {group.sample.id for group in groups}
        order = ffr.noise(key, 1, len(self.samples))[0].argsort().tolist()
        fresh = [self.samples[i] for i in order if self.samples[i].id not in seen]
        return self.groups(fresh[:count])

    def decoded(self, wanted: list[Sample]) -> list[Sample]:
        """Return the samples with their clips; record and leave out what cannot be decoded."""
        loaded = []
        for sample in wanted:
            ready, reason = self.loader.get(sample)
            if ready is not None:
                loaded.append(ready)
                for wrong in filter(None, (ready.clip.damage, outside_clip(ready))):
                    self.record_bad(sample, wrong)
            else:
                self.bad += 1
                self.record_bad(sample, reason)
                if not (self.decoded_any or loaded or self.bad < len(self.samples)):
                    self.note_bad([self.unusable])
                    raise ValueError(f"not one of {self.bad} files could be read; sample "
                                     f"{sample.id}: {reason}")
        self.decoded_any = self.decoded_any or bool(loaded)
        return loaded

    def prefix(self, sample: Sample) -> data.Segment:
        """Return the sample's prompt as a segment, processed once while it fits in memory."""
        key = sample.media, sample.id
        if key not in self.prefixes:
            self.prefixes[key] = self.prompts.prefix(sample)
            self.prefix_bytes += self.prefixes[key].pixels.nbytes
        self.prefixes.move_to_end(key)
        while self.prefix_bytes > PREFIX_BYTES and len(self.prefixes) > 1:
            self.prefix_bytes -= self.prefixes.popitem(last=False)[1].pixels.nbytes
        return self.prefixes[key]

    def keeps(self) -> bool:
        """Return whether the step's rollouts are to be kept."""
        return self.config.keep_rollouts > 0 and self.step % self.config.keep_rollouts == 0

    def taught(self) -> dict[str, float]:
        """Return what the teacher did since this was last asked."""
        stats = self.teacher.stats() if self.teacher else dict.fromkeys(STATS, 0)
        before, self.stats = self.stats, stats
        return {name: count - before.get(name, 0) for name, count in stats.items()}

    # -- find and reason of ffr.py, with this run's collaborators

    def find(self, cache: Any, groups: list[ffr.Group], key: str, rollouts: int | list[int],
             sampling: ffr.Sampling) -> None:
        """Sample and verify first tries (Eq. 3, 4)."""
        if self.config.ahead:  # else all diagnoses of a step have ended before the next one's
            self.teacher.begin_step()
        ffr.find(self.student, cache, groups, self.prompts.header, self.score, self.diagnose, key,
                 rollouts, sampling)

    def tried_again(self, kept: list[tuple]) -> list[ffr.Group]:
        """Return groups with the first tries that a checkpoint had, and ask about them again.

        kept: id, place and tries of each; a try is ids, log-probs, whether it ended, staleness.
        """
        samples, groups = {sample.id: sample for sample in self.samples}, []
        for name, place, tries in kept:
            for group in self.groups([samples[name]]):
                group.place = place
                for ids_C, logp_C, finished, staleness in tries:
                    first = ffr.scored(self.student, group.sample, self.prompts.header,
                                       Completion(ids_C, logp_C, finished), self.score,
                                       self.sampling)
                    group.slots.append(ffr.Slot(replace(first, staleness=staleness)))
                    ffr.ask(group.sample, group.slots[-1], self.diagnose)
                groups.append(group)
        self.taught()  # the run has counted these diagnoses when it asked for them
        return groups

    def reason(self, cache: Any, groups: list[ffr.Group], key: str, sampling: ffr.Sampling) -> None:
        """Sample repairs (Eq. 6)."""
        ffr.reason(self.student, cache, groups, self.write, self.score, alignment, key, sampling)

    def score(self, sample: Sample, text: str) -> tuple[float, float, bool]:
        """Return accuracy, format, and whether the answer is of an exact kind."""
        accuracy = reward.accuracy(sample.kind, text, sample.answer, sample.options)
        return accuracy, reward.format_reward(text), sample.kind in reward.EXACT_KINDS

    def answer(self, text: str) -> str | None:
        """Return the answer in a completion's text, or None."""
        return reward.parse_answer(text)

    def write(self, sample: Sample, patch: Patch) -> data.Segment:
        """Return a patch as the segment between question and completion."""
        images = patch_images(patch, sample.clip.frames, self.config.evidence)
        return self.prompts.suffix(render(patch, self.config.evidence), images)


def listed(paths: str) -> list[str]:
    """Return the files of --data A,B; where there is a file of all of that name, it alone."""
    return [paths] if Path(paths).is_file() else [path for path in paths.split(",") if path]


def identity(student: Student) -> str:
    """Return a digest of a student's architecture: its config, names and shapes of weights."""
    passing = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}

    def lasting(value):
        return {k: lasting(v) for k, v in value.items() if k not in passing} \
            if isinstance(value, dict) else value

    shapes = {name: list(p.shape) for name, p in student.model.named_parameters()}
    return digest(lasting(json.loads(student.model.config.to_json_string())), shapes)


def frozen(*models: Any) -> str:
    """Return a digest of the weights that stay as --model has them, however they are sharded."""
    own = [weight for model in models if isinstance(model, Student)
           for weight in model.parameters() if not weight.requires_grad]
    sums = [int(part.detach().view(torch.int16).sum()) for part in local(own)]  # of bits: exact
    return digest([sum(parts) for parts in zip(*everyone(sums))])


def teacher_of(config: Config) -> Teacher:
    """Return the run's teacher; a service that does not answer is found out here."""
    blocks = config.teacher_prompt.split(",")
    return make_teacher(config.teacher, TeacherConfig(
        url=config.teacher_url, model=config.teacher_model, rounds=config.teacher_rounds,
        no_gt=config.no_gt, analysis="analysis" in blocks, negative="negative" in blocks,
        tools="tools" in blocks, blind_test=config.blind_test, price=config.teacher_price,
        budget=config.teacher_budget, timeout=config.teacher_timeout,
        step_timeout=config.teacher_step_timeout,
        cache=config.teacher_cache or f"{config.output}/teacher"), ping=rank() == 0)


def make_optimizer(student: Student, config: Config) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


# ---------------------------------------------------------------------------------------------
# One step


def update(run: Run, groups: list[ffr.Group], phases: Phases) -> dict:
    """Train on the chosen rollouts of all ranks: weigh, reference, forward, backward, clip, step.

    Ranks run equally many forwards: the ones with fewer micro-batches add fillers of weight zero.
    Returns sums for the logs.
    """
    config = run.config
    trained = [slot.trained for g in groups for slot in g.slots if slot.trained is not None]
    counts = everyone((sum(len(rollout.ids_C) for rollout in trained), len(trained)))
    tokens, number = (sum(count) for count in zip(*counts))
    weight = ffr.token_weights(config.loss_norm, tokens, number, config.max_completion)
    batches = ffr.micro_batches(groups, config.micro_tokens, weight)
    batches += [filler(run) for _ in range(max(everyone(len(batches))) - len(batches))]
    lr = config.lr * 0.5 * (1 + math.cos(math.pi * run.step / run.steps))
    lr *= min(1.0, (run.step + 1) / (config.warmup_steps + 1))
    for param_group in run.optimizer.param_groups:
        param_group["lr"] = lr
    with phases("weigh"):
        run.method.weigh(run, batches)
    if run.reference is not None:
        with phases("reference"), torch.no_grad():
            for batch in batches:
                batch.ref_logp_T, _ = score(run.reference, batch, config)
    sums, ratios = {"lr": lr}, Counter()
    for turn in range(config.updates_per_batch):
        with phases("train"):
            one = backward(run, batches, first=turn == 0)
            norm = torch.nn.utils.clip_grad_norm_(run.student.parameters(), config.max_grad_norm)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            stop_if_broken(run, one.pop("broken"), norm, turn)
            run.optimizer.step()
            run.optimizer.zero_grad()
        if turn == 0:
            sums.update(one, grad_norm=norm)
        ratios.update({f"{name}_of_all": one.get(name, 0)
                       for name in ("clipped", "tokens")})
    run.method.after(run, groups)
    return sums | ratios


def score(student: Student, batch: ffr.MicroBatch, config: Config, entropy: bool = False) -> tuple:
    """Return log-probs and, if asked for, entropies of a micro-batch's completion tokens [T]."""
    return student(batch.prefixes, batch.suffixes, batch.owners, batch.completions,
                   config.temperature, entropy)


def backward(run: Run, batches: list[ffr.MicroBatch], first: bool) -> dict:
    """Add up the gradients of the step's loss; its first update settles what π_old is.

    Returns sums over this rank's tokens, the samples of parts that are not finite, and, of a step
    that is kept, the means of every slot's trained tokens by id(slot): entropy, and log π_θ − log
    π_old at sampling time.
    """
    config, sums = run.config, {"loss": 0.0, "broken": [], "slots": {}}
    if config.balance:
        real = sum(everyone(sum(bool(batch.members) for batch in batches)))
    for batch in batches:
        logp_T, entropy_T = score(run.student, batch, config, first)
        if first and run.keeps():
            both_2T = torch.stack([entropy_T, logp_T.detach() - batch.old_logp_T.to(logp_T.device)])
            means = both_2T.cpu().split([len(ids) for ids in batch.completions], dim=1)
            sums["slots"] |= {id(slot): part.mean(dim=1).tolist()
                              for (_, slot), part in zip(batch.members, means)}
        mismatch = ffr.settle(batch, logp_T) if first else 0.0
        loss, added = ffr.loss(logp_T, batch, config.clip_low, config.clip_high, config.beta,
                               run.method.surrogate)
        whole = loss
        if config.balance:  # a mean over micro-batches and ranks, as Hugging Face's trainer adds it
            imbalance = run.student.imbalance * bool(batch.members) / real
            whole = loss + config.balance * imbalance
            sums["imbalance"] = sums.get("imbalance", 0.0) + imbalance.item()
        (whole * world_size()).backward()  # FSDP averages over ranks, the objective sums
        if not math.isfinite(loss.item()):
            sums["broken"] += [group.sample.id for group, _ in batch.members]
        if batch.members:  # fillers do not count
            stale_T = ffr.of_tokens(batch, lambda slot: slot.trained.staleness)
            drift_T = (logp_T.detach().cpu() - batch.old_logp_T)[stale_T].abs()
            added |= {"loss": loss.item(), "mismatch": mismatch, "drift": drift_T.sum().item(),
                      "stale": len(drift_T), "entropy": entropy_T.sum().item() if first else 0.0}
            for name, value in added.items():
                sums[name] = sums.get(name, 0.0) + value
    return sums


def stop_if_broken(run: Run, broken: list[str], norm: float, turn: int) -> None:
    """End the run before a loss or gradient that is not finite reaches the weights.

    Before a step's first update the weights are those of the step before, and are saved; after
    it they belong to no step, and the last checkpoint has to do.
    """
    broken = sorted({sample for samples in everyone(broken) for sample in samples})
    if broken or not math.isfinite(norm):
        run.optimizer.zero_grad()
        if turn == 0:
            save(run)
        raise FloatingPointError(
            f"step {run.step}, update {turn + 1}: the loss or its gradient is not finite; samples: "
            f"{', '.join(broken) or 'any of this step'}")


def filler(run: Run) -> ffr.MicroBatch:
    """Return a micro-batch of weight zero on a black clip, which keeps ranks in step."""
    side = 2 * run.prompts.factor
    frames = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    clip = Clip(frames, (0.0, 1.0), (0, 1), 1.0, 2.0, 2)
    prefix = run.prompts.prefix(replace(run.samples[0], media_type="video", clip=clip))
    zero, ids = torch.zeros(1), run.prompts.completion("")
    return ffr.MicroBatch([prefix], [run.prompts.header], [0], [ids[-1:]], zero, zero, zero, [])


# ---------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(run: Run) -> int:
    """Answer the held-out questions greedily: alone and, by --eval_patches, with patches as well.

    A stop is heeded between two batches; then nothing is written, and the signal's number is
    returned, else 0.
    """
    mine, greedy = run.eval_samples[rank()::world_size()], replace(run.sampling, temperature=0.0)
    answers, bad, diagnose = [], run.bad, run.diagnose if run.eval_patches else None
    parts = [mine[i:i + run.eval_prompts] for i in range(0, len(mine), run.eval_prompts)]
    with run.student.gathered():
        for part, following in zip(parts, parts[1:] + [[]]):
            if run.stopper.asked:
                break
            run.loader.submit(part + following)
            groups = [ffr.Group(s, run.prompts.prefix(s)) for s in run.decoded(part)]
            if groups:
                cache = run.student.prefill([group.prefix for group in groups])
                ffr.find(run.student, cache, groups, run.prompts.header, run.score, diagnose,
                         "eval", 1, greedy)
                ffr.fix(groups, diagnose)
                run.reason(cache, groups, "eval", greedy)
                answers += [answer_row(run, group, bool(diagnose)) for group in groups]
    parts, undecodable, stops, taught, unusable = zip(*everyone((
        answers, run.bad - bad, run.stopper.asked, run.taught(), run.unusable)))
    run.bad = bad  # of training alone, so that a run which repeats no evaluation counts alike
    run.note_bad(unusable)
    if rank() == 0 and not any(stops):
        taught = {name: sum(t[name] for t in taught) for name in taught[0]}
        write_answers(run, [row for part in parts for row in part], sum(undecodable), taught,
                      bool(diagnose))
    return max(stops)


def write_answers(run: Run, rows: list[dict], undecodable: int, teacher: dict,
                  patches: bool) -> None:
    """Write eval_answers.jsonl in the order of the data, then the line of eval.jsonl.

    Without that line, which a kill may prevent, the answers are cut by --resume.
    """
    order, n = {sample.id: i for i, sample in enumerate(run.eval_samples)}, max(len(rows), 1)
    rows = sorted(rows, key=lambda row: order[row["id"]])
    total = {"step": run.step, "n": len(rows), "undecodable": undecodable,
             "accuracy": sum(row["accuracy"] for row in rows) / n, "accuracy_with_patches":
             sum(row["patched_accuracy"] for row in rows) / n if patches else None,
             "teacher": teacher}
    append(run.output / "eval_answers.jsonl", jsonl(*rows))
    append(run.output / "eval.jsonl", total)
    if run.tracker:
        run.tracker.send(run.step, {"eval": total})


def answer_row(run: Run, group: ffr.Group, patches: bool) -> dict:
    """Return one held-out question, its answer and, in an evaluation with patches, the chosen."""
    sample, slot = group.sample, group.slots[0]
    row = {"step": run.step, "id": sample.id, "kind": sample.kind, "question": sample.question,
           "gold": sample.answer, "answer": run.answer(slot.first.text),
           "accuracy": slot.first.accuracy, "text": slot.first.text}
    return row | {"patched_answer": run.answer(slot.chosen.text) if patches else None,
                  "patched_accuracy": slot.chosen.accuracy if patches else None}


# ---------------------------------------------------------------------------------------------
# Logs


def log(run: Run, groups: list[ffr.Group], sums: dict, phases: Phases) -> tuple[dict, int]:
    """Write what all ranks did in a step; logs of rollouts go by rank, prompt and slot.

    Returns the metrics, and the number of the signal that asked any rank to stop, else 0.
    """
    asked = [(group.sample, i, slot) for group in groups for i, slot in enumerate(group.slots)
             if slot.diagnosis is not None]
    reasons = Counter(slot.diagnosis.result().reason for *_, slot in asked if slot.patch is None)
    own = [slot for group in groups for slot in group.slots if not slot.off_policy]
    both = [r for slot in own for r in (slot.first, slot.repair) if r is not None]
    means = sums.pop("slots")
    ranks = everyone({
        "totals": measure(groups), "method": run.method.figures(), "sums": sums,
        "seconds": phases.all(), "bad": run.bad,
        "sampled": sum(len(rollout.ids_C) for rollout in both), "memory": peak_memory(run.device),
        "teacher": run.taught(), "stop": run.stopper.asked, "reasons": reasons,
        "readers": Counter(group.sample.clip.reader for group in groups),
        "unusable": run.unusable, "patches": [patch_row(run.step, *one) for one in asked],
        "kept": [kept_row(run, group, means) for group in groups if run.keeps()]})
    row = metrics(run.step, ranks)
    run.note_bad([r["unusable"] for r in ranks])
    if rank() == 0:
        for patch in (patch for r in ranks for patch in r["patches"]):
            append(run.output / "patches.jsonl", patch)
        shown = show(run, [kept for r in ranks for kept in r["kept"]])
        append(run.output / "metrics.jsonl", row)
        if run.tracker:
            run.tracker.send(run.step, row, *shown)
    return row, max(r["stop"] for r in ranks)


def patch_row(step: int, sample: Sample, i: int, slot: ffr.Slot) -> dict:
    """Return one diagnosis, patched or not, as guard.py reads it."""
    diagnosis, repair = slot.diagnosis.result(), slot.repair
    return {"step": step, "sample": sample.id, "slot": i,
            **{name: getattr(diagnosis, name)
               for name in ("status", "reason", "input_tokens", "cache_write_tokens",
                            "cache_read_tokens", "output_tokens")},
            **(asdict(diagnosis.patch) if diagnosis.patch else {}),
            "question": sample.question, "options": sample.options, "answer": sample.answer,
            "response": slot.first.text, "repaired": repair.correct if repair else None}


def kept_row(run: Run, group: ffr.Group, means: dict) -> dict:
    """Return a group as a line of rollouts.jsonl, and the strip of its frames if it is new."""
    sample, frames_F3hw = group.sample, group.sample.clip.frames
    name = f"thumbnails/{digest(sample.id)}.jpg"
    return {"step": run.step, "rank": rank(), "sample": sample.id, "question": sample.question,
            "options": sample.options, "kind": sample.kind, "answer": sample.answer,
            "media": os.path.relpath(sample.media, run.output), "media_type": sample.media_type,
            "times": sample.clip.times, "thumbnails": name,
            "thumbnail_size": strip_size(frames_F3hw),
            "strip": None if (run.output / name).exists() else strip(frames_F3hw),
            "slots": [kept_slot(run, slot, *means.get(id(slot), (None, None)))
                      for slot in group.slots]}


def kept_slot(run: Run, slot: ffr.Slot, entropy: float | None, log_ratio: float | None) -> dict:
    """Return a slot as rollouts.jsonl has it; the parts of a reward by Eq. 8 add up to it."""
    def rollout(made):
        same = ("text", "accuracy", "format", "correct", "finished")
        return made and {**{name: getattr(made, name) for name in same},
                         "answer": run.answer(made.text), "tokens": len(made.ids_C)}

    config, chosen, diagnosis = run.config, slot.chosen, slot.diagnosis and slot.diagnosis.result()
    taxed = chosen is slot.repair
    parts = {"accuracy": chosen.accuracy, "format": chosen.format,
             "kappa": -config.kappa if taxed else 0.0,
             "alignment": config.alignment_weight * slot.alignment if taxed else 0.0}
    by_eq_8 = run.method.compares and run.method.value is ffr.reward
    trained = "trace" if slot.off_policy else "repair" if slot.trained is slot.repair else "first"
    return {"first": rollout(slot.first), "repair": rollout(slot.repair),
            "diagnosis": diagnosis and {"status": diagnosis.status, "reason": diagnosis.reason},
            "patch": slot.patch and asdict(slot.patch),
            "patch_text": slot.patch and render(slot.patch, config.evidence),
            "reward": slot.reward, "parts": parts if by_eq_8 else {}, "advantage": slot.advantage,
            "trained": slot.trained and trained, "entropy": entropy,
            "log_ratio": None if slot.off_policy else log_ratio,
            "staleness": None if slot.off_policy else slot.chosen.staleness}


def show(run: Run, rows: list[dict]) -> tuple:
    """Keep the groups of a step, and write one slot to samples.md on about ten of the kept steps.

    Returns that slot's text and its frames for a tracker; nothing where nothing is kept.
    """
    kept = bool(rows) and keep_rollouts(run, rows)
    slots = [(row, slot) for row in rows for slot in row["slots"] if slot["trained"] != "trace"]
    if not slots:
        return ()
    row, slot = next((pair for pair in slots if pair[1]["repair"]), slots[0])
    text, every = told(row, slot), run.config.keep_rollouts
    if run.step // every % max(1, run.steps // every // 10) == 0:
        append(run.output / "samples.md", text)
    return (text, run.output / row["thumbnails"]) if kept else ()


def told(row: dict, slot: dict) -> str:
    """Return a slot of rollouts.jsonl in Markdown."""
    def tried(name, made):
        quoted = "\n".join("> " + line for line in made["text"].splitlines())
        return [f"{name} (accuracy {made['accuracy']:g})", quoted]

    parts = [f"## step {row['step']}, sample {row['sample']}", row["question"], *row["options"],
             f"gold: {row['answer']}", *tried("first try", slot["first"])]
    if slot["repair"]:
        parts += ["patch", f"> {slot['patch_text'].strip()}", *tried("repair", slot["repair"])]
    parts.append(f"reward {slot['reward']:.3f}, advantage {slot['advantage']:+.3f}")
    return "\n\n".join(parts) + "\n\n"


# ---------------------------------------------------------------------------------------------
# The loop


def plan(config: Config, device: torch.device, dtype: torch.dtype) -> int:
    """Print what a run needs (lab/plan.py), and leave nothing behind."""
    def make(*place):
        run = Run(config, *place)
        run.stopper.close()  # a plan stops at once
        return run

    with TemporaryDirectory() as folder:  # sampling ahead takes no more memory or time
        config = replace(config, output=folder, frame_cache=folder, decode_workers=0, ahead=0,
                         track="none")
        say(planned(make, update, device, dtype))
    return 0


def train(config: Config, device: torch.device, dtype: torch.dtype) -> int:
    """Run `config` to its end; return 0, or the number of the signal that stopped it first."""
    folder = output = None
    if rank() == 0:
        folder = Folder(Path(config.output), "config.json", config.resume) if config.output else \
            Folder.numbered(f"runs/{config.method}", "config.json")
    try:
        output, = everyone(folder and str(folder.path))[:1]
        run = Run(replace(config, output=output), device, dtype)
        if folder:
            folder.keep()
        return to_the_end(run)
    except BaseException as error:
        if output and (Path(output) / "config.json").exists():
            error.add_note(goes_on(output))
        raise
    finally:
        if folder:
            folder.close()


def to_the_end(run: Run) -> int:
    """Take the steps that are left; return 0, or the number of the signal that stopped the run."""
    config, stopped, rows = run.config, 0, []
    say(f"{config.method}: {len(run.samples)} samples, {run.steps} steps of "
        f"{config.batch_prompts * world_size()} prompts; {changed(config)}")
    run.taught()  # the connection check is no step's
    bar = tqdm(total=run.steps, initial=run.step, disable=rank() != 0, desc=config.method)
    try:
        while not (stopped := evaluate_if_due(run)) and run.step < run.steps:
            phases = Phases(run.device)
            groups = run.method.fill(run, run.step, phases)
            sums = update(run, groups, phases)
            row, stopped = log(run, groups, sums, phases)
            run.step += 1
            bar.set_postfix_str(postfix(row), refresh=False)
            bar.update()
            rows.append(row)
            if len(rows) == FIRST_STEPS:
                warn(rows)
            if stopped or run.step == run.steps or run.step % config.save_every == 0:
                save(run)
                if not stopped and run.step < run.steps:
                    write_page(run)
            if stopped:
                break
        require(stopped or any(everyone(run.decoded_any)), "not one file of the run could be read: "
                f"{run.output / 'bad_samples.jsonl'} says why")
        if stopped and run.step:  # perhaps within an evaluation, between two checkpoints
            save(run)
    finally:
        bar.close()
        run.loader.close()
        run.stopper.close()
        if run.teacher:
            run.teacher.close()
    write_page(run)
    say(conclusion(run, stopped))
    return stopped


def write_page(run: Run) -> None:
    """Write the page of the run as far as it is; a run goes on also where that cannot be."""
    if rank() == 0 and not run.config.no_report:
        from lab import report  # and with it the benchmarks, for nothing else
        try:
            report.write([run.output])
        except (ValueError, OSError) as error:
            say(f"\nno page: {error}")


def evaluate_if_due(run: Run) -> int:
    """Evaluate at the start, every --eval_every steps and at the end, where eval.jsonl lacks it.

    Returns the number of the signal that stopped it, else 0.
    """
    every, step = run.config.eval_every, run.step
    due = step in (0, run.steps) or every and step % every == 0
    if not run.eval_samples or not due:
        return 0
    done = {row["step"] for row in read_log(run.output / "eval.jsonl")} if rank() == 0 else None
    return 0 if step in everyone(done)[0] else evaluate(run)


def warn(rows: list[dict]) -> None:
    """Say what the first steps show to be wrong: no answer in its format, a teacher that fails."""
    formats = [row["format"] for row in rows if row["format"] is not None]
    if formats and not any(formats):
        say(f"\nwarning: no completion of {len(rows)} steps kept the <think>...<answer> format: is "
            "--template the wording that the student was trained with?")
    asked = sum(row["teacher"]["calls"] for row in rows)
    reasons = sum((Counter(row["unpatched_by_reason"]) for row in rows), Counter())
    if reasons and 2 * reasons.total() > asked:
        say(f"\nwarning: {reasons.total()} of {asked:.0f} diagnoses brought no patch, mostly: "
            f"{reasons.most_common(1)[0][0]}")


def conclusion(run: Run, stopped: int) -> str:
    """Return what became of a run: accuracy and help, what could not be read, what to type next."""
    evals, rows, answers = (read_log(run.output / f"{name}.jsonl")
                            for name in ("eval", "metrics", "eval_answers"))
    bad = read_log(run.output / "bad_samples.jsonl")
    lines = summary(evals, rows, answers) if evals and rows and not stopped else []
    if bad:
        lines.append(f"{len({row['id'] for row in bad})} samples could not be used as they are: "
                     + str(run.output / "bad_samples.jsonl"))
    if stopped:
        return "\n".join([*lines, f"stopped after step {run.step}", goes_on(run.output)])
    if (page := run.output / "report.html").exists():
        lines.append(f"to look at: {page}")
    newest = newest_checkpoint(run.output)
    return "\n".join([*lines, f"finished: {run.output}; to use it: --model {newest}"])


def goes_on(output: str | Path) -> str:
    """Return what of a run is saved and the command that goes on with it, as one would type it."""
    newest = newest_checkpoint(output)
    flags = sys.argv[1:] if Path(output) == TOY_WARM else ["--resume", "--output", str(output)]
    return (f"{output} is saved up to {newest.name if newest else 'its start'}; to go on: "
            + typed(*flags))


def toy_config(config: Config, given: set[str]) -> Config:
    """Return the toy world's settings, where a flag was not given."""
    settings = {**TOY_WORLD, **TOY, "model": str(TOY_STUDENT)}
    return replace(config, **{name: settings[name] for name in settings if name not in given})


def make_toy_world(device: torch.device, dtype: torch.dtype) -> None:
    """Make the toy world and its warm student where they are missing, one command at a time."""
    with waiting_for(TOY_FOLDER) if rank() == 0 else nullcontext():
        if rank() == 0 and not (TOY_FOLDER / "heldout.json").exists():
            say(f"making the toy world in {TOY_FOLDER}")
            toy.make(TOY_FOLDER)
        everyone(None)
        if not TOY_STUDENT.exists():
            say("warming the student up")
            begun = (TOY_WARM / "config.json").exists()
            warming = Config(**TOY_WORLD | TOY_WARMING, resume=begun)
            if stopped := train(warming, device, dtype):
                sys.exit(128 + stopped)


# What a run may go on with other values of: where files lie, logs, workers, limits of time.
FREE = {"output", "resume", "model", "data", "eval_data", "video_root", "template", "teacher_url",
        "teacher_cache", "teacher_price", "teacher_budget", "teacher_timeout",
        "teacher_step_timeout", "save_every", "keep_checkpoints", "eval_every", "decode_workers",
        "decode_seconds", "frame_cache", "frame_cache_gb", "keep_rollouts", "keep_rollouts_mb",
        "no_report", "track"}


def last_output(method: str) -> str:
    """Return the last runs/METHOD-N."""
    names = (path.name.rpartition("-") for path in Path("runs").glob(f"{method}-*"))
    last = max((int(n) for stem, _, n in names if stem == method and n.isdigit()), default=0)
    return f"runs/{method}-{last}"


def main(argv: list[str] | None = None) -> None:
    """Train what the command line says."""
    config, given = parse(Config, argv, __doc__.split("\n\n")[0])
    with one_sentence("train.py", LESS_MEMORY):
        toy_run = not config.resume and not config.model
        require(not config.plan or not given & {"resume", "output"},
                "--plan is for a run that has not begun, and writes nothing: without --resume and "
                "--output")
        if config.resume:
            config = replace(config, output=config.output or last_output(config.method))
            config = going_on(config, given, FREE)
        elif toy_run:
            require(not given & {"data", "video_root"}, "--data and --video_root need --model: "
                    "without, the toy world is trained on")
            config = toy_config(config, given)
            require(not config.plan or TOY_STUDENT.exists(), "--plan writes nothing, and the toy "
                    "world is not there yet: python train.py makes it")
        else:
            check_model(config.model)
            require(not (Path(config.model) / ADAPTER).exists(), f"--model {config.model} is an "
                    "adapter: train whole weights, which --merge saves (docs/performance.md)")
            config = asked_with(config, given)
        refuse_useless(config, given)
        check(config)
        device, dtype = start_processes(config.dtype, config.cuda_graphs, trains=True,
                                        offload=config.offload)
        if toy_run and not config.plan:
            make_toy_world(device, dtype)
        stopped = (plan if config.plan else train)(config, device, dtype)
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
