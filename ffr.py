"""Find, Fix, Reason: the algorithm of arXiv 2604.16243, from a group's first tries to its loss.

    find        G first tries τ_i of one prompt, verified: z_i                      (Eq. 3, 4)
    fix         the teacher's evidence patch c_i for every failed try               (Eq. 5)
    reason      one repair τ*_i per patch: same question, more evidence             (Eq. 6)
    choose      τ̂_i = τ_i if z_i = 1 else τ*_i                                      (Eq. 7)
    reward      R̃_i, the robust improvement reward: a repair pays the patch tax κ   (Eq. 8)
    advantages  R̃_i standardised within the group                                   (Eq. 9)
    loss        clipped token ratios under each rollout's own observation, and KL   (Eq. 10, 11)

Everything the step needs from outside is an argument: the student, `score` (verifier), `diagnose`
(teacher), `write` (patch to prompt). GRPO is the same step without a teacher.

Where the paper is silent: a slot whose patch is missing keeps its first try, untaxed; a repaired
slot takes the repair's score even where the repair failed too; an all-equal group gets exact zeros;
the KL is the k3 estimator.

Dimensions: B prompts, G rollouts of a prompt, C completion tokens, T completion tokens of a
micro-batch.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DELTA = 1e-4  # δ of Eq. 9
KL_CLAMP = 10.0  # largest |log ratio| in the KL, so that one stray token cannot overflow exp


@dataclass
class Rollout:
    """One sampled completion τ under one observation: x, or (x, c) for a repair."""
    ids_C: Tensor  # through EOS
    old_logp_C: Tensor  # log π_old at sampling time, fp32
    suffix: Any  # the segment between prefix and completion: header, or patch and header
    text: str
    accuracy: float  # of the final answer, in [0, 1]
    format: float  # 1 if the completion keeps the think/answer format
    correct: bool  # R(τ) = 1, Eq. 3: exact kinds at accuracy 1, graded ones at the pass mark
    finished: bool  # ended with EOS, not at the length limit


@dataclass
class Slot:
    """One of a group's G places: a first try and, where that failed and a patch came, its
    repair.
    """
    first: Rollout  # τ_i; z_i = first.correct, Eq. 4
    diagnosis: Any = None  # future of the teacher's diagnosis, whose patch may be None
    patch: Any = None  # c_i
    repair: Rollout | None = None  # τ*_i
    alignment: float = 0.0  # 1 if the repair's rationale refers to the patch's evidence
    reward: float = 0.0  # R̃_i
    advantage: float = 0.0  # Â_i
    trained: Rollout | None = None  # the rollout whose tokens carry the loss, if any
    off_policy: bool = False  # `first` is somebody's trace, not this step's own try
    note: Any = None  # what one of methods.py keeps about it

    @property
    def chosen(self):
        """τ̂_i = τ_i if z_i = 1 else τ*_i  (Eq. 7); τ_i too where no usable patch came."""
        return self.first if self.first.correct or self.repair is None else self.repair


@dataclass
class Group:
    """All that one prompt yields in one step."""
    sample: Any
    prefix: Any  # the segment x = [system, video, question]
    slots: list[Slot] = field(default_factory=list)
    note: Any = None  # what one of methods.py keeps about it


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn, and from which accuracy a graded answer counts as right."""
    max_completion: int
    temperature: float
    top_p: float
    pass_mark: float


