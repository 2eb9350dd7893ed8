"""What a step costs, the usual way and ours: same weights, prompt, frames and seeds, one table.

    python tests/bench.py                                       the whole table
    python tests/bench.py --quick                               does it run at all
    python tests/bench.py --linear                              our cost over lengths and prompts
    python tests/bench.py --profile                             what our decoding spends its time on
    python tests/bench.py --reading                             reading videos: PyAV, decord, others
    python tests/bench.py --waiting                             a slow teacher, and --ahead
    python tests/bench.py --keeping                             what --keep_rollouts costs a step
    python tests/bench.py --device cuda --model 7b --recompute --cuda_graphs
                                                                real shapes, random weights, bf16

`usual` is R1-V's trainer, which Video-R1 and FFR's release follow, on Hugging Face's own model:
tries by generate() with num_return_sequences; repairs one after another, the whole prompt prefilled
anew; policy and reference on G padded rows with the pixels repeated, full logits, log_softmax row
by row. Twice it is kinder than they are: its forwards are handed their positions, and generate() of
today repeats the vision tower's output where older ones ran the tower G times. `ours` is train.py's
step. Both sample rows to their full length (EOS is banned) and end in AdamW at learning rate 0, so
that all repeats meet the same weights. Part by part they take turns: ours, the usual way, ours;
the mean of our two laps counts, so that a steady drift of the machine's speed falls out. On a CPU
the process keeps the memory it frees, as CUDA's allocator does: glibc would hand large blocks back
to the kernel and fault in every page at the next use, to the usual way's loss most of all.

A cell is how many times faster, (smallest..largest over the repeats), / the limit that counting
tokens sets. The usual way runs at the first two failure rates given, 0 and 50 %; the rest follows:
n serial repairs cost n times one, rows are padded to the longest. "Share of torch.mm": operations
of linear layers, attention and head per second over torch.mm's in the same run. Memory is what a
part adds at its peak to the level before it, in a process of its own, with half of the tries
failed.

Dimensions: G rollouts, P prefix tokens, C completion tokens, S suffix and completion tokens, L row
tokens, V vocabulary, D width, E head width.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import torch
from transformers import (AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3_5Config,
                          Qwen3VLConfig)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's flat files
import ffr
import tiny
from decode import cuda_graph
from model import Student, recompute_blocks
from prefix_tree import attention_names, mrope
from runs import used_memory

HEADER, PATCH = 5, 75  # tokens of a header, and of the patch before it in a repair
BETA, TOP_P = 0.04, 0.95
FORBIDDEN = list(range(tiny.IMAGE, tiny.EOS + 2))  # vision tokens and EOS
SMALL = (512, 1408, 4, 8, 2, 8192), (160, 432, 3, 4, [2])
LARGE = 1280, 3420, 32, 16, [7, 15, 23, 31]
QWEN3, QWEN3_5 = ("qwen3", "8b"), ("qwen3_5", "9b")
# width, inner width, layers, heads, key heads, vocabulary; the tower's, and its full or deep layers
MODELS = {
    "cpu": SMALL, "qwen3": SMALL, "3b": ((2048, 11008, 36, 16, 2, 151936), LARGE),
    "7b": ((3584, 18944, 28, 28, 4, 152064), LARGE),
    "8b": ((4096, 12288, 36, 32, 8, 151936), (1152, 4304, 27, 16, [8, 16, 24])),
    "qwen3_5": SMALL, "9b": ((4096, 12288, 32, 16, 4, 248320), (1152, 4304, 27, 16, []))}


# ---------------------------------------------------------------------------------------------
# One set of weights, two ways to use it


def make_config(name):
    (D, inner, layers, heads, key_heads, V), (width, mlp, depth, vision_heads, full) = MODELS[name]
    E = D // heads
    rope = {"rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [E // 8, E * 3 // 16, E * 3 // 16]}
    text = dict(hidden_size=D, intermediate_size=inner, num_hidden_layers=layers, vocab_size=V,
                num_attention_heads=heads, num_key_value_heads=key_heads, rope_parameters=rope,
                bos_token_id=None, eos_token_id=tiny.EOS, pad_token_id=None)
    vision = dict(hidden_size=width, intermediate_size=mlp, depth=depth, num_heads=vision_heads,
                  out_hidden_size=D, patch_size=14)
    rest = dict(image_token_id=tiny.IMAGE, video_token_id=tiny.VIDEO, vision_end_token_id=tiny.END,
                vision_start_token_id=tiny.START, tie_word_embeddings=name == "3b")
    if name in QWEN3:
        deep = full if name == "8b" else [0, 1]
        vision |= dict(num_position_embeddings=576, deepstack_visual_indexes=deep)
        return Qwen3VLConfig(text_config=text | {"head_dim": E}, vision_config=vision, **rest)
    if name in QWEN3_5:  # three layers of four are recurrent, with twice as many heads of values
        rope |= {"partial_rotary_factor": 0.25, "mrope_section": [E // 32] * 2 + [E // 16]}
        text |= dict(head_dim=E, linear_num_key_heads=heads, linear_num_value_heads=2 * heads,
                     linear_key_head_dim=E // 2, linear_value_head_dim=E // 2)
        vision |= dict(num_position_embeddings=576)
        return Qwen3_5Config(text_config=text, vision_config=vision, **rest)
    vision |= dict(window_size=112, fullatt_block_indexes=full, tokens_per_second=2)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **rest)


def make_models(flags):
    """Make Hugging Face's model and our Student on the same parameters, frozen copies, AdamW."""
    device, cuda = torch.device(flags.device), flags.device == "cuda"
    ours = attention_names("auto", cuda, torch.bfloat16)
    attention = ours["vision_config"]
    torch.manual_seed(flags.seed)
    with device:
        policy = AutoModelForImageTextToText.from_config(
            make_config(flags.model), dtype=torch.bfloat16 if cuda else torch.float32,
            attn_implementation=attention)
    for p in (p for p in policy.parameters() if p.ndim > 1):
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    if flags.recompute:
        recompute_blocks(policy)
    reference = deepcopy(policy).eval().requires_grad_(False)
    models = SimpleNamespace(config=policy.config, device=device, G=flags.rollouts,
                             usual=policy.train(), usual_ref=reference)
    for name in ("", "_ref"):
        model = getattr(models, "usual" + name)
        twin = deepcopy(model, {id(p): p for p in model.parameters()})  # shares the parameters
        twin.set_attn_implementation(ours)
        student = Student(twin, SimpleNamespace(tokenizer=tiny.Tokenizer()), trainable=not name)
        student.to(device).banned = torch.tensor(FORBIDDEN, device=device)
        student.record = cuda_graph if flags.cuda_graphs else None
        setattr(models, "ours" + name, student)
    models.optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.01, fused=True)
    return models


