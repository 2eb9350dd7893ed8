"""Find, Fix, Reason: the algorithm of arXiv 2604.16243, from a group's first tries to its loss.

    find        G first tries τ_i of one prompt, verified: z_i                      Eq. 3, Eq. 4
    fix         the teacher's evidence patch c_i for every failed try               Eq. 5
    reason      one repair τ*_i per patch: same question, more evidence             Eq. 6
    choose      τ̂_i = τ_i if z_i = 1 else τ*_i                                      Eq. 7
    reward      R̃_i, the robust improvement reward: a repair pays the patch tax κ   Eq. 8
    advantages  R̃_i standardised within the group                                   Eq. 9
    loss        clipped token ratios under each rollout's own observation, and KL   Eq. 10, Eq. 11

`step` is these seven in order. Everything it needs from outside is an argument: the student,
`score` (verifier), `diagnose` (teacher), `write` (patch to prompt). GRPO is the same step without
a teacher: Eq. 1 is Eq. 9 and Eq. 2 is Eq. 11 where nothing is repaired.

Where the paper is silent: a slot whose patch is missing keeps its first try, untaxed; a repaired
slot takes the repair's score even where the repair failed too; an all-equal group gets exact zeros;
the KL is the k3 estimator.

Dimensions: B prompts, G rollouts of a prompt, C completion tokens, T completion tokens of a
micro-batch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DELTA = 1e-4  # δ of Eq. 9
ROUNDING = 1e-9  # rewards that are as near are equal
KL_CLAMP = 10.0  # largest |log ratio| in the KL, so that one stray token cannot overflow exp
RATIO_CLAMP = 20.0  # largest log ratio in CLIP: beyond 88.7 exp would give gradients of NaN;
# beyond the clamp Â > 0 is clipped anyway, and Â < 0 has no gradient: it would be all of the update


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
    staleness: int = 0  # updates made since it was sampled, before the one that trains it


@dataclass
class Slot:
    """One of a group's G places: a first try and, where that failed and a patch came, a repair."""
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
    def chosen(self) -> Rollout:
        """τ̂_i = τ_i if z_i = 1 else τ*_i  (Eq. 7); τ_i too where no usable patch came."""
        return self.first if self.first.correct or self.repair is None else self.repair


@dataclass
class Group:
    """All that one prompt yields in one step."""
    sample: Any
    prefix: Any  # the segment x = [system, video, question]
    slots: list[Slot] = field(default_factory=list)
    note: Any = None  # what one of methods.py keeps about it
    place: str = ""  # tells groups of one sample in a step apart


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn, and from which accuracy a graded answer counts as right."""
    max_completion: int
    temperature: float
    top_p: float
    pass_mark: float


def noise(key: str, rows: int, length: int) -> Tensor:
    """Draw uniform numbers [rows, length] by `key` alone, whatever processes, batch or resume."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def step(student: Any, reference: Any, groups: list[Group], header: Any, score: Callable,
         diagnose: Callable | None, write: Callable, align: Callable, key: str, rollouts: int,
         sampling: Sampling, kappa: float = 0.3, epsilon: float = 0.2, beta: float = 0.04,
         max_tokens: int = 16384) -> float:
    """Take one step on one process, in the paper's order; return the loss, leave its gradient.

    train.py goes the same way through the same functions, with several processes, clocks and the
    hooks of other methods in between. reference: π_ref, None for no KL; groups: one for each
    prompt, still empty; header: the segment before a completion; epsilon, beta: ε and β.
    """
    cache = student.prefill([group.prefix for group in groups])
    find(student, cache, groups, header, score, diagnose, key, rollouts, sampling)  # Eq. 3, Eq. 4
    fix(groups, diagnose)  # Eq. 5
    reason(student, cache, groups, write, score, align, key, sampling)  # Eq. 6
    credit(groups, kappa)  # choose, reward, advantages: Eq. 7, Eq. 8, Eq. 9
    trained = [slot.trained for group in groups for slot in group.slots]
    weight = token_weights("token", sum(len(rollout.ids_C) for rollout in trained), len(trained))
    total = 0.0
    for batch in micro_batches(groups, max_tokens, weight):
        rows = batch.prefixes, batch.suffixes, batch.owners, batch.completions
        if reference is not None:
            with torch.no_grad():
                batch.ref_logp_T, _ = reference(*rows, sampling.temperature)
        logp_T, _ = student(*rows, sampling.temperature)
        settle(batch, logp_T)
        part, _ = loss(logp_T, batch, epsilon, epsilon, beta)  # Eq. 10, Eq. 11
        part.backward()
        total += part.item()
    return total


