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
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
from model import Student
from patch import EVIDENCE_LEVELS, Patch, alignment, patch_images, render
from runs import (Phases, Stopper, append, changed, claim, end_processes, everyone, flag, leave,
                  newest_checkpoint, parse, peak_memory, rank, read_log, read_rows, require,
                  require_positive, resume, save, say, start_processes, world_size, write_whole)
from teacher import Teacher, TeacherConfig, make_teacher
from video import MAX_IMAGE_PIXELS, Clip, ClipLoader, FrameCache


@dataclass(frozen=True)
class Config:
    """Every flag of the command line; the defaults are the paper's Table 8."""
    model: str = flag("", "checkpoint folder or hub name; without it, the toy world is trained on")
    data: str = flag("", "file of questions in Video-R1's format, JSON or JSONL")
    video_root: str = flag("", "folder of the media, or a JSON map from data_source to folder")
    eval_data: str = flag("", "held-out questions, answered greedily at the start and the end")
    eval_every: int = flag(0, "steps between further evaluations; 0: at the start and end only")
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
    updates_per_batch: int = flag(1, "updates for each batch; more than one makes the clip matter")
    micro_tokens: int = flag(16384, "packed tokens of one forward and backward")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    seed: int = flag(0, "seed of the data order and of every rollout")
    # the run
    save_every: int = flag(100, "steps between checkpoints")
    keep_checkpoints: int = flag(2, "how many of the newest checkpoints are kept")
    resume: bool = flag(False, "go on from the newest checkpoint of --output")
    attention: str = flag("auto", "kernel of scoring on CUDA; auto: flash-attn's if installed",
                          ("auto", "torch", "flash", "sdpa"))
    dtype: str = flag("auto", "compute type; auto: bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "bfloat16", "float32"))
    cuda_graphs: bool = flag(False, "sample with CUDA graphs (not yet tried on a GPU)")
    decode_workers: int = flag(2, "processes of each rank that decode videos")
    decode_seconds: float = flag(60.0, "time limit for decoding one file, in seconds")
    frame_cache: str = flag("", "folder of decoded frames; empty: OUTPUT/frames")
    frame_cache_gb: float = flag(20.0, "size limit of that folder, in GiB")


# What `python train.py` runs: flags not given on the command line take these.
TOY_FOLDER = Path("runs/toy")
TOY_SEEN = dict(max_completion=48, frames=16, max_pixels=56 * 56)
TOY_WARM = dict(method="sft", steps=60, batch_prompts=24, lr=1e-3, warmup_steps=5,
                max_grad_norm=1.0, save_every=10**6, **TOY_SEEN)
TOY = dict(steps=60, batch_prompts=8, lr=4e-4, beta=0.0, save_every=20, **TOY_SEEN)
EVAL_PROMPTS = 32  # prompts decoded together in an evaluation
PREFIX_BYTES = 2**30  # pixels of processed prompts kept in memory


def check(config: Config) -> None:
    """Refuse settings that cannot work, each in one sentence naming the flag."""
    require_positive(config, "rollouts", "max_completion", "frames", "max_pixels", "batch_prompts",
                     "epochs", "lr", "updates_per_batch", "micro_tokens", "save_every",
                     "keep_checkpoints", "shape_gamma", "sd_sync")
    require(config.frames % 2 == 0,
            f"--frames must be even (temporal patches of two), got {config.frames}")
    require(config.temperature > 0 and 0 < config.top_p <= 1,
            "--temperature must be above 0 and --top_p in (0, 1]")
    require(config.data, "--data is missing: a Video-R1 JSON or JSONL file")
    require(not methods.METHODS[config.method].compares or config.rollouts >= 2,
            "--rollouts must be at least 2: advantages compare a group's rollouts")
    repairs = config.method in ("ffr", "ffr_visd") and config.train_on != "original"
    require(config.score_under != "plain" or repairs,
            "--score_under plain is for repairs that are trained: --method ffr or ffr_visd, "
            "--train_on chosen")
    shares = config.replay_share, config.sd_lambda, config.sd_ema
    require(all(0 <= share <= 1 for share in shares), "--replay_share, --sd_lambda and "
            "--sd_ema are shares between 0 and 1")
    require(min(config.dynamic_sampling, config.sd_horizon, config.sd_topk) >= 0,
            "--dynamic_sampling, --sd_horizon and --sd_topk must not be negative")
    check_money(config.teacher_price, config.teacher_budget, "--teacher")
    require(set(config.teacher_prompt.split(",")) <= {"analysis", "negative", "tools", ""},
            "--teacher_prompt is a list of analysis, negative and tools")


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
        self.teacher = teacher_of(config) if self.method.asks else None
        self.diagnose = self.teacher.submit if self.method.repairs else None
        if rank() == 0:
            self._start_folder()
        everyone(None)
        self._load_student()
        self.loader = ClipLoader(
            frames=config.frames, max_pixels=config.max_pixels, factor=self.prompts.factor,
            max_image_pixels=config.max_image_pixels, workers=config.decode_workers,
            time_limit=config.decode_seconds,
            cache=FrameCache(config.frame_cache or self.output / "frames",
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
        """Return the samples of a file whose media exist; the others are named and left out."""
        if not path:
            return []
        samples = data.load_samples(read_rows(path), self.config.video_root)
        require(samples, f"{path} holds no samples")
        for sample in samples:
            try:
                reward.check_gold(sample.kind, sample.answer, sample.options)
            except ValueError as error:
                raise ValueError(f"sample {sample.id}: {error}") from None
        missing = data.missing_media(samples)
        require(len(missing) < len(samples), f"{path}: not one media file was found; is "
                f"--video_root {self.config.video_root!r} right?")
        if missing:
            say(f"{path}: left out of {len(samples)}: {data.missing_sentence(missing)}")
            self.missing += missing
        absent = {sample.id for sample in missing}
        return [sample for sample in samples if sample.id not in absent]

    def _start_folder(self):
        claim(self.output, "config.json", self.config.resume)
        if not self.config.resume:
            for sample in self.missing:
                self.record_bad(sample, "no such file")
        write_whole(self.output / "config.json", json.dumps(asdict(self.config), indent=1))

    def record_bad(self, sample: Sample, reason: str) -> None:
        """Note a sample whose file cannot be used."""
        append(self.output / "bad_samples.jsonl",
               {"id": sample.id, "media": sample.media, "reason": reason})

    def _load_student(self):
        config = self.config

        def load(**options):
            return Student.load(config.model, self.device, self.dtype, config.attention,
                                recompute=self.device.type == "cuda", **options)

        self.student = load(freeze_vision=config.freeze_vision, cuda_graphs=config.cuda_graphs)
        compared = config.beta > 0 and self.method.compares
        self.reference = load(trainable=False) if compared else None
        self.method.start(load)
        self.prompts = data.Prompts(self.student.processor, data.read_template(config.template))
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
        return self.groups(wanted)

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
            else:
                self.bad += 1
                self.record_bad(sample, reason)
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

    def taught(self) -> dict[str, float]:
        """Return what the teacher did since this was last asked."""
        stats = self.teacher.stats() if self.teacher else {}
        before, self.stats = self.stats, stats
        return {name: count - before.get(name, 0) for name, count in stats.items()}

    # -- find and reason of ffr.py, with this run's collaborators

    def find(self, cache: Any, groups: list[ffr.Group], key: str, rollouts: int | list[int],
             sampling: ffr.Sampling) -> None:
        """Sample and verify first tries (Eq. 3, 4)."""
        ffr.find(self.student, cache, groups, self.prompts.header, self.score, self.diagnose, key,
                 rollouts, sampling)

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


def score(student: Student, batch: ffr.MicroBatch, config: Config, entropy: bool = False) -> tuple:
    """Return log-probs and, if asked for, entropies of a micro-batch's completion tokens [T]."""
    return student(batch.prefixes, batch.suffixes, batch.owners, batch.completions,
                   config.temperature, entropy)


def backward(run: Run, batches: list[ffr.MicroBatch], entropy: bool) -> dict:
    """Add up the gradients of the step's loss.

    Returns sums over this rank's tokens, and the samples of parts that are not finite.
    """
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


def stop_if_broken(run: Run, broken: list[str], norm: float) -> None:
    """End the run before a loss or gradient that is not finite reaches the weights."""
    broken = sorted({sample for samples in everyone(broken) for sample in samples})
    if broken or not math.isfinite(norm):
        run.optimizer.zero_grad()
        save(run)
        raise FloatingPointError(
            f"step {run.step}: the loss or its gradient is not finite; saved as before the update; "
            f"samples: {', '.join(broken) or 'any of this step'}")


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
def evaluate(run: Run) -> dict:
    """Answer the held-out questions greedily: alone, and with a patch after each failed try."""
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
                ffr.fix(groups, run.diagnose)
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


def log(run: Run, groups: list[ffr.Group], sums: dict, phases: Phases) -> tuple[dict, bool]:
    """Write a line of metrics.jsonl for all ranks, this rank's of patches.jsonl, and samples.md.

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


def metrics(step: int, ranks: list[dict]) -> dict:
    """Return the line of metrics.jsonl from what every rank counted; a mean over nothing is null.

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


def patch_row(step: int, sample: Sample, i: int, slot: ffr.Slot) -> dict:
    """Return one diagnosis, patched or not, as guard.py reads it."""
    diagnosis, repair = slot.diagnosis.result(), slot.repair
    return {"step": step, "sample": sample.id, "slot": i,
            **{name: getattr(diagnosis, name)
               for name in ("status", "reason", "input_tokens", "output_tokens")},
            **(asdict(diagnosis.patch) if diagnosis.patch else {}),
            "question": sample.question, "options": sample.options, "answer": sample.answer,
            "response": slot.first.text, "repaired": repair.correct if repair else None}


def write_sample(run: Run, slots: list[tuple[Sample, ffr.Slot]]) -> None:
    """Write a whole slot to samples.md, a repaired one where there is one."""
    sample, slot = next((pair for pair in slots if pair[1].repair is not None), slots[0])

    def quote(text):
        return "\n".join("> " + line for line in text.splitlines())

    parts = [f"## step {run.step}, sample {sample.id}", sample.question, *sample.options,
             f"gold: {sample.answer}", f"first try (accuracy {slot.first.accuracy:g})",
             quote(slot.first.text)]
    if slot.repair is not None:
        parts += ["patch", quote(render(slot.patch, run.config.evidence)),
                  f"repair (accuracy {slot.repair.accuracy:g})", quote(slot.repair.text)]
    parts.append(f"reward {slot.reward:.3f}, advantage {slot.advantage:+.3f}")
    with open(run.output / "samples.md", "a") as file:
        file.write("\n\n".join(parts) + "\n\n")


# ---------------------------------------------------------------------------------------------
# The loop


def train(config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Run `config` to its end; return whether it got there (and not a stop signal first)."""
    run = Run(config, device, dtype)
    say(f"{config.method}: {len(run.samples)} samples, {run.steps} steps of "
        f"{config.batch_prompts * world_size()} prompts; {changed(config)}")
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


def postfix(row: dict) -> str:
    """Return what of a step the progress bar shows."""
    shown = {"loss": "loss", "acc": "accuracy", "chosen": "chosen_accuracy", "kl": "kl",
             "help": "intervention_ratio", "repair": "repair_rate", "tok/s": "tokens_per_second"}
    return " ".join(f"{short} {row[name]:.2f}" for short, name in shown.items() if row[name])


def summary(run: Run) -> str:
    """Return held-out accuracy before and after, and how the need for help changed."""
    evals, rows = (read_log(run.output / name) for name in ("eval.jsonl", "metrics.jsonl"))
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


def toy_config(config: Config, given: set[str], device: torch.device,
               dtype: torch.dtype) -> Config:
    """Return the toy world's settings; make it and its warm student where they are missing."""
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


def output_folder(config: Config) -> str:
    """Return the folder given, else the next free runs/METHOD-N (the last one with --resume)."""
    names = (path.name.rpartition("-") for path in Path("runs").glob(f"{config.method}-*"))
    last = max((int(n) for method, _, n in names if method == config.method and n.isdigit()),
               default=0)
    number = last + (not (config.resume and last))
    return config.output or everyone(f"runs/{config.method}-{number}")[0]


def main(argv: list[str] | None = None) -> None:
    """Train what the command line says."""
    config, given = parse(Config, argv, __doc__.split("\n\n")[0])
    try:
        device, dtype = start_processes(config.dtype, config.cuda_graphs, trains=True)
        config = replace(config, output=output_folder(config))
        if not config.model:
            config = toy_config(config, given, device, dtype)
        train(config, device, dtype)
    except (ValueError, FileNotFoundError) as error:
        leave("train.py", error)
    finally:
        end_processes()


if __name__ == "__main__":
    main()