def make_prefix(model, P):
    """Return a prompt of P tokens: 16 frames, as large as leaves some 50 for the question.

    The clip is so short that all frames have one temporal position, as Hugging Face's rules (that
    of transformers 5.17 cuts seconds off to whole ones) and the checkpoints' agree.
    """
    family, side = "qwen3_vl" if model in QWEN3 + QWEN3_5 else "qwen2_5_vl", 2 * math.isqrt(
        (P - 60) // 8)
    without = tiny.video(family, 8, side, side, 0)
    return tiny.video(family, 8, side, side, P - len(without.ids), seconds=0.05)


def rollout(suffix, ids_C, logp_C=None):
    logp_C = torch.zeros(len(ids_C)) if logp_C is None else logp_C
    return ffr.Rollout(ids_C, logp_C, suffix, "", 0.0, 0.0, False, True)


class Usual:
    """R1-V's step on Hugging Face's own model."""

    def __init__(self, models, prefix, seed=0):
        self.m, self.prefix, self.text = models, prefix, models.usual.model.language_model
        torch.manual_seed(seed)

    def video(self, rows):
        return {"pixel_values_videos": self.prefix.pixels.repeat(rows, 1).to(self.m.device),
                "video_grid_thw": self.prefix.grids.repeat(rows, 1).to(self.m.device)}

    def generate(self, suffix, rows, C, greedy=False):
        ids = torch.cat([self.prefix.ids, suffix.ids])[None].to(self.m.device)
        inputs = {"mm_token_type_ids": (ids == tiny.VIDEO).int() * 2, **self.video(1)}
        if self.m.config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = self.prefix.seconds_per_grid.to(self.m.device)
        sampling = {} if greedy else dict(temperature=1.0, top_p=TOP_P, top_k=0)
        self.m.usual.eval()  # in training mode, activation checkpointing switches its cache off
        out = self.m.usual.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=not greedy, max_new_tokens=C,
            num_return_sequences=rows, suppress_tokens=FORBIDDEN, eos_token_id=tiny.EOS,
            pad_token_id=tiny.EOS, **inputs, **sampling)
        self.m.usual.train()
        return [rollout(suffix, row.cpu()) for row in out[:, ids.shape[1]:]]

    def tries(self, C):
        return self.generate(tiny.text(HEADER), self.m.G, C)

    def repairs(self, suffixes, C):
        return [self.generate(suffix, 1, C)[0] for suffix in suffixes]

    def logp(self, model, rollouts):
        """Return [G, C]: prompts padded on the left, logits of whole rows, log_softmax by row."""
        G, C = len(rollouts), len(rollouts[0].ids_C)
        L = len(self.prefix.ids) + max(len(r.suffix.ids) for r in rollouts) + C
        ids_GL, mask_GL = torch.full((G, L), tiny.EOS), torch.zeros(G, L, dtype=torch.long)
        positions_3GL = torch.zeros(3, G, L, dtype=torch.long)
        for g, r in enumerate(rollouts):
            ids = torch.cat([self.prefix.ids, r.suffix.ids, r.ids_C])
            row = tiny.Segment(ids, None, self.prefix.grids, self.prefix.seconds_per_grid)
            ids_GL[g, -len(ids):], mask_GL[g, -len(ids):] = ids, 1
            positions_3GL[:, g, -len(ids):] = mrope(row, 0, self.m.config)[0]
        device, ids_GL = self.m.device, ids_GL.to(self.m.device)
        logits_GLV = model(input_ids=ids_GL, attention_mask=mask_GL.to(device), use_cache=False,
                           position_ids=positions_3GL.to(device), **self.video(G)).logits
        rows = [logits_LV.log_softmax(-1).gather(-1, ids_L[:, None])[:, 0]
                for logits_LV, ids_L in zip(logits_GLV[:, :-1], ids_GL[:, 1:])]
        return torch.stack(rows)[:, -C:]

    @torch.no_grad()
    def reference(self, rollouts):
        return self.logp(self.m.usual_ref, rollouts).flatten()

    def update(self, rollouts, ref_logp):
        logp_GC = self.logp(self.m.usual, rollouts)
        advantage_G1 = torch.linspace(-1, 1, len(rollouts), device=self.m.device)[:, None]
        d_GC = ref_logp.view_as(logp_GC) - logp_GC
        kl_GC = d_GC.exp() - d_GC - 1
        (BETA * kl_GC - (logp_GC - logp_GC.detach()).exp() * advantage_G1).mean(1).mean().backward()
        self.m.optimizer.step()
        self.m.optimizer.zero_grad()


