"""The prefix tree and cached sampling against the plain way, for both families, in fp32."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.utils.logging import set_tqdm_hook

import model as model_module
from model import (Student, TokenLogp, Tree, grouped_attention, mrope, recompute_blocks,
                   tree_attention_varlen)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_separate_rows(family):
    """Catches: a suffix that sees another suffix, a shift by one, wrong positions after a video or
    a patch image.
    """
    student = tiny_student(family)
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
def test_several_prompts_equal_one_at_a_time(family):
    """Catches: padding of a shorter prefix that leaks into another prompt's rollouts."""
    student = tiny_student(family)
    prefixes, suffixes, owners = forest(family)
    completions = [words(n, n) for n in (50, 9, 7, 6, 4, 8, 3)]  # the first row packed last
    together, _ = student(prefixes, suffixes, owners, completions)
    apart = [student([prefixes[b]], [s], [0], [c])[0]
             for b, s, c in zip(owners, suffixes, completions)]
    assert (together - torch.cat(apart)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_greedy_equals_plain_greedy(family):
    """Catches: a cache slot off by one, a wrong position while decoding, padding that is attended
    to, dropped rows mixed up.
    """
    student = tiny_student(family)
    prefixes, suffixes, owners = forest(family)
    with torch.no_grad():
        student.model.lm_head.weight[EOS] *= 2  # rows that end, and not all at once
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


@pytest.mark.parametrize("blocked", (True, False))
@pytest.mark.parametrize("family", FAMILIES)
def test_logp_while_sampling_equals_logp_while_scoring(family, blocked, monkeypatch):
    """Catches: a ratio that is not 1 before any update; log-probs taken after top-p or under
    another temperature; a decode step that is right in oneDNN's products only (CUDA has none).
    """
    if not blocked:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    student = tiny_student(family)
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
    monkeypatch.setattr(model_module, "RECORDED_SLOTS", 16)
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


def test_recomputed_activations_give_the_same_gradients():
    """Catches: activation checkpointing that drops the tree on the second forward."""
    grads = []
    for recompute in (False, True):
        student = tiny_student("qwen2_5_vl").train()
        if recompute:
            recompute_blocks(student.model)
        prefixes, suffixes, owners = forest("qwen2_5_vl")
        student(prefixes, suffixes, owners, [words(5, n) for n in range(7)])[0].sum().backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-5), name


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

    padded, _ = model_module.tree_attention(Module, q[None], k[None], v[None], None, scaling=0.3,
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
    with pytest.raises(AssertionError, match="placeholders"):
        student.prefill([broken])


def test_loading_and_saving_show_no_bars_of_their_own(tmp_path, capfd, monkeypatch):
    """Catches: transformers' bars in the middle of the run's, or hidden for good; weights that a
    save and a load change.
    """
    student = tiny_student("qwen2_5_vl")
    student.processor.save_pretrained = lambda folder: None
    monkeypatch.setattr(model_module.AutoProcessor, "from_pretrained", lambda _: student.processor)
    student.save(tmp_path)
    loaded = Student.load(tmp_path)
    assert "%|" not in capfd.readouterr().err
    assert set_tqdm_hook(None) is None
    for a, b in zip(student.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
