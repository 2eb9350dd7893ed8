"""Train a student with FFR (or a method it is compared with) and write down everything a run does.

    python train.py                                       the toy world, end to end on this machine
    torchrun --nproc_per_node 8 train.py --model M --data D --video_root V --teacher anthropic
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:PORT train.py ...

A step: the method (methods.py) fills groups of prompts, samples and repairs (no rank waits for
another meanwhile), `update` trains on the chosen rollouts. Ranks meet only in `everyone` and inside
FSDP, equally often on every rank. Every random number derives from (seed, step, sample), so that a
resumed run repeats the interrupted one.
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from tqdm import tqdm

import data
import ffr
import methods
import reward
import teacher
import toy
from model import Student
from teacher import TeacherConfig


def flag(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every flag of the command line; the defaults are the paper's Table 8."""
    model: str = flag("", "checkpoint folder or hub name; without it, the toy world")
    data: str = flag("", "questions, Video-R1's JSON or JSONL")
    video_root: str = flag("", "folder of the media, or a JSON map from data_source to folder")
    eval_data: str = flag("", "held-out questions, answered greedily at the start and the end")
    eval_every: int = flag(0, "steps between evaluations; 0: start and end only")
    output: str = flag("", "folder of the run (runs/METHOD-1, -2, ...)")
    method: str = flag("ffr", "what to train with: see methods.py", tuple(methods.METHODS))
    # the student's rollouts
    rollouts: int = flag(8, "G, first tries per prompt")
    max_completion: int = flag(1024, "tokens of one completion")
    max_prompt: int = flag(16384, "tokens of one prompt; a sample that may exceed it is refused")
    frames: int = flag(16, "frames of a video")
    max_pixels: int = flag(128 * 28 * 28, "pixels of a video frame")
    max_image_pixels: int = flag(401408, "pixels of an image")
    temperature: float = flag(1.0, "sampling temperature")
    top_p: float = flag(0.95, "nucleus of sampling")
    template: str = flag("", "file with the question's wording: {question} and {answer_format}")
    # the teacher
    teacher: str = flag("annotated", "who writes the patches", ("annotated", "anthropic"))
    evidence: str = flag("text", "what of a patch the student sees", ("none", "text", "frames"))
    no_gt: bool = flag(False, "the teacher does not see the gold answer")
    teacher_url: str = flag("", "server that speaks the Messages API; empty: Anthropic's")
    teacher_model: str = flag(TeacherConfig.model, "model asked for there")
    teacher_rounds: int = flag(TeacherConfig.rounds, "answers until it has to submit")
    teacher_prompt: str = flag("analysis,negative,tools", "which prompt blocks it reads (Table 5)")
    teacher_cache: str = flag("", "folder of answers already paid for (OUTPUT/teacher)")
    teacher_price: str = flag("", "dollars for a million tokens in and out, as 3/15")
    teacher_budget: float = flag(0.0, "dollars after which teaching ends; 0: no limit")
    teacher_timeout: float = flag(TeacherConfig.timeout, "seconds for one diagnosis")
    teacher_step_timeout: float = flag(TeacherConfig.step_timeout, "seconds for a step's")
    blind_test: int = flag(0, "answers without the video that check a patch for leaks; 0: none")
    # reward and loss
    kappa: float = flag(0.3, "κ, the patch tax of Eq. 8")
    alignment_weight: float = flag(0.0, "reward of a repair that refers to the patch's evidence")
    pass_mark: float = flag(0.5, "accuracy from which a graded answer counts as right")
    beta: float = flag(0.04, "weight of the KL to the reference copy; 0 keeps no copy")
    clip_low: float = flag(0.2, "ε below 1")
    clip_high: float = flag(0.2, "ε above 1")
    loss_norm: str = flag("token", "what the loss is averaged over; constant: --max_completion",
                          ("token", "sequence", "constant"))
    no_std: bool = flag(False, "advantages without division by the group's deviation (Dr. GRPO)")
    ratio: str = flag("token", "sequence: one ratio per completion (GSPO)", ("token", "sequence"))
    dynamic_sampling: int = flag(0, "times a step tries fresh prompts for all-equal groups (DAPO)")
    score_under: str = flag("observation", "plain: what repairs got right is taught without patch",
                            ("observation", "plain"))
    select: str = flag("slot", "slot: Eq. 7; best: train the group's best only", ("slot", "best"))
    train_on: str = flag("chosen", "original: the release's gradient on the failed tokens",
                         ("chosen", "original"))
    # single methods
    length_low: int = flag(320, "tgrpo: shortest answer with a length bonus")
    length_high: int = flag(512, "tgrpo: longest")
    shape_gamma: float = flag(0.1, "luffy, replay: γ of r / (r + γ)")
    replay_share: float = flag(0.5, "replay: share of a step's prompts from the buffer")
    replay_start: float = flag(0.35, "replay: accuracy of a batch from which it begins")
    sd_lambda: float = flag(0.5, "rlsd, visd, ffr_visd: λ, weight of the token credit at step 0")
    sd_horizon: int = flag(0, "steps until λ is 0 (rlsd 60, visd and ffr_visd 600)")
    sd_clip: float = flag(0.2, "largest change of a token's credit")
    sd_sync: int = flag(20, "rlsd: steps between copies of the policy")
    sd_ema: float = flag(0.01, "visd: what the copy takes of the policy each step")
    sd_topk: int = flag(16, "visd: tokens of the support; 0: the sampled one's own log-probs")
    # optimisation
    lr: float = flag(5e-6, "peak learning rate, cosine to zero")
    warmup_steps: int = flag(0, "steps of linear rise to it")
    weight_decay: float = flag(0.01, "of matrices; norms and biases have none")
    max_grad_norm: float = flag(5.0, "gradient norm clip")
    steps: int = flag(0, "optimizer steps; 0: as many as --epochs needs")
    epochs: float = flag(1.0, "passes over the data")
    batch_prompts: int = flag(1, "prompts per step and process")
    updates_per_batch: int = flag(1, "updates per group; more than one makes the clip matter")
    micro_tokens: int = flag(16384, "packed tokens per forward and backward")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    seed: int = flag(0, "of the data order and of every rollout")
    # the run
    save_every: int = flag(100, "steps between checkpoints")
    keep_checkpoints: int = flag(2, "newest checkpoints kept")
    resume: bool = flag(False, "go on from the newest checkpoint of --output")
    attention: str = flag("auto", "flash: the flash-attn package; sdpa: torch's own",
                          ("auto", "flash", "sdpa"))
    dtype: str = flag("auto", "compute type; auto: bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "bfloat16", "float32"))
    cuda_graphs: bool = flag(False, "sample with CUDA graphs (not yet tried on a GPU)")
    decode_workers: int = flag(2, "video decoding processes per rank")
    decode_seconds: float = flag(60.0, "time limit for decoding one file")
    frame_cache: str = flag("", "folder of decoded frames (OUTPUT/frames)")
    frame_cache_gb: float = flag(20.0, "size limit of that folder")


# What `python train.py` runs: flags not given on the command line take these.
TOY_FOLDER = Path("runs/toy")
TOY_SEEN = dict(max_completion=48, frames=16, max_pixels=56 * 56)
TOY_WARM = dict(method="sft", steps=60, batch_prompts=24, lr=1e-3, warmup_steps=5,
                max_grad_norm=1.0, save_every=10**6, **TOY_SEEN)
TOY = dict(steps=60, batch_prompts=8, lr=4e-4, beta=0.0, save_every=20, **TOY_SEEN)
EVAL_PROMPTS = 32  # prompts decoded together in an evaluation
PREFIX_BYTES = 2**30  # pixels of processed prompts kept in memory


def parse(argv):
    """Command line to (Config, names of the flags that were given)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in fields(Config):
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})",
                            **({"action": "store_true"} if f.type is bool else kind))
    given = vars(parser.parse_args(argv))
    return Config(**given), set(given)


def check(config):
    """Refuse settings that cannot work, each in one sentence naming the flag."""
    for name in ("rollouts", "max_completion", "frames", "max_pixels", "batch_prompts", "epochs",
                 "lr", "updates_per_batch", "micro_tokens", "save_every", "keep_checkpoints",
                 "shape_gamma", "sd_sync"):
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name} must be positive, got {getattr(config, name)}")
    if config.frames % 2:
        raise ValueError(f"--frames must be even (temporal patches of two), got {config.frames}")
    if config.temperature <= 0 or not 0 < config.top_p <= 1:
        raise ValueError("--temperature must be above 0 and --top_p in (0, 1]")
    if not config.data:
        raise ValueError("--data is missing: a Video-R1 JSON or JSONL file")
    if methods.METHODS[config.method].compares and config.rollouts < 2:
        raise ValueError("--rollouts must be at least 2: advantages compare a group's rollouts")
    if config.score_under == "plain" and (config.method not in ("ffr", "ffr_visd")
                                          or config.train_on == "original"):
        raise ValueError("--score_under plain is for repairs that are trained: --method ffr or "
                         "ffr_visd, --train_on chosen")
    if not all(0 <= share <= 1 for share in (config.replay_share, config.sd_lambda, config.sd_ema)):
        raise ValueError("--replay_share, --sd_lambda and --sd_ema are shares between 0 and 1")
    if min(config.dynamic_sampling, config.sd_horizon, config.sd_topk) < 0:
        raise ValueError("--dynamic_sampling, --sd_horizon and --sd_topk must not be negative")
    if not set(config.teacher_prompt.split(",")) <= {"analysis", "negative", "tools", ""}:
        raise ValueError("--teacher_prompt is a list of analysis, negative and tools")


# ---------------------------------------------------------------------------------------------
# Processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone(value):
    """The value of every rank, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def start_processes(config):
    """The device and compute type; torch.distributed where torchrun or bfloat16 asks for it.

    bfloat16 keeps its fp32 master weights in FSDP, also on a single process.
    """
    cuda = torch.cuda.is_available()
    if config.cuda_graphs and not cuda:
        raise ValueError("--cuda_graphs needs a CUDA device")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    name = ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype
    dtype, backend = getattr(torch, name), "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif dtype != torch.float32:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, dtype


def say(text):
    if rank() == 0:
        print(text, flush=True)


class Stopper:
    """SIGTERM and Ctrl-C ask for a stop after the step; a second one stops at once."""

    def __init__(self):
        self.asked, numbers = False, (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._ask) for number in numbers}

    def _ask(self, number, frame):
        if self.asked:
            signal.default_int_handler(number, frame)
        self.asked = True

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Phases:
    """Seconds per phase of a step; what no phase claims is `other`, so that they add up."""

    def __init__(self, device):
        self.device, self.seconds = device, {}
        self.start = self._now()

    @contextmanager
    def __call__(self, name):
        begin = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - begin

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def all(self):
        step = self._now() - self.start
        return {**self.seconds, "other": step - sum(self.seconds.values()), "step": step}


