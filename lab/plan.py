"""The plan: what a run will need, from one step at the largest sizes that its data and flags allow.

    python train.py ... --plan

prints memory of a process by phase, as predicted and, where it fits, as measured; and seconds of
the step by phase, what the whole run takes on disk and asks of the teacher. It writes nothing. The
step: the longest prompt in every place, all G first tries full and failing, every patch at its
limit.

Predicted: the step's forwards and backwards run on the meta device, through the student's own code,
while `Live` adds up the tensors that are alive; what FSDP shards and gathers is arithmetic.
"""

import ctypes
import math
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import ffr
from guard import money, prices
from model import Features, Tree, recompute_blocks
from patch import MAX_GUIDANCE, MAX_REGIONS, Patch
from runs import Phases, world_size
from video import Clip, still

GIB = 2**30
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
EVAL_PROMPTS = 32  # prompts decoded together in an evaluation
CARDS = 1, 2, 4, 8  # numbers of GPUs that the table is for
DRAWING = 7  # fp32 tensors as large as the logits that drawing a token makes
PHASES = "rollouts", "reference", "update", "evaluation"
OF_PHASE = {"prefill": "rollouts", "decode": "rollouts", "repair": "rollouts", "train": "update"}
# tokens of a diagnosis, roughly: instructions, tools and question; what a tool shows; an answer
PROMPT_TOKENS, LOOK_TOKENS, ANSWER_TOKENS = 2500, 1500, 300


# ---------------------------------------------------------------------------------------------
# The step at the largest sizes


def longest(run: Any) -> Any:
    """Return the sample with the longest prompt, its clip as large as the flags allow, black.

    Prompts are compared by the letters of their text, media by the most tokens they may take.
    """
    config, prompts = run.config, run.prompts
    limits = config.frames, config.max_pixels, config.max_image_pixels

    def letters(sample):
        return len(sample.question) + sum(map(len, sample.options))

    kinds = {sample.media_type for sample in run.samples}
    found = [max((s for s in run.samples if s.media_type == kind), key=letters) for kind in kinds]
    sample = max(found, key=lambda s: prompts.prompt_bound(s, *limits))
    side = prompts.factor
    if sample.media_type != "video":
        return replace(sample, clip=still(black(1, config.max_image_pixels, side)))
    times = tuple(1000.5 + i for i in range(config.frames))
    return replace(sample, clip=Clip(black(config.frames, config.max_pixels, side), times,
                                     tuple(range(config.frames)), 1.0, times[-1] + 1, 10**4))