def noise(key, rows, length):
    """Uniform numbers [rows, length] that depend on nothing but `key`.

    The same seed, step and prompt give the same rollouts on any number of processes, in any batch,
    after any resume.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# Find, fix, reason


def find(student, cache, groups, header, score, diagnose, key, rollouts, sampling):
    """τ_i ~ π_old(· | x), i = 1..G, and z_i = 1[R(τ_i) = 1]  (Eq. 3, 4); fills each group's slots.

    A failed try goes to the teacher the moment it has ended, while other rows are being sampled.
    score(sample, text) -> (accuracy, format, exact): exact kinds pass at 1, graded at the mark.
    diagnose(sample, text) -> future of a diagnosis (with .patch); None where nobody teaches.
    rollouts: G, or a number for each group.
    """
    counts = rollouts if isinstance(rollouts, list) else [rollouts] * len(groups)
    owners = [b for b, count in enumerate(counts) for _ in range(count)]
    slots = [None] * len(owners)

    def verify(n, completion):
        sample = groups[owners[n]].sample
        first = _scored(student, sample, header, completion, score, sampling)
        ask = diagnose is not None and not first.correct
        slots[n] = Slot(first, diagnose(sample, first.text) if ask else None)

    uniforms = [noise(f"{key}/{group.sample.id}/find", count, sampling.max_completion)
                for group, count in zip(groups, counts)]
    student.sample(cache, [header] * len(owners), owners, torch.cat(uniforms),
                   sampling.max_completion, sampling.temperature, sampling.top_p, done=verify)
    for b, group in enumerate(groups):
        group.slots = [slot for slot, owner in zip(slots, owners) if owner == b]


def fix(groups):
    """(e_i, c_i) = T(x, y, τ_i) where z_i = 0  (Eq. 5): wait for the teacher's patches."""
    for group in groups:
        for slot in group.slots:
            if slot.diagnosis is not None:
                slot.patch = slot.diagnosis.result().patch


def reason(student, cache, groups, write, score, align, key, sampling):
    """τ*_i ~ π_old(· | x, c_i)  (Eq. 6): all repairs of a step in one batch, prefixes cached.

    write(sample, patch) -> the segment [patch, header]; align(text, patch) -> 1 if text uses it.
    """
    patched = [(b, i) for b, group in enumerate(groups)
               for i, slot in enumerate(group.slots) if slot.patch is not None]
    if not patched:
        return
    rows = len(groups[0].slots)
    uniforms = [noise(f"{key}/{group.sample.id}/reason", rows, sampling.max_completion)
                for group in groups]
    suffixes = [write(groups[b].sample, groups[b].slots[i].patch) for b, i in patched]
    completions = student.sample(
        cache, suffixes, [b for b, _ in patched], torch.stack([uniforms[b][i] for b, i in patched]),
        sampling.max_completion, sampling.temperature, sampling.top_p)
    for (b, i), suffix, completion in zip(patched, suffixes, completions):
        slot = groups[b].slots[i]
        slot.repair = _scored(student, groups[b].sample, suffix, completion, score, sampling)
        slot.alignment = align(slot.repair.text, slot.patch)


def _scored(student, sample, suffix, completion, score, sampling):
    text = student.text(completion.ids)
    accuracy, form, exact = score(sample, text)
    correct = accuracy >= (1.0 if exact else sampling.pass_mark)
    return Rollout(completion.ids, completion.logp.cpu(), suffix, text, accuracy, form, correct,
                   completion.finished)


# ---------------------------------------------------------------------------------------------
# Choose, reward, advantage


def choose(group, select="slot", train_on="chosen"):
    """Which rollout of each slot carries the loss.

    The paper's Eq. 7: every slot's chosen rollout. Ablations: select "best" keeps only the slot of
    the highest reward, the unassisted first (appendix D.2); train_on "original" puts the repair's
    reward on the failed tokens (the authors' release).
    """
    for slot in group.slots:
        slot.trained = slot.first if train_on == "original" else slot.chosen
    if select == "best":
        best = max(group.slots, key=lambda slot: (slot.reward, slot.repair is None))
        for slot in group.slots:
            slot.trained = slot.trained if slot is best else None


def reward(slot, kappa, alignment_weight=0.0):
    """R̃_i = z_i R(τ_i) + (1 − z_i)(R(τ*_i) − κ), R = accuracy + format of the chosen one  (Eq. 8).

    κ = `kappa` is charged for a repair, right or wrong, and never for a first try.
    """
    chosen = slot.chosen
    value = chosen.accuracy + chosen.format
    if chosen is slot.repair:
        value += alignment_weight * slot.alignment - kappa
    return value