# ---------------------------------------------------------------------------------------------
# Find, fix, reason


def find(student: Any, cache: Any, groups: list[Group], header: Any, score: Callable,
         diagnose: Callable | None, key: str, rollouts: int | list[int],
         sampling: Sampling) -> None:
    """Sample τ_i ~ π_old(· | x), i = 1..G, and verify: z_i = 1[R(τ_i) = 1]  (Eq. 3, Eq. 4).

    Fills each group's slots. `fix` begins in here: the teacher is asked about a failed try the
    moment it has ended, while other rows are still being sampled.
    score(sample, text) -> (accuracy, format, exact): exact kinds pass at 1, graded at the mark.
    rollouts: G, or a number for each group.
    """
    counts = rollouts if isinstance(rollouts, list) else [rollouts] * len(groups)
    owners = [b for b, count in enumerate(counts) for _ in range(count)]
    slots = [None] * len(owners)

    def verify(n, completion):
        sample = groups[owners[n]].sample
        slots[n] = Slot(scored(student, sample, header, completion, score, sampling))
        ask(sample, slots[n], diagnose)

    uniforms = [noise(f"{key}/{group.sample.id}{group.place}/find", count, sampling.max_completion)
                for group, count in zip(groups, counts)]
    student.sample(cache, [header] * len(owners), owners, torch.cat(uniforms),
                   sampling.max_completion, sampling.temperature, sampling.top_p, done=verify)
    for b, group in enumerate(groups):
        group.slots = [slot for slot, owner in zip(slots, owners) if owner == b]


def ask(sample: Any, slot: Slot, diagnose: Callable | None) -> None:
    """Ask the teacher about a failed try, z_i = 0, once and without waiting  (Eq. 5)."""
    if diagnose is not None and slot.diagnosis is None and not slot.first.correct:
        slot.diagnosis = diagnose(sample, slot.first.text)


def fix(groups: list[Group], diagnose: Callable | None) -> None:
    """Get (e_i, c_i) = T(x, y, τ_i) for every failed try, z_i = 0  (Eq. 5).

    `find` has asked already, as the tries ended, where it was given `diagnose`; what is left is
    asked for here, then all patches are waited for. A slot without a usable patch keeps None.
    diagnose(sample, text) -> future of a diagnosis (with .patch); None where nobody teaches.
    """
    slots = [(group.sample, slot) for group in groups for slot in group.slots]
    for sample, slot in slots:
        ask(sample, slot, diagnose)
    for _, slot in slots:
        if slot.diagnosis is not None:
            slot.patch = slot.diagnosis.result().patch


def reason(student: Any, cache: Any, groups: list[Group], write: Callable, score: Callable,
           align: Callable, key: str, sampling: Sampling) -> None:
    """Sample τ*_i ~ π_old(· | x, c_i), all repairs of a step in one batch  (Eq. 6).

    The prefixes are those of the first tries, from the cache.
    write(sample, patch) -> the segment [patch, header]; align(text, patch) -> 1 if text uses it.
    """
    patched = [(b, i) for b, group in enumerate(groups)
               for i, slot in enumerate(group.slots) if slot.patch is not None]
    if not patched:
        return
    rows = len(groups[0].slots)
    uniforms = [noise(f"{key}/{group.sample.id}{group.place}/reason", rows, sampling.max_completion)
                for group in groups]
    suffixes = [write(groups[b].sample, groups[b].slots[i].patch) for b, i in patched]
    completions = student.sample(
        cache, suffixes, [b for b, _ in patched], torch.stack([uniforms[b][i] for b, i in patched]),
        sampling.max_completion, sampling.temperature, sampling.top_p)
    for (b, i), suffix, completion in zip(patched, suffixes, completions):
        slot = groups[b].slots[i]
        slot.repair = scored(student, groups[b].sample, suffix, completion, score, sampling)
        slot.alignment = align(slot.repair.text, slot.patch)


