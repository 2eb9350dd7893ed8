"""The prefix tree and cached sampling against the plain way, for every family, in fp32."""

import functools
import json
import multiprocessing
import os
import socket
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students import LAYOUTS, publish
from torch.distributed import fsdp
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import set_tqdm_hook

import decode
import evaluate
import ffr
import model as model_module
import reward
import runs
import train
import prefix_tree
from data import Prompts
from model import AdapterCopy, Completion, Student, TokenLogp, cast, recompute_blocks, shard
from prefix_tree import Tree, grouped_attention, mrope, tree_attention_varlen
from tiny import (
    EOS,
    FAMILIES,
    IMAGE,
    VIDEO,
    image,
    plain_positions,
    separate_logits,
    text,
    tiny_student,
    video,
    words,
)
from video import Clip


def forest(family):
    """Three prompts (two videos of different sizes, one image), seven rollouts: headers, a text
    patch, two image patches, the longer one first.
    """
    prefixes = [video(family, 4, 4, 4, 11), video(family, 6, 4, 8, 7), image(8, 4, 9)]
    suffixes = [text(3), text(3), image(4, 8, 6), image(4, 4, 5), text(3), text(9, 2), text(3)]
    return prefixes, suffixes, [0, 0, 0, 0, 1, 1, 2]