class Ours:
    """train.py's step, for one prompt or several like it."""

    def __init__(self, models, prefix, seed=0, prompts=1, header=None):
        self.m, self.prefixes, self.seed = models, [prefix] * prompts, seed
        self.header = header or tiny.text(HEADER)
        self.text = models.ours.model.model.language_model

    def repairs(self, suffixes, C, temperature=1.0):
        if not suffixes:
            return []
        owners = [n * len(self.prefixes) // len(suffixes) for n in range(len(suffixes))]
        uniforms = ffr.noise(f"{self.seed}/{len(suffixes[0].ids)}", len(suffixes), C)
        out = self.m.ours.sample(self.cache, suffixes, owners, uniforms, C, temperature, TOP_P)
        return [rollout(suffix, c.ids, c.logp.cpu()) for suffix, c in zip(suffixes, out)]

    def tries(self, C):
        self.cache = self.m.ours.prefill(self.prefixes)
        return self.repairs([self.header] * self.m.G * len(self.prefixes), C)

    def batches(self, rollouts):
        n = len(rollouts) // len(self.prefixes)
        advantages = torch.linspace(-1, 1, n).tolist() * len(self.prefixes)
        slots = [ffr.Slot(r, trained=r, advantage=a) for r, a in zip(rollouts, advantages)]
        groups = [ffr.Group(SimpleNamespace(id=b), prefix, slots[b * n:(b + 1) * n])
                  for b, prefix in enumerate(self.prefixes)]
        weight = ffr.token_weights("token", sum(len(r.ids_C) for r in rollouts), len(rollouts))
        return ffr.micro_batches(groups, 16384, weight)

    @torch.no_grad()
    def reference(self, rollouts):
        return torch.cat([self.m.ours_ref(b.prefixes, b.suffixes, b.owners, b.completions)[0]
                          for b in self.batches(rollouts)])

    def update(self, rollouts, ref_logp):
        batches = self.batches(rollouts)
        for batch, ref in zip(batches, ref_logp.split([len(b.weight_T) for b in batches])):
            batch.ref_logp_T = ref
            logp_T, _ = self.m.ours(batch.prefixes, batch.suffixes, batch.owners, batch.completions,
                                    entropy=True)
            ffr.loss(logp_T, batch, 0.2, 0.2, BETA)[0].backward()
        self.m.optimizer.step()
        self.m.optimizer.zero_grad()


WAYS = {"usual": Usual, "ours": Ours}


# ---------------------------------------------------------------------------------------------
# Measuring


def step(way, C, failures, do):
    """Take a whole step, as a generator: two ways can take turns. do(part, work, *arguments)."""
    do("prefill", way.tries, 1)
    yield
    chosen = do("tries", way.tries, C)
    yield
    n = round(failures * len(chosen))
    patches = [tiny.text(PATCH + HEADER, i) for i in range(n)]
    chosen[len(chosen) - n:] = do("repair", way.repairs, patches, C)
    yield
    ref_logp = do("reference", way.reference, chosen)
    yield
    do("update", way.update, chosen, ref_logp)


class Meter:
    """A stopwatch for the parts of a step, or a scale for the memory that they add."""

    def __init__(self, device, memory=False):
        self.device, self.memory, self.of, self.top = device, memory, {}, 0
        self.start = self.level()

    def level(self, peak=False):
        """Return bytes in use, or the most since last asked; on CUDA it waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return used_memory(self.device, peak) if self.memory or self.device.type == "cuda" else 0

    def __call__(self, part, work, *arguments):
        before, start = self.level(), time.perf_counter()
        result = work(*arguments)
        top = self.level(peak=True)
        self.of[part] = time.perf_counter() - start
        if self.memory:
            self.top = max(self.top, top)
            self.of |= {part: top - before, "step": self.top - self.start}
        return result


def machine(models, tokens):
    """Measure operations per second of torch.mm at a layer's size, bytes per second of a copy."""
    text, kind = models.config.text_config, dict(device=models.device, dtype=models.usual.dtype)
    a = torch.randn(tokens, text.hidden_size, **kind)
    b = torch.randn(text.hidden_size, text.intermediate_size, **kind)
    x, y = (torch.ones(2**29 if models.device.type == "cuda" else 2**25, **kind) for _ in range(2))
    laps = []
    for _ in range(5):
        meter = Meter(models.device)
        meter("mm", torch.mm, a, b)
        meter("copy", x.copy_, y)
        laps.append(meter.of)
    return {"operations": 2 * a.numel() * b.shape[1] / median(lap["mm"] for lap in laps),
            "bytes": 2 * x.numel() * x.element_size() / median(lap["copy"] for lap in laps)}


def keep_freed_memory():
    """Let malloc map no block of its own and trim nothing."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def measure(models, prefix, C, rates, repeats, seed):
    """Return {way: {failure rate: [{part: seconds} of each repeat]}}, and the machine's speed."""
    laps, speeds = {name: {f: [] for f in rates} for name in WAYS}, []
    for repeat, f in itertools.product(range(repeats), rates):
        names = ["ours", "usual", "ours"] if f in rates[:2] else ["ours", "ours"]
        meters = [Meter(models.device) for _ in names]
        ways = [WAYS[name](models, prefix, seed + repeat) for name in names]
        for _ in itertools.zip_longest(*(step(w, C, f, m) for w, m in zip(ways, meters))):
            pass
        for name in set(names):
            mine = [meter.of for meter, other in zip(meters, names) if other == name]
            laps[name][f].append({part: mean(lap[part] for lap in mine) for part in mine[0]})
        speeds.append(machine(models, len(prefix.ids) + models.G * C))
    for f in rates[2:]:
        more = round(f * models.G) / round(rates[1] * models.G)
        measured = laps["usual"][rates[1]]
        laps["usual"][f] = [lap | {"repair": lap["repair"] * more} for lap in measured]
    for lap in (lap for way in laps.values() for rate in way.values() for lap in rate):
        lap["step"] = sum(lap[part] for part in ("tries", "repair", "reference", "update"))
    return laps, speeds


def verify(models, prefix):
    """Compare what both compute (fp32: or raise), and count what each prefills for a repair."""
    usual, ours, embedded = Usual(models, prefix), Ours(models, prefix), []
    sampled = ours.tries(7)
    drift = torch.cat([r.old_logp_C for r in sampled]) - ours.reference(sampled).cpu()
    suffixes = [tiny.text(HEADER + PATCH * (g % 2), g) for g in range(models.G)]
    rollouts = [rollout(s, tiny.words(7, g)) for g, s in enumerate(suffixes)]
    gap = (usual.reference(rollouts) - ours.reference(rollouts)).abs().max().item()
    greedy = usual.generate(suffixes[1], 1, 7, True)[0], ours.repairs(suffixes[1:2], 7, 0.0)[0]
    same = {"logp_gap": gap, "sampling_gap": drift.abs().mean().item(), "prefilled": [],
            "greedy_equal": greedy[0].ids_C.equal(greedy[1].ids_C)}
    if models.device.type == "cpu":
        assert gap < 1e-4 and same["sampling_gap"] < 1e-5 and same["greedy_equal"], same
    for way in (usual, ours):
        embedded.clear()
        hook = way.text.embed_tokens.register_forward_hook(
            lambda module, ids, out: embedded.append(ids[0].numel()))
        way.repairs(suffixes[1:4:2], 1)
        hook.remove()
        same["prefilled"].append(sum(embedded) // 2)
    return same


def operations(models, prefix, rows, logits, clips):
    """Count a forward's operations in linear layers, attention and head.

    rows: (tokens, tokens before them) each.
    """
    text, vision = models.config.text_config, models.config.vision_config

    def size(module):
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    (t, h, w), inner = prefix.grids[0].tolist(), models.usual.model
    full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    seen = full * h * w + (vision.depth - full) * min(h * w, 64)  # keys per patch, all layers
    tower = size(inner.visual.blocks) + size(inner.visual.merger) / 4
    tower += 2 * seen * vision.hidden_size
    pairs = sum(n * before + n * (n + 1) / 2 for n, before in rows)
    attending = sum(hasattr(layer, "self_attn") for layer in inner.language_model.layers)
    return (2 * clips * t * h * w * tower + 4 * pairs * text.hidden_size * attending
            + 2 * sum(n for n, _ in rows) * size(inner.language_model.layers)
            + 2 * logits * text.vocab_size * text.hidden_size)


def peaks(models, way, P, C, flags):
    """Measure bytes of one way's parts; a short step first, for libraries and AdamW's state."""
    for tokens, length in ((100, 2), (P, C)):
        meter = Meter(models.device, memory=True)
        list(step(WAYS[way](models, make_prefix(flags.model, tokens)), length, 0.5, meter))
    return meter.of


def linear(models, prefix, flags):
    """Print our cost over four lengths and four numbers of prompts, half of the tries failed."""
    def cost(C, prompts, seed):
        meter = Meter(models.device)
        list(step(Ours(models, prefix, seed, prompts), C, 0.5, meter))
        return sum(meter.of.values()) - meter.of["prefill"]

    lengths, found = (8, 16, 24, 32) if flags.quick else (64, 128, 192, 256), {}
    for axis, name in enumerate(("completion tokens", "prompts")):
        sizes = [(lengths[0], B) for B in (1, 2, 4, 8)] if axis else [(C, 1) for C in lengths]
        cost(*sizes[-1], 0)
        runs = torch.tensor([[cost(*size, r) for size in sizes] for r in range(flags.repeats)])
        y, x = runs.median(0).values, torch.tensor(sizes).float()[:, axis]
        line = torch.linalg.lstsq(torch.stack([x, torch.ones(4)], 1), y[:, None]).solution[:, 0]
        off = y / (line[0] * x + line[1]) - 1
        found[name] = {"at": x.tolist(), "seconds": runs.tolist(), "line": line.tolist()}
        print(f"\n| {name} |", *(f"{n:g} |" for n in x), "fitted slope |\n" + "|---" * 6 + "|")
        print("| cost over the first |", *(f"{n:.2f} |" for n in y / y[0]),
              f"{line[0] * x[0] / y[0]:.2f} per {x[0]:g} |")
        print("| from the fitted line |", *(f"{100 * n:+.1f} % |" for n in off), "|")
    return found


def profile(models, prefix, C):
    """Print operations of our decoding by self time: G rows of C tokens after a prefill."""
    way, cuda = Ours(models, prefix), models.device.type == "cuda"
    way.tries(4)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities[:1 + cuda]) as run:
        way.repairs([tiny.text(HEADER)] * models.G, C)
    print(run.key_averages().table(sort_by=f"self_{models.device.type}_time_total", row_limit=14,
                                   max_name_column_width=40))


# ---------------------------------------------------------------------------------------------
# The table


def column(models, prefix, C, laps, speeds, prefilled):
    """Return {row: cell} of one shape."""
    usual, ours, G, P, S = laps["usual"], laps["ours"], models.G, len(prefix.ids), HEADER + C
    rates, both, cells = list(ours), (usual, ours), {}
    speed = {what: median(one[what] for one in speeds) for what in speeds[0]}

    def of(way, f, part):
        return median(lap[part] for lap in way[f])

    def decode(lap):
        return G * (C - 1) / (lap["tries"] - lap["prefill"])

    def failed(f):
        return f"{100 * f:.0f} % failed"

    def show(values, digits=2):
        return ", ".join(f"{n:.{digits}f}" for n in values)

    def faster(row, rates, part, limit=None):
        laps = [pair for f in rates for pair in zip(usual[f], ours[f])]
        each = [decode(b) / decode(a) if part == "decode" else a[part] / b[part] for a, b in laps]
        cells[row] = f"{median(each):.2f} ({min(each):.2f}..{max(each):.2f})"
        cells[row] += f" / {limit:.2f}" if limit else ""

    faster("prefill", rates[:2], "prefill", G * (P + HEADER) / (P + G * HEADER))
    faster("decode, tokens/s", rates[:2], "decode")
    for f in sorted(f for f in rates if f):
        faster(f"repair, {failed(f)}", [f], "repair")
    cells["tokens prefilled per repair: usual, ours"] = show(prefilled, 0)
    for part, f in itertools.product(("reference", "update"), rates[:2]):
        suffixes = [S + PATCH * (g < round(f * G)) for g in range(G)]
        limit = G * (P + max(suffixes)) / (P + sum(suffixes))
        faster(f"{part}, {failed(f)}", [f], part, limit)
    for f in sorted(rates):
        faster(f"whole step, {failed(f)}", [f], "step")
    cells[f"step, {failed(max(rates))} over {failed(min(rates))}: usual, ours"] = show(
        median(more["step"] / less["step"] for more, less in zip(way[max(rates)], way[min(rates)]))
        for way in both)
    work = [operations(models, prefix, [(P + S, 0)] * G, G * (P + S), G),
            operations(models, prefix, [(P, 0)] + [(S, P)] * G, G * C, 1)]
    for part, times in (("reference", 1), ("update", 3)) if rates[0] == 0 else ():
        cells[f"{part}, share of torch.mm: usual, ours"] = show(
            times * n / of(way, 0.0, part) / speed["operations"] for n, way in zip(work, both))
    if models.device.type == "cuda":
        text, head = models.usual.model.language_model, models.usual.lm_head
        weights = [*text.layers.parameters(), head.weight]  # all that a decode step has to read
        limit = G * speed["bytes"] / sum(p.numel() * p.element_size() for p in weights)
        cells["tokens/s: usual, ours, bandwidth limit"] = show(
            [*(median(decode(lap) for lap in way[rates[0]]) for way in both), limit], 0)
        for f in sorted(rates):
            cells[f"step seconds, {failed(f)}: usual, ours"] = show(
                (of(way, f, "step") for way in both), 1)
    return cells


def write_film(path, codec, width, height, frames):
    """Write a film of 30 frames a second and 2 Mbit/s: blocks of noise that move to the right."""
    import av
    import numpy as np
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    scene = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(scene, 2 * i, 1))))
        container.mux(stream.encode())