def black(frames: int, pixels: int, factor: int) -> Tensor:
    """Return frames [F, 3, h, w] of the most tokens in so many pixels, as near a square as can."""
    tokens = pixels // factor**2
    rows = max(a for a in range(1, math.isqrt(tokens) + 1) if tokens % a == 0)
    return torch.zeros(frames, 3, rows * factor, tokens // rows * factor, dtype=torch.uint8)


def largest_patch(sample: Any) -> Patch:
    """Return a patch at its limits: guidance, frames and regions."""
    box = (0.11, 0.12, 0.98, 0.97)
    return Patch("misconception", "attribute", ("look at it " * MAX_GUIDANCE)[:MAX_GUIDANCE],
                 (0, len(sample.clip.frames) - 1), (0.0, 9999.9), (), (box,) * MAX_REGIONS)


class Teacher:
    """Answers at once: every failed try gets the largest patch, every trace is full."""

    def __init__(self, run: Any):
        self.run = run

    def submit(self, sample: Any, text: str) -> Future:
        """Return a diagnosis that is there already."""
        return done(SimpleNamespace(patch=self.diagnose(sample, text)))

    def diagnose(self, sample: Any, text: str) -> Patch:
        """Return the largest patch."""
        return largest_patch(sample)

    def ask(self, task: str, sample: Any, response: str = "") -> Future:
        """Return a full trace; nothing for the tasks that judge."""
        return done(full_text(self.run) if task == "trace" else None)


def done(value: Any) -> Future:
    """Return a future that has its result."""
    future = Future()
    future.set_result(value)
    return future


def full_text(run: Any) -> str:
    """Return a text of about as many tokens as a completion may have."""
    limit, n = run.config.max_completion, run.config.max_completion
    while n > 1 and (size := len(run.prompts.completion(" a" * n))) > limit:
        n -= max(1, min(n - 1, size - limit))
    return " a" * n


def at_the_largest(run: Any) -> list[ffr.Group]:
    """Let all that the run's method asks for be as large as it can; return one process's groups.

    First tries fail where they are repaired; half of them keep the format, so that no group is flat
    and none is left out of the loss.
    """
    sample, tries = longest(run), [0]
    sample = replace(sample, process=max((s.process for s in run.samples), key=len))
    right = float(not run.method.repairs)

    def score(sample, text):
        tries[0] += 1
        return right, float(tries[0] % 2), True

    run.teacher, run.score = Teacher(run), score
    run.diagnose = run.teacher.submit if run.method.repairs else None
    run.student.text = lambda ids_C: "a"
    groups = [ffr.Group(sample, run.prompts.prefix(sample), place=f"#{b}")
              for b in range(run.config.batch_prompts)]
    run.fetch = run.groups = lambda _: [replace(group, slots=[]) for group in groups]
    return groups


# ---------------------------------------------------------------------------------------------
# Predicted


class Fused(torch.autograd.Function):
    """Attention as fused kernels hold memory: the inputs, the output, a number a row, the mask."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return an output of the right size."""
        out, rows = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        bias = None if mask is None else q.new_empty(mask.shape)
        ctx.save_for_backward(q, k, v, out, rows, bias)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        """Return gradients of the right sizes."""
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Stand in for torch's attention, which on the meta device is the unfused one."""
    return Fused.apply(q, k, v, attn_mask)


class Live(TorchDispatchMode):
    """Adds up the bytes of the meta tensors that are alive: `now`, and at most `top`.

    What a run computes on the CPU meanwhile, such as a tower's window indices, stays real.
    standing: what has been there before, and is not counted. visual: how many tokens a mask of
    visual tokens selects, which meta tensors cannot tell.
    """

    def __init__(self, standing: nn.Module, visual: int):
        super().__init__()
        self.now = self.top = 0
        self.visual, self.sizes = visual, weakref.WeakKeyDictionary()
        for weight in [*standing.parameters(), *standing.buffers()]:
            self.sizes[weight.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_iter((args, kwargs))):
            args, kwargs = tree_map(_on_meta, (args, kwargs))
            if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
                args = args[0], [i for x in args[1] for i in self._numbers(x)], *args[2:]
        out = func(*args, **kwargs or {})
        for x in tree_iter(out):
            if isinstance(x, Tensor) and x.is_meta and x.untyped_storage() not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage] = size = storage.nbytes()
                weakref.finalize(storage, self._drop, size)
                self.now += size
                self.top = max(self.top, self.now)
        return out

    def _drop(self, size):
        self.now -= size

    def _numbers(self, x):
        """Return an index as it is, a mask as the numbers of what it selects."""
        if x is None or x.dtype != torch.bool:
            return [x]
        return [torch.empty(self.visual, dtype=torch.long, device="meta") for _ in range(x.ndim)]


def _on_meta(x):
    return x.to("meta") if isinstance(x, Tensor) and not x.is_meta else x


def features(student: Any, segments: list) -> Features | None:
    """Return Student.features on the meta device; the sizes of images stay real."""
    pixels = [s.pixels for s in segments if s.pixels is not None]
    if not pixels:
        return None
    tower = student.model.model.visual
    with torch.set_grad_enabled(torch.is_grad_enabled() and not student.freeze_vision):
        pixels = torch.cat(pixels).to("meta", tower.patch_embed.proj.weight.dtype)
        out = tower(pixels, grid_thw=torch.cat([s.grids for s in segments]), return_dict=True)
    return Features(out.pooler_output, list(getattr(out, "deepstack_features", None) or []))


def tokens_shown(segments: list, merge: int) -> int:
    """Return how many visual tokens the segments hold."""
    return sum(int(s.grids.prod(dim=1).sum()) for s in segments) // merge**2


