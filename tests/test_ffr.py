"""The algorithm: each test names the mistake it would catch and works the right value out by
itself.
"""

import math
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

import ffr
import runs
from model import Completion
from tiny import separate_logits, text, tiny_student, video

pytestmark = pytest.mark.quick

RIGHT, WRONG, EOS = 1, 2, 9  # a completion of these ids ends in a right or a wrong answer
HEADER, LIMITS = text(2), ffr.Sampling(8, 1.0, 0.95, 0.5)


def digits(ids):
    return " ".join(map(str, ids.tolist()))


class Script:
    """A student that says what it is told to, in order, and remembers what it was asked."""

    def __init__(self, *batches):
        self.batches, self.asked = list(batches), []

    def sample(self, cache, suffixes, owners, uniforms, max_completion, temperature, top_p,
               done=None):
        self.asked.append((suffixes, owners, uniforms))
        completions = [
            Completion(torch.tensor(ids), -torch.arange(1.0, len(ids) + 1), ids[-1] == EOS)
            for ids in self.batches.pop(0)]
        assert len(completions) == len(suffixes) == len(owners) == len(uniforms)
        if done is not None:
            for n, completion in enumerate(completions):
                done(n, completion)
        return completions

    def text(self, ids):
        return digits(ids)


def score(sample, words):
    return float(str(RIGHT) in words.split()), 1.0, True


def answered(patch):
    future = Future()
    future.set_result(SimpleNamespace(patch=patch))
    return future


PATCH = SimpleNamespace(error_type="temporal")


def write(sample, patch):
    return text(7, seed=5)


def one_group(first, repairs, diagnose=lambda sample, words: answered(PATCH), kappa=0.3, **options):
    """Take a group through find, fix, reason and credit with scripted completions."""
    student = Script(first, repairs)
    groups = [ffr.Group(SimpleNamespace(id="a"), video("qwen2_5_vl", 2, 4, 4, 3))]
    ffr.find(student, None, groups, HEADER, score, diagnose, "0/0", len(first), LIMITS)
    ffr.fix(groups, diagnose)
    ffr.reason(student, None, groups, write, score, lambda words, patch: 1.0, "0/0", LIMITS)
    ffr.credit(groups, kappa, **options)
    return groups, student


FIRST = [[RIGHT, EOS], [WRONG, WRONG, EOS], [WRONG, EOS], [RIGHT, RIGHT, EOS]]
REPAIRS = [[RIGHT, 5, EOS], [WRONG, 6, 6, EOS]]


def test_only_failed_tries_are_diagnosed_and_repaired():
    """Catches: patches for right answers, a repair put into another slot, a repair from another
    prompt's prefix.
    """
    asked = []
    groups, student = one_group(FIRST, REPAIRS,
                                lambda sample, words: asked.append(words) or answered(PATCH))
    assert asked == ["2 2 9", "2 9"]
    assert [slot.repair is not None for slot in groups[0].slots] == [False, True, True, False]
    assert groups[0].slots[1].repair.ids_C.tolist() == [RIGHT, 5, EOS]
    suffixes, owners, uniforms = student.asked[1]
    assert owners == [0, 0] and all(len(s.ids) == 7 for s in suffixes)
    assert not torch.equal(uniforms[0], uniforms[1])


def test_reward_takes_the_repair_minus_kappa_and_never_taxes_a_first_try():
    """Catches: κ on a first try, κ forgotten, max of both tries (strict repair has none), format
    left out (Eq. 8).
    """
    groups, _ = one_group(FIRST, REPAIRS, kappa=0.3)
    assert [slot.reward for slot in groups[0].slots] == pytest.approx([2.0, 1.7, 0.7, 2.0])