def reading(flags):
    """Print how long readers take for 16 frames spread over a film, ours as 1, side by side.

    Ours and decord's go through video.decode, without the comparison of pictures that --decoder
    decord makes; torchcodec, where it is installed, is scaled alike.
    """
    import tempfile

    import decord
    import video
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError):  # it brings no FFmpeg of its own
        VideoDecoder = None
    torch.set_num_threads(1)
    limits = 128 * 28 * 28, 28

    def ours(path):
        video._video.cache_clear()
        return video.decode(path, "video", 16, *limits).frames

    def by_decord(path):
        reader = decord.VideoReader(path, num_threads=1)
        batch = reader.get_batch(video.frame_indices(len(reader), 16)).asnumpy()
        return video.resize(torch.from_numpy(batch).permute(0, 3, 1, 2), *limits)

    def by_torchcodec(path):
        reader = VideoDecoder(path, num_ffmpeg_threads=1)
        indices = video.frame_indices(reader.metadata.num_frames, 16)
        return video.resize(reader.get_frames_at(indices).data, *limits)

    readers = {"PyAV": ours, "decord": by_decord} | (
        {"torchcodec": by_torchcodec} if VideoDecoder else {})
    films = [("h264 720p, 60 s", "libx264", 1280, 720, 60, "mp4"),
             ("h264 360p, 180 s", "libx264", 640, 360, 180, "mp4"),
             ("hevc 360p, 60 s", "libx265", 640, 360, 60, "mp4"),
             ("xvid 360p, 60 s, avi", "mpeg4", 640, 360, 60, "avi")][:1 if flags.quick else 4]
    print("| times as long as PyAV |", *(f"{name} |" for name in readers))
    with tempfile.TemporaryDirectory() as folder:
        for title, codec, width, height, seconds, ending in films:
            path = f"{folder}/{width}{codec}.{ending}"
            write_film(path, codec, width, height, 30 * (2 if flags.quick else seconds))
            laps, shown = {name: [] for name in readers}, {}
            for _ in range(flags.repeats):
                for name, reader in readers.items():
                    began = time.perf_counter()
                    shown[name] = reader(path)
                    laps[name].append(time.perf_counter() - began)
            apart = [(shown[name].float() - shown["PyAV"].float()).abs().mean((1, 2, 3)).max()
                     for name in readers]
            print(f"| {title} |", *(
                f"{median(laps[name]) / median(laps['PyAV']):.2f}"
                + " (other pictures)" * bool(far > 2) + " |" for name, far in zip(readers, apart)))