# ---------------------------------------------------------------------------------------------
# A run


class Run:
    """What the functions below share: settings, data, teacher, student, optimizer, folder."""

    everyone = staticmethod(everyone)

    def __init__(self, config, device, dtype):
        check(config)
        self.config, self.device, self.dtype = config, device, dtype
        self.output, self.missing = Path(config.output), []
        self.samples, self.eval_samples = self._load(config.data), self._load(config.eval_data)
        self.method = methods.METHODS[config.method](config)
        self.teacher = make_teacher(config) if self.method.asks else None
        if rank() == 0:
            self._start_folder()
        everyone(None)
        self._load_student()
        self.loader = data.ClipLoader(
            frames=config.frames, max_pixels=config.max_pixels, factor=self.prompts.factor,
            max_image_pixels=config.max_image_pixels, workers=config.decode_workers,
            time_limit=config.decode_seconds,
            cache=data.FrameCache(config.frame_cache or self.output / "frames",
                                  int(config.frame_cache_gb * 2**30)))
        self.sampling = ffr.Sampling(config.max_completion, config.temperature, config.top_p,
                                     config.pass_mark)
        per_step = config.batch_prompts * world_size()
        self.steps = config.steps or max(1, int(config.epochs * len(self.samples)) // per_step)
        self.prefixes, self.prefix_bytes = OrderedDict(), 0
        self.epoch, self.step, self.bad, self.stats, self.stopper = None, 0, 0, {}, Stopper()
        if config.resume:
            resume(self)

    def _load(self, path):
        """The samples of a file whose media exist; the others are named and left out."""
        if not path:
            return []
        samples = data.load_samples(path, self.config.video_root)
        for sample in samples:
            try:
                reward.check_gold(sample.kind, sample.answer, sample.options)
            except ValueError as error:
                raise ValueError(f"sample {sample.id}: {error}") from None
        missing = data.missing_media(samples)
        if len(missing) == len(samples):
            raise ValueError(f"{path}: not one media file was found; is --video_root "
                             f"{self.config.video_root!r} right?")
        if missing:
            say(f"{path}: left out of {len(samples)}: {data.missing_sentence(missing)}")
            self.missing += missing
        absent = {sample.id for sample in missing}
        return [sample for sample in samples if sample.id not in absent]

    def _start_folder(self):
        self.output.mkdir(parents=True, exist_ok=True)
        if not self.config.resume:
            if (self.output / "config.json").exists():
                raise ValueError(f"--output {self.output} already holds a run: add --resume to go "
                                 "on with it, or name another folder")
            for sample in self.missing:
                data.record_bad(self.output / "bad_samples.jsonl", sample, "no such file")
        (self.output / "config.json").write_text(json.dumps(asdict(self.config), indent=1))

    def _load_student(self):
        config = self.config

        def load(**options):
            return Student.load(config.model, self.device, self.dtype, config.attention,
                                recompute=self.device.type == "cuda", **options)

        self.student = load(freeze_vision=config.freeze_vision, cuda_graphs=config.cuda_graphs)
        compared = config.beta > 0 and self.method.compares
        self.reference = load(trainable=False) if compared else None
        self.method.start(load)
        template = Path(config.template).read_text() if config.template else None
        self.prompts = data.Prompts(self.student.processor, template)
        self.student.text = self.prompts.text
        for sample in [*self.samples, *self.eval_samples]:
            bound = self.prompts.prompt_bound(sample, config.frames, config.max_pixels,
                                              config.max_image_pixels)
            if bound > config.max_prompt:
                raise ValueError(f"sample {sample.id}: its prompt may take {bound} tokens, more "
                                 f"than --max_prompt {config.max_prompt}")
        self.optimizer = make_optimizer(self.student, config)

    # -- data

    def sample_at(self, position):
        """The sample at a place of the endless stream of shuffled epochs."""
        epoch, index = divmod(position, len(self.samples))
        if epoch != self.epoch:
            order = ffr.noise(f"{self.config.seed}/order/{epoch}", 1, len(self.samples))
            self.epoch, self.order = epoch, order[0].argsort().tolist()
        return self.samples[self.order[index]]

    def step_samples(self, step):
        """This rank's samples of a step; together the ranks take the next ones of the stream."""
        first = (step * world_size() + rank()) * self.config.batch_prompts
        return [self.sample_at(first + b) for b in range(self.config.batch_prompts)]

    def fetch(self, step):
        """Groups of a step's samples that could be decoded, while the next step's are begun."""
        wanted = self.step_samples(step)
        self.loader.submit(wanted)
        if step + 1 < self.steps:
            self.loader.submit(self.step_samples(step + 1))
        return self.groups(wanted)

    def groups(self, samples):
        """Empty groups of the samples that can be decoded."""
        return [ffr.Group(sample, self.prefix(sample)) for sample in self.decoded(samples)]

    def others(self, groups, count, key):
        """Groups of `count` samples that are in none of `groups`, drawn by `key`."""
        seen = {group.sample.id for group in groups}
        order = ffr.noise(key, 1, len(self.samples))[0].argsort().tolist()
        fresh = [self.samples[i] for i in order if self.samples[i].id not in seen]
        return self.groups(fresh[:count])

    def decoded(self, wanted):
        """The samples with their clips; the ones that cannot be decoded are recorded, left out."""
        loaded = []
        for sample in wanted:
            ready, reason = self.loader.get(sample)
            if ready is not None:
                loaded.append(ready)
            else:
                self.bad += 1
                data.record_bad(self.output / "bad_samples.jsonl", sample, reason)
        return loaded

    def prefix(self, sample):
        """The sample's prompt as a segment, processed once while it fits in memory."""
        key = sample.media, sample.id
        if key not in self.prefixes:
            self.prefixes[key] = self.prompts.prefix(sample)
            self.prefix_bytes += self.prefixes[key].pixels.nbytes
        self.prefixes.move_to_end(key)
        while self.prefix_bytes > PREFIX_BYTES and len(self.prefixes) > 1:
            self.prefix_bytes -= self.prefixes.popitem(last=False)[1].pixels.nbytes
        return self.prefixes[key]

    def taught(self):
        """What the teacher did since this was last asked."""
        stats = self.teacher.stats() if self.teacher else {}
        before, self.stats = self.stats, stats
        return {name: count - before.get(name, 0) for name, count in stats.items()}

    # -- the three phases of ffr.py, with this run's collaborators

    def find(self, cache, groups, key, rollouts, sampling):
        ffr.find(self.student, cache, groups, self.prompts.header, self.score,
                 self.teacher.submit if self.method.repairs else None, key, rollouts, sampling)

    def reason(self, cache, groups, key, sampling):
        ffr.reason(self.student, cache, groups, self.write, self.score, teacher.alignment, key,
                   sampling)

    def score(self, sample, text):
        """(accuracy, format, whether the answer is of an exact kind) of a completion's text."""
        accuracy = reward.accuracy(sample.kind, text, sample.answer, sample.options)
        return accuracy, reward.format_reward(text), sample.kind in reward.EXACT_KINDS

    def answer(self, text):
        """The answer in a completion's text, or None."""
        return reward.parse_answer(text)

    def write(self, sample, patch):
        """A patch as the segment between question and completion."""
        images = teacher.patch_images(patch, sample.clip.frames, self.config.evidence)
        return self.prompts.suffix(teacher.render(patch, self.config.evidence), images)


def make_teacher(config):
    """The run's teacher; a service that does not answer is found out here."""
    if config.teacher == "annotated":
        return teacher.Annotated()
    blocks = config.teacher_prompt.split(",")
    settings = TeacherConfig(
        url=config.teacher_url, model=config.teacher_model, rounds=config.teacher_rounds,
        no_gt=config.no_gt, analysis="analysis" in blocks, negative="negative" in blocks,
        tools="tools" in blocks, blind_test=config.blind_test, price=config.teacher_price,
        budget=config.teacher_budget, timeout=config.teacher_timeout,
        step_timeout=config.teacher_step_timeout,
        cache=config.teacher_cache or f"{config.output}/teacher")
    try:
        service = teacher.Service(settings)
        if rank() == 0:
            service.ping()
    except RuntimeError as error:
        raise ValueError(f"--teacher anthropic: {error}") from None
    return service


def make_optimizer(student, config):
    """AdamW; weight decay on matrices only."""
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


# ---------------------------------------------------------------------------------------------
# One step


def update(run, groups, phases):
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
    sums = {"lr": lr}
    for turn in range(config.updates_per_batch):
        with phases("train"):
            one = backward(run, batches, entropy=turn == 0)
            norm = torch.nn.utils.clip_grad_norm_(run.student.parameters(), config.max_grad_norm)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            stop_if_broken(run, one.pop("broken"), norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        if turn == 0:
            sums.update(one, grad_norm=norm)
    run.method.after(run, groups)
    return sums


def score(student, batch, config, entropy=False):
    return student(batch.prefixes, batch.suffixes, batch.owners, batch.completions,
                   config.temperature, entropy)


def backward(run, batches, entropy):
    """Gradients of the step's loss; sums over this rank's tokens, and samples of broken parts."""
    config, sums = run.config, {"loss": 0.0, "broken": []}
    for batch in batches:
        logp_T, entropy_T = score(run.student, batch, config, entropy)
        loss, added = ffr.loss(logp_T, batch, config.clip_low, config.clip_high, config.beta,
                               run.method.surrogate)
        (loss * world_size()).backward()  # FSDP averages over ranks, the objective sums
        if not math.isfinite(loss.item()):
            sums["broken"] += [group.sample.id for group, _ in batch.members]
        if batch.members:  # fillers do not count
            added |= {"loss": loss.item(), "entropy": entropy_T.sum().item() if entropy else 0.0}
            for name, value in added.items():
                sums[name] = sums.get(name, 0.0) + value
    return sums


def stop_if_broken(run, broken, norm):
    """A loss or gradient that is not finite ends the run before it reaches the weights."""
    broken = sorted({sample for samples in everyone(broken) for sample in samples})
    if broken or not math.isfinite(norm):
        run.optimizer.zero_grad()
        save(run)
        raise FloatingPointError(
            f"step {run.step}: the loss or its gradient is not finite; saved as before the update; "
            f"samples: {', '.join(broken) or 'any of this step'}")


def filler(run):
    """A micro-batch of weight zero on a black clip; it keeps this rank's collectives in step."""
    side = 2 * run.prompts.factor
    frames = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    clip = data.Clip(frames, (0.0, 1.0), (0, 1), 1.0, 2.0, 2)
    prefix = run.prompts.prefix(replace(run.samples[0], media_type="video", clip=clip))
    zero, ids = torch.zeros(1), run.prompts.completion("")
    return ffr.MicroBatch([prefix], [run.prompts.header], [0], [ids[-1:]], zero, zero, zero, [])


# ---------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(run):
    """Greedy accuracy on the held-out questions: alone, and with a patch for each failed try."""
    mine, greedy = run.eval_samples[rank()::world_size()], replace(run.sampling, temperature=0.0)
    totals, bad = [0, 0.0, 0.0], run.bad
    parts = [mine[i:i + EVAL_PROMPTS] for i in range(0, len(mine), EVAL_PROMPTS)]
    with run.student.gathered():
        for part, following in zip(parts, parts[1:] + [[]]):
            run.loader.submit(part + following)
            groups = [ffr.Group(s, run.prompts.prefix(s)) for s in run.decoded(part)]
            if groups:
                cache = run.student.prefill([group.prefix for group in groups])
                run.find(cache, groups, "eval", 1, greedy)
                ffr.fix(groups)
                run.reason(cache, groups, "eval", greedy)
                slots = [group.slots[0] for group in groups]
                found = (len(slots), sum(slot.first.accuracy for slot in slots),
                         sum(slot.chosen.accuracy for slot in slots))
                totals = [a + b for a, b in zip(totals, found)]
    n, right, patched, bad = (sum(x) for x in zip(*everyone((*totals, run.bad - bad))))
    row = {"step": run.step, "n": n, "undecodable": bad, "accuracy": right / max(n, 1),
           "accuracy_with_patches": patched / max(n, 1) if run.method.repairs else None}
    if rank() == 0:
        append(run.output / "eval.jsonl", row)
    return row


# ---------------------------------------------------------------------------------------------
# Logs


def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def log(run, groups, sums, phases):
    """One line of metrics.jsonl for all ranks, this rank's lines of patches.jsonl, and samples.md.

    Returns the metrics, and whether any rank was asked to stop.
    """
    for group in groups:
        for i, slot in enumerate(group.slots):
            if slot.diagnosis is not None:
                append(run.output / "patches.jsonl", patch_row(run.step, group.sample, i, slot))
    own = [(g.sample, s) for g in groups for s in g.slots if not s.off_policy]
    both = [r for _, slot in own for r in (slot.first, slot.repair) if r is not None]
    ranks = everyone({
        "totals": ffr.measure(groups), "method": run.method.figures(), "sums": sums,
        "seconds": phases.all(), "bad": run.bad,
        "sampled": sum(len(rollout.ids_C) for rollout in both), "memory": peak_memory(run.device),
        "teacher": run.taught(), "stop": run.stopper.asked})
    row = metrics(run.step, ranks)
    if rank() == 0:
        append(run.output / "metrics.jsonl", row)
        if run.step % max(1, run.steps // 10) == 0 and own:
            write_sample(run, own)
    return row, any(r["stop"] for r in ranks)


def metrics(step, ranks):
    """The line of metrics.jsonl from what every rank counted; a mean over nothing is null.

    The seconds are those of the slowest rank.
    """
    def ratio(name, part="totals"):
        parts = [r[part].get(name, (0, 0)) for r in ranks]
        count = sum(n for _, n in parts)
        return sum(total for total, _ in parts) / count if count else None

    def add(name, part="sums"):
        return sum(r[part].get(name, 0) for r in ranks)

    tokens = max(add("tokens"), 1)
    kinds = {name[12:] for r in ranks for name in r["totals"] if name.startswith("repair_rate/")}
    counted = {kind: sum(r["totals"].get(f"repair_rate/{kind}", (0, 0))[1] for r in ranks)
               for kind in sorted(kinds)}
    names = dict.fromkeys(name for r in ranks for name in r["seconds"])
    seconds = max((r["seconds"] for r in ranks), key=lambda s: s["step"])
    sampling = seconds.get("decode", 0.0) + seconds.get("repair", 0.0)
    means = ("reward", "accuracy", "format", "intervention_ratio", "repair_rate", "chosen_accuracy",
             "alignment", "advantage_zero_fraction", "completion_length", "finished")
    return {
        "step": step, "loss": add("loss"), **{name: ratio(name) for name in means},
        "repair_rate_by_error": {kind: ratio(f"repair_rate/{kind}") for kind in counted},
        "error_types": counted, "kl": add("kl") / tokens, "entropy": add("entropy") / tokens,
        "clip_fraction": add("clipped") / tokens, "logp_mismatch": add("mismatch") / tokens,
        "grad_norm": ranks[0]["sums"]["grad_norm"], "lr": ranks[0]["sums"]["lr"],
        **{name: ratio(name, "method") for name in ranks[0]["method"]},
        "bad_samples": sum(r["bad"] for r in ranks),
        "teacher": {name: add(name, "teacher") for name in ranks[0]["teacher"]},
        "tokens_per_second": sum(r["sampled"] for r in ranks) / (sampling or 1.0),
        "peak_memory_gb": max(r["memory"] for r in ranks),
        "seconds": {name: seconds.get(name, 0.0) for name in names}}


def peak_memory(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def patch_row(step, sample, i, slot):
    """One diagnosis, patched or not, as `teacher.py audit` reads it."""
    diagnosis, repair = slot.diagnosis.result(), slot.repair
    return {"step": step, "sample": sample.id, "slot": i,
            **{name: getattr(diagnosis, name)
               for name in ("status", "reason", "input_tokens", "output_tokens")},
            **(asdict(diagnosis.patch) if diagnosis.patch else {}),
            "question": sample.question, "options": sample.options, "answer": sample.answer,
            "response": slot.first.text, "repaired": repair.correct if repair else None}


def write_sample(run, slots):
    """A whole slot to read, a repaired one where there is one."""
    sample, slot = next((pair for pair in slots if pair[1].repair is not None), slots[0])

    def quote(text):
        return "\n".join("> " + line for line in text.splitlines())

    parts = [f"## step {run.step}, sample {sample.id}", sample.question, *sample.options,
             f"gold: {sample.answer}", f"first try (accuracy {slot.first.accuracy:g})",
             quote(slot.first.text)]
    if slot.repair is not None:
        parts += ["patch", quote(teacher.render(slot.patch, run.config.evidence)),
                  f"repair (accuracy {slot.repair.accuracy:g})", quote(slot.repair.text)]
    parts.append(f"reward {slot.reward:.3f}, advantage {slot.advantage:+.3f}")
    with open(run.output / "samples.md", "a") as file:
        file.write("\n\n".join(parts) + "\n\n")


# ---------------------------------------------------------------------------------------------
# Checkpoints


def save(run):
    """A checkpoint of the run after `run.step` steps: complete under its name, or absent.

    Hugging Face weights and processor for everybody; to go on from, training_state/ (fp32 weights,
    optimizer, the method's copy) and what the method keeps on each rank. There is no random state:
    every random number derives from (seed, step, sample).
    """
    folder = run.output / "checkpoints" / f"step-{run.step:06d}"
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    everyone(None)
    run.student.save(partial, run.dtype)
    dcp.save(training_state(run), no_dist=not dist.is_initialized(),
             checkpoint_id=partial / "training_state")
    if (state := run.method.state()) is not None:
        torch.save(state, partial / f"method-{rank()}.pt")
    bad = sum(everyone(run.bad))
    if rank() == 0:
        progress = {"step": run.step, "processes": world_size(), "bad_samples": bad}
        (partial / "progress.json").write_text(json.dumps(progress))
        partial.rename(folder)
        for old in sorted(folder.parent.glob("step-??????"))[:-run.config.keep_checkpoints]:
            shutil.rmtree(old)
    everyone(None)


def training_state(run):
    """Everything that is sharded."""
    weights, optimizer = get_state_dict(run.student, run.optimizer)
    copy = {"copy": get_model_state_dict(run.method.copy)} if run.method.copy else {}
    return {"weights": weights, "optimizer": optimizer, **copy}


def newest_checkpoint(output):
    return max((Path(output) / "checkpoints").glob("step-??????"), default=None)


def resume(run):
    """Go on from the newest checkpoint; log lines of steps that will be repeated are cut."""
    folder = newest_checkpoint(run.output)
    if folder is None:
        say(f"{run.output} has no checkpoint yet: starting from the beginning")
        progress = {"step": 0, "bad_samples": 0}
    else:
        progress = json.loads((folder / "progress.json").read_text())
        if progress["processes"] != world_size():
            raise ValueError(f"{folder} was written by {progress['processes']} processes: resume "
                             f"with as many, not {world_size()}")
        own = folder / f"method-{rank()}.pt"
        run.method.resume(progress["step"], torch.load(own) if own.exists() else None)
        state = training_state(run)
        dcp.load(state, no_dist=not dist.is_initialized(), checkpoint_id=folder / "training_state")
        set_state_dict(run.student, run.optimizer, model_state_dict=state["weights"],
                       optim_state_dict=state["optimizer"])
        if run.method.copy:
            set_model_state_dict(run.method.copy, state["copy"])
    run.step, run.bad = progress["step"], progress["bad_samples"] if rank() == 0 else 0
    if rank() == 0:
        cut(run.output / "metrics.jsonl", run.step - 1)
        cut(run.output / "patches.jsonl", run.step - 1)
        cut(run.output / "eval.jsonl", run.step if run.step < run.steps else run.step - 1)
    everyone(None)


def cut(path, last):
    """Drop the lines of later steps, and a last line that was torn by the kill."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        kept = "".join(line for line in lines if json.loads(line)["step"] <= last)
        path.with_suffix(".partial").write_text(kept)
        path.with_suffix(".partial").rename(path)


# ---------------------------------------------------------------------------------------------
# The loop


def train(config, device, dtype):
    """Run `config` to its end; returns whether it got there (and not a stop signal first)."""
    run = Run(config, device, dtype)
    say("\n".join(f"  {name} {value}" for name, value in asdict(config).items() if value != ""))
    say(f"{config.method}: {len(run.samples)} samples, {run.steps} steps of "
        f"{config.batch_prompts * world_size()} prompts")
    stopped = False
    bar = tqdm(total=run.steps, initial=run.step, disable=rank() != 0, desc=config.method)
    try:
        if run.eval_samples and run.step == 0 and not (run.output / "metrics.jsonl").exists():
            evaluate(run)
        while run.step < run.steps and not stopped:
            phases = Phases(device)
            run.taught()  # what an evaluation asked is not the step's
            groups = run.method.fill(run, run.step, phases)
            sums = update(run, groups, phases)
            row, stopped = log(run, groups, sums, phases)
            run.step += 1
            bar.set_postfix_str(postfix(row), refresh=False)
            bar.update()
            ended = run.step == run.steps
            if stopped or ended or run.step % config.save_every == 0:
                save(run)
            due = config.eval_every and run.step % config.eval_every == 0
            if run.eval_samples and due and not (stopped or ended):
                evaluate(run)
        bar.close()
        if stopped:
            say(f"stopped after step {run.step}, saved; go on with --resume --output {run.output}")
        elif run.eval_samples:  # also of a run that was killed between its last step and here
            evaluate(run)
            say(summary(run))
    finally:
        run.loader.close()
        run.stopper.close()
        if run.teacher:
            run.teacher.close()
    return not stopped


def postfix(row):
    """What of a step the progress bar shows."""
    shown = {"loss": "loss", "acc": "accuracy", "chosen": "chosen_accuracy", "kl": "kl",
             "help": "intervention_ratio", "repair": "repair_rate", "tok/s": "tokens_per_second"}
    return " ".join(f"{short} {row[name]:.2f}" for short, name in shown.items() if row[name])


def summary(run):
    """Held-out accuracy before and after, and how the need for help changed."""
    evals, rows = ([json.loads(line) for line in (run.output / name).read_text().splitlines()]
                   for name in ("eval.jsonl", "metrics.jsonl"))
    quarter = max(1, len(rows) // 4)

    def mean(part, name):
        values = [row[name] for row in part if row[name] is not None]
        return sum(values) / len(values) if values else None

    def line(label, *values):
        return f"  {label:22}" + "".join("-".rjust(15) if value is None else
                                         f"{100 * value:13.1f} %" for value in values)

    return "\n".join((
        f"held-out ({evals[-1]['n']} questions)".ljust(24) + f"{'before':>15}{'after':>15}",
        line("without patches", evals[0]["accuracy"], evals[-1]["accuracy"]),
        line("with patches", *(e["accuracy_with_patches"] for e in (evals[0], evals[-1]))),
        "training".ljust(24) + f"{'first quarter':>15}{'last quarter':>15}",
        *(line(name.replace("_", " "), mean(rows[:quarter], name), mean(rows[-quarter:], name))
          for name in ("intervention_ratio", "repair_rate"))))


def toy_config(config, given, device, dtype):
    """The toy world's settings; makes the world and its warm student where they are missing."""
    folder, warm = TOY_FOLDER, TOY_FOLDER / "warm"
    if rank() == 0 and not (folder / "heldout.json").exists():
        say(f"making the toy world in {folder}")
        toy.make(folder)
    everyone(None)
    world = dict(
        data=str(folder / "train.json"), eval_data=str(folder / "heldout.json"),
        video_root=str(folder / "videos"), template=str(folder / "template.txt"),
        frame_cache=str(folder / "frames"))
    if not (warm / "checkpoints" / f"step-{TOY_WARM['steps']:06d}").exists():
        say("warming the student up")
        again = {"output": str(warm), "resume": (warm / "config.json").exists()}
        source = {"model": str(folder / "model"), "data": str(folder / "warm.json")}
        if not train(Config(**{**world, **TOY_WARM, **source, **again}), device, dtype):
            sys.exit(1)
    settings = {**world, **TOY, "model": str(newest_checkpoint(warm))}
    return replace(config, **{name: settings[name] for name in settings if name not in given})


def output_folder(config):
    """The folder given, else the next free runs/METHOD-N (the last one with --resume)."""
    names = (path.name.rpartition("-") for path in Path("runs").glob(f"{config.method}-*"))
    last = max((int(n) for method, _, n in names if method == config.method and n.isdigit()),
               default=0)
    number = last + (not (config.resume and last))
    return config.output or everyone(f"runs/{config.method}-{number}")[0]


def main(argv=None):
    config, given = parse(argv)
    try:
        device, dtype = start_processes(config)
        config = replace(config, output=output_folder(config))
        if not config.model:
            config = toy_config(config, given, device, dtype)
        train(config, device, dtype)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