def test_without_a_patch_the_first_try_stands_untaxed():
    """Catches: κ charged, or the slot dropped, when the teacher could not be reached."""
    groups, student = one_group(FIRST, [], lambda sample, words: answered(None))
    assert [slot.reward for slot in groups[0].slots] == [2.0, 1.0, 1.0, 2.0]
    assert all(slot.chosen is slot.first for slot in groups[0].slots) and len(student.asked) == 1


def test_grpo_is_the_step_without_a_teacher():
    """Catches: a teacher called by the baseline."""
    groups, student = one_group(FIRST, [], diagnose=None)
    assert len(student.asked) == 1
    assert [slot.reward for slot in groups[0].slots] == [2.0, 1.0, 1.0, 2.0]


def test_advantages_use_the_unbiased_deviation_of_the_group():
    """Catches: division by G, mean over the wrong axis, δ forgotten (Eq. 9). Worked out by hand for
    2, 1.7, 0.7, 2.
    """
    groups, _ = one_group(FIRST, REPAIRS)
    mean = (2 + 1.7 + 0.7 + 2) / 4
    std = math.sqrt(((2 - mean) ** 2 * 2 + (1.7 - mean) ** 2 + (0.7 - mean) ** 2) / 3)
    expected = [(r - mean) / (std + 1e-4) for r in (2, 1.7, 0.7, 2)]
    assert [slot.advantage for slot in groups[0].slots] == pytest.approx(expected, abs=1e-6)


def test_an_all_equal_group_has_exactly_zero_gradient():
    """Catches: rounding that turns equal rewards into huge advantages through the small δ."""
    for value in (0.1, 1.7, 2.0 / 3.0):
        assert ffr.advantages([value] * 8).tolist() == [0.0] * 8
    assert 0.9 - 0.3 != 0.6  # a repair's 0.9 − κ and a first try's 0.6 are equal on paper
    for std in (True, False):
        assert ffr.advantages([0.6, 0.9 - 0.3] * 4, std).tolist() == [0.0] * 8
    middle = ffr.advantages([0.0, 0.9 - 0.6, 0.6])  # of three, the mean is the middle one
    assert middle[1] == 0 and middle.tolist() == pytest.approx([-0.3 / 0.3001, 0, 0.3 / 0.3001])
    assert ffr.advantages([1.3]).tolist() == ffr.advantages([1.3], False).tolist() == [0.0]
    groups, _ = one_group([[RIGHT, EOS]] * 4, [])
    batch, = ffr.micro_batches(groups, 10**6, ffr.token_weights("token", 8, 4))
    logp = batch.old_logp_T.clone().requires_grad_()
    ffr.loss(logp, batch, 0.2, 0.2, 0.0)[0].backward()
    assert torch.equal(logp.grad, torch.zeros(8))


def test_the_chosen_rollout_carries_the_loss():
    """Catches: the repaired reward on the failed tokens (the release), a patch or prompt token in
    the loss, EOS left out.
    """
    groups, _ = one_group(FIRST, REPAIRS)
    batch, = ffr.micro_batches(groups, 10**6, ffr.token_weights("token", 12, 4))
    assert [c.tolist() for c in batch.completions] == [
        [RIGHT, EOS], [RIGHT, 5, EOS], [WRONG, 6, 6, EOS], [RIGHT, RIGHT, EOS]]
    assert [len(s.ids) for s in batch.suffixes] == [2, 7, 7, 2]  # each under its own observation
    assert batch.old_logp_T.tolist() == [-1, -2, -1, -2, -3, -1, -2, -3, -4, -1, -2, -3]
    assert len(batch.weight_T) == 12 and (batch.weight_T == 1 / 12).all()