def waiting(flags):
    """Print what a teacher of a second an answer adds to a step of the toy world, by --ahead.

    train.py with real processes and a server on this machine; two answers a diagnosis, every first
    try of an untaught student failing. Means over the steps between the first and the last ones,
    which sample more and less than the others: a step that waits long gives the next one's
    diagnoses time, so that waits may alternate.
    """
    import tempfile

    import toy
    from messages_server import MessagesServer, call, submit
    from runs import read_log

    def teacher(seconds):
        def answer(body):
            time.sleep(seconds)
            looked = any(message["role"] == "assistant" for message in body["messages"])
            return [submit("Look again.") if looked else call("get_frame", index=0)]
        return answer

    steps, found = 16, {}
    with tempfile.TemporaryDirectory() as folder:
        toy.make(Path(folder), train=40, heldout=5, warm=5, pretrained=False)
        common = ["--model", "model", "--data", "train.json", "--video_root", "videos",
                  "--template", "template.txt", "--max_pixels", 3136, "--max_completion", 48,
                  "--teacher", "anthropic", "--steps", steps, "--beta", 0, "--frame_cache", "f"]
        for prompts, seconds, ahead in itertools.product(
                (1,) if flags.quick else (1, 4), (0, 1), (0, 1, 3)):
            if ahead and not seconds:
                continue
            with MessagesServer(teacher(seconds)) as server:
                more = ["--teacher_url", server.url, "--batch_prompts", prompts, "--ahead", ahead,
                        "--output", f"{prompts}-{seconds}-{ahead}"]
                subprocess.run(list(map(str, [sys.executable, Path(__file__).resolve().parent.parent
                                              / "train.py", *common, *more])), cwd=folder,
                               check=True, capture_output=True,
                               env=os.environ | {"ANTHROPIC_API_KEY": "none"})
            rows = read_log(f"{folder}/{prompts}-{seconds}-{ahead}/metrics.jsonl")
            laps = [row["seconds"]["step"] for row in rows[1:steps - 1 - ahead]]
            found[prompts, seconds, ahead] = mean(laps)
    print("| prompts | L / W | --ahead 0 | 1 | 1: of max(W, L) | 3 | 3: of max(W, L / 3) |")
    for prompts in sorted({prompts for prompts, *_ in found}):
        W, slow, one, three = (found[prompts, *rest] for rest in ((0, 0), (1, 0), (1, 1), (1, 3)))
        L = slow - W
        cells = (L / W, slow / W, one / W, one / max(W, L), three / W, three / max(W, L / 3))
        print(f"| {prompts} |", *(f"{cell:.2f} |" for cell in cells))


