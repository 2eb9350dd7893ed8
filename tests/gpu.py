"""The CUDA paths proved right, then measured: one card, one call, under eight minutes.

    python tests/gpu.py --out FOLDER                    every section, in this order
    python tests/gpu.py --out FOLDER --only right,decode
    python tests/gpu.py --out FOLDER --dry              every section on the CPU, at toy sizes

Every section is a process of its own with a time limit (480 s in all); what it finds it writes at
once, so that a cut run still leaves what was found. FOLDER/gpu.json holds the card, driver,
versions and commit and every finding, FOLDER/gpu.md the same as tables for docs/performance.md.
Exit code 1 if anything was wrong or broke.

It runs on a bare machine with Python 3.12, torch 2.11, torchvision, transformers 5.17 and numpy.
Two groups of sections need more, and where it is missing they say so and are left out: `toy`,
`plan` and `evaluate`, which run train.py and evaluate.py on videos, av, jiwer, rapidfuzz, nltk,
tqdm and pytest; `trl` trl, accelerate and psutil. As wheels all of these are 42 MB, 36 of them av:

    pip download -d WHEELS --no-deps --only-binary=:all: --python-version 3.12
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 av==18.1.0 jiwer==4.0.0
        rapidfuzz nltk tqdm pytest pluggy iniconfig trl==1.16.0 accelerate psutil
    pip install --no-index --no-deps WHEELS/*.whl       on the other machine

TRL also imports datasets, pandas and pyarrow (68 MB) to read and write tables, which no step does:
where one of them is missing, an empty module stands in for it.

Dimensions: T packed tokens, P prefix, S suffix and C completion tokens, H query and K key heads, E
head width.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched, and TRL reports no use of itself
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's flat files
import bench
import ffr
import model as student_module
import prefix_tree
import tiny
from decode import cuda_graph
from model import Student, add_adapters
from prefix_tree import Tree, attention_names, tree_attention

ROOT = Path(__file__).resolve().parent.parent
READING, TRL = "av jiwer rapidfuzz nltk tqdm pytest".split(), "trl accelerate psutil".split()
REAL = "3b", "7b", "8b"  # Qwen2.5-VL 3B and 7B, Qwen3-VL 8B: shapes of tests/bench.py
HEADS = {"3b": (16, 2), "7b": (28, 4), "8b": (32, 8)}  # of queries and of keys, each 128 wide


class Findings:
    """The file that a section writes to, a line as soon as something is found."""

    def __init__(self, folder: Path, section: str):
        self.path, self.section = folder / f"{section}.jsonl", section

    def __call__(self, what: str, value: object, right: bool | None = None, **more: object) -> None:
        """Write a finding; `right` says whether it is what it must be, where it can be wrong."""
        row = {"section": self.section, "what": what, "value": value, "right": right, **more}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {what}: {value}" + ("" if right is not False else "   WRONG"), flush=True)


# ---------------------------------------------------------------------------------------------
# Right: kernels


def plain_tree(q_HTE, k_KTE, v_KTE, tree, scale):
    """Attend suffix by suffix with matrices of scores, in the inputs' own precision: [T, H, E]."""
    group = q_HTE.shape[0] // k_KTE.shape[0]
    k_HTE, v_HTE = (x.repeat_interleave(group, 0) for x in (k_KTE, v_KTE))
    starts = torch.tensor([0, *tree.prefix_lengths, *tree.suffix_lengths]).cumsum(0).tolist()
    B, parts = len(tree.prefix_lengths), []
    for n, (start, end) in enumerate(zip(starts, starts[1:])):
        own = torch.arange(start, end)
        keys = own
        if n >= B:
            owner = tree.owners[n - B].item()
            keys = torch.cat([torch.arange(starts[owner], starts[owner + 1]), own])
        keys, S = keys.to(q_HTE.device), end - start
        scores = q_HTE[:, start:end] @ k_HTE[:, keys].transpose(1, 2) * scale
        seen = torch.ones(S, len(keys), dtype=torch.bool, device=q_HTE.device)
        seen = seen.tril(len(keys) - S)
        p = scores.masked_fill(~seen, -math.inf).softmax(-1)
        parts.append((p @ v_HTE[:, keys]).transpose(0, 1))
    return torch.cat(parts)


def outcome(attend, inputs, cotangent):
    """Return attention's output and the gradients of its inputs, in float64."""
    inputs = [x.detach().clone().requires_grad_(True) for x in inputs]
    out = attend(*inputs)
    out.backward(cotangent.to(out.dtype))
    return [out.detach().double(), *(x.grad.double() for x in inputs)]