def test_pi_old_is_scored_before_the_first_update():
    """Catches: rounding between sampling and scoring taken for a change of the policy, so that the
    clip binds before any update; a trace's π_φ replaced by the policy; π_old set again later.
    """
    groups, _ = one_group(FIRST, REPAIRS)
    groups[0].slots[3].off_policy = True
    batch, = ffr.micro_batches(groups, 10**6, ffr.token_weights("token", 12, 4))
    sampled = batch.old_logp_T.clone()
    logp = (sampled + torch.tensor([0.01, -0.01] * 6)).requires_grad_()
    own = torch.tensor([True] * 9 + [False] * 3)  # the last rollout is somebody's trace
    assert ffr.settle(batch, logp) == pytest.approx(9 * 0.01, abs=1e-5)
    assert torch.equal(batch.old_logp_T[own], logp.detach()[own])
    assert torch.equal(batch.old_logp_T[~own], sampled[~own])
    assert not batch.old_logp_T.requires_grad
    _, sums = ffr.loss(logp, batch, 3e-4, 4e-4, 0.0)
    assert sums["clipped"] <= 3  # 8 to 12 of them, where π_old is the sampler's


def test_train_on_original_reproduces_the_release():
    """Catches: an ablation that silently trains the paper's way."""
    groups, _ = one_group(FIRST, REPAIRS, train_on="original")
    batch, = ffr.micro_batches(groups, 10**6, ffr.token_weights("token", 10, 4))
    assert [c.tolist() for c in batch.completions] == FIRST
    assert [slot.reward for slot in groups[0].slots] == pytest.approx([2.0, 1.7, 0.7, 2.0])


def test_select_best_prefers_the_unassisted():
    """Catches: a repair that wins a tie; more than one rollout trained (appendix D.2)."""
    groups, _ = one_group([[WRONG, EOS], [RIGHT, EOS]], [[RIGHT, EOS]], kappa=0.0, select="best")
    assert [slot.reward for slot in groups[0].slots] == [2.0, 2.0]
    assert [slot.trained is None for slot in groups[0].slots] == [True, False]


def test_alignment_weight_rewards_repairs_only():
    """Catches: the alignment bonus given to first tries, or when its weight is 0."""
    groups, _ = one_group(FIRST, REPAIRS, alignment_weight=0.5)
    assert [slot.reward for slot in groups[0].slots] == pytest.approx([2.0, 2.2, 1.2, 2.0])


def test_clip_binds_on_the_right_side_only():
    """Catches: max for min, ε on the wrong side, a clip that also stops corrective updates (Eq.
    11).
    """
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    batch = SimpleNamespace(old_logp_T=torch.zeros(4), advantage_T=advantage,
                            weight_T=torch.full((4,), 0.25), ref_logp_T=None)
    logp = ratios.log().requires_grad_()
    loss, sums = ffr.loss(logp, batch, 0.2, 0.3, 0.0)
    assert loss.item() == pytest.approx(-(1.3 + 0.5 - 1.5 - 0.8) / 4)
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([0.0, -0.5 / 4, 1.5 / 4, 0.0])
    assert sums["clipped"] == 2


def test_no_log_ratio_overflows():
    """Catches: exp of a log ratio above 88.7, whose gradient is NaN where the clip binds (Â > 0),
    and the loss too where Â = 0; a bound that changes what needed none.
    """
    logs = [-1e4, -200.0, -88.0, -20.0, -3.0, -0.1, 0.0, 0.1, 3.0, 19.0, 21.0, 50.0, 88.0, 89.0,
            200.0, 1e4]
    for advantage in (0.7, 0.0, -0.7):
        for log in logs:
            r = math.exp(min(log, 20.0))
            bounded = min(r * advantage, min(max(r, 0.8), 1.3) * advantage)
            passes = r < 1.3 if advantage > 0 else r > 0.8 and log < 20.0
            batch = SimpleNamespace(old_logp_T=torch.zeros(1), weight_T=torch.ones(1),
                                    advantage_T=torch.tensor([advantage]), ref_logp_T=None)
            logp = torch.tensor([log], requires_grad=True)
            loss, sums = ffr.loss(logp, batch, 0.2, 0.3, 0.0)
            loss.backward()
            assert loss.item() == pytest.approx(-bounded, rel=1e-5), (advantage, log)
            assert logp.grad.item() == pytest.approx(-r * advantage * passes, rel=1e-5)
    mixed = torch.tensor([1e4, 0.1]).requires_grad_()  # one stray token spoils no other
    ffr.clip(mixed, torch.ones(2), 0.2, 0.3)[0].sum().backward()
    assert mixed.grad.tolist() == pytest.approx([0.0, math.exp(0.1)])