def keeping(flags):
    """Print processor time of steps of the toy world that keep their rollouts, over others'.

    Two runs take turns in one process, step by step, from the same untaught student.
    """
    import tempfile
    from dataclasses import replace

    import toy
    import train
    from runs import start_processes
    torch.set_num_threads(1)
    device, dtype = start_processes("float32", trains=True)
    with tempfile.TemporaryDirectory() as folder:
        toy.make(Path(folder), train=120, heldout=5, warm=5, pretrained=False)
        config = train.Config(
            model=f"{folder}/model", data=f"{folder}/train.json", video_root=f"{folder}/videos",
            template=f"{folder}/template.txt", decode_workers=0, steps=60, **train.TOY_SEEN,
            batch_prompts=8, beta=0.0)
        made = [train.Run(replace(config, output=f"{folder}/{k}", keep_rollouts=k), device, dtype)
                for k in (0, 1)]
        laps = [[], []]
        for turn in range(4 if flags.quick else 30):
            for run, mine in list(zip(made, laps))[::1 if turn % 2 else -1]:
                phases, began = train.Phases(device), time.process_time()
                groups = run.method.fill(run, run.step, phases)
                train.log(run, groups, train.update(run, groups, phases), phases)
                run.step += 1
                mine.append(time.process_time() - began)
    without, kept = (laps[k][1:] for k in (0, 1))  # the first ones read the videos
    ratios = sorted(a / b for a, b in zip(kept, without))
    print(f"steps that keep their rollouts over others: {sum(kept) / sum(without):.3f}, median of "
          f"{len(ratios)} pairs {median(ratios):.3f} ({ratios[0]:.3f}..{ratios[-1]:.3f})")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--model", default="cpu", choices=MODELS, help="4 layers of width 512, or real shapes")
    add("--shapes", default="600x128,600x200,1250x64", help="prefix x completion tokens, columns")
    add("--memory", default="1250x200", help="shapes whose peak memory is measured; '': none")
    add("--failures", default="0,0.5,0.75", help="shares of failed tries")
    add("--rollouts", type=int, default=8, help="G")
    add("--repeats", type=int, default=4)
    add("--threads", type=int, default=os.cpu_count(), help="of torch")
    add("--seed", type=int, default=0)
    add("--recompute", action="store_true", help="activation checkpointing, in both ways")
    add("--cuda_graphs", action="store_true", help="our decode steps recorded, as in train.py")
    add("--linear", action="store_true", help="only our cost over lengths and numbers of prompts")
    add("--profile", action="store_true", help="only the operations of our decoding")
    add("--reading", action="store_true", help="only the reading of videos, on one thread")
    add("--waiting", action="store_true", help="only a slow teacher's share of a step")
    add("--keeping", action="store_true", help="only what keeping rollouts costs")
    add("--quick", action="store_true", help="one tiny shape, once")
    add("--json", default="", help="file for all figures")
    add("--child", default="", help=argparse.SUPPRESS)  # way,P,C of a fresh process for memory
    flags = parser.parse_args(argv)
    if flags.quick:
        flags.shapes, flags.memory, flags.repeats = "120x8", flags.memory and "120x8", 1
    return flags