def scored(student: Any, sample: Any, suffix: Any, completion: Any, score: Callable,
           sampling: Sampling) -> Rollout:
    """Verify a completion, R(τ) = 1 (Eq. 3): exact kinds pass at 1, graded ones at the mark."""
    text = student.text(completion.ids)
    accuracy, form, exact = score(sample, text)
    correct = accuracy >= (1.0 if exact else sampling.pass_mark)
    return Rollout(completion.ids, completion.logp.cpu(), suffix, text, accuracy, form, correct,
                   completion.finished)


def choose(group: Group, train_on: str = "chosen") -> None:
    """Let the chosen rollout carry the loss in every slot: τ̂_i = τ_i if z_i = 1 else τ*_i (Eq. 7).

    train_on "original" puts the repair's reward on the failed tokens: the authors' release.
    """
    for slot in group.slots:
        slot.trained = slot.first if train_on == "original" else slot.chosen


def keep_best(group: Group) -> None:
    """Train the slot of the highest reward alone, the unassisted first: appendix D.2."""
    best = max(group.slots, key=lambda slot: (slot.reward, slot.repair is None))
    for slot in group.slots:
        slot.trained = slot.trained if slot is best else None


def reward(slot: Slot, kappa: float, alignment_weight: float = 0.0) -> float:
    """Return R̃_i = z_i R(τ_i) + (1 − z_i)(R(τ*_i) − κ)  (Eq. 8).

    R = accuracy + format of the chosen rollout; κ = `kappa` is charged for a repair, right or
    wrong, and never for a first try.
    """
    chosen = slot.chosen
    value = chosen.accuracy + chosen.format
    if chosen is slot.repair:
        value += alignment_weight * slot.alignment - kappa
    return value


def advantages(rewards_G: list[float], std: bool = True) -> Tensor:
    """Return Â_i = (R̃_i − mean_j R̃_j) / (std_j R̃_j + δ), unbiased std  (Eq. 9; Eq. 1 for GRPO).

    An all-equal group gets zeros: 0.6 and 0.9 − 0.3 are equal on paper, and differ by rounding.
    Without `std` only the mean is taken off (Dr. GRPO).
    """
    rewards_G = torch.as_tensor(rewards_G, dtype=torch.float64)
    apart_G = rewards_G - rewards_G.mean()
    apart_G[apart_G.abs() < ROUNDING] = 0.0
    scale = apart_G.std() + DELTA if std and len(apart_G) > 1 else 1
    return (apart_G / scale).float()


def credit(groups: list[Group], kappa: float, alignment_weight: float = 0.0, select: str = "slot",
           train_on: str = "chosen", std: bool = True, value: Callable = reward) -> None:
    """Choose, reward and compare the slots of every group  (Eq. 7, Eq. 8, Eq. 9).

    Ablations: select "best" is `keep_best`, train_on as in `choose`, std as in `advantages`; a
    method may have its own `value` in place of `reward`.
    """
    for group in groups:
        choose(group, train_on)
        for slot in group.slots:
            slot.reward = value(slot, kappa, alignment_weight)
        compared = advantages([slot.reward for slot in group.slots], std)
        for slot, advantage in zip(group.slots, compared.tolist()):
            slot.advantage = advantage
        if select == "best":
            keep_best(group)


# ---------------------------------------------------------------------------------------------
# Loss


@dataclass
class MicroBatch:
    """Part of a step that fits one packed forward: B prefixes, N trained rollouts, T tokens.

    old_logp_T: log π_old, of sampling time until `settle`. weight_T: what one token's objective
    counts for; zero throughout for the filler that keeps ranks in step. members: group and slot of
    each rollout; a filler has none.
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


def micro_batches(groups: list[Group], max_tokens: int, token_weight: Callable) -> list[MicroBatch]:
    """Split the trained rollouts into micro-batches of at most `max_tokens` packed tokens.

    A single rollout may exceed that. A group that is split has its prefix in every part.
    token_weight(rollout) -> the weight of each of its tokens in the loss.
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