def separate_logp(student, prefixes, suffixes, owners, completions):
    parts = []
    for b, suffix, ids in zip(owners, suffixes, completions):
        logp = separate_logits(student, prefixes[b], suffix, ids)[:-1].log_softmax(-1)
        parts.append(logp.gather(-1, ids[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_separate_rows(family, tied):
    """Catches: a suffix that sees another suffix, a shift by one, wrong positions after a video or
    a patch image.
    """
    student = tiny_student(family, tied=tied)
    head, embedding = student.model.lm_head.weight, student.model.get_input_embeddings().weight
    assert (head is embedding) == tied
    prefixes, suffixes, owners = forest(family)
    completions = [words(n, n) for n in (5, 9, 7, 6, 4, 8, 3)]
    weight = torch.linspace(-1, 1, 42)
    plain = separate_logp(student, prefixes, suffixes, owners, completions)
    (plain * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    logp, entropy = student(prefixes, suffixes, owners, completions, entropy=True)
    (logp * weight).sum().backward()
    assert (logp - plain).abs().max() < 1e-5
    for name, p in student.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7, name
    first = separate_logits(student, prefixes[0], suffixes[0], completions[0])[0].log_softmax(-1)
    assert abs(entropy[0] - -(first.exp() * first).sum()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_suffix_does_not_see_another_one(family):
    """Catches: a recurrent layer that runs over the packed row, one suffix into the next."""
    student = tiny_student(family)
    prefixes, suffixes, owners = [video(family, 4, 4, 4, 11)], [text(3)] * 3, [0, 0, 0]
    said = [words(9, 1), words(9, 2), words(9, 3)]
    before, _ = student(prefixes, suffixes, owners, said)
    for changed in range(3):
        others = [words(9, 9) if n == changed else ids for n, ids in enumerate(said)]
        after, _ = student(prefixes, suffixes, owners, others)
        gaps = (after - before).view(3, 9).abs().amax(1)
        assert gaps[changed] > 0.1 and (gaps > 1e-5).sum() == 1, gaps


def test_what_a_prefix_leaves_is_small_and_made_by_torch_off_the_card(monkeypatch):
    """Catches: a window that is a view and keeps all of a prompt's inputs as long as the cache;
    flash-linear-attention's kernels, where they are installed, called off CUDA or in fp32.
    """
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        def kernel(*arguments, **options):
            raise RuntimeError("no card")

        torchs = getattr(prefix_tree, name).__wrapped__
        monkeypatch.setattr(prefix_tree, name, functools.wraps(torchs)(kernel))
    student = tiny_student("qwen3_5")
    cache = student.prefill([video("qwen3_5", 4, 4, 4, 11)])
    student.sample(cache, [text(3)], [0], torch.rand(1, 4), 4)
    for window, state in cache.layers[:2]:
        assert window.shape == (1, 3, 2 * 2 * 8 + 4 * 12) and state.shape == (1, 4, 8, 12)
        assert window.untyped_storage().nbytes() == window.nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_several_prompts_equal_one_at_a_time(family):
    """Catches: padding of a shorter prefix that leaks into another prompt's rollouts."""
    student = tiny_student(family)
    prefixes, suffixes, owners = forest(family)
    completions = [words(n, n) for n in (50, 9, 7, 6, 4, 8, 3)]  # the first row packed last
    together, _ = student(prefixes, suffixes, owners, completions)
    apart = [student([prefixes[b]], [s], [0], [c])[0]
             for b, s, c in zip(owners, suffixes, completions)]
    assert (together - torch.cat(apart)).abs().max() < 1e-5


@pytest.mark.parametrize("lora", [(), (4, 32, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_greedy_equals_plain_greedy(family, lora):
    """Catches: a cache slot off by one, a wrong position while decoding, padding that is attended
    to, dropped rows mixed up, adapters left out while decoding.
    """
    student = tiny_student(family, lora=lora)
    prefixes, suffixes, owners = forest(family)
    with torch.no_grad():
        # rows that end, and not all at once
        student.model.lm_head.weight[EOS] *= 8 if family == "qwen3_vl_moe" else 2
        cache = student.prefill(prefixes)
        got = student.sample(cache, suffixes, owners, torch.zeros(7, 20), 20, temperature=0.0)
        for suffix, b, completion in zip(suffixes, owners, got):
            ids = torch.zeros(0, dtype=torch.long)
            while len(ids) < 20 and (not len(ids) or ids[-1] != EOS):
                logits = separate_logits(student, prefixes[b], suffix, ids)[-1]
                likeliest = logits.index_fill(0, student.banned, -torch.inf).argmax()
                ids = torch.cat([ids, likeliest[None]])
            assert completion.ids.tolist() == ids.tolist()
            assert completion.finished == (ids[-1] == EOS)
    assert len({len(c.ids) for c in got}) > 1, "the test wants rows that end at different lengths"


@pytest.mark.parametrize("lora", [(), (4, 4)])
@pytest.mark.parametrize("blocked", (True, False))
@pytest.mark.parametrize("family", FAMILIES)
def test_logp_while_sampling_equals_logp_while_scoring(family, blocked, lora, monkeypatch):
    """Catches: a ratio that is not 1 before any update; log-probs taken after top-p or under
    another temperature; a decode step that is right in oneDNN's products only (CUDA has none).
    """
    if not blocked:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    student = tiny_student(family, lora=lora)
    prefixes, suffixes, owners = forest(family)
    cache = student.prefill(prefixes)
    uniforms = torch.rand(7, 24, generator=torch.Generator().manual_seed(1))
    sampled = student.sample(cache, suffixes, owners, uniforms, 24, temperature=0.8, top_p=0.9)
    scored, _ = student(prefixes, suffixes, owners, [c.ids for c in sampled], temperature=0.8)
    assert (torch.cat([c.logp for c in sampled]) - scored).abs().max() < 1e-5


def traced(calls):
    """Do on the CPU what a CUDA graph does: write work's kernels down once, and repeat them on the
    same tensors.
    """
    def record(work):
        calls.append(make_fx(lambda: work())())
        return calls[-1].forward
    return record


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_decode_step_equals_the_growing_one(family, monkeypatch):
    """Catches: a step whose kernels depend on the number of the token (a shape, a slice, a Python
    number), so that repeating them is wrong; slots attended to before they are written; a recording
    kept when rows were dropped or the slots ran out.
    """
    monkeypatch.setattr(decode, "RECORDED_SLOTS", 16)
    student, recordings, told = tiny_student(family), [], []
    prefixes, suffixes, owners = forest(family)
    uniforms = torch.rand(7, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        student.model.lm_head.weight[EOS] *= 2
    growing = student.sample(student.prefill(prefixes), suffixes, owners, uniforms, 40)
    student.record = traced(recordings)
    repeated = student.sample(student.prefill(prefixes), suffixes, owners, uniforms, 40,
                              done=lambda n, completion: told.append(n))
    assert sorted(told) == list(range(7))
    for a, b in zip(growing, repeated):
        assert a.ids.tolist() == b.ids.tolist() and (a.logp - b.logp).abs().max() < 1e-5
    steps = max(len(c.ids) for c in growing)
    assert len({len(c.ids) for c in growing}) > 2 and 3 <= len(recordings) < steps / 2


def test_each_way_to_attend_is_what_its_flag_says(monkeypatch):
    """Catches: --attention that is not heeded, or falls back to another kernel unsaid."""
    def names(attention, on_cuda=True, dtype=torch.bfloat16):
        return tuple(prefix_tree.attention_names(attention, on_cuda, dtype).values())

    padded, torchs = ("prefix_tree", "sdpa"), ("prefix_tree_torch", "sdpa")
    flash = "prefix_tree_fa2", "flash_attention_2"
    for package, auto in ((None, torchs), (lambda: None, flash)):
        monkeypatch.setattr(prefix_tree, "flash_attn_varlen_func", package)
        assert names("auto") == auto and names("torch") == torchs and names("sdpa") == padded
        assert names("auto", False) == names("auto", True, torch.float32) == padded
        for unfit in ((False, torch.bfloat16), (True, torch.float32)):
            with pytest.raises(ValueError, match="^--attention torch needs CUDA and bfloat16"):
                names("torch", *unfit)
            with pytest.raises(ValueError, match="^--attention flash needs CUDA, bfloat16 and the"):
                names("flash", *unfit)
    assert names("flash") == flash
    monkeypatch.setattr(prefix_tree, "flash_attn_varlen_func", None)
    with pytest.raises(ValueError, match="^--attention flash needs"):
        names("flash")


def test_a_student_on_a_card_is_not_exposed_to_cudnns_attention(tmp_path):
    """Catches: training with gradients that are NaN for some masks on Hopper (pytorch 196678)."""
    publish(tmp_path / "student", next(iter(LAYOUTS)))
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        Student.load(tmp_path / "student", torch.device("cuda"), torch.bfloat16, trainable=False)
    except (AssertionError, RuntimeError):  # no card is here; the switch comes before the weights
        assert not torch.cuda.is_available()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_row_depends_on_its_own_numbers_only():
    """Catches: rollouts that change with the batch they are sampled in, which no resume or other
    world size could repeat.
    """
    student = tiny_student("qwen2_5_vl")
    prefixes, suffixes, owners = forest("qwen2_5_vl")
    uniforms = torch.rand(7, 16, generator=torch.Generator().manual_seed(2))
    together = student.sample(student.prefill(prefixes), suffixes, owners, uniforms, 16)
    alone = [student.sample(student.prefill([prefixes[b]]), [s], [0], u[None], 16)[0]
             for b, s, u in zip(owners, suffixes, uniforms)]
    assert [c.ids.tolist() for c in together] == [c.ids.tolist() for c in alone]


def test_done_is_called_once_per_row_with_its_completion():
    """Catches: a failed try that never reaches the teacher, or reaches it twice, or with another
    row's text.
    """
    student, calls = tiny_student("qwen2_5_vl"), {}
    prefixes, suffixes, owners = forest("qwen2_5_vl")

    def done(n, completion):
        assert n not in calls
        calls[n] = completion.ids.tolist()

    uniforms = torch.rand(7, 16, generator=torch.Generator().manual_seed(2))
    sampled = student.sample(student.prefill(prefixes), suffixes, owners, uniforms, 16, done=done)
    assert calls == {n: c.ids.tolist() for n, c in enumerate(sampled)}


@pytest.mark.parametrize("temperature", (1.5, 0.05, 0.0))
def test_forbidden_tokens_are_never_sampled_and_eos_ends_a_row(temperature):
    """Catches: a sampled image placeholder (the forward would want pixels), an EOS cut off or
    followed by more tokens, no probability left for the rest where forbidden tokens hold it all.
    """
    student = tiny_student("qwen2_5_vl")
    with torch.no_grad():
        student.model.lm_head.weight[[IMAGE, VIDEO, 198, 199]] *= 30  # make them likely
        cache = student.prefill([image(4, 4, 3)])
        sampled = student.sample(cache, [text(3)] * 64, [0] * 64, torch.rand(64, 40), 40,
                                 temperature)
    seen = torch.cat([c.ids for c in sampled])
    assert not set(seen.tolist()) & {*range(190, 194), 195, 198, 199}
    assert temperature != 1.5 or any(c.finished for c in sampled)
    assert all(c.logp.isfinite().all() for c in sampled)
    for c in sampled:
        assert (c.ids[:-1] != EOS).all() and c.finished == (c.ids[-1] == EOS)
        assert len(c.ids) == len(c.logp) <= 40


def test_top_p_and_temperature_follow_the_distribution():
    """Catches: a nucleus one token too small or too large, temperature applied after truncation, a
    biased draw.
    """
    student = tiny_student("qwen2_5_vl")
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) * 2
    logits = student.logits(hidden, 0.7)
    allowed = logits[0].index_fill(0, student.banned, -torch.inf).softmax(-1)
    p, order = allowed.sort(descending=True)
    n = int((p.cumsum(0) < 0.6).sum()) + 1  # the smallest set whose mass reaches top_p
    expected = torch.zeros(200).index_put((order[:n],), p[:n] / p[:n].sum())
    uniforms = (torch.arange(20000) + 0.5) / 20000
    with torch.no_grad():
        tokens, logp = student._draw(logits.expand(20000, -1), uniforms, 0.7, 0.6)
    counted = torch.bincount(tokens, minlength=200) / 20000
    assert (counted - expected).abs().max() < 2e-4
    assert torch.allclose(logp[0], logits[0].log_softmax(-1)[tokens[0]], atol=1e-6)


@pytest.mark.parametrize("rows", [64, 5])
def test_log_probs_and_their_gradients_equal_plain_ones(rows, monkeypatch):
    """Catches: log-probs, entropies or gradients that depend on how the logits are cut into chunks,
    on which of them are kept for the backward, or that miss the temperature; outputs that are views
    of one tensor, which FSDP warns of.
    """
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(model_module, "ROWS_OF_LOGITS", rows)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 12, generator=generator).requires_grad_() for n in (23, 40))
    targets = torch.randint(40, (23,), generator=generator)
    upstream = torch.randn(23, generator=generator)
    logp, entropy = TokenLogp.apply(hidden, head, targets, 0.7, True)
    assert logp._base is None and entropy._base is None
    grads = torch.autograd.grad(logp @ upstream, (hidden, head), retain_graph=True)
    plain = (hidden @ head.T / 0.7).log_softmax(-1)
    chosen = plain[torch.arange(23), targets]
    assert torch.allclose(logp, chosen, atol=1e-5)
    assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(chosen @ upstream, (hidden, head))):
        assert torch.allclose(a, b, atol=1e-4)
    again = torch.autograd.grad(logp @ upstream, (hidden, head))  # nothing kept is left by now
    assert all(torch.allclose(a, b) for a, b in zip(grads, again))
    assert TokenLogp.apply(hidden[:0], head, targets[:0], 0.7, False)[0].shape == (0,)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients(family):
    """Catches: activation checkpointing that drops the tree on the second forward."""
    grads = []
    for recompute in (False, True):
        student = tiny_student(family).train()
        if recompute:
            recompute_blocks(student.model)
        prefixes, suffixes, owners = forest(family)
        student(prefixes, suffixes, owners, [words(5, n) for n in range(7)])[0].sum().backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-5), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_are_balanced_by_the_switch_transformers_loss(family, recompute):
    """Catches: a loss over one layer, over padding, or without a gradient for the routers; one that
    counts a recomputed block twice. Expected: its formula, E Σ_e f_e P_e, with f_e the choices of
    expert e and P_e its mean probability over all tokens and layers, written out.
    """
    student, seen = tiny_student(family).train(), []
    student.balances = True
    prefixes, suffixes, owners = forest(family)
    completions = [words(5, n) for n in range(7)]
    routers = [layer.mlp.gate for layer in student.model.model.language_model.layers]
    hooks = [r.register_forward_hook(lambda gate, x, out: seen.append(out[0])) for r in routers]
    student(prefixes, suffixes, owners, completions)
    for hook in hooks:
        hook.remove()
    probabilities = torch.cat(seen).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(2).indices, 1.0)
    expected = 6 * (chosen.mean(0) * probabilities.mean(0)).sum()
    weights = [router.weight for router in routers]
    wanted = torch.autograd.grad(expected, weights)
    if recompute:
        recompute_blocks(student.model)
    student(prefixes, suffixes, owners, completions)
    assert abs(student.imbalance - expected) < 1e-5
    for found, want in zip(torch.autograd.grad(student.imbalance, weights), wanted):
        assert torch.allclose(found, want, atol=1e-6) and want.abs().max() > 1e-5
    with torch.no_grad():
        student.imbalance = None
        student(prefixes, suffixes, owners, completions)
    assert student.imbalance is None, "a reference is scored without"


def test_a_frozen_tower_is_run_once_and_gets_no_gradient():
    """Catches: vision features computed again for scoring, or trained although frozen."""
    student = tiny_student("qwen3_vl", freeze_vision=True)
    prefixes, suffixes, owners = forest("qwen3_vl")
    completions = [words(4, n) for n in range(7)]
    cache = student.prefill(prefixes)
    fresh, _ = student(prefixes, suffixes, owners, completions)
    reused, _ = student(prefixes, suffixes, owners, completions, features=cache.features)
    assert (fresh - reused).abs().max() < 1e-6
    reused.sum().backward()
    assert all(p.grad is None for p in student.model.model.visual.parameters())


# --- adapters -------------------------------------------------------------------------------------


def merged_twin(student, family, scale):
    """Return a student without adapters whose weights are W + scale B A, and those of its layers
    that have one, by name.
    """
    twin, layers = tiny_student(family), {}
    weights = dict(student.model.named_parameters())
    with torch.no_grad():
        for name, p in twin.model.named_parameters():
            p.copy_(weights[name])
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A" in weights:
                A, B = (weights[f"{layer}.lora_{part}"] for part in "AB")
                p.add_(scale * B @ A)
                layers[layer] = p
    return twin, layers


# The linear layers of a tiny model's three; the experts of a layer are no linear layers.
ATTENDING = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 1)
RECURRENT = dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"), 2)
DENSE = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 3)
LINEAR = dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), dict.fromkeys(ATTENDING, 3) | DENSE) | {
    "qwen3_vl_moe": dict.fromkeys(ATTENDING, 3), "qwen3_5": ATTENDING | RECURRENT | DENSE,
    "qwen3_5_moe": ATTENDING | RECURRENT | DENSE | {"shared_expert_gate": 3}}