def kernels(note: Findings, device: torch.device, dry: bool) -> None:
    """Hold every way to attend against float64: at most twice the error of plain low precision."""
    lengths = ([20, 13], [7, 9, 5, 8]) if dry else ([1250, 704], [205, 330, 205, 64])
    tree, T = Tree(*lengths, [0, 0, 1, 1], device), sum(map(sum, lengths))
    for name, (H, K) in ({"3b": (4, 2)} if dry else HEADS).items():
        E, dtype = (16, torch.float32) if dry else (128, torch.bfloat16)
        torch.manual_seed(0)
        inputs = [torch.randn(heads, T, E, device=device).to(dtype) for heads in (H, K, K)]
        compare(note, name, tree, inputs, torch.randn(T, H, E, device=device), E ** -0.5)


def compare(note: Findings, name: str, tree: Tree, inputs: list, cotangent: torch.Tensor,
            scale: float) -> None:
    """Hold every way to attend over one tree against float64."""
    cuda = cotangent.is_cuda

    def plain(*x):
        return plain_tree(*x, tree, scale)

    def ours(implementation):
        config = SimpleNamespace(_attn_implementation=implementation)
        module = SimpleNamespace(config=config, layer_idx=0)
        return lambda *x: tree_attention(module, *(y[None] for y in x), None, scale, tree)[0][0]

    exact = outcome(plain, [x.double() for x in inputs], cotangent)
    floor = [(x - y).abs().max() for x, y in zip(outcome(plain, inputs, cotangent), exact)]
    ways = {"padded": "prefix_tree"} | ({"torch": "prefix_tree_torch"} if cuda else {})
    if prefix_tree.flash_attn_varlen_func:
        ways["flash"] = "prefix_tree_fa2"
    for way, implementation in ways.items():
        for cudnn in (False, True) if cuda and way != "flash" else (False,):
            if cuda:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
            found = outcome(ours(implementation), inputs, cotangent)
            worst = max(((x - y).abs().max() / (2 * bound + 1e-5)).item()
                        for x, y, bound in zip(found, exact, floor))
            how = f"{way}, cuDNN allowed" if cudnn else way
            note(f"{name} shapes, {how}: largest error of output and gradients, 1 is allowed",
                 round(worst, 3), None if cudnn else worst <= 1)  # training never meets cuDNN


def trap(note: Findings, device: torch.device, dry: bool) -> None:
    """Try the known NaN of cuDNN's backward, and see that a loaded student is not exposed to it."""
    L, half = (192, torch.bfloat16) if not dry else (64, torch.float32)
    q, k, v = (torch.randn(1, 4, L, 128, device=device, dtype=half) for _ in range(3))
    q[:], k[:] = 3.5, -3.5  # scores of -139: every row's logsumexp is below -88.7
    mask = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    for cudnn in (True, False):
        inputs = [x.detach().clone().requires_grad_(True) for x in (q, k, v)]
        first = [SDPBackend.CUDNN_ATTENTION] * cudnn  # where this build and card have it
        with sdpa_kernel([*first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], True):
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
            out.sum().backward()
        finite = all(bool(x.grad.isfinite().all()) for x in inputs)
        note(f"gradients with an explicit mask are finite, cuDNN {'on' if cudnn else 'off'}",
             finite, None if cudnn else finite)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(True)
        with checkpoint() as folder:
            Student.load(folder, device, torch.bfloat16, trainable=False)
        off = not torch.backends.cuda.cudnn_sdp_enabled()
        note("cuDNN's attention is off once a student is loaded", off, off)


class checkpoint:  # noqa: N801, used as a context like open()
    """A folder with a random toy student, without the toy world's need for av."""

    def __init__(self):
        self.folder = Path(f"/tmp/gpu-checkpoint-{os.getpid()}")

    def __enter__(self) -> str:
        missing = importlib.util.find_spec("av") is None
        if missing:  # toy.py writes videos with it; none are written here
            sys.modules.setdefault("av", SimpleNamespace())
        import toy
        toy.save_student(self.folder, 0, pretrained=False)
        return str(self.folder)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# Right: tokens and log-probs


def make_student(name: str, device: torch.device, dtype: torch.dtype, trainable: bool = False,
                 attention: str = "auto", seed: int = 0, lora: int = 0) -> Student:
    """Return a student of random weights in the shapes of tests/bench.py, adapters in fp32."""
    names = attention_names(attention, device.type == "cuda", dtype)
    torch.manual_seed(seed)
    with torch.device(device):
        made = transformers.AutoModelForImageTextToText.from_config(
            bench.make_config(name), dtype=dtype, attn_implementation=names)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    if lora:
        add_adapters(made, lora)
    if trainable:
        student_module.recompute_blocks(made)
    student = Student(made.train(trainable), SimpleNamespace(tokenizer=tiny.Tokenizer()), trainable)
    student.to(device).banned = torch.tensor(bench.FORBIDDEN, device=device)
    return student


def tokens(note: Findings, device: torch.device, dry: bool) -> None:
    """Hold sampled ids and log-probs against plain loops, the CPU, and scoring in bfloat16."""
    torch.backends.cudnn.allow_tf32 = False  # else a convolution's fp32 on CUDA has 10 bits
    for name in ("cpu", "qwen3", "qwen3_5"):  # small shapes
        rows = [tiny.text(5, seed) for seed in range(4)] + [tiny.text(80, 9)]
        family(note, name, device, bench.make_prefix(name, 120 if dry else 600), rows,
               8 if dry else 300)


