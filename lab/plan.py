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
import os
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
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
from model import recompute_blocks
from patch import MAX_GUIDANCE, MAX_REGIONS, Patch
from prefix_tree import Tree
from runs import Phases, everyone, proc_bytes, used_memory, world_size
from teacher import Diagnosis, Teacher
from video import Clip, still

GIB = 2**30
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
CGROUP = Path("/sys/fs/cgroup")  # what a container may have
CARDS = 1, 2, 4, 8  # numbers of GPUs that the table is for
DRAWING = 7  # fp32 tensors as large as the logits that drawing a token makes
PHASES = "reference", "rollouts", "evaluation", "update"
OF_PHASE = {"reference": "reference", "prefill": "rollouts", "decode": "rollouts",
            "repair": "rollouts", "shuffled": "rollouts", "weigh": "update", "train": "update"}
# tokens of a diagnosis, roughly: instructions, tools and question; what a tool shows; an answer
PROMPT_TOKENS, LOOK_TOKENS, ANSWER_TOKENS = 2500, 1500, 300


# ---------------------------------------------------------------------------------------------
# The step at the largest sizes


def longest(run: Any, samples: list) -> Any:
    """Return the sample with the longest prompt, its clip as large as the flags allow, black.

    Prompts are compared by the letters of their text, media by the most tokens they may take.
    """
    config, prompts = run.config, run.prompts
    limits = config.frames, config.max_pixels, config.max_image_pixels

    def letters(sample):
        return len(sample.question) + sum(map(len, sample.options))

    kinds = {sample.media_type for sample in samples}
    found = [max((s for s in samples if s.media_type == kind), key=letters) for kind in kinds]
    sample = max(found, key=lambda s: prompts.prompt_bound(s, *limits))
    if sample.media_type != "video":
        return replace(sample, clip=still(black(1, config.max_image_pixels, prompts.factor)))
    times = tuple(1000.5 + i for i in range(config.frames))
    return replace(sample, clip=Clip(black(config.frames, config.max_pixels, prompts.factor), times,
                                     tuple(range(config.frames)), 1.0, times[-1] + 1, 10**4))