@pytest.mark.parametrize("vision", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_equal_a_slow_sum_of_weights(family, vision):
    """Catches: a scale other than α / r, B A transposed, a layer without its adapter or with a
    gradient of its own, a step of AdamW that moves anything else. The slow way knows no adapters:
    whole rows through Hugging Face's model with W + s B A, dA = s Bᵀ dW, dB = s dW Aᵀ, and AdamW's
    first step by its formula.
    """
    student, scale = tiny_student(family, lora=(4, 6, vision)), 1.5
    twin, layers = merged_twin(student, family, scale)
    kinds = Counter(name.rpartition(".")[2] for name in layers if "language_model" in name)
    assert kinds == LINEAR[family]
    linear = [m for m in student.model.model.visual.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == kinds.total() + len(linear) * vision and len(linear) > 8
    prefixes, suffixes, owners = forest(family)
    completions = [words(n, n) for n in (5, 9, 7, 6, 4, 8, 3)]
    weight = torch.linspace(-1, 1, 42)
    plain = separate_logp(twin, prefixes, suffixes, owners, completions)
    (plain * weight).sum().backward()
    logp, _ = student(prefixes, suffixes, owners, completions)
    (logp * weight).sum().backward()
    assert (logp - plain).abs().max() < 1e-5
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    train.make_optimizer(student, train.Config(lr=1e-3, weight_decay=0.1)).step()
    for name, p in student.model.named_parameters():
        layer, _, part = name.partition(".lora_")
        assert (p.grad is None) == (not part) == torch.equal(p, before[name]), name
        if part:
            dW, A, B = layers[layer].grad, *(before[f"{layer}.lora_{x}"] for x in "AB")
            gradient = scale * (B.T @ dW if part == "A" else dW @ A.T)
            rounding = 3e-5 if family == "qwen3_5_moe" else 1e-5  # its sums in fp32 come in chunks
            assert (p.grad - gradient).norm() <= rounding * gradient.norm() + 1e-7, name
            step = p.grad / (p.grad.abs() + 1e-8) + 0.1 * before[name]
            assert torch.allclose(p, before[name] - 1e-3 * step, atol=1e-5), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_without_adapters_a_student_is_its_start_to_the_bit(dtype):
    """Catches: a reference that is not the start: adapters still on, or off for good afterwards;
    a copy that trains along, or leaves its own adapters with the student.
    """
    student = cast(tiny_student("qwen3_vl", lora=(4, 32, True)), dtype, False)
    start = cast(tiny_student("qwen3_vl", trainable=False), dtype, False)
    assert {p.dtype for p in student.trained()} == {torch.float32}
    prefixes, suffixes, owners = forest("qwen3_vl")
    rows = prefixes, suffixes, owners, [words(n, n) for n in (5, 9, 7, 6, 4, 8, 3)]
    first = student(*rows)[0].detach()
    copy = AdapterCopy(student)
    assert torch.equal(student.at_start(*rows)[0], start(*rows)[0])
    with torch.no_grad():
        for p in student.trained():
            p.mul_(1.5)
    now = student(*rows)[0].detach()
    assert (now - first).abs().max() > 0.1 and torch.equal(copy(*rows)[0], first)
    assert torch.equal(student(*rows)[0], now) and torch.equal(copy(*rows)[0], first)
    copy.follow(student, 0.5)
    expected = [p.detach() / 1.5 * 1.25 for p in student.trained()]
    assert all(torch.allclose(a, b) for a, b in zip(copy.parameters(), expected, strict=True))
    assert not any(p.requires_grad for p in copy.parameters()) and len(expected) > 50


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_follow_the_released_rule(family):
    """Catches: text after a long video that overlaps its temporal positions, a suffix that starts
    from its token count.
    """
    config = tiny_student(family).model.config
    prefix, suffix = video(family, 8, 4, 4, 6, seconds=2.3), image(4, 8, 3)
    first, end = mrope(prefix, 0, config)
    second, _ = mrope(suffix, end, config)
    ids = torch.cat([prefix.ids, suffix.ids]).tolist()
    grids, seconds = prefix.grids.tolist() + suffix.grids.tolist(), [2.3, 0.0]
    expected = plain_positions(ids, grids, seconds, config)
    assert torch.equal(torch.cat([first, second], dim=1), expected)
    assert end == int(first.max()) + 1


def test_positions_equal_transformers_where_it_keeps_the_rule():
    """Catches: swapped height and width, a wrong start. For images transformers' own index agrees
    with the released rule.
    """
    student, segment = tiny_student("qwen2_5_vl"), image(8, 4, 9)
    types = (segment.ids == IMAGE).int()[None]
    theirs, _ = student.model.model.get_rope_index(segment.ids[None], types,
                                                   image_grid_thw=segment.grids)
    assert torch.equal(mrope(segment, 0, student.model.config)[0], theirs[:, 0])


def test_variable_length_attention_equals_padded():
    """Catches: a wrong cumulative length or key order in the layout that the CUDA kernels read."""
    torch.manual_seed(0)
    prefixes, suffixes, owners = [7, 4], [3, 5, 2], [0, 0, 1]
    T = sum(prefixes) + sum(suffixes)
    q, k, v = torch.randn(4, T, 8), torch.randn(2, T, 8), torch.randn(2, T, 8)
    tree = Tree(prefixes, suffixes, owners, torch.device("cpu"))

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        """Compute what the fused kernels do, one sequence after another."""
        out = []
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
            assert b - a <= max_q and d - c <= max_k
            kk, vv = (x[c:d].repeat_interleave(2, dim=1) for x in (k, v))
            scores = torch.einsum("qhe,khe->hqk", q[a:b], kk) * scale
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)).logical_not()
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out.append(torch.einsum("hqk,khe->qhe", p, vv))
        return torch.cat(out)

    class Module:
        layer_idx = 0
        config = type("Config", (), {"_attn_implementation": "prefix_tree"})

    padded, _ = prefix_tree.tree_attention(Module, q[None], k[None], v[None], None, scaling=0.3,
                                            tree=tree)
    assert (padded[0] - tree_attention_varlen(q, k, v, 0.3, tree, kernel)).abs().max() < 1e-6