def activations(run: Any, groups: list[ffr.Group], cards: bool) -> dict[str, float]:
    """Return what each phase adds to what always stands, in bytes at its peak, without FSDP's part.

    run: on the meta device. cards: gradients are sharded as they come, blocks computed anew.
    """
    student, config, merge = run.student, run.config, run.prompts.merge
    student.features = lambda segments: features(student, segments)
    suffix = run.write(groups[0].sample, largest_patch(groups[0].sample)) \
        if run.method.repairs else run.prompts.header
    trace = torch.zeros(config.max_completion, dtype=torch.long)
    slots = [ffr.Slot(ffr.Rollout(trace, trace.float(), suffix, "", 0.0, 0.0, False, True))
             for _ in range(config.rollouts if run.method.compares else 1)]
    for group in groups:
        group.slots = [replace(slot, trained=slot.first) for slot in slots]
    batches = ffr.micro_batches(groups, config.micro_tokens, lambda rollout: 1.0)
    batch = max(batches, key=lambda b: sum(map(len, b.completions)) + sum(
        len(s.ids) for s in [*b.prefixes, *b.suffixes]))
    rows = batch.prefixes, batch.suffixes, batch.owners, batch.completions
    shown = tokens_shown([*batch.prefixes, *batch.suffixes], merge)
    with patch.object(F, "scaled_dot_product_attention", fused):
        found = {"reference": scoring(student, rows, shown)} if run.reference else {}
        if run.method.compares:
            found["rollouts"] = rolling(run, groups, config.rollouts, suffix)
        if run.eval_samples:
            questions = math.ceil(len(run.eval_samples) / world_size())
            some = groups[:1] * min(questions, EVAL_PROMPTS)
            found["evaluation"] = rolling(run, some, 1, suffix)
        found["update"] = updating(student, rows, shown, cards, len(batches) > 1)
    return found


@torch.no_grad()
def scoring(student: Any, rows: tuple, shown: int) -> float:
    """Return the peak of a forward without gradients."""
    with Live(student, shown) as live:
        student(*rows)
    return live.top


def updating(student: Any, rows: tuple, shown: int, cards: bool, again: bool) -> float:
    """Return the peak of forward and backward; of the second one where gradients stay `again`."""
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
             for p in student.parameters() if p.requires_grad and cards]
    with Live(student, shown) as live:
        for _ in range(1 + again * (not cards)):
            student(*rows)[0].sum().backward()
    for hook in hooks:
        hook.remove()
    student.zero_grad()
    return live.top


@torch.no_grad()
def rolling(run: Any, groups: list[ffr.Group], rows: int, suffix: Any) -> float:
    """Return the peak of prefill and of decoding so many rows of each group."""
    student, merge = run.student, run.prompts.merge
    prefixes, suffixes = [group.prefix for group in groups], [suffix] * rows * len(groups)
    owners = [b for b in range(len(groups)) for _ in range(rows)]
    with Live(student, tokens_shown(prefixes, merge)) as live:
        cache = student.prefill(prefixes)
        live.visual = tokens_shown(suffixes, merge)
        ids_T, positions_3T, _ = student.pack(suffixes, [cache.next_position[b] for b in owners])
        tree = Tree(cache.lengths, [len(s.ids) for s in suffixes], owners, student.device, cache,
                    [])
        student.hidden(ids_T, positions_3T, student.features(suffixes), tree)
        (N, K, S, E), size = tree.store[0][0].shape, tree.store[0][0].element_size()
        own = 2 * len(tree.store) * N * K * (S + run.config.max_completion) * E * size
        logits = DRAWING * 4 * N * student.model.config.text_config.vocab_size
        return max(live.top, live.now + own + logits)


def count(weights: Iterable[nn.Parameter], trained: bool = False) -> int:
    """Return how many numbers the weights are, or those of them that are trained."""
    return sum(p.numel() for p in weights if p.requires_grad or not trained)


def standing(run: Any, processes: int, size: int) -> dict[str, float]:
    """Return the bytes that stand all the time in one of so many processes, by what they are.

    size: bytes of a number in the compute type, which frozen weights have. Trained weights,
    gradients and AdamW's two averages are fp32.
    """
    whole, trained = (count(run.student.parameters(), only) for only in (False, True))
    found = {"weights": 4 * trained + size * (whole - trained), "gradients": 4 * trained,
             "AdamW": 8 * trained}
    if isinstance(run.reference, nn.Module):  # with adapters it is the student without them
        found["reference"] = size * whole
    if run.method.copy:
        found["copy of the method"] = 4 * count(run.method.copy.parameters())
    return {name: number / processes for name, number in found.items()}