def advantages(rewards_G, std=True):
    """Â_i = (R̃_i − mean_j R̃_j) / (std_j R̃_j + δ), unbiased std  (Eq. 9); all equal: zeros.

    Without `std` only the mean is taken off (Dr. GRPO).
    """
    rewards_G = torch.as_tensor(rewards_G, dtype=torch.float64)
    if len(rewards_G) < 2 or bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros(len(rewards_G))
    return ((rewards_G - rewards_G.mean()) / (rewards_G.std() + DELTA if std else 1)).float()


def credit(groups, kappa, alignment_weight=0.0, select="slot", train_on="chosen", std=True,
           value=reward):
    """Eq. 7 to 9 for every group: rewards by `value`, advantages, and whose tokens are trained."""
    for group in groups:
        for slot in group.slots:
            slot.reward = value(slot, kappa, alignment_weight)
        values = advantages([slot.reward for slot in group.slots], std)
        for slot, advantage in zip(group.slots, values.tolist()):
            slot.advantage = advantage
        choose(group, select, train_on)


# ---------------------------------------------------------------------------------------------
# Loss


@dataclass
class MicroBatch:
    """Part of a step that fits one packed forward: B prefixes, N trained rollouts, T completion
    tokens.

    weight_T: what one token's objective counts for; zero throughout for the filler that keeps ranks
    in step. members: group and slot of each rollout; a filler has none.
    """
    prefixes: list
    suffixes: list
    owners: list[int]
    completions: list[Tensor]
    old_logp_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor
    members: list[tuple[Group, Slot]]
    ref_logp_T: Tensor | None = None


def micro_batches(groups, max_tokens, token_weight):
    """Split the trained rollouts into micro-batches of at most `max_tokens` packed tokens (a single
    rollout may exceed it).

    token_weight(rollout) -> the weight of each of its tokens in the loss. A group that is split has
    its prefix in every part.
    """
    parts, used = [], 0
    for g, group in enumerate(groups):
        for slot in (slot for slot in group.slots if slot.trained is not None):
            size = len(slot.trained.suffix.ids) + len(slot.trained.ids_C)
            new_prefix = not parts or parts[-1][-1][0] != g
            if not parts or used + size + new_prefix * len(group.prefix.ids) > max_tokens:
                parts.append([])
                used, new_prefix = 0, True
            used += size + new_prefix * len(group.prefix.ids)
            parts[-1].append((g, slot))
    return [_micro_batch(groups, part, token_weight) for part in parts]


def _micro_batch(groups, part, token_weight):
    present = sorted({g for g, _ in part})
    trained = [slot.trained for _, slot in part]
    lengths = torch.tensor([len(rollout.ids_C) for rollout in trained])
    weights = torch.tensor([token_weight(rollout) for rollout in trained])
    advantages = torch.tensor([slot.advantage for _, slot in part])
    return MicroBatch(
        prefixes=[groups[g].prefix for g in present],
        suffixes=[rollout.suffix for rollout in trained],
        owners=[present.index(g) for g, _ in part],
        completions=[rollout.ids_C for rollout in trained],
        old_logp_T=torch.cat([rollout.old_logp_C for rollout in trained]),
        advantage_T=advantages.repeat_interleave(lengths),
        weight_T=weights.repeat_interleave(lengths),
        members=[(groups[g], slot) for g, slot in part])


def token_weights(loss_norm, tokens, rollouts, max_completion=0):
    """Weight of a rollout's tokens: 1/Σ_i|τ̂_i| ("token", Eq. 11), 1/(n |τ̂_i|) ("sequence", R1-V),
    1/(n L_max) ("constant", Dr. GRPO).

    tokens, rollouts: how many are trained in the whole step, over all ranks and micro-batches.
    """
    if loss_norm == "token":
        return lambda rollout: 1.0 / max(tokens, 1)
    if loss_norm == "constant":
        return lambda rollout: 1.0 / (max(rollouts, 1) * max_completion)
    return lambda rollout: 1.0 / (max(rollouts, 1) * len(rollout.ids_C))