def family(note: Findings, name: str, device: torch.device, prefix: tiny.Segment, suffixes: list,
           C: int) -> None:
    """Do what `tokens` says for one family of students."""
    cuda, owners = device.type == "cuda", [0] * len(suffixes)
    uniforms = ffr.noise("gpu", len(suffixes), C)

    def sample(student, temperature, record=None):
        student.record = record
        return student.sample(student.prefill([prefix]), suffixes, owners, uniforms, C, temperature,
                              0.95)

    def score(student, completions):
        return student([prefix], suffixes, owners, [c.ids for c in completions])[0].cpu()

    exact = make_student(name, device, torch.float32)
    greedy = sample(exact, 0.0)
    for n in (0, 4):
        same = plain_greedy(exact, prefix, suffixes[n], 6) == greedy[n].ids[:6].tolist()
        note(f"{name}, fp32: greedy ids of row {n} equal a plain loop's", same, same)
    if cuda:
        same = all(a.ids.equal(b.ids) for a, b in zip(greedy, sample(exact, 0.0, cuda_graph)))
        note(f"{name}, fp32: greedy ids with CUDA graphs equal those without", same, same)
        ends, exact.eos_ids = exact.eos_ids, set(range(100))  # rows end all along the way
        drawn = [[c.ids for c in sample(exact, 1.0, record)] for record in (None, cuda_graph)]
        same, exact.eos_ids = all(a.equal(b) for a, b in zip(*drawn)), ends
        note(f"{name}, fp32: the same where rows of {[len(ids) for ids in drawn[0]]} tokens are "
             "drawn", same, same)
        on_cpu = make_student(name, torch.device("cpu"), torch.float32)
        on_cpu.load_state_dict({key: w.cpu() for key, w in exact.state_dict().items()})
        gap = (score(exact, greedy) - score(on_cpu, greedy)).abs().max().item()
        note(f"{name}, fp32: largest difference of log-probs from the CPU's", gap, gap < 1e-3)
    half = make_student(name, device, torch.bfloat16)
    for record in (None, cuda_graph) if cuda else (None,):
        drawn, how = sample(half, 1.0, record), ", CUDA graphs" if record else ""
        ratio_T = score(half, drawn) - torch.cat([c.logp.cpu() for c in drawn])
        rows = [part.mean().abs().item() for part in ratio_T.split([len(c.ids) for c in drawn])]
        gap_T = ratio_T.abs()
        note(f"{name}, bf16{how}: logp_mismatch, mean and 99th percentile",
             [gap_T.mean().item(), gap_T.quantile(0.99).item()], gap_T.mean().item() < 0.05)
        note(f"{name}, bf16{how}: share of tokens outside a clip of 0.2, of rows outside GSPO's",
             [((ratio_T.exp() - 1).abs() > 0.2).float().mean().item(),
              sum(row > 4e-4 for row in rows) / len(rows)])


@torch.no_grad()
def plain_greedy(student: Student, prefix: tiny.Segment, suffix: tiny.Segment,
                 length: int) -> list[int]:
    """Return the likeliest ids, the whole row computed anew for every one of them."""
    ids = torch.zeros(0, dtype=torch.long)
    for _ in range(length):
        row = student_module._extended(suffix, ids)
        P_ids, P_positions, ends = student.pack([prefix], [0])
        S_ids, S_positions, _ = student.pack([row], ends)
        tree = Tree([len(prefix.ids)], [len(row.ids)], [0], student.device)
        positions_3T = torch.cat([P_positions, S_positions], 1)
        hidden_TD = student.hidden(torch.cat([P_ids, S_ids]), positions_3T,
                                   student.features([prefix]), tree)
        logits_V = student.logits(hidden_TD[-1:], 0).index_fill(-1, student.banned, -math.inf)
        ids = torch.cat([ids, logits_V.argmax(-1).cpu()])
    return ids.tolist()


# ---------------------------------------------------------------------------------------------
# Right: train.py on the toy world