def gathered(run: Any, size: int) -> dict[str, float]:
    """Return the bytes of whole parameters and gradients that FSDP holds for a while, by phase.

    Rollouts keep all parameters whole; else it is what is outside the blocks, two blocks, and the
    gradients of one and of what is outside, which are added up in fp32.
    """
    inner, everything = run.student.model.model, list(run.student.parameters())
    blocks = [list(block.parameters())
              for block in [*inner.visual.blocks, *inner.language_model.layers]]

    def parts(trained):
        sizes = [count(block, trained) for block in blocks]
        return count(everything, trained) - sum(sizes), max(sizes)

    (root, block), (root_trained, block_trained) = parts(False), parts(True)
    some, whole = size * (root + 2 * block), size * count(everything)
    return {"rollouts": whole, "evaluation": whole, "reference": some,
            "update": some + (size + 4) * (root_trained + block_trained)}


def predicted(run: Any, peaks: dict[str, float], processes: int, on_cpu: bool) -> dict[str, float]:
    """Return the bytes of one process: what stands, and each phase at its peak with all of it.

    run: on the meta device, in the compute type; peaks: of `activations`. on_cpu: one process
    without FSDP, whose gradients are in the peaks, and which repacks its layers to decode. With
    --offload nothing stands on a card.
    """
    size, student = run.student.model.lm_head.weight.element_size(), run.student
    found, more = standing(run, processes, size), gathered(run, size)
    always = 0 if run.config.offload else sum(found.values()) - on_cpu * found["gradients"]
    for phase, peak in peaks.items():
        found[phase] = always + peak
        if processes > 1 or not (on_cpu or student.adapted):
            found[phase] += more[phase]
        elif on_cpu and phase in ("rollouts", "evaluation"):
            layers = [*student.model.model.language_model.layers.parameters(),
                      student.model.lm_head.weight]
            found[phase] += size * count(p for p in layers if p.ndim > 1)
    return found


# ---------------------------------------------------------------------------------------------
# Measured


class Scale(Phases):
    """Phases that keep the most memory of each as well, in bytes above `base`."""

    def __init__(self, device: torch.device, base: int):
        super().__init__(device)
        self.base, self.most = base, {}

    @contextmanager
    def __call__(self, name: str):
        """Add the time of the block to a phase, and see how far the memory goes."""
        used(self.device)
        with super().__call__(name):
            yield
        top = used(self.device, peak=True) - self.base
        self.most[name] = max(self.most.get(name, 0), top)


def used(device: torch.device, peak: bool = False) -> int:
    """Return the bytes in use, from where a new peak is looked for; or the last peak."""
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not peak:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator merely holds is not in use
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return 1024 * _line("/proc/self/status", "VmHWM" if peak else "VmRSS")