def test_kl_is_k3_with_its_gradient_and_clamped():
    """Catches: the KL's sign or direction swapped, β on the wrong term, overflow on a stray
    token.
    """
    logp = torch.tensor([-1.0, -2.0, -50.0]).requires_grad_()
    ref = torch.tensor([-1.5, -1.0, -1.0])
    zero = torch.zeros(3)
    batch = SimpleNamespace(old_logp_T=logp.detach(), advantage_T=zero, weight_T=zero + 1,
                            ref_logp_T=ref)
    loss, sums = ffr.loss(logp, batch, 0.2, 0.2, beta=0.1)
    k3 = [math.exp(d) - d - 1 for d in (-0.5, 1.0, 10.0)]
    assert loss.item() == pytest.approx(0.1 * sum(k3), rel=1e-5)
    loss.backward()
    gradient = [0.1 * (1 - math.exp(-0.5)), 0.1 * (1 - math.e), 0.0]
    assert logp.grad.tolist() == pytest.approx(gradient, abs=1e-5)


def test_observation_of_the_ratio_is_the_repairs_own():
    """Catches: repaired tokens scored under x instead of (x, c): then the ratio is not 1 before the
    first update (Eq. 10).
    """
    student = tiny_student("qwen2_5_vl")
    student.text = digits
    groups = [ffr.Group(SimpleNamespace(id=i), video("qwen2_5_vl", 2, 4, 4, 3)) for i in "ab"]
    cache = student.prefill([group.prefix for group in groups])

    def fail(sample, words):
        return 0.0, 0.0, True

    ffr.find(student, cache, groups, HEADER, fail, None, "0/0", 3, LIMITS)
    ffr.fix(groups, lambda s, w: answered(PATCH))  # nothing was asked while sampling
    ffr.reason(student, cache, groups, write, fail, lambda w, p: 0.0, "0/0", LIMITS)
    ffr.credit(groups, 0.3)
    batch, = ffr.micro_batches(groups, 10**6, ffr.token_weights("token", 1, 1))
    logp, _ = student(batch.prefixes, batch.suffixes, batch.owners, batch.completions)
    assert (logp - batch.old_logp_T).abs().max() < 1e-5
    under_x, _ = student(batch.prefixes, [HEADER] * 6, batch.owners, batch.completions)
    gap = (under_x - batch.old_logp_T).abs().max()
    assert gap > 1e-2, "the patch must matter for this test to mean anything"


def separate_logp(model, prefix, suffix, ids_C):
    logits_CV = separate_logits(model, prefix, suffix, ids_C)[:-1]
    return logits_CV.log_softmax(-1).gather(-1, ids_C[:, None])[:, 0]