def toy_run(note: Findings, device: torch.device, dry: bool) -> None:
    """Train on the toy world as a user does, kill it, resume it; compare with a straight run."""
    folder = note.path.parent / "toy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = 3 if dry else 15
    flags = ["--steps", str(steps), "--save_every", "2"]
    if dry:
        import toy
        toy.make(folder / "world", train=10, heldout=5, warm=10, pretrained=False)
        world = folder / "world"
        flags += ["--model", world / "model", "--data", world / "train.json", "--video_root",
                  world / "videos", "--template", world / "template.txt", "--max_pixels", "3136",
                  "--max_completion", "8", "--rollouts", "2", "--decode_workers", "1"]

    def command(output, *more):
        return [sys.executable, str(ROOT / "train.py"), *map(str, flags), "--output", output, *more]

    begin = time.time()
    straight = subprocess.run(command("straight"), cwd=folder, capture_output=True, text=True)
    said = (straight.stdout + straight.stderr)[-3000:]
    note("train.py ends", straight.returncode, straight.returncode == 0, output=said)
    note("its seconds, world and warm-up included", round(time.time() - begin, 1))
    if straight.returncode:
        return
    unread = [row["reason"] for row in read(folder / "straight/bad_samples.jsonl")]
    note("samples that could not be read", unread, not unread)
    rows = read(folder / "straight/metrics.jsonl")
    for key in ("logp_mismatch", "clip_fraction"):
        note(f"largest {key}", max(row[key] for row in rows))
    evals = read(folder / "straight/eval.jsonl")
    if not dry:
        before, after = evals[0]["accuracy"], evals[-1]["accuracy"]
        note(f"held-out accuracy before and after {steps} steps", [before, after], after > before)
    process = subprocess.Popen(command("killed"), cwd=folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(read(folder / "killed/metrics.jsonl")) < steps - 1:
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = subprocess.run(command("killed", "--resume"), cwd=folder, capture_output=True,
                             text=True)
    note("a killed run resumes", resumed.returncode, resumed.returncode == 0,
         output=(resumed.stdout + resumed.stderr)[-3000:])
    timed = {"seconds", "tokens_per_second", "peak_memory_gb"}
    both = [[{k: v for k, v in row.items() if k not in timed}
             for row in read(folder / run / "metrics.jsonl")] for run in ("straight", "killed")]
    note("as many steps as a straight run", len(both[1]), len(both[0]) == len(both[1]))
    note("equal to the bit to a straight run", both[0] == both[1])


def read(path: Path) -> list[dict]:
    """Return the whole lines of a JSONL file, [] where there is none."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].split("\n") if line]


# ---------------------------------------------------------------------------------------------
# Fast


def timed(work: Callable, device: torch.device, repeats: int = 3) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    laps = []
    for _ in range(repeats + 1):
        meter = bench.Meter(device)
        meter("work", work)
        laps.append(meter.of["work"])
    return median(laps[1:])


def ceiling(student: Student, T: int) -> dict:
    """Measure the card: operations a second of a matrix product, bytes a second of a copy."""
    models = SimpleNamespace(config=student.model.config, device=student.device,
                             usual=SimpleNamespace(dtype=student.model.dtype))
    return bench.machine(models, T)


def decode(note: Findings, device: torch.device, dry: bool) -> None:
    """Measure tokens a second of sampling against what the memory's bandwidth allows."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in ("cpu",) if dry else REAL:
        student = make_student(name, device, dtype)
        prefix, speed = bench.make_prefix(name, 120 if dry else 1250), ceiling(student, 4096)
        for G, record in ((8, None), (8, cuda_graph), (32, cuda_graph)):
            if record is None or device.type == "cuda":
                student.record = record
                C = 6 if dry else 192 if record else 64
                found = rate(student, prefix, G, C, speed["bytes"])
                note(f"{name} shapes, G {G}, P {len(prefix.ids)}{', CUDA graphs' * bool(record)}: "
                     "tokens a second, share of the bandwidth limit", found)
        del student  # before the next one is made


def rate(student: Student, prefix: tiny.Segment, G: int, C: int, bandwidth: float) -> list[float]:
    """Return tokens a second of G rows, and their share of what reading all once a step allows."""
    text, cache = student.model.model.language_model, student.prefill([prefix])
    uniforms = ffr.noise("decode", G, C)

    def run(length):
        student.sample(cache, [tiny.text(5)] * G, [0] * G, uniforms[:, :length], length, 1.0, 0.95)

    seconds = timed(lambda: run(C), student.device, 2) - timed(lambda: run(2), student.device, 2)
    weights = sum(p.numel() * p.element_size()
                  for p in [*text.layers.parameters(), student.model.lm_head.weight])
    kept = sum(x.numel() * x.element_size() for pair in cache.layers for x in pair)
    own = kept * G * (C / 2 + 5) / len(prefix.ids)  # of the rows, half full on average
    found = G * (C - 2) / max(seconds, 1e-9)
    return [round(found), round(found / (G * bandwidth / (weights + kept + own)), 3)]


def update(note: Findings, device: torch.device, dry: bool) -> None:
    """Measure prefill, a scoring pass and an update as shares of the card's measured peak."""
    cuda, G, P, C = device.type == "cuda", 8, 120 if dry else 1250, 6 if dry else 400
    name = "cpu" if dry else "7b"
    dtype = torch.bfloat16 if cuda else torch.float32
    student, prefix = make_student(name, device, dtype, trainable=True), bench.make_prefix(name, P)
    rows = [prefix], [tiny.text(5)] * G, [0] * G, [tiny.words(C, g) for g in range(G)]
    models = SimpleNamespace(config=student.model.config,
                             usual=SimpleNamespace(model=student.model.model))
    P, peak = len(prefix.ids), ceiling(student, P + G * C)["operations"]

    def share(work, operations):
        seconds = timed(work, device)
        return [round(seconds, 4), round(operations / seconds / peak, 3)]

    forward = bench.operations(models, prefix, [(P, 0)] + [(5 + C, P)] * G, G * C, 1)

    def scoring():
        with torch.no_grad():
            student(*rows)

    def training():
        student(*rows)[0].mean().backward()
        student.zero_grad()

    note(f"{name} shapes, prefill of P {P}: seconds, share of the matrix peak",
         share(lambda: student.prefill([prefix]),
               bench.operations(models, prefix, [(P, 0)], 0, 1)))
    note(f"{name} shapes, scoring pass, G {G}, C {C}: seconds, share of the peak",
         share(scoring, forward))
    note(f"{name} shapes, forward and backward with recomputation: seconds, MFU",
         share(training, 3 * forward))
    if cuda:
        note("its peak memory in GiB", round(torch.cuda.max_memory_allocated() / 2**30, 1))


def lora(note: Findings, device: torch.device, dry: bool) -> None:
    """Make two steps of a 7B's adapters as train.py does: sample, reference, update; its memory."""
    cuda, G, C = device.type == "cuda", 8, 6 if dry else 200
    dtype = torch.bfloat16 if cuda else torch.float32
    student = make_student("cpu" if dry else "7b", device, dtype, trainable=True, lora=16)
    student.record = cuda_graph if cuda else None
    prefix = bench.make_prefix("cpu" if dry else "7b", 120 if dry else 1250)
    optimizer, mean = torch.optim.AdamW(student.trained(), lr=1e-3, fused=True), []
    rows, first = ([prefix], [tiny.text(5)] * G, [0] * G), None
    for step in range(2):
        begin = time.time()
        with student.gathered():
            drawn = student.sample(student.prefill([prefix]), *rows[1:], ffr.noise("lora", G, C), C)
        said = [c.ids for c in drawn]
        first = first or said
        mean.append(student.at_start(*rows, first)[0].mean().item())
        logp_T, _ = student(*rows, said)
        gap = (logp_T.detach().cpu() - torch.cat([c.logp.cpu() for c in drawn])).abs().mean().item()
        logp_T.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = round(time.time() - begin, 2)
        note(f"step {step}: seconds, logp_mismatch", [seconds, gap], gap < 0.05)
    note("the reference is the same before and after an update", mean, mean[0] == mean[1])
    note("GiB of weights", round(sum(p.nbytes for p in student.parameters()) / 2**30, 2))
    if cuda:
        note("peak memory in GiB", round(torch.cuda.max_memory_allocated() / 2**30, 1))


def steps(note: Findings, device: torch.device, dry: bool) -> None:
    """Run tests/bench.py: a whole step by phase against the usual way, and memory by phase."""
    out = note.path.parent / "bench.json"
    bench.main([*(["--quick", "--threads", "1"] if dry else [
        "--device", "cuda", "--model", "3b", "--recompute", "--cuda_graphs", "--shapes", "1250x128",
        "--memory", "1250x64", "--repeats", "1", "--failures", "0,0.25,0.5,0.75"]),
        "--json", str(out)])
    found = json.loads(out.read_text())
    for shape, cells in found["table"].items():
        for row, cell in cells.items():
            note(f"{shape}: {row}", cell)
    for shape, ways in found["memory"].items():
        for way, parts in ways.items():
            note(f"{shape}: GiB that a part adds at its peak, {way}",
                 {part: round(size / 2**30, 2) for part, size in parts.items()})


class StandIn(ModuleType):
    """An empty module: whatever is asked of it is a class of that name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


def import_trl() -> ModuleType:
    """Import TRL's GRPO; empty modules stand in for missing ones that handle tables."""
    missing = [name for name in ("datasets", "pandas", "pyarrow")
               if importlib.util.find_spec(name) is None]
    for name in [*missing, *(["pyarrow.compute", "pyarrow.types"] if "pyarrow" in missing else [])]:
        sys.modules[name] = StandIn(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    from trl.trainer import grpo_trainer
    return grpo_trainer


def picture_prompt(models: SimpleNamespace, folder: str, P: int) -> tuple:
    """Return a prompt of P tokens and a header, half a frame's pair each a picture, in three forms.

    TRL's processor, whose ids of vision tokens the models' configs take over; TRL's row of a data
    set; and our prefix and header, cut from the very tensors that the processor makes of that row.
    """
    import numpy as np
    from PIL import Image
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.image_processor = transformers.Qwen2VLImageProcessor(
        patch_size=14, temporal_patch_size=2, merge_size=2)  # the family's, with its own limits
    ids_of = json.loads((Path(folder) / "config.json").read_text())
    for model in (models.usual, models.usual_ref, models.ours.model, models.ours_ref.model):
        for key in ("image", "video", "vision_start", "vision_end"):
            setattr(model.config, f"{key}_token_id", ids_of[f"{key}_token_id"])
    side, rng = 28 * math.isqrt((P - 60) // 8), np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(8)]

    def processed(words):
        parts = [*({"type": "image", "image": picture} for picture in pictures),
                 {"type": "text", "text": " red" * words}]
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt")

    words = max(1, P + bench.HEADER - processed(0)["input_ids"].shape[1])
    made, cut = processed(words), -bench.HEADER
    ids, grids = made["input_ids"][0], made["image_grid_thw"]
    prefix = tiny.Segment(ids[:cut], made["pixel_values"], grids, torch.zeros(len(grids)))
    header = tiny.Segment(ids[cut:], None, grids[:0], torch.zeros(0))
    row = {"prompt": [{"role": "user", "content": " red" * words}], "images": pictures}
    return processor, row, prefix, header


def against_trl(note: Findings, device: torch.device, dry: bool) -> None:
    """Time GRPOTrainer's steps and ours, in turns, on the same weights, prompt and optimizer.

    The prompt shows 8 pictures, as many tokens as 16 frames of a video. Both sample G rows of just
    C tokens (EOS is banned), score them with a reference, beta 0.04, and take one step of the same
    AdamW at learning rate 0; TRL without vLLM and with its other defaults, but for the norm of
    gradients, which ours does not clip here either. It has no repairs: it is held against our step
    with none, and with half of the tries repaired.
    """
    grpo, cuda = import_trl(), device.type == "cuda"
    P, C, repeats = (120, 8, 1) if dry else (1250, 128, 2)
    models = bench.make_models(bench.parse([] if not cuda else [
        "--device", "cuda", "--model", "3b", "--recompute", "--cuda_graphs"]))
    with checkpoint() as folder:
        processor, row, prefix, header = picture_prompt(models, folder, P)
    banned = sorted({*bench.FORBIDDEN, *processor.tokenizer.added_tokens_decoder})
    models.ours.banned = torch.tensor(banned, device=device)
    grpo.create_model_from_path = lambda *_, **__: models.usual_ref  # handed over, not read anew
    turns = Turns(note, models, prefix, header, C)
    processor.image_processor.preprocess = turns.prepare
    turns.trainer = grpo.GRPOTrainer(
        models.usual, lambda completions, **_: [float(n) for n in range(len(completions))],
        grpo.GRPOConfig(  # not bf16, which is autocast: the weights are bfloat16 already
            str(note.path.parent / "trl"), per_device_train_batch_size=models.G, use_cpu=not cuda,
            num_generations=models.G, max_completion_length=C, beta=bench.BETA, top_p=bench.TOP_P,
            generation_kwargs={"suppress_tokens": banned}, max_steps=repeats + 1, bf16=False,
            learning_rate=0.0, max_grad_norm=0.0, gradient_checkpointing=cuda,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True),
        data_set(row, repeats + 1), processing_class=processor, callbacks=[turns],
        optimizers=(models.optimizer, None))
    turns.trainer.train()
    turns.tell()


def data_set(row: dict, count: int) -> object:
    """Return what TRL takes for one of datasets' tables: a row, several times."""
    from datasets import Dataset

    class Rows(Dataset):
        cache_files = []

        def __init__(self):  # it needs no table
            pass

        def __len__(self):
            return count

        def __getitem__(self, _):
            return row

        def __getitems__(self, keys):
            return [row for _ in keys]
    return Rows()


class Turns(transformers.TrainerCallback):
    """A stopwatch and a scale for TRL's steps, which takes our steps between them."""

    def __init__(self, note: Findings, models: SimpleNamespace, prefix: tiny.Segment,
                 header: tiny.Segment, C: int):
        self.note, self.given, self.models = note, (models, prefix, header, C), models
        self.shape = f"P {len(prefix.ids)}, C {C}"
        self.laps = {"TRL": [], 0.0: [], 0.5: []}  # seconds, peak bytes and, of TRL, preparing

    def prepare(self, *pictures, **options):
        """Prepare pictures as the processor does, and count the seconds."""
        begun, processor = time.perf_counter(), self.trainer.processing_class.image_processor
        made = type(processor).preprocess(processor, *pictures, **options)
        self.preparing += time.perf_counter() - begun
        return made

    def on_step_begin(self, *_, **__):
        self.meter = bench.Meter(self.models.device, memory=True)
        self.begun, self.preparing = time.perf_counter(), 0.0

    def on_step_end(self, *_, **__):
        top = self.meter.level(peak=True)
        self.laps["TRL"].append((time.perf_counter() - self.begun, top, self.preparing))
        if len(self.laps["TRL"]) == 1:
            gap = difference(*self.given[:3], self.trainer._buffered_inputs[0])
            self.note(f"{self.shape}: mean difference of log-probs of TRL's completions, ours from "
                      "TRL's", gap, gap < (0.05 if self.models.device.type == "cuda" else 1e-4))
        self.trainer._buffered_inputs = None  # its pixels, which the next step makes anew
        for failures in (0.0, 0.5):
            self.laps[failures].append(our_step(*self.given, failures))

    def tell(self):
        """Write the medians, without the first steps, which set libraries up."""
        laps = {way: [median(x) for x in zip(*laps[1:])] for way, laps in self.laps.items()}
        seconds, top, preparing = laps["TRL"]
        self.note(f"{self.shape}: seconds of TRL's step, of which its processor prepares pictures",
                  [round(seconds, 2), round(preparing, 2)])
        for failures in (0.0, 0.5):
            ours, peak = laps[failures]
            self.note(f"{self.shape}: our step, {100 * failures:.0f} % repaired: seconds, times "
                      "faster than TRL's; GiB at the peak, TRL's there, ours over TRL's",
                      [round(ours, 2), round(seconds / ours, 2), round(peak / 2**30, 2),
                       round(top / 2**30, 2), round(peak / top, 2)])


def our_step(models: SimpleNamespace, prefix: tiny.Segment, header: tiny.Segment, C: int,
             failures: float) -> tuple[float, int]:
    """Return seconds and peak bytes of our whole step, a share of whose tries is repaired."""
    way, meter = bench.Ours(models, prefix, header=header), bench.Meter(models.device, memory=True)
    patch = torch.cat([header.ids[-1:].repeat(bench.PATCH), header.ids])  # of ids that are text

    def do(part, work, *given):
        if part == "repair":
            given = [[replace(header, ids=patch)] * len(given[0]), C]
        return None if part == "prefill" else work(*given)  # which the tries begin with anyway

    begun = time.perf_counter()
    list(bench.step(way, C, failures, do))
    top = meter.level(peak=True)
    return time.perf_counter() - begun, top


@torch.no_grad()
def difference(models: SimpleNamespace, prefix: tiny.Segment, header: tiny.Segment,
               batch: dict) -> float:
    """Return the mean difference of our reference's log-probs of TRL's completions from TRL's."""
    ids, found = batch["completion_ids"], batch["ref_per_token_logps"]
    ours, _ = models.ours_ref([prefix], [header] * len(ids), [0] * len(ids), list(ids))
    return (ours - found.flatten()).abs().mean().item()


def random_checkpoint(folder: Path, device: torch.device, name: str) -> None:
    """Save random weights in a shape of tests/bench.py, with the toy's processor."""
    import toy
    toy.save_student(folder, 0, pretrained=False)
    config, small = bench.make_config(name), json.loads((folder / "config.json").read_text())
    for key in ("image", "video", "vision_start", "vision_end"):
        setattr(config, f"{key}_token_id", small[f"{key}_token_id"])
    with torch.device(device):
        made = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)


def plan(note: Findings, device: torch.device, dry: bool) -> None:
    """Hold what train.py --plan predicts of a 3B's step against what it then takes, by phase."""
    import toy
    folder = note.path.parent / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    toy.make(folder, train=10, heldout=5, warm=10, pretrained=False)
    random_checkpoint(folder / "student", device, "cpu" if dry else "3b")
    sizes = ["--rollouts", "2", "--max_completion", "8"] if dry else ["--cuda_graphs"]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--plan", "--model", "student", "--data",
         "train.json", "--video_root", "videos", "--steps", "100", *sizes], cwd=folder,
        capture_output=True, text=True)
    note("train.py --plan ends", ran.returncode, ran.returncode == 0,
         output=(ran.stdout + ran.stderr)[-4000:])
    for line in ran.stdout.split("\n"):
        cells = line[22:44].split()  # predicted and measured, GiB
        if line.startswith(("rollouts", "reference", "update")) and len(cells) == 2:
            expected, found = map(float, cells)
            near = abs(expected / found - 1) < 0.15 if line.startswith("update") else None
            note(f"GiB of {line.split()[0]}: predicted, measured", [expected, found], near)
        elif line.startswith("the step took"):
            note("the largest step", line)