def test_folded_query_heads_equal_repeated_key_heads():
    """Catches: query heads that meet the wrong key head."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask, scale=0.2)
    got = grouped_attention(q, k, v, 0.2, mask[None, None])
    assert (got - plain.transpose(1, 2)).abs().max() < 1e-6


def test_placeholders_and_pixels_must_agree():
    """Catches: a forward that goes on with features in the wrong places."""
    student, broken = tiny_student("qwen2_5_vl"), image(4, 4, 3)
    broken.ids = torch.cat([broken.ids, torch.tensor([IMAGE])])
    with pytest.raises(AssertionError, match="placeholders without pixels"):
        student.prefill([broken])
    first = broken.ids.tolist().index(IMAGE)
    broken.ids = torch.cat([broken.ids[:first], broken.ids[first + 1:-1]])
    with pytest.raises(AssertionError, match="pixels without placeholders"):
        student.prefill([broken])


def test_loading_and_saving_show_no_bars_of_their_own(tmp_path, capfd):
    """Catches: transformers' bars in the middle of the run's, or hidden for good."""
    Student.load(publish(tmp_path / "model", "qwen2_5_vl")).save(tmp_path / "saved")
    assert "%|" not in capfd.readouterr().err
    assert set_tqdm_hook(None) is None


# --- checkpoints as their authors publish them ----------------------------------------------------

PIXELS = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
QUESTION = "What colour? {answer_format}{question}"
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def asked(prompts):
    """Return a video question: 4 frames of 2 x 3 (Qwen3-VL) or 3 x 4 tokens, 2 seconds apart."""
    side = prompts.factor
    frames = PIXELS if side == 32 else PIXELS.repeat(1, 1, 2, 2)[..., :84, :112]
    clip = Clip(frames=frames, times=(0.0, 2.0, 4.0, 6.0), indices=(0, 16, 32, 48), fps=8.0,
                duration=6.125, total_frames=49)
    return replace(sample(question="Why?"), clip=clip)


def fresh(path, **options):
    """Return what a new command would load."""
    student = Student.load(path, **options)
    return student, Prompts(student.processor, "{question} Think.")


def scored(student, prompts, said=("<think>I look.</think>\n<answer>red</answer>", "no")):
    """Return the log-probs of two responses to the question."""
    completions = [prompts.completion(text) for text in said]
    return student([prompts.prefix(asked(prompts))], [prompts.header] * 2, [0, 0], completions)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_checkpoint_loads_samples_scores_and_comes_back(layout, tmp_path):
    """Catches: an image processor by a name of old, a chat template that stands elsewhere, a system
    turn or vision tags that are not the template's own; a save that changes a weight, doubles a
    tied one, or says another type than the weights have.
    """
    path = publish(tmp_path / "model", layout)
    student, prompts = fresh(path, dtype=torch.float32)
    qwen3 = layout.startswith("qwen3")
    pads = ["<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>" if qwen3 else
            "<|vision_start|>" + "<|video_pad|>" * 24 + "<|vision_end|>"]
    video = "".join(f"<{s} seconds>{pads[0]}" for s in ("1.0", "5.0")) if qwen3 else pads[0]
    chat = ("" if qwen3 else DEFAULT_SYSTEM) + f"<|im_start|>user\n{video}Why? Think."
    thinks = "think" in LAYOUTS[layout]["chat"]
    header = "<|im_end|>\n<|im_start|>assistant\n" + "<think>\n" * thinks
    names, prefix = prompts.tokenizer.get_vocab(), prompts.prefix(asked(prompts))
    assert prefix.ids.tolist() == prompts.tokenizer(chat).input_ids
    assert prompts.header.ids.tolist() == prompts.tokenizer(header).input_ids
    assert student.eos_ids == {names["<|im_end|>"], names["<|endoftext|>"]}

    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    sampled = student.sample(student.prefill([prefix]), [prompts.header] * 3, [0] * 3, uniforms, 12)
    again, _ = student([prefix], [prompts.header] * 3, [0] * 3, [c.ids for c in sampled])
    assert (torch.cat([c.logp for c in sampled]) - again).abs().max() < 1e-4

    student.save(tmp_path / "saved", torch.bfloat16)
    assert torch.equal(scored(*fresh(tmp_path / "saved")), scored(student, prompts))
    published, saved = (AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
                        for folder in (path, tmp_path / "saved"))
    assert same_weights(published, saved) and saved.dtype == torch.bfloat16
    types, names = said_and_stored(tmp_path / "saved")
    assert types == {"bfloat16"}
    assert ("lm_head.weight" in names) == (not LAYOUTS[layout].get("tied"))
    if qwen3:  # also experts, which transformers keeps in another order
        told, ours = (files_of(folder) for folder in (tmp_path / "model", tmp_path / "saved"))
        assert set(told) - set(ours) == {"mtp.fc.weight"} & set(told) and set(ours) <= set(told)
        assert all(torch.equal(told[name], weight) for name, weight in ours.items())


def files_of(folder):
    return {name: w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def said_and_stored(folder):
    """Return the types that config.json and the tensors of a checkpoint name, and the tensors."""
    config, types, names = json.loads((folder / "config.json").read_text()), set(), set()
    for part in (config, config["text_config"], config["vision_config"]):
        types.add(part["dtype"])
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
            types |= {str(tensors.get_tensor(n).dtype).partition(".")[2] for n in tensors.keys()}
    return types, names


def trained_and_saved(folder, layout, dtype):
    """Make one step, score, save; load what was saved as a new command would, and score again."""
    student, prompts = fresh(publish(folder / f"model-{dist.get_rank()}", layout), dtype=dtype)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scored(student, prompts).sum().backward()
    optimizer.step()
    before = scored(student, prompts).detach()
    student.save(folder / "saved", dtype)
    dist.barrier()
    assert torch.equal(before, scored(*fresh(folder / "saved", dtype=dtype)))
    types, names = said_and_stored(folder / "saved")
    assert types == {str(dtype).partition(".")[2]}
    assert ("lm_head.weight" in names) == (not LAYOUTS[layout].get("tied"))
    return before


@pytest.mark.parametrize("layout", ["qwen2_5_vl_3b", "qwen3_vl"])
def test_what_a_bfloat16_run_saves_comes_back_to_the_bit(layout, tmp_path):
    """Catches: a config that says float32, the master weights' type, over bfloat16 tensors; a tied
    head that is stored beside its embedding; a fresh start that is not the run's end.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trained_and_saved(tmp_path, layout, torch.bfloat16)
    finally:
        dist.destroy_process_group()