def token_weights(loss_norm: str, tokens: int, rollouts: int, max_completion: int = 0) -> Callable:
    """Return rollout -> the weight of each of its tokens in the loss.

    "token" 1/Σ_i|τ̂_i| (Eq. 11), "sequence" 1/(n |τ̂_i|) (R1-V), "constant" 1/(n L_max) (Dr. GRPO).
    tokens, rollouts: how many are trained in the whole step, over all ranks and micro-batches.
    """
    if loss_norm == "token":
        return lambda rollout: 1.0 / max(tokens, 1)
    if loss_norm == "constant":
        return lambda rollout: 1.0 / (max(rollouts, 1) * max_completion)
    return lambda rollout: 1.0 / (max(rollouts, 1) * len(rollout.ids_C))


def of_tokens(batch: MicroBatch, test: Callable) -> Tensor:
    """Return test(slot) of every completion token's slot, bool [T]; False in a filler."""
    tested = torch.tensor([bool(test(slot)) for _, slot in batch.members] or [False])
    return tested.repeat_interleave(torch.tensor([len(ids) for ids in batch.completions]))


def settle(batch: MicroBatch, logp_T: Tensor) -> float:
    """Let π_old be the policy as scoring sees it before the step's first update.

    Sampling and scoring round differently; in bf16 this alone puts tokens outside the clip. What
    another or an older policy sampled keeps its log-probs. Returns Σ_t |sampled − scored|.
    """
    others_T = of_tokens(batch, lambda slot: slot.off_policy or slot.trained.staleness)
    scored_T = torch.where(others_T, batch.old_logp_T, logp_T.detach().cpu())
    mismatch = (batch.old_logp_T - scored_T).abs().sum().item()
    batch.old_logp_T = scored_T
    return mismatch


def clip(log_ratio_T: Tensor, advantage_T: Tensor, clip_low: float,
         clip_high: float) -> tuple[Tensor, dict]:
    """Return CLIP(r, Â, ε) = min(r Â, clip(r, 1 − ε_low, 1 + ε_high) Â) [T]  (Eq. 10).

    r is bounded by RATIO_CLAMP. Also, for the logs: how many tokens the clip bounds.
    """
    ratio_T = log_ratio_T.clamp(max=RATIO_CLAMP).exp()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    bound = (clipped_T * advantage_T < ratio_T * advantage_T).sum().item()
    return torch.min(ratio_T * advantage_T, clipped_T * advantage_T), {"clipped": bound}


def loss(logp_T: Tensor, batch: MicroBatch, clip_low: float, clip_high: float, beta: float,
         surrogate: Callable | None = None) -> tuple[Tensor, dict]:
    """Return −J = −Σ_t w_t [ CLIP(r_t, Â_t, ε) − β KL_t ]  (Eq. 11; Eq. 2 for GRPO).

    r_t = π_θ(τ̂_t | x̂, τ̂_<t) / π_old(same)  (Eq. 10): `logp_T` and the batch's old_logp_T are of
    the same observation x̂. surrogate: what a method of methods.py has in CLIP's place.
    KL_t = exp(d) − d − 1 with d = log π_ref − log π_θ (k3), unbiased for KL[π_θ ‖ π_ref].
    Beside the loss: a dict of sums over tokens, for the logs.
    """
    assert logp_T.shape == batch.old_logp_T.shape == batch.advantage_T.shape == batch.weight_T.shape
    advantage_T, weight_T = batch.advantage_T.to(logp_T.device), batch.weight_T.to(logp_T.device)
    log_ratio_T = logp_T - batch.old_logp_T.to(logp_T.device)
    if surrogate is None:
        objective_T, sums = clip(log_ratio_T, advantage_T, clip_low, clip_high)
    else:
        objective_T, sums = surrogate(log_ratio_T, advantage_T, batch, clip_low, clip_high)
    sums["tokens"] = float(len(logp_T))
    if batch.ref_logp_T is not None:
        d_T = (batch.ref_logp_T.to(logp_T.device) - logp_T).clamp(-KL_CLAMP, KL_CLAMP)
        kl_T = d_T.exp() - d_T - 1
        objective_T = objective_T - beta * kl_T
        sums["kl"] = kl_T.sum().item()
    return -(weight_T * objective_T).sum(), sums