def evaluation(note: Findings, device: torch.device, dry: bool) -> None:
    """Time evaluate.py on a miniature VSI-Bench; tell how much of it is spent reading videos."""
    import miniature
    import video
    folder = note.path.parent / "evaluation"
    shutil.rmtree(folder, ignore_errors=True)
    film = folder / "vsibench/scannet/scene0000_00.mp4"
    film.parent.mkdir(parents=True, exist_ok=True)
    bench.write_film(film, "libx264", *(64, 64, 48) if dry else (640, 480, 1800))  # a minute
    miniature.vsibench(folder, film)
    random_checkpoint(folder / "student", device, "cpu" if dry else "3b")
    frames, begin = 4 if dry else 16, time.time()
    ran = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), "--benchmark", "vsibench", "--data",
         str(folder / miniature.DATA["vsibench"]), "--video_root", str(folder / "vsibench"),
         "--model", str(folder / "student"), "--output", str(folder / "run"), "--max_completion",
         "8" if dry else "64", "--frames", str(frames)], capture_output=True, text=True)
    seconds = time.time() - begin
    note("evaluate.py ends", ran.returncode, ran.returncode == 0, output=ran.stderr[-2000:])
    answers = read(folder / "run/answers.jsonl")
    unread = [row["error"] for row in answers if "error" in row]
    note("questions that could not be asked", unread, not unread)
    note("questions a second, loading included", round(len(answers) / seconds, 3))
    begin = time.time()
    for _ in range(3):
        video._video.cache_clear()  # each question's file is read by another process, or anew
        video.decode(str(film), "video", frames, 128 * 28 * 28, 28)
    once = (time.time() - begin) / 3
    note("seconds to read one file alone, and that times the questions over the run's seconds",
         [round(once, 3), round(once * len(answers) / seconds, 3)])