def sharded(rank, port, folder):
    """Do so as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for layout in ("qwen2_5_vl_3b", "qwen3_5_moe", "qwen3_vl_moe"):
        trained_and_saved(folder / f"half-{layout}", layout, torch.bfloat16)
    scores = trained_and_saved(folder / "whole", "qwen3_vl_thinking", torch.float32)
    torch.save(scores, folder / f"scores-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_two_processes_save_comes_back_to_the_bit(tmp_path):
    """Catches: a tied head that two processes train or store apart from its embedding; shards that
    are put together in another type or order.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    children = [context.Process(target=sharded, args=(rank, port, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(200)
    assert [child.exitcode for child in children] == [0, 0]
    alone = scored(*fresh(tmp_path / "whole/saved")).detach()  # one process computes the same
    assert torch.allclose(alone, torch.load(tmp_path / "scores-0.pt"), atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_next", "qwen4_exp", "llava", "no_such_type"])
def test_another_architecture_is_refused_before_its_weights_are_read(kind, tmp_path):
    """Catches: a model whose layers or positions are not those of the tree, scored without a word;
    a refusal that is a traceback, or that comes after minutes of reading.
    """
    path = publish(tmp_path / "model", "qwen3_vl")
    rewrite("config.json", model_type=kind)(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(ValueError) as refused:
        Student.load(path)
    assert str(refused.value) == (
        f"--model {path} cannot be loaded: its model type is {kind}, and only qwen2_5_vl, "
        "qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe are supported (docs/models.md)")


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def rewrite(name, **keys):
    def edit(folder):
        values = json.loads((folder / name).read_text()) | keys
        (folder / name).write_text(json.dumps(values))
    return edit


def cut(folder):
    path = folder / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def stepped(student, lr=0.1):
    """Make one step of AdamW on the student's score of two responses; return log-probs, before and
    after, and the gradients' norm.
    """
    prompts = Prompts(student.processor, "{question} Think.")
    optimizer = train.make_optimizer(student, train.Config(lr=lr))
    before = scored(student, prompts)
    before.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1e9)
    optimizer.step()
    optimizer.zero_grad()
    return before.detach(), scored(student, prompts).detach(), \
        norm.full_tensor() if hasattr(norm, "full_tensor") else norm


LORA = 4, 6, True  # rank, α, the tower too


@pytest.mark.parametrize("options", ({"lora": LORA}, {"freeze_vision": True}))
def test_offloaded_weights_are_trained_like_others(options, tmp_path, monkeypatch):
    """Catches: a step, gathered weights, copy or checkpoint that offloading breaks (as far as FSDP
    can be made to offload on a CPU, without pinned memory), or FSDP where there are adapters, which
    one process does without. Frozen weights stay in the type that is computed in, others are fp32.
    """
    unpinned = functools.partial(fsdp.CPUOffloadPolicy, pin_memory=False)
    monkeypatch.setattr(fsdp, "CPUOffloadPolicy", unpinned)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    path, found = publish(tmp_path / "model", "qwen3_vl"), []
    try:
        for offload in (False, True):
            student, prompts = fresh(path, dtype=torch.bfloat16, offload=offload, **options)
            if offload and student.adapted:
                shard(student, torch.device("cpu"), torch.bfloat16, False, offload)
            assert isinstance(student, fsdp.FSDPModule) == (offload or not student.adapted)
            for name, p in student.named_parameters():
                assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
            found.append(stepped(student))
            copy = AdapterCopy(student) if options.get("lora") else Student.load(
                path, dtype=torch.bfloat16, trainable=False, master=True, offload=offload)
            copy.follow(student, 1.0)
            assert torch.equal(scored(copy, prompts), found[-1][1])
            with student.gathered():
                assert torch.equal(scored(student, prompts), found[-1][1])
            student.save(tmp_path / str(offload), torch.bfloat16)
            again, _ = fresh(tmp_path / str(offload), dtype=torch.bfloat16, trainable=False)
            assert torch.equal(scored(again, prompts), found[-1][1])
        assert all(torch.equal(a, b) for a, b in zip(*found))
        assert (found[0][0] - found[0][1]).abs().max() > 0.1
    finally:
        dist.destroy_process_group()


# --- adapters in files


def adapted(folder, layout, vision=False):
    """Publish a checkpoint and return its path, a student with adapters that are not 0, prompts."""
    path = publish(folder, layout)
    student, prompts = fresh(path, lora=(4, 6, vision))
    with torch.no_grad():
        for p in student.trained():
            torch.nn.init.normal_(p, std=0.15)
    return path, student, prompts


@pytest.mark.parametrize("layout,vision", [("qwen2_5_vl_3b", False), ("qwen3_vl", True),
                                           ("qwen3_5", True), ("qwen3_5_moe", False)])
def test_saved_adapters_come_back_and_merged_ones_are_whole_weights(layout, vision, tmp_path):
    """Catches: an adapter that comes back on another layer, at another scale or rounded, or whose
    base is looked for where the next command happens to run; a merge that changes a weight twice.
    """
    path, student, prompts = adapted(tmp_path / "model", layout, vision=vision)
    student.save(tmp_path / "adapter", torch.bfloat16)
    again, _ = fresh(tmp_path / "adapter", trainable=False)
    assert torch.equal(scored(again, prompts), scored(student, prompts))
    assert not again.trained() and not (tmp_path / "adapter/config.json").exists()
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == path and written["lora_alpha"] == 6
    again.save(tmp_path / "again")
    again.save(tmp_path / "merged", torch.float32, merge=True)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in
                    ("adapter", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    merged, _ = fresh(tmp_path / "merged")
    assert not merged.adapted
    assert (scored(merged, prompts) - scored(student, prompts)).abs().max() < 1e-4
    assert (scored(merged, prompts) - scored(fresh(path)[0], prompts)).abs().max() > 0.1


@pytest.mark.parametrize("layout,vision", [("qwen2_5_vl_3b", False), ("qwen3_vl", True),
                                           ("qwen3_5", True), ("qwen3_5_moe", False)])
def test_peft_reads_our_adapters_and_we_read_peft_s(layout, vision, tmp_path):
    """Catches: names, scale or settings that peft takes otherwise, or silently leaves out."""
    peft = pytest.importorskip("peft", reason="peft is not installed: see requirements-dev.txt")
    path, student, _ = adapted(tmp_path / "model", layout, vision=vision)
    student.save(tmp_path / "ours")

    def base():
        return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)

    def same(student, model):
        ids = [words(n, n) for n in (6, 3, 9)]
        logp, _ = student([text(6, 6)], [text(3, 3)], [0], [ids[2]])
        plain = model(input_ids=torch.cat(ids)[None]).logits[0, 8:-1].log_softmax(-1)
        assert (logp - plain.gather(-1, ids[2][:, None])[:, 0]).abs().max() < 1e-4
        student.save(tmp_path / "merged", torch.float32, merge=True)
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
        merged = model.merge_and_unload().state_dict()
        assert whole.keys() == merged.keys()
        assert all(torch.allclose(whole[name], merged[name], atol=1e-5) for name in whole)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(missing|unexpected|not found).*")
        same(student, peft.PeftModel.from_pretrained(base(), tmp_path / "ours"))
    made = peft.get_peft_model(base(), peft.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights=False, target_modules=["q_proj", "attn.proj"]))
    made.save_pretrained(tmp_path / "theirs")
    ours, _ = fresh(tmp_path / "theirs")
    assert len(ours.adapted) == len([m for m in made.modules() if hasattr(m, "lora_A")]) > 3
    uniforms = torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    sampled = ours.sample(ours.prefill([text(6)]), [text(3)] * 2, [0, 0], uniforms, 9)
    again, _ = ours([text(6)], [text(3)] * 2, [0, 0], [c.ids for c in sampled])
    assert (torch.cat([c.logp for c in sampled]) - again).abs().max() < 1e-4
    same(ours, made)


def changed(**keys):
    return rewrite("adapter_config.json", **keys)


def other_tensor(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    save_file(tensors, file)


@pytest.mark.parametrize("damage,why", [
    (changed(use_dora=True), "adapter cannot be loaded: its .* more than plain LoRA: use_dora"),
    (changed(peft_type="IA3"), "says more than plain LoRA: peft_type"),
    (changed(bias="all", modules_to_save=["lm_head"]), "plain LoRA: bias, modules_to_save"),
    (changed(base_model_name_or_path="/nowhere/base"), "adapter cannot be loaded: --model /no"),
    (changed(base_model_name_or_path=None), "its adapter_config.json names no base"),
    (without("adapter_model.safetensors"), "adapter cannot be loaded: No such file"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be loaded: Expect"),
    (lambda folder: save_file({}, folder / "adapter_model.safetensors"), "is empty"),
    (other_tensor, "it changes base_model.model.lm_head, which is no layer of text or tower"),
    (lambda folder: rewrite("config.json", intermediate_size=100)(folder.parent / "model"),
     "model cannot be loaded: .* weights are not its config's"),
])
def test_an_adapter_that_is_not_plain_lora_is_refused_in_a_sentence(damage, why, tmp_path):
    """Catches: a part of an adapter that is left out in silence, another base, a traceback."""
    _, student, _ = adapted(tmp_path / "model", "qwen2_5_vl_3b")
    student.save(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=why) as refused:
        Student.load(tmp_path / "adapter")
    assert "\n" not in str(refused.value)


TOKENIZER = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
DAMAGE = {
    "quantised": (rewrite("config.json", quantization_config={"quant_method": "awq"}),
                  "its weights are quantised"),
    "no_tokenizer": (without(*TOKENIZER), "its tokenizer does not have <|image_pad|> at 312"),
    "other_tokenizer": (rewrite("config.json", video_token_id=311), "<|video_pad|> at 311"),
    "too_few_rows": (rewrite("config.json", vocab_size=320), "322 tokens, and its model 320 rows"),
    "more_layers": (rewrite("config.json", num_hidden_layers=3), "12 weights are not its"),
    "fewer_layers": (rewrite("config.json", num_hidden_layers=1), "12 weights are not its"),
    "wider": (rewrite("config.json", intermediate_size=100), "6 weights are not its"),
    "no_images": (without("preprocessor_config.json"), "Can't load image processor"),
    "torn": (cut, "deserializing"),
    "odd_value": (rewrite("config.json", use_cache=None), "use_cache"),
    "no_chat": (rewrite("tokenizer_config.json", chat_template=None), "chat template"),
    "text_chat": (rewrite("tokenizer_config.json", chat_template="{{ messages[0].content + '!' }}"),
                  "str"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_checkpoint_that_is_not_what_it_says_is_refused_in_a_sentence(case, tmp_path):
    """Catches: random weights in place of missing ones, a tokenizer of another model, a traceback
    from within a library.
    """
    path = publish(tmp_path / "model", "qwen2_5_vl_3b")
    damage, why = DAMAGE[case]
    damage(tmp_path / "model")
    with pytest.raises(ValueError) as refused:
        Student.load(path)
    sentence = str(refused.value)
    assert sentence.startswith(f"--model {path} cannot be loaded: ") and why in sentence
    assert "\n" not in sentence and len(sentence) < 400 + len(path)


@pytest.mark.parametrize("changes,ends", [
    ({"generation": {"eos_token_id": None}}, ["<|im_end|>"]),
    ({"generation": {"eos_token_id": 300}, "eos": "<|endoftext|>"},
     ["<|im_end|>", "<|endoftext|>"]),
    ({"generation": {"eos_token_id": 302, "pad_token_id": 302}}, ["<|im_end|>"]),
    ({"generation": {"eos_token_id": None}, "eos": None}, ["<|im_end|>"]),
    ({"sampling": {"do_sample": False, "temperature": 1e-6, "top_k": 1}},
     ["<|im_end|>", "<|endoftext|>"]),
])
def test_an_answer_ends_where_its_chat_template_ends_it(changes, ends, tmp_path):
    """Catches: an end of turn that is banned while sampling, so that no answer ever ends, because
    generation config or tokenizer name another token or none; flags of sampling without do_sample,
    for which transformers may refuse to save.
    """
    student, prompts = fresh(publish(tmp_path / "model", "qwen2_5_vl", **changes))
    ids = prompts.tokenizer.get_vocab()
    assert student.eos_ids == {ids[name] for name in ends}
    assert not student.eos_ids & set(student.banned.tolist())
    assert int(prompts.completion("red")[-1]) == ids["<|im_end|>"]
    student.save(tmp_path / "saved")
    again, prompts = fresh(tmp_path / "saved")
    assert again.eos_ids == student.eos_ids and torch.equal(again.banned, student.banned)


def test_tags_that_are_special_tokens_are_refused(tmp_path):
    """Catches: <answer> banned while sampling and cut from every text, so that no answer counts."""
    path = publish(tmp_path / "model", "qwen2_5_vl", tokens={"<answer>": True, "</answer>": True})
    with pytest.raises(ValueError, match="the tokenizer has .*<answer>.* as special tokens"):
        fresh(path)


# What the chat template has written of an answer already, and what a student adds to it.
THOUGHTS = [
    ("<think>I look.</think>\n<answer>red</answer>", "I look.</think>\n<answer>red</answer>"),
    ("<think>\nI look.\n</think>\n\n<answer>red</answer>",
     "I look.\n</think>\n\n<answer>red</answer>"),
    ("<answer>red</answer>", "</think>\n\n<answer>red</answer>"),
]


@pytest.mark.parametrize("trace,written", THOUGHTS)
def test_what_the_template_opens_belongs_to_the_response(trace, written, tmp_path):
    """Catches: a Thinking checkpoint whose well-formed answers lack <think> and get no reward for
    format, ever; a trace that teaches it to write <think> twice.
    """
    _, thinking = fresh(publish(tmp_path / "thinking", "qwen3_vl_thinking"))
    _, plain = fresh(publish(tmp_path / "plain", "qwen3_vl"))
    assert plain.text(plain.completion(trace)) == trace
    ids = thinking.tokenizer(written + "<|im_end|>").input_ids
    assert thinking.completion(trace).tolist() == ids
    response = thinking.text(torch.tensor(ids))
    assert response == "<think>\n" + written and reward.format_reward(response) == 1
    assert reward.parse_answer(response) == "red"


@pytest.mark.parametrize("layout", ["qwen3_5", "qwen3_5_small"])
def test_thinking_is_told_to_a_template_that_can_be_told(layout, tmp_path):
    """Catches: Qwen3.5's small checkpoints, whose template ends a thought before it begins unless
    told, trained for a format they then break in every answer; --direct with a thought opened.
    """
    student, thinking = fresh(publish(tmp_path / "model", layout))
    assert thinking.header_text.endswith("assistant\n<think>\n") and thinking.opened == "<think>\n"
    direct = Prompts(student.processor, "{question}", thinking=False)
    assert direct.header_text.endswith("assistant\n<think>\n\n</think>\n\n") and not direct.opened
    answer = "<answer>red</answer>"
    assert direct.text(direct.completion(answer)) == answer


def saying(text):
    """Return a Student.sample whose students all say `text`."""
    def sample(self, cache, suffixes, owners, *rest, done=None, **options):
        ids = torch.tensor(self.processor.tokenizer(text + "<|im_end|>").input_ids)
        said = [Completion(ids, torch.zeros(len(ids)), True) for _ in suffixes]
        for n, completion in enumerate(said if done else []):
            done(n, completion)
        return said
    return sample


def question(folder, film, **fields):
    """Write one question about the film, and return the file."""
    row = {"problem_id": "1", "problem": "What colour?", "problem_type": "free-form",
           "options": [], "solution": "<answer>red</answer>", "data_type": "video", "path": film}
    (folder / "data.json").write_text(json.dumps([row | fields]))
    return str(folder / "data.json")


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_thinking_student_is_trained_by_its_whole_response(method, film, tmp_path, monkeypatch):
    """Catches: format, accuracy, logs or traces that miss what the template has written."""
    monkeypatch.setattr(Student, "sample", saying("I look.\n</think>\n\n<answer>red</answer>"))
    trained, forward = [], Student.forward
    monkeypatch.setattr(Student, "forward", lambda self, prefixes, suffixes, owners, completions,
                        *rest, **options: (trained.extend(completions), forward(
                            self, prefixes, suffixes, owners, completions, *rest, **options))[1])
    config = train.Config(
        model=publish(tmp_path / "model", "qwen3_vl_thinking"), video_root=str(tmp_path),
        data=question(tmp_path, film, process="<think>I look.</think>"), method=method, steps=1,
        output=str(tmp_path / "run"), rollouts=2, beta=0.0, frames=4, max_pixels=64 * 64,
        max_completion=32, decode_workers=0)
    train.train(config, torch.device("cpu"), torch.float32)
    row, = runs.read_log(tmp_path / "run/metrics.jsonl")
    if method == "grpo":
        assert row["format"] == row["accuracy"] == 1.0
        assert "> <think>\n> I look.\n> </think>" in (tmp_path / "run/samples.md").read_text()
    else:
        assert [fresh(config.model)[1].text(ids) for ids in trained] == [
            "<think>\nI look.</think>\n<answer>red</answer>"]
    saved = json.loads((tmp_path / "run/checkpoints/step-000001/student.json").read_text())
    assert "transformers 5.3 and later differ" in saved["positions"]


@pytest.mark.parametrize("layout", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_are_trained_balanced_and_saved(layout, film, tmp_path):
    """Catches: --balance that is not heeded; routers or experts that a step leaves as they were; a
    checkpoint of experts that evaluates otherwise than it was trained.
    """
    config = train.Config(
        model=publish(tmp_path / "model", layout), video_root=str(tmp_path), method="sft", steps=1,
        data=question(tmp_path, film, process="<think>I look.</think>"), beta=0.0, frames=4,
        output=str(tmp_path / "run"), max_pixels=64 * 64, max_completion=32, decode_workers=0)
    saved = {}
    for balance in (0.0, 1.0):
        config = replace(config, balance=balance, output=str(tmp_path / f"run-{balance}"))
        train.train(config, torch.device("cpu"), torch.float32)
        row, = runs.read_log(tmp_path / f"run-{balance}/metrics.jsonl")
        assert (row["imbalance"] or 0) >= balance, "1 is the least of one expert's choices"
        saved[balance] = files_of(tmp_path / f"run-{balance}/checkpoints/step-000001")
    before = files_of(tmp_path / "model")
    for name, weight in saved[0.0].items():
        if ".mlp." in name and "shared" not in name:
            assert not torch.equal(weight, before[name].float()), name
    differ = {name for name in before if name in saved[0.0]
              and not torch.equal(saved[0.0][name], saved[1.0][name])}
    assert any(name.endswith("mlp.gate.weight") for name in differ)


def test_fillers_balance_nothing(film, tmp_path):
    """Catches: a rank with fewer micro-batches, whose fillers train the routers on a black clip."""
    config = train.Config(
        model=publish(tmp_path / "model", "qwen3_vl_moe"), video_root=str(tmp_path), method="sft",
        data=question(tmp_path, film, process="<think>I look.</think>"), steps=1, beta=0.0,
        frames=4, output=str(tmp_path / "run"), max_pixels=64 * 64, decode_workers=0, balance=1.0)
    run, found = train.Run(config, torch.device("cpu"), torch.float32), []
    groups = run.method.fill(run, 0, runs.Phases(run.device))
    batches = ffr.micro_batches(groups, 16384, lambda rollout: 0.0)
    for more in ([], [train.filler(run)] * 2):
        sums = train.backward(run, batches + more, first=True)
        gates = [layer.mlp.gate.weight for layer in run.student.model.model.language_model.layers]
        found.append([sums["imbalance"], *(gate.grad.clone() for gate in gates)])
        run.optimizer.zero_grad()
    assert found[0][0] == found[1][0] > 1
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:]))


def test_balancing_a_student_without_experts_is_refused(film, tmp_path):
    """Catches: a flag that does nothing."""
    config = train.Config(
        model=publish(tmp_path / "model", "qwen3_5"), video_root=str(tmp_path), steps=1,
        data=question(tmp_path, film), output=str(tmp_path / "run"), decode_workers=0, balance=0.1,
        method="grpo")
    with pytest.raises(ValueError, match="^--balance changes nothing in this run: .* no experts$"):
        train.train(config, torch.device("cpu"), torch.float32)
    assert not (tmp_path / "run").exists()


def test_a_thinking_student_is_evaluated_by_its_whole_response(film, tmp_path, monkeypatch):
    """Catches: answers.jsonl that lacks what the template has written."""
    monkeypatch.setattr(Student, "sample", saying("I look.\n</think>\n\n<answer>red</answer>"))
    path = publish(tmp_path / "model", "qwen3_vl_thinking")
    evaluate.main(["--benchmark", "family", "--data", question(tmp_path, film), "--frames", "4",
                   "--video_root", str(tmp_path), "--model", path, "--max_pixels", "4096",
                   "--output", str(tmp_path / "run"), "--decode_workers", "0"])
    row, = runs.read_log(tmp_path / "run/answers.jsonl")
    assert row["text"] == "<think>\nI look.\n</think>\n\n<answer>red</answer>"


@pytest.mark.parametrize("seconds", [2, 8.5, 8.6, 60])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_counts_other_positions_from_the_documented_length_on(family, seconds,
                                                                           tmp_path):
    """Catches: docs/models.md's figure, 8.6 s for 16 frames of 420 x 224 in Qwen2.5-VL and never in
    others, when the installed transformers or our positions have changed.
    """
    student, prompts = fresh(publish(tmp_path / "model", family))
    frames = torch.zeros(16, 3, 224, 420 if family == "qwen2_5_vl" else 416, dtype=torch.uint8)
    times = tuple(seconds * i / 16 for i in range(16))
    clip = Clip(frames=frames, times=times, indices=tuple(range(16)), fps=16 / seconds,
                duration=seconds, total_frames=16)
    segment = prompts.prefix(replace(sample(), clip=clip))
    config, types = student.model.config, torch.zeros_like(segment.ids)
    types[segment.ids == config.video_token_id] = 2
    extra = {"second_per_grid_ts": segment.seconds_per_grid} if family == "qwen2_5_vl" else {}
    theirs, _ = student.model.model.get_rope_index(
        segment.ids[None], types[None], video_grid_thw=segment.grids, **extra)
    same = torch.equal(mrope(segment, 0, config)[0], theirs[:, 0])
    assert same == (family != "qwen2_5_vl" or seconds < 8.6)