def clip(log_ratio_T, advantage_T, batch, clip_low, clip_high):
    """CLIP(r, Â, ε) = min(r Â, clip(r, 1 − ε_low, 1 + ε_high) Â)  (Eq. 10); sums for the logs."""
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    bound = (clipped_T * advantage_T < ratio_T * advantage_T).sum().item()
    return (torch.min(ratio_T * advantage_T, clipped_T * advantage_T),
            {"clipped": bound, "mismatch": log_ratio_T.abs().sum().item()})


def loss(logp_T, batch, clip_low, clip_high, beta, surrogate=clip):
    """−J = −Σ_t w_t [ CLIP(r_t, Â_t, ε) − β KL_t ]  (Eq. 10, 11), w_t = 1/Σ_i|τ̂_i|.

    r_t = π_θ(τ̂_t | x̂, τ̂_<t) / π_old(same): `logp_T` and the batch's old_logp_T are of the same
    observation x̂. surrogate: CLIP, or what a method of methods.py has in its place.
    KL_t = exp(d) − d − 1 with d = log π_ref − log π_θ (k3), unbiased for KL[π_θ ‖ π_ref].
    Returns the loss and a dict of sums over tokens, for the logs.
    """
    assert logp_T.shape == batch.old_logp_T.shape == batch.advantage_T.shape == batch.weight_T.shape
    advantage_T, weight_T = batch.advantage_T.to(logp_T.device), batch.weight_T.to(logp_T.device)
    log_ratio_T = logp_T - batch.old_logp_T.to(logp_T.device)
    objective_T, sums = surrogate(log_ratio_T, advantage_T, batch, clip_low, clip_high)
    sums["tokens"] = float(len(logp_T))
    if batch.ref_logp_T is not None:
        d_T = (batch.ref_logp_T.to(logp_T.device) - logp_T).clamp(-KL_CLAMP, KL_CLAMP)
        kl_T = d_T.exp() - d_T - 1
        objective_T = objective_T - beta * kl_T
        sums["kl"] = kl_T.sum().item()
    return -(weight_T * objective_T).sum(), sums


# ---------------------------------------------------------------------------------------------
# What a step did, in numbers


def measure(groups):
    """Sums and counts of a step, name -> [sum, count], so that ranks can be added up before
    dividing.
    """
    slots = [slot for group in groups for slot in group.slots if not slot.off_policy]
    repaired = [slot for slot in slots if slot.repair is not None]
    mended = sum(slot.repair.correct for slot in repaired)
    totals = {
        "reward": [sum(slot.reward for slot in slots), len(slots)],
        "accuracy": [sum(slot.first.accuracy for slot in slots), len(slots)],
        "format": [sum(slot.first.format for slot in slots), len(slots)],
        "intervention_ratio": [len(repaired), len(slots)],
        "repair_rate": [mended, len(repaired)],
        "chosen_accuracy": [sum(slot.chosen.accuracy for slot in slots), len(slots)],
        "alignment": [sum(slot.alignment for slot in repaired), len(repaired)],
        "advantage_zero_fraction": [sum(slot.advantage == 0 for slot in slots), len(slots)],
        "completion_length": [sum(len(slot.chosen.ids_C) for slot in slots), len(slots)],
        "finished": [sum(slot.chosen.finished for slot in slots), len(slots)],
    }
    for slot in repaired:
        kind = slot.patch.error_type
        right, seen = totals.get(f"repair_rate/{kind}", [0, 0])
        totals[f"repair_rate/{kind}"] = [right + slot.repair.correct, seen + 1]
    return totals