# ---------------------------------------------------------------------------------------------
# All sections, each in a process of its own

SECTIONS = {  # what to run, seconds it may take on a card, and the modules that it needs
    "kernels": (kernels, 25, []), "trap": (trap, 15, []), "tokens": (tokens, 40, []),
    "toy": (toy_run, 90, READING), "decode": (decode, 50, []), "update": (update, 30, []),
    "lora": (lora, 15, []), "steps": (steps, 80, []), "trl": (against_trl, 50, TRL),
    "plan": (plan, 45, READING), "evaluate": (evaluation, 40, READING)}
GROUPS = {"right": ("kernels", "trap", "tokens", "toy"),
          "fast": ("decode", "update", "lora", "steps", "trl", "plan", "evaluate")}


def card() -> list[str]:
    """Return name and driver, [] without a card; torch is not asked, as sections are forked."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version",
                            "--format=csv,noheader"], text=True, capture_output=True)
    return [] if asked.returncode else asked.stdout.split("\n")[0].split(", ")


def about(found: list[str]) -> dict:
    """Return card, driver, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip()
    name, driver = found or ("none", "")
    return {"card": name, "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "commit": commit, "date": time.strftime("%Y-%m-%d"),
            "flash_attn": bool(prefix_tree.flash_attn_varlen_func)}