def main(argv):
    flags = parse(argv)
    shapes, memory = ([tuple(map(int, shape.split("x"))) for shape in text.split(",") if shape]
                      for text in (flags.shapes, flags.memory))
    torch.set_num_threads(flags.threads)
    if flags.cuda_graphs and flags.device != "cuda":
        sys.exit("bench.py: --cuda_graphs needs --device cuda")
    for chosen in (reading, waiting, keeping):
        if getattr(flags, chosen.__name__):
            return chosen(flags)
    if flags.child:
        way, P, C = flags.child.split(",")
        return print(json.dumps(peaks(make_models(flags), way, int(P), int(C), flags)))
    found = {"flags": vars(flags), "torch": torch.__version__, "memory": {}, "seconds": {},
             "machine": {}}
    table = {shape: {} for shape in sorted({*shapes, *memory})}
    if flags.linear or flags.profile:
        memory = []
    for P, C in memory:  # before this process takes the device's memory
        bytes_of = {way: json.loads(subprocess.run(
            [sys.executable, __file__, *argv, "--child", f"{way},{P},{C}"], check=True,
            stdout=subprocess.PIPE).stdout) for way in WAYS}
        found["memory"][f"{P}x{C}"] = bytes_of
        table[P, C] |= {f"peak memory, {part}: ours / usual":
                        f"{bytes_of['ours'][part] / bytes_of['usual'][part]:.2f}"
                        for part in ("update", "step")}
    if flags.device == "cpu":
        keep_freed_memory()
    models = make_models(flags)
    prefixes = {P: make_prefix(flags.model, P) for P, _ in shapes}
    found["same"] = same = {P: verify(models, prefix) for P, prefix in prefixes.items()}
    print("largest difference of log-probs:", max(s["logp_gap"] for s in same.values()))
    if flags.profile:
        profile(models, prefixes[shapes[0][0]], shapes[0][1])
    elif flags.linear:
        found["linear"] = linear(models, prefixes[shapes[0][0]], flags)
    else:
        rates = [float(f) for f in flags.failures.split(",")]
        measure(models, prefixes[max(prefixes)], 2, rates[:1], 1, 0)  # warms up
        for P, C in shapes:
            laps, speeds = measure(models, prefixes[P], C, rates, flags.repeats, flags.seed)
            found["seconds"][f"{P}x{C}"], found["machine"][f"{P}x{C}"] = laps, speeds
            table[P, C] |= column(models, prefixes[P], C, laps, speeds, same[P]["prefilled"])
        print("\n| times faster |", *(f"P {P}, C {C} |" for P, C in table))
        print("|---" * (len(table) + 1) + "|")
        for row in dict.fromkeys(row for cells in reversed(table.values()) for row in cells):
            print(f"| {row} |", *(f"{cells.get(row, '')} |" for cells in table.values()))
        found["table"] = {f"P {P}, C {C}": cells for (P, C), cells in table.items()}
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