def test_the_step_is_the_paper_written_out():
    """Catches: any of Eq. 3 to 11 left out of `step`, or in another order; a reference that sees
    another observation; a tax on first tries. All is computed anew here, a row at a time.
    """
    student, reference = (tiny_student("qwen2_5_vl", seed=seed) for seed in (0, 1))
    student.text = digits
    groups = [ffr.Group(SimpleNamespace(id=i), video("qwen2_5_vl", 2, 4, 4, 3)) for i in "ab"]

    def verify(sample, words):  # about half of the completions are right
        return float(sum(map(int, words.split())) % 2), 1.0, True

    loss = ffr.step(student, reference, groups, HEADER, verify, lambda s, w: answered(PATCH), write,
                    lambda w, p: 0.0, "0/0", 4, LIMITS, kappa=0.3, beta=0.04, max_tokens=200)
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    tokens, terms, repaired = 0, [], 0
    for group in groups:
        chosen = [s.first if s.first.accuracy == 1 else s.repair for s in group.slots]
        rewards = [r.accuracy + r.format - (0.0 if s.first.accuracy == 1 else 0.3)
                   for s, r in zip(group.slots, chosen)]
        mean = sum(rewards) / 4
        std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / 3)
        for slot, rollout, value in zip(group.slots, chosen, rewards):
            suffix = HEADER if slot.first is rollout else write(None, PATCH)
            repaired += slot.first is not rollout
            ours, ref = (separate_logp(model, group.prefix, suffix, rollout.ids_C)
                         for model in (student, reference))
            ratio = (ours - rollout.old_logp_C).exp()
            gain = (value - mean) / (std + 1e-4)
            bounded = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            gap = ref.detach() - ours
            terms.append((bounded - 0.04 * (gap.exp() - gap - 1)).sum())
            tokens += len(rollout.ids_C)
    expected = -sum(terms) / tokens
    expected.backward()
    assert 2 <= repaired <= 6 and loss == pytest.approx(expected.item(), abs=1e-5)
    for name, p in student.named_parameters():
        if p.grad is not None and p.grad.norm() > 1e-4:
            assert (found[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name


@pytest.mark.parametrize("loss_norm", ("token", "sequence"))
def test_micro_batches_add_up_to_the_whole(loss_norm):
    """Catches: a mean per micro-batch (or rank) instead of over the whole step; a group split
    without its prefix.
    """
    student = tiny_student("qwen2_5_vl")
    groups = one_group(FIRST, REPAIRS)[0] + one_group(FIRST[::-1], REPAIRS)[0]
    slots = [slot for group in groups for slot in group.slots]
    tokens = sum(len(slot.trained.ids_C) for slot in slots)
    weight = ffr.token_weights(loss_norm, tokens, len(slots))
    results = []
    for limit in (10**6, 30):
        batches, total = ffr.micro_batches(groups, limit, weight), 0.0
        student.zero_grad()
        for batch in batches:
            logp, _ = student(batch.prefixes, batch.suffixes, batch.owners, batch.completions)
            fresh = SimpleNamespace(**{**vars(batch), "old_logp_T": logp.detach()})
            part, _ = ffr.loss(logp, fresh, 0.2, 0.2, 0.0)
            part.backward()
            total += part.item()
        grads = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        results.append((len(batches), total, grads))
    (one, whole, expected), (several, summed, got) = results
    assert one == 1 and several > 2 and summed == pytest.approx(whole, abs=1e-5)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    if loss_norm == "sequence":
        weights = [weight(slot.trained) * len(slot.trained.ids_C) for slot in slots]
        assert sum(weights) == pytest.approx(1.0)


def test_noise_depends_on_its_key_only():
    """Catches: rollouts that change with the number of processes or after a resume; the same
    numbers for two prompts.
    """
    torch.manual_seed(1)
    a = ffr.noise("0/3/x/find", 2, 5)
    torch.manual_seed(2)
    assert torch.equal(a, ffr.noise("0/3/x/find", 2, 5))
    for other in ("1/3/x/find", "0/4/x/find", "0/3/y/find", "0/3/x/reason"):
        assert not torch.equal(a, ffr.noise(other, 2, 5))


def test_measures_count_slots():
    """Catches: the intervention ratio over failures only, the repair rate over all slots."""
    totals = runs.measure(one_group(FIRST, REPAIRS)[0])
    assert totals["intervention_ratio"] == [2, 4] and totals["repair_rate"] == [1, 2]
    assert totals["accuracy"] == [2.0, 4] and totals["chosen_accuracy"] == [3.0, 4]
    assert totals["repair_rate/temporal"] == [1, 2] and totals["completion_length"] == [12, 4]