def write(folder: Path, machine: dict, rows: list[dict], ended: dict[str, str]) -> None:
    """Write gpu.json and gpu.md from what was found so far."""
    found = {"about": machine, "sections": ended, "findings": rows}
    (folder / "gpu.json").write_text(json.dumps(found, indent=1))
    lines = [", ".join(f"{key} {value}" for key, value in found["about"].items() if value)]
    for section, how in ended.items():
        lines += ["", f"**{section}** ({how})", "", "| what | found | |", "|---|---|---|"]
        mark = {True: "right", False: "WRONG", None: ""}
        lines += [f"| {row['what']} | {row['value']} | {mark[row['right']]} |"
                  for row in rows if row["section"] == section]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the sections asked for, or one of them in this process; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, or right or fast")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at toy sizes")
    flags = parser.parse_args(argv)
    flags.out = flags.out.absolute()
    flags.out.mkdir(parents=True, exist_ok=True)
    machine = about(found := card())
    if not flags.dry and not found:
        parser.error("no CUDA device is here: --dry goes through the sections on the CPU")
    names = [n for word in flags.only.split(",") for n in GROUPS.get(word, (word,))]
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: no section is called {', '.join(sorted(unknown))}")
    rows, ended = [], {}
    for name in names:
        print(f"{name}:", flush=True)
        (flags.out / f"{name}.jsonl").unlink(missing_ok=True)
        if missing := [n for n in SECTIONS[name][2] if importlib.util.find_spec(n) is None]:
            ended[name] = f"left out: needs {', '.join(missing)}"
        else:
            ended[name] = run_section(name, flags)
        rows += read(flags.out / f"{name}.jsonl")
        write(flags.out, machine, rows, ended)
        print(f"  {ended[name]}", flush=True)
    wrong = [row for row in rows if row["right"] is False]
    broke = [name for name, how in ended.items() if how.startswith(("broke", "cut"))]
    print(f"{len(rows)} findings, {len(wrong)} wrong, {len(broke)} sections broke: {flags.out}")
    return 1 if wrong or broke else 0


def run_section(name: str, flags: argparse.Namespace) -> str:
    """Run one section in a process forked from this one, all imports made; return how it ended."""
    begin, limit = time.time(), 600 if flags.dry else SECTIONS[name][1]
    process = multiprocessing.get_context("fork").Process(target=section, args=(name, flags))
    process.start()
    try:
        process.join(limit)
        if process.is_alive():
            return f"cut after {limit:g} s"
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    if process.exitcode:
        last = (flags.out / f"{name}.log").read_text(errors="replace").strip().split("\n")[-1]
        return f"broke, exit code {process.exitcode}: {last}"
    return f"{time.time() - begin:.0f} s"


def section(name: str, flags: argparse.Namespace) -> None:
    """Run a section in this process, a group of its own; what it prints goes to its log."""
    os.setsid()
    with open(flags.out / f"{name}.log", "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as Student.load does
    device = torch.device("cpu" if flags.dry else "cuda:0")
    SECTIONS[name][0](Findings(flags.out, name), device, flags.dry)


if __name__ == "__main__":
    sys.exit(main())