def black(frames: int, pixels: int, factor: int) -> Tensor:
    """Return frames [F, 3, h, w] of the most tokens in so many pixels, at most some 1 : 10."""
    tokens = max(1, pixels // factor**2)
    side = math.isqrt(tokens)
    rows = max(range(side // 3 + 1, side + 1), key=lambda a: (tokens // a * a, a))
    return torch.zeros(frames, 3, rows * factor, tokens // rows * factor, dtype=torch.uint8)


def largest_patch(sample: Any) -> Patch:
    """Return a patch at its limits: guidance, frames and regions."""
    box = (0.11, 0.12, 0.98, 0.97)
    return Patch("misconception", "attribute", ("look at it " * MAX_GUIDANCE)[:MAX_GUIDANCE],
                 (0, len(sample.clip.frames) - 1), (0.0, 9999.9), (), (box,) * MAX_REGIONS)


class Largest(Teacher):
    """Answers at once: every failed try gets the largest patch, every text is full."""

    def __init__(self, run: Any):
        super().__init__()
        n = run.config.max_completion  # tokens, EOS among them
        self.text = " a" * (n * n // len(run.prompts.completion(" a" * n)))

    def diagnose_full(self, sample: Any, response: str) -> Diagnosis:
        """Return the largest patch."""
        return Diagnosis(largest_patch(sample), "patched")

    def tell(self, task: str, sample: Any, response: str) -> str | None:
        """Return a full text; nothing in place of a score."""
        return None if task == "judge" else self.text


def at_the_largest(run: Any) -> list[ffr.Group]:
    """Let all that the run's method asks for be as large as it can; return one process's groups.

    First tries fail where they are repaired; half of them keep the format, so that no group is flat
    and none is left out of the loss.
    """
    sample, tries = longest(run, run.samples), [0]
    sample = replace(sample, process=max((s.process for s in run.samples), key=len))
    prefix, right = run.prompts.prefix(sample), float(not run.method.repairs)

    def score(sample, text):
        tries[0] += 1
        return right, float(tries[0] % 2), True

    def groups(count):
        return [ffr.Group(sample, prefix, place=f"#{b}") for b in range(count)]

    run.teacher, run.score = Largest(run), score
    run.diagnose = run.teacher.submit if run.method.repairs else None
    run.student.text = lambda ids_C: "a"
    run.fetch = lambda step: groups(run.config.batch_prompts)
    run.groups = lambda samples: groups(len(samples))
    return run.fetch(0)


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
    """Adds up the bytes of the tensors that are alive: `now`, and at most `top`.

    Those on the meta device, and those with values (ids, pixels, masks) from where they meet one.
    What is computed of these alone stays real. standing: what is there anyhow, and not counted.
    """

    def __init__(self, standing: nn.Module):
        super().__init__()
        self.now = self.top = 0
        self.seen = weakref.WeakSet(
            x.untyped_storage() for x in [*standing.parameters(), *standing.buffers()])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_iter((args, kwargs))):
            self._count((args, kwargs), meta=False)
            if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
                args = args[0], [i for x in args[1] for i in _numbers(x)], *args[2:]
            args, kwargs = tree_map(_on_meta, (args, kwargs))
        elif kwargs.get("device") == torch.device("meta"):
            kwargs = kwargs | {"device": torch.device("cpu")}
        out = func(*args, **kwargs)
        self._count(out, meta=True)
        return out

    def _count(self, tree, meta):
        tensors = [x for x in tree_iter(tree) if isinstance(x, Tensor) and x.is_meta == meta]
        for storage in (x.untyped_storage() for x in tensors):
            if storage not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self._drop, storage.nbytes())
                self.now += storage.nbytes()
                self.top = max(self.top, self.now)

    def _drop(self, size):
        self.now -= size


def _numbers(index):
    """Return an index as it is, a mask as the numbers of what it selects."""
    masks = index is not None and index.dtype == torch.bool
    return index.nonzero(as_tuple=True) if masks else [index]


def _on_meta(x):
    return x.to("meta") if isinstance(x, Tensor) and not x.is_meta else x


def activations(run: Any, groups: list[ffr.Group], sharded: bool, packs: bool) -> dict[str, float]:
    """Return what each phase adds to what always stands, in bytes at its peak, without FSDP's part.

    run: on the meta device. sharded: gradients leave as they come. packs: see `rolling`.
    """
    student, config = run.student, run.config
    student.banned = torch.zeros(0, dtype=torch.long)  # where it is, ids and pixels are: see Live
    sample, suffix = groups[0].sample, run.prompts.header
    if run.method.repairs:
        suffix = run.write(sample, largest_patch(sample))
    if run.method.compares:
        ids = torch.zeros(config.max_completion, dtype=torch.long)
        tried = ffr.Rollout(ids, ids.float(), suffix, "", 0.0, 0.0, False, True)
        for group in groups:
            group.slots = [ffr.Slot(tried, trained=tried)] * config.rollouts
    else:
        groups = run.method.fill(run, 0, Phases(run.device))
    batches = ffr.micro_batches(groups, config.micro_tokens, lambda rollout: 1.0)
    batch = max(batches, key=lambda b: sum(map(len, b.completions)) + sum(
        len(s.ids) for s in [*b.prefixes, *b.suffixes]))
    rows = batch.prefixes, batch.suffixes, batch.owners, batch.completions
    with patch.object(F, "scaled_dot_product_attention", fused):
        found = {"update": updating(student, rows, sharded, len(batches) > 1)}
        if run.reference:
            with Live(student) as live, torch.no_grad():
                student(*rows)
            found["reference"] = live.top
        if run.method.compares:
            prefixes = [group.prefix for group in groups]
            found["rollouts"] = rolling(run, prefixes, config.rollouts, suffix, packs)
        if run.eval_samples:
            prefix = run.prompts.prefix(longest(run, run.eval_samples))
            questions = min(run.eval_prompts, math.ceil(len(run.eval_samples) / world_size()))
            found["evaluation"] = rolling(run, [prefix] * questions, 1, suffix, packs)
    return found


def updating(student: Any, rows: tuple, sharded: bool, again: bool) -> float:
    """Return the peak of forward and backward, the gradients aside that stand at its end.

    again: of one more while the gradients of the first stay, which sharded ones do elsewhere.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
             for p in trained if sharded]
    with Live(student) as live:
        for _ in range(1 if sharded else 1 + again):
            student(*rows, entropy=True)[0].sum().backward()
    for hook in hooks:
        hook.remove()
    student.zero_grad()
    return live.top - (0 if sharded else 4 * count(trained))


@torch.no_grad()
def rolling(run: Any, prefixes: list, rows: int, suffix: Any, packs: bool) -> float:
    """Return the peak of prefill and of decoding so many rows of each prefix, as Student.sample.

    packs: the layers stand once more, laid out for few rows (decode.packed).
    """
    student, owners = run.student, [b for b in range(len(prefixes)) for _ in range(rows)]
    suffixes = [suffix] * len(owners)
    with Live(student) as live:
        cache = student.prefill(prefixes)
        ids_T, positions_3T, _ = student.pack(suffixes, [cache.next_position[b] for b in owners])
        tree = Tree(cache.lengths, [len(s.ids) for s in suffixes], owners, student.device,
                    cache.layers, [])
        student.hidden(ids_T, positions_3T, student.features(suffixes), tree)
        S, C = len(suffix.ids), run.config.max_completion
        own = sum(x.nbytes * (1 if pair[0].ndim == 3 else (S + C) / S)  # windows, states stay
                  for pair in tree.store for x in pair)
        logits = DRAWING * 4 * len(owners) * student.model.config.text_config.vocab_size
        layers = [*student.model.model.language_model.layers.parameters(),
                  student.model.lm_head.weight]
        packed = packs * sum(p.nbytes for p in layers if p.ndim == 2)
        return max(live.top, live.now + own + logits) + packed


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


def predicted(run: Any, peaks: dict[str, float], processes: int,
              sharded: bool) -> dict[str, float]:
    """Return the bytes of one process: what stands, and each phase at its peak with all of it.

    run: on the meta device, in the compute type; peaks: of `activations`. Gradients are there in
    the update alone. With --offload what stands does so in the host's memory, and is in no phase.
    """
    size = run.student.model.lm_head.weight.element_size()
    found, more = standing(run, processes, size), gathered(run, size)
    alone = 0 if run.config.offload else 1
    always = alone * (sum(found.values()) - found["gradients"])
    for phase in (phase for phase in PHASES if phase in peaks):
        found[phase] = always + peaks[phase] + sharded * more[phase]
    found["update"] += alone * found["gradients"]
    return found


# ---------------------------------------------------------------------------------------------
# Measured


class Scale(Phases):
    """Phases that also keep the most memory of each of PHASES, in bytes above `base`."""

    def __init__(self, device: torch.device, base: int):
        super().__init__(device)
        self.base, self.most = base, {}

    @contextmanager
    def __call__(self, name: str):
        """Add the time of the block to a phase, and see how far the memory goes."""
        used_memory(self.device)
        with super().__call__(name):
            yield
        phase, top = OF_PHASE.get(name), used_memory(self.device, peak=True) - self.base
        if phase:
            self.most[phase] = max(self.most.get(phase, 0), top)


def free(device: torch.device) -> int:
    """Return the bytes that are free: of the card, or of this machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    room = proc_bytes("/proc/meminfo", "MemAvailable")
    limit, taken = (CGROUP / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        room = min(room, int(most) - int(taken.read_text()))
    return room


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


def taken(make: Callable, update: Callable, device: torch.device, dtype: torch.dtype,
          most: float) -> tuple[dict, dict, str]:
    """Take the step, unless `most` bytes do not fit; return its seconds, its memory, a sentence.

    All processes take it or none; on a CPU those of one machine share its memory.
    """
    room, on_cpu = free(device), device.type == "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_cpu else 1
    if not all(everyone(here * most < 0.95 * room)):
        return {}, {}, ("no step was taken: it would not fit into the "
                        f"{room / GIB:.1f} GiB that are free")
    base = used_memory(device)
    try:
        with redirect_stdout(None):  # what it says of the data has been said
            run = make(device, dtype)
    except ValueError as error:  # a folder without weights can be planned for
        return {}, {}, f"no step was taken: {error}"
    phases = step(run, update, base)
    return phases.all(), phases.most, (f"of {room / GIB:.1f} GiB free here, the step took at most "
                                       f"{max(phases.most.values()) / GIB:.2f}")


# ---------------------------------------------------------------------------------------------
# What it prints


def planned(make: Callable, update: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Return the plan of a run as text. make(device, dtype) -> its Run; update: train.py's."""
    if device.type == "cpu":  # blocks of their own: what is freed is gone, as CUDA counts
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    run = make(torch.device("meta"), dtype)
    adapted, groups = bool(run.student.adapted), at_the_largest(run)
    sharded = dist.is_initialized() and (world_size() > 1 or not adapted)  # as in Student.load
    if device.type == "cuda":
        recompute_blocks(run.student.model)
    packs = device.type == "cpu" and dtype == torch.float32
    here = predicted(run, activations(run, groups, sharded, packs), world_size(), sharded)
    recompute_blocks(run.student.model)
    run.student.to(torch.bfloat16)
    peaks = activations(run, run.fetch(0), True, False)
    cards = {f"{n} GPU{'s' * (n > 1)}": predicted(run, peaks, n, n > 1 or not adapted)
             for n in CARDS}
    seconds, measured, sentence = taken(make, update, device, dtype, max(here.values()))
    return "\n".join([
        f"one step at the largest sizes: prompts of {len(groups[0].prefix.ids)} tokens, "
        f"{len(groups)} for each of {world_size()} processes",
        *memory({"predicted": here, "measured": measured} | cards),
        "GPUs: bfloat16, blocks computed anew in the backward, CUDA's and NCCL's own GiB aside",
        *["weights, gradients and AdamW: in the host's memory"] * run.config.offload,
        sentence, *time_and_cost(run, groups[0].sample, seconds, dtype)])


def memory(columns: dict[str, dict]) -> list[str]:
    """Return the table of GiB by what stands and by phase."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = ["GiB of one process".ljust(22) + "".join(f"{title:>11}" for title in columns)]
    for name in names:
        cells = (f"{column[name] / GIB:.2f}" if name in column else ""
                 for column in columns.values())
        lines.append((name if name in PHASES else f"  {name}").ljust(22)
                     + "".join(f"{cell:>11}" for cell in cells))
    return lines


def time_and_cost(run: Any, sample: Any, seconds: dict, dtype: torch.dtype) -> list[str]:
    """Return seconds, disk and what is asked of the teacher, for the whole run, as lines."""
    config, lines = run.config, []
    if seconds:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()
                          if name != "step")
        hours = run.steps * seconds["step"] / 3600
        lines.append(f"the step took {seconds['step']:.1f} s ({parts}), reading files and the "
                     f"teacher aside; {run.steps} such steps: {hours:.2f} h")
    adapters = config.lora and not config.merge  # in fp32, whatever is computed in
    trained, shown = (count(run.student.parameters(), only) for only in (True, adapters))
    size = 12 * trained + shown * (4 if adapters else dtype.itemsize)
    size += standing(run, 1, 4).get("copy of the method", 0)
    lines.append(f"a checkpoint of a run in {str(dtype).removeprefix('torch.')} takes "
                 f"{size / 1e9:.2f} GB on disk; {config.keep_checkpoints} are kept, and one more "
                 "while it is written")
    return lines + asked(run, sample)


def asked(run: Any, sample: Any) -> list[str]:
    """Return a line on the most that the teacher is asked for in a run; none without a teacher.

    It is asked once for a prompt, or for each first try, of which --dynamic_sampling makes more;
    and for the held-out questions of every evaluation, where these get patches.
    """
    config, method = run.config, run.method
    if not method.asks:
        return []
    tries = config.rollouts if method.compares and config.method != "luffy" else 1
    n = run.steps * world_size() * config.batch_prompts * tries * (1 + config.dynamic_sampling)
    if run.eval_patches and method.repairs:
        due = {0, run.steps, *range(0, run.steps, config.eval_every or run.steps)}
        n += len(due) * len(run.eval_samples)
    what = "diagnoses (every first try failing)" if method.repairs and method.compares else \
        "answers of the teacher"
    return [f"at most {n} {what}" + requests(run, sample, n) * (config.teacher == "anthropic")]


def requests(run: Any, sample: Any, n: int) -> str:
    """Return the most requests of so many answers, and about what they cost, as text.

    The frames are in the first request, later ones read them from the server's prompt cache at a
    tenth of the price; an image is about a token for 750 pixels.
    """
    config = run.config
    tools = run.method.repairs and "tools" in config.teacher_prompt.split(",")
    rounds = config.teacher_rounds if tools else 1
    text = f", up to {rounds * n} requests"
    text += ", more where patches are refused or tested" * run.method.repairs
    if config.teacher_price:
        first = PROMPT_TOKENS + sample.clip.frames[:, 0].numel() / 750
        usage = [(rounds - 1) * LOOK_TOKENS, first, (rounds - 1) * first, rounds * ANSWER_TOKENS]
        text += f"; about {n * money(usage, prices(config.teacher_price)):.0f} dollars"
    return text