def free(device: torch.device) -> int:
    """Return the bytes that are free, of the card or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * _line("/proc/meminfo", "MemAvailable")


def _line(path, name):
    return next(int(line.split()[1]) for line in open(path) if line.startswith(name + ":"))


def step(run: Any, update: Callable, base: int) -> Scale:
    """Take a step at the largest sizes; return its seconds and memory by phase."""
    at_the_largest(run)
    student = run.student
    eos = torch.tensor(sorted(student.eos_ids), device=student.device)
    student.banned = torch.cat([student.banned, eos])  # completions go to their limit
    for p in student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    run.optimizer.step()  # its averages are there from the second step on
    run.optimizer.zero_grad()
    for _ in range(2 if run.device.type == "cuda" else 1):  # kernels are loaded by the first one
        phases = Scale(run.device, base)
        update(run, run.method.fill(run, 0, phases), phases)
    return phases


# ---------------------------------------------------------------------------------------------
# What it prints

def planned(make: Callable, update: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Return the plan of a run as text. make(device, dtype) -> its Run; update: train.py's."""
    if device.type == "cpu":  # blocks of their own: what is freed is gone, as CUDA counts
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    meta, measured = torch.device("meta"), {}
    on_cpu = device.type == "cpu" and not dist.is_initialized()
    blank = make(meta, dtype)
    if device.type == "cuda":
        recompute_blocks(blank.student.model)
    groups = at_the_largest(blank)
    here = predicted(blank, activations(blank, groups, not on_cpu), world_size(), on_cpu)
    seconds, why, room = None, "", free(device)
    if max(here.values()) < 0.95 * room:
        base = used(device)
        try:
            run = make(device, dtype)
            phases = step(run, update, base)
            seconds = phases.all()
            for phase, most in phases.most.items():
                name = OF_PHASE.get(phase, phase)
                measured[name] = max(measured.get(name, 0), most)
        except ValueError as error:  # a folder without weights can be planned for
            why = f"no step was taken: {error}"
    else:
        why = f"no step was taken: it would not fit into the {room / GIB:.1f} GiB that are free"
    cards = make(meta, torch.bfloat16)
    recompute_blocks(cards.student.model)
    peaks = activations(cards, at_the_largest(cards), True)
    columns = {"predicted": here, "measured": measured} | {
        f"{n} GPU{'s' * (n > 1)}": predicted(cards, peaks, n, False) for n in CARDS}
    longest = len(groups[0].prefix.ids)
    return "\n".join([
        f"one step at the largest sizes: prompts of {longest} tokens, "
        f"{len(groups)} for each of {world_size()} processes", *memory(columns),
        "GPUs: bfloat16, blocks computed anew in the backward, CUDA's and NCCL's own GiB aside",
        *([why] if why else [f"of {room / GIB:.1f} GiB free here, the step took at most "
                             f"{max(measured.values()) / GIB:.2f}"]),
        *time_and_cost(blank, seconds, dtype.itemsize)])


def memory(columns: dict[str, dict]) -> list[str]:
    """Return the table of GiB by what stands and by phase."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = ["GiB of one process".ljust(22) + "".join(f"{title:>11}" for title in columns)]
    for name in names:
        cells = (f"{column[name] / GIB:.2f}" if name in column else "" for column in
                 columns.values())
        label = name if name in PHASES else f"  {name}"
        lines.append(label.ljust(22) + "".join(f"{cell:>11}" for cell in cells))
    return lines


def time_and_cost(run: Any, seconds: dict | None, size: int) -> list[str]:
    """Return seconds, disk and what is asked of the teacher, for the whole run, as lines."""
    config, lines = run.config, []
    if seconds:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()
                          if name != "step")
        hours = run.steps * seconds["step"] / 3600
        lines.append(f"the step took {seconds['step']:.1f} s ({parts}), reading files and the "
                     f"teacher aside; {run.steps} such steps: {hours:.2f} h")
    stands = standing(run, 1, size)
    state = 12 * count(run.student.parameters(), True) + stands.get("copy of the method", 0)
    shown = count(run.student.parameters(), bool(config.lora) and not config.merge)
    each = state + shown * (4 if config.lora and not config.merge else size)
    lines.append(f"a checkpoint takes {each / 1e9:.2f} GB on disk; {config.keep_checkpoints} are "
                 "kept, and one more while it is written")
    if run.method.repairs and run.method.compares:
        tries = run.steps * world_size() * config.batch_prompts * config.rollouts
        lines.append(f"at most {tries} diagnoses (every first try failing)"
                     + requests(config, tries) * (config.teacher == "anthropic"))
    return lines


def requests(config: Any, diagnoses: int) -> str:
    """Return the most requests of so many diagnoses, and about what they cost, as text.

    The frames are in the first request, later ones read them from the server's prompt cache at a
    tenth of the price; an image is about a token for 750 pixels.
    """
    rounds = config.teacher_rounds if "tools" in config.teacher_prompt.split(",") else 1
    text = f", up to {rounds * diagnoses} requests, more where patches are refused"
    if config.teacher_price:
        first = PROMPT_TOKENS + config.frames * config.max_pixels / 750
        usage = [(rounds - 1) * LOOK_TOKENS, first, (rounds - 1) * first, rounds * ANSWER_TOKENS]
        each = money(usage, prices(config.teacher_price, "--teacher_price"))
        text += f"; about {diagnoses * each:.0f} dollars"
    return text
