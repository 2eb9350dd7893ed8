"""The methods FFR is compared with: each another way to fill a group or to weigh its tokens.

    python train.py --method luffy

    grpo         G rollouts, their rewards compared
    ffr          ffr.py; --score_under plain: what was found with help is taught without it
    sft          imitate the data's traces                            (the paper's Tables 2 to 4)
    sft_teacher  imitate the teacher's traces that the verifier passes           (Tables 4, 11)
    tgrpo        Video-R1, 2503.21776: a bonus where order in time helps
    luffy        2504.14945: one verified teacher trace in each group
    replay       ExGRPO, 2510.02245: old successes join new rollouts
    vote         TTRL, 2504.16084: the majority is the label
    judge        a model's score in place of the rule's accuracy
    rlsd         2604.03128: a replay informed of the answer sizes each token's credit
    visd         2605.06094: the same, informed of evidence and a judge's feedback as well
    ffr_visd     FFR, a repair's tokens weighed by what the patch changed: the paper's next step

Sampler, verifier, loss and logs are common to all; --loss_norm, --no_std, --beta and the clip stay
as the user set them, so that runs compare. Docstrings say where the authors ran something else.

Dimensions: G rollouts of a prompt, C completion tokens, T completion tokens of a micro-batch, K
tokens of a support.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ffr

ORDER_BONUS, ORDER_MARGIN = 0.3, 0.8  # T-GRPO's α; μ of the released code (the paper has 1)
LENGTH_BONUS, PARTLY_RIGHT = 0.2, 0.1  # T-GRPO's ω; accuracy above which its code counts as right
KEPT = 16  # newest successes of a question that the replay buffer holds


# ---------------------------------------------------------------------------------------------
# In place of CLIP, and on top of the advantage


def clip(log_ratio_T: Tensor, advantage_T: Tensor, batch: ffr.MicroBatch, clip_low: float,
         clip_high: float) -> tuple[Tensor, dict]:
    """Return CLIP of every token's own ratio, as ffr.py has it."""
    return ffr.clip(log_ratio_T, advantage_T, clip_low, clip_high)


def sequence(log_ratio_T: Tensor, advantage_T: Tensor, batch: ffr.MicroBatch, clip_low: float,
             clip_high: float) -> tuple[Tensor, dict]:
    """Return CLIP of GSPO-token: one ratio per completion, gradient per token (2507.18071, Eq. 13).

    s_i = exp(1/|y_i| Σ_t log r_t), s_{i,t} = sg[s_i] π_θ / sg[π_θ]. The authors clip at 3e-4 and
    4e-4 and average by sequence.
    """
    parts = log_ratio_T.split([len(ids) for ids in batch.completions])
    mean_T = torch.cat([part.mean().expand(len(part)) for part in parts]).detach()
    log_ratio_T = mean_T + log_ratio_T - log_ratio_T.detach()
    return ffr.clip(log_ratio_T, advantage_T, clip_low, clip_high)


def shaped(log_ratio_T: Tensor, advantage_T: Tensor, batch: ffr.MicroBatch, clip_low: float,
           clip_high: float, gamma: float, otherwise: Callable) -> tuple[Tensor, dict]:
    """Return f(r) Â, f(r) = r / (r + γ), unclipped on replayed traces (LUFFY, Eq. 6), else CLIP.

    r is π_θ itself where the trace's old_logp are zeros. ∇f = γ r / (r + γ)² ∇log π: largest at
    r = γ, and 0.083 at r = 1, where a rollout of the policy itself has 1. Computed as the sigmoid
    of log r − log γ, which no r can overflow.
    """
    off_T = ffr.of_tokens(batch, lambda slot: slot.off_policy).to(log_ratio_T.device)
    own_T = log_ratio_T.masked_fill(off_T, 0.0)
    objective_T, sums = otherwise(own_T, advantage_T, batch, clip_low, clip_high)
    shaped_T = torch.sigmoid(log_ratio_T - math.log(gamma))
    return torch.where(off_T, shaped_T * advantage_T, objective_T), sums


def imitate(log_ratio_T: Tensor, advantage_T: Tensor, batch: ffr.MicroBatch, clip_low: float,
            clip_high: float) -> tuple[Tensor, dict]:
    """Return log π_θ of traces, whose old_logp are zeros."""
    return log_ratio_T * advantage_T, {}


def token_credit(advantage_T: Tensor, gap_T: Tensor, weight: float, width: float) -> Tensor:
    """Return W_t = (1 − λ) + λ clip(exp(sign(Â) Δ_t), 1 − ε_w, 1 + ε_w)  (RLSD, Algorithm 1).

    W > 0, so the direction stays the reward's. What the informed replay finds likelier (Δ > 0) gets
    more of a good advantage and less of a bad one. λ = weight, ε_w = width.
    """
    size_T = (advantage_T.sign() * gap_T).exp().clamp(1 - width, 1 + width)
    return 1 + weight * (size_T - 1)


# ---------------------------------------------------------------------------------------------
# The step's hooks, which are GRPO and FFR


class Method:
    """GRPO, and what train.py's step asks of every method.

    run is its Run, config its Config; phases(name) keeps the time of a part of the step.
    """
    asks = False  # there is a teacher
    repairs = False  # it writes patches for failed tries
    compares = True  # rewards within groups of rollouts; else traces are imitated
    names = ()  # figures of its own in metrics.jsonl
    value = staticmethod(ffr.reward)  # a slot's reward

    def __init__(self, config: Any):
        self.config, self.copy = config, None
        self.surrogate = sequence if config.ratio == "sequence" else clip
        self.tally = defaultdict(list)

    # -- optional hooks, which do nothing here

    def start(self, copied: Callable) -> None:
        """Get what the method needs besides policy and reference; copied() -> a frozen policy."""

    def beside(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> None:
        """Find out what else the rewards depend on."""

    def weigh(self, run: Any, batches: list[ffr.MicroBatch]) -> None:
        """Change the micro-batches, of which all ranks have equally many."""

    def after(self, run: Any, groups: list[ffr.Group]) -> None:
        """Learn from a step whose update has been made."""

    def state(self) -> Any:
        """Return what a checkpoint has to hold of this rank besides weights, None for nothing."""

    def resume(self, step: int, state: Any) -> None:
        """Go on after `step` steps, from what `state` returned then."""

    # -- a step's groups

    def fill(self, run: Any, step: int, phases: Callable) -> list[ffr.Group]:
        """Return this rank's groups of a step, credited, without waiting for another rank.

        With --dynamic_sampling (DAPO) prompts whose rewards are all equal stay in the metrics, lose
        their place in the loss, and as many fresh prompts are tried, so many times at most.
        """
        key, again = f"{self.config.seed}/{step}", self.config.dynamic_sampling
        with run.student.gathered():
            latest = self.prompts(run, step, phases)
            groups = list(latest)
            self.roll(run, latest, key, phases)
            for turn in range(again):
                with phases("load"):
                    latest = run.others(groups, sum(map(flat, latest)), f"{key}/fresh/{turn}")
                self.roll(run, latest, f"{key}/fresh/{turn}", phases)
                groups += latest
        for slot in (slot for group in groups if again and flat(group) for slot in group.slots):
            slot.trained = None
        return groups

    def prompts(self, run: Any, step: int, phases: Callable) -> list[ffr.Group]:
        """Return the step's groups, still empty."""
        with phases("load"):
            return run.fetch(step)

    def roll(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> None:
        """Find, fix, reason, then credit. A rollout in group.note takes one of the G places."""
        if not groups:
            return
        ahead = bool(groups[0].slots)  # found already
        cache = None if ahead else self.find(run, groups, key, phases)
        with phases("teach"):
            ffr.fix(groups, run.diagnose)
        if ahead and any(slot.patch for group in groups for slot in group.slots):
            with phases("prefill"):  # anew: the weights are others by now
                cache = run.student.prefill([group.prefix for group in groups])
        with phases("repair"):
            run.reason(cache, groups, key, run.sampling)
        del cache
        for group in groups:
            group.slots += [ffr.Slot(group.note, off_policy=True)] if group.note is not None else []
        self.beside(run, groups, key, phases)
        for group in groups:
            self.credit(run, group)

    def find(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> Any:
        """Sample first tries and ask about those that fail; return the prefixes' cache."""
        with phases("prefill"):
            cache = run.student.prefill([group.prefix for group in groups])
        with phases("decode"):
            counts = [self.config.rollouts - (group.note is not None) for group in groups]
            run.find(cache, groups, key, counts, run.sampling)
        return cache

    def credit(self, run: Any, group: ffr.Group) -> None:
        """Set the group's rewards and advantages, and whose tokens are trained."""
        config = self.config
        ffr.credit([group], config.kappa, config.alignment_weight, config.select, config.train_on,
                   not config.no_std, self.value)

    # -- figures

    def count(self, name: str, *values: float) -> None:
        """Add to one of the step's own figures, a mean over all ranks."""
        self.tally[name] += values

    def figures(self) -> dict[str, list]:
        """Return the step's own figures, name -> [sum, count], and begin anew."""
        figures = {name: [sum(self.tally[name]), len(self.tally[name])] for name in self.names}
        self.tally.clear()
        return figures


def flat(group: ffr.Group) -> bool:
    """Return whether all rewards are equal."""
    return all(slot.advantage == 0 for slot in group.slots)


class Ffr(Method):
    """FFR itself: find, fix, reason; a repair is scored under (x, c) (Eq. 10).

    With --score_under plain under x, by the policy that sampled it, and where its advantage is
    positive only: what a repair did wrong is improbable under x as it is, and pushing the
    improbable further down has no bound.

    With --ahead N the first tries of N steps are sampled before the teacher's patches for this one
    are waited for, with the weights as they are: these tries are then up to N updates old.
    """
    asks = repairs = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.tried, self.kept = {}, {}  # groups found ahead by step, and what a checkpoint had

    def prompts(self, run: Any, step: int, phases: Callable) -> list[ffr.Group]:
        """Return the step's groups; with --ahead their first tries are there, and later ones'."""
        if not self.config.ahead:
            return super().prompts(run, step, phases)
        self.tried |= {later: run.tried_again(groups) for later, groups in self.kept.items()}
        self.kept = {}
        for later in range(step, min(step + self.config.ahead + 1, run.steps)):
            if later not in self.tried:
                self.tried[later] = groups = super().prompts(run, later, phases)
                if groups:
                    self.find(run, groups, f"{self.config.seed}/{later}", phases)
                for slot in (slot for group in groups for slot in group.slots):
                    slot.first.staleness = (later - step) * self.config.updates_per_batch
        return self.tried.pop(step)

    def state(self) -> Any:
        """Return the first tries that were sampled ahead, by step and group; None where none."""
        return {step: [(group.sample.id, group.place, [
            (slot.first.ids_C, slot.first.old_logp_C, slot.first.finished, slot.first.staleness)
            for slot in group.slots]) for group in groups]
            for step, groups in self.tried.items()} or None

    def resume(self, step: int, state: Any) -> None:
        """Go on with the first tries that were sampled ahead."""
        self.kept = state or {}

    def weight(self, step: int) -> float:
        """Return λ of the token credit by the patch, which plain FFR has none of."""
        return 0.0

    def weigh(self, run: Any, batches: list[ffr.MicroBatch]) -> None:
        """Score repairs under x too, by the policy that sampled them, where that is needed.

        For the token credit, or with --score_under plain in place of suffix and π_old.
        """
        weight, under_x = self.weight(run.step), self.config.score_under == "plain"
        for batch in batches if weight or under_x else []:
            headers = [run.prompts.header] * len(batch.suffixes)
            repaired_T = ffr.of_tokens(batch, lambda slot: slot.trained is slot.repair)
            with torch.no_grad():
                plain_T = run.student(batch.prefixes, headers, batch.owners, batch.completions,
                                      self.config.temperature)[0].cpu()
            if weight:
                self.apply(batch, (batch.old_logp_T - plain_T).masked_fill(~repaired_T, 0), weight)
            if under_x:
                batch.suffixes = headers
                batch.old_logp_T = torch.where(repaired_T, plain_T, batch.old_logp_T)
                batch.advantage_T.masked_fill_(repaired_T & (batch.advantage_T < 0), 0.0)


# ---------------------------------------------------------------------------------------------
# Traces


class Sft(Method):
    """Imitation of the data's trace under x and, where evidence gives a patch, under (x, c)."""
    asks, repairs, compares = True, True, False

    def __init__(self, config: Any):
        super().__init__(config)
        self.surrogate = imitate

    def fill(self, run: Any, step: int, phases: Callable) -> list[ffr.Group]:
        """Return this rank's groups of a step, with the traces in place of rollouts."""
        groups = self.prompts(run, step, phases)
        for group, traces in zip(groups, self.traces(run, groups, phases)):
            group.slots = [ffr.Slot(trace, trained=trace, advantage=1.0, off_policy=True)
                           for trace in traces]
        return groups

    def traces(self, run: Any, groups: list[ffr.Group],
               phases: Callable) -> Iterable[list[ffr.Rollout]]:
        """Return what to imitate for each group."""
        for sample in (group.sample for group in groups):
            text = f"{sample.process}\n<answer>{sample.answer}</answer>".lstrip()
            ids, patch = run.prompts.completion(text), run.teacher.diagnose(sample, text)
            suffixes = [run.prompts.header] + ([run.write(sample, patch)] if patch else [])
            yield [ffr.Rollout(ids, torch.zeros(len(ids)), suffix, text, 1.0, 1.0, True, True)
                   for suffix in suffixes]


class SftTeacher(Sft):
    """Distillation: imitation of the teacher's verified trace under x."""
    repairs, names = False, ("trace_used",)

    def traces(self, run: Any, groups: list[ffr.Group],
               phases: Callable) -> Iterable[list[ffr.Rollout]]:
        """Return the teacher's trace for each group, or none where the verifier refused it."""
        return [[trace] if trace else [] for trace in verified(self, run, groups, phases)]


def verified(method: Method, run: Any, groups: list[ffr.Group],
             phases: Callable) -> list[ffr.Rollout | None]:
    """Return the teacher's trace for each group as a rollout, None where the verifier refused it.

    π_φ, the policy that wrote it, counts as 1: its old_logp are zeros.
    """
    with phases("teach"):
        asked = [run.teacher.ask("trace", group.sample) for group in groups]
        texts = [future.result() or "" for future in asked]
    traces = []
    for group, text in zip(groups, texts):
        ids = run.prompts.completion(text)
        accuracy, form, exact = run.score(group.sample, text)
        right = accuracy >= (1.0 if exact else run.sampling.pass_mark)
        used = right and len(ids) <= method.config.max_completion
        traces.append(ffr.Rollout(ids, torch.zeros(len(ids)), run.prompts.header, text, accuracy,
                                  form, True, True) if used else None)
        method.count("trace_used", float(used))
    return traces


class Luffy(Method):
    """G − 1 rollouts and a verified trace; without one, G rollouts and plain GRPO.

    The authors run --no_std, --loss_norm constant, --beta 0, no clip on policy, an entropy bonus.
    """
    asks, names = True, ("trace_used",)

    def __init__(self, config: Any):
        super().__init__(config)
        self.surrogate = partial(shaped, gamma=config.shape_gamma, otherwise=self.surrogate)

    def roll(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> None:
        """Note the groups' verified traces, then fill the other places as GRPO does."""
        for group, trace in zip(groups, verified(self, run, groups, phases)):
            group.note = trace
        super().roll(run, groups, key, phases)


class Replay(Luffy):
    """Old successes beside new rollouts of questions that are neither solved nor hopeless.

    A buffer per rank holds, of each question, the successes with their log-probs at the time and k,
    how many of its latest G succeeded (a replayed one counts); k = G retires it from the buffer.
    Buckets by k are drawn by N(k; G/2, 1) over counts, the released code's form; of a question
    the success of lowest mean entropy under the current policy. The authors run --no_std,
    --loss_norm constant, --beta 0, no clip on policy, and leave solved questions out of the data.
    """
    asks, names = False, ("replay_questions", "replayed")

    def __init__(self, config: Any):
        super().__init__(config)
        self.buffer, self.retired, self.started = {}, set(), False

    def prompts(self, run: Any, step: int, phases: Callable) -> list[ffr.Group]:
        """Return the step's groups, a share of them replaced by the buffer's."""
        key, groups = f"{self.config.seed}/{step}/replay", super().prompts(run, step, phases)
        wanted = self.config.replay_share * len(groups)
        count = int(wanted) + bool(ffr.noise(f"{key}/share", 1, 1) < wanted % 1)
        samples = {sample.id: sample for sample in run.samples}
        names = self.pick(count, {group.sample.id for group in groups}, key)
        again = run.groups([samples[name] for name in names])
        for group in again:
            group.note = self.buffer[group.sample.id]["kept"]
        return groups[:len(groups) - len(again)] + again

    def pick(self, count: int, without: set[str], key: str) -> list[str]:
        """Draw ids of at most `count` questions: a bucket by its weight, a question by chance."""
        rng, half, buckets = random.Random(key), self.config.rollouts / 2, defaultdict(list)
        for name, question in self.buffer.items():
            if self.started and name not in without:
                buckets[question["k"]].append(name)
        picked = []
        while len(picked) < count and (filled := sorted(k for k in buckets if buckets[k])):
            k, = rng.choices(filled, [math.exp(-(k - half)**2 / 2) for k in filled])
            picked.append(buckets[k].pop(rng.randrange(len(buckets[k]))))
        return picked

    def roll(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> None:
        """Note the surest old success of each group that has some, then go on as GRPO does."""
        with phases("replay"):
            for group in groups:
                group.note = group.note and self.surest(run, group)
                self.count("replayed", float(group.note is not None))
        Method.roll(self, run, groups, key, phases)

    def surest(self, run: Any, group: ffr.Group) -> ffr.Rollout:
        """Return the question's success of lowest mean token entropy under the current policy."""
        header, kept = run.prompts.header, [ids_C for ids_C, _ in group.note]
        with torch.no_grad():
            _, entropy_T = run.student([group.prefix], [header] * len(kept), [0] * len(kept), kept,
                                       self.config.temperature, entropy=True)
        means = [part.mean().item() for part in entropy_T.split([len(ids) for ids in kept])]
        ids_C, old_logp_C = group.note[means.index(min(means))]
        text = run.student.text(ids_C)
        accuracy, form, _ = run.score(group.sample, text)
        return ffr.Rollout(ids_C, old_logp_C, header, text, accuracy, form, True, True)

    def after(self, run: Any, groups: list[ffr.Group]) -> None:
        """Begin after a batch of all ranks that is right often enough, and keep successes then."""
        own = [slot.first for group in groups for slot in group.slots if not slot.off_policy]
        counts = run.everyone((sum(first.correct for first in own), len(own)))
        right, tried = (sum(count) for count in zip(*counts))
        for group in groups:
            self.keep(group)
        self.started |= right > self.config.replay_start * max(tried, 1)
        self.count("replay_questions", len(self.buffer))

    def keep(self, group: ffr.Group) -> None:
        """Retire a question where all G succeeded; else keep its successes, and k if there are."""
        name, right = group.sample.id, [slot.first for slot in group.slots if slot.first.correct]
        if len(right) == len(group.slots) or name in self.retired:
            self.retired.add(name)
            self.buffer.pop(name, None)
            return
        if not (self.started and right):
            return
        kept = list(self.buffer.get(name, {"kept": []})["kept"])
        for rollout in right:
            if not any(torch.equal(rollout.ids_C, ids_C) for ids_C, _ in kept):
                kept.append((rollout.ids_C, rollout.old_logp_C))
        self.buffer[name] = {"k": len(right), "kept": kept[-KEPT:]}

    def state(self) -> dict:
        """Return the buffer, the retired questions, and whether replay has begun."""
        return {"buffer": self.buffer, "retired": sorted(self.retired), "started": self.started}

    def resume(self, step: int, state: dict) -> None:
        """Go on with the buffer as it was."""
        self.buffer, self.started = state["buffer"], state["started"]
        self.retired = set(state["retired"])


# ---------------------------------------------------------------------------------------------
# Rewards


class Tgrpo(Method):
    """T-GRPO: bonuses for right answers that need the order of the frames, and for their length.

    R_i += α for right answers to videos whose frames in order do at least as well as shuffled
    (p ≥ μ p̃), and += ω for right answers of a wanted length where more than one is right.
    With accuracies of 0 and 1 and a constant format the first changes nothing but δ's share.
    """
    names = ("shuffled_accuracy", "order_bonus")

    def beside(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> None:
        """Find p̃: G/2 answers to the same prompts with shuffled frames, verified and forgotten."""
        groups = [group for group in groups if group.sample.media_type == "video"]
        with phases("shuffled"):
            samples = [shuffled(group.sample, key) for group in groups]
            mixed = [ffr.Group(sample, run.prompts.prefix(sample)) for sample in samples]
            if mixed:
                cache = run.student.prefill([group.prefix for group in mixed])
                run.find(cache, mixed, f"{key}/shuffled", self.config.rollouts // 2, run.sampling)
        for group, other in zip(groups, mixed):
            group.note = sum(slot.first.accuracy for slot in other.slots) / len(other.slots)
            self.count("shuffled_accuracy", group.note)

    def credit(self, run: Any, group: ffr.Group) -> None:
        """Add the bonuses to the rewards, then compare them."""
        right = [slot.first.accuracy > PARTLY_RIGHT for slot in group.slots]
        p = sum(slot.first.accuracy for slot in group.slots) / len(group.slots)
        ordered = group.note is not None and p >= ORDER_MARGIN * group.note
        for slot, is_right in zip(group.slots, right):
            wanted = self.config.length_low <= len(slot.first.ids_C) <= self.config.length_high
            bonus = ORDER_BONUS * ordered + LENGTH_BONUS * (wanted and sum(right) > 1)
            slot.note = is_right * bonus
        self.count("order_bonus", float(ordered and any(right)))
        super().credit(run, group)

    def value(self, slot: ffr.Slot, kappa: float, alignment_weight: float) -> float:
        """Return the reward with its bonus."""
        return ffr.reward(slot, kappa, alignment_weight) + slot.note


def shuffled(sample: Any, key: str) -> Any:
    """Return the sample with its frames permuted and their times left in place."""
    frames = sample.clip.frames
    order = ffr.noise(f"{key}/{sample.id}/order", 1, len(frames))[0].argsort()
    return replace(sample, clip=replace(sample.clip, frames=frames[order]))


class Vote(Method):
    """Majority vote: reward 1 for the answer that most of the group gave, and format.

    The gold answer plays no part; answers are compared as the verifier compares them with a gold
    one. No answer is no vote (the authors' code lets it win); the first met wins a tie. The metrics
    keep the gold accuracy.
    """
    names = ("label_accuracy", "majority_share")

    def credit(self, run: Any, group: ffr.Group) -> None:
        """Count the votes, reward those for the winner, and compare the rewards."""
        sample, texts = group.sample, [slot.first.text for slot in group.slots]
        ballots, most = [0.0] * len(texts), ""
        for answer in dict.fromkeys(filter(None, map(run.answer, texts))):
            named = replace(sample, answer=answer)
            agreed = [float(run.score(named, text)[0] >= 1) for text in texts]
            if sum(agreed) > sum(ballots):
                ballots, most = agreed, answer
        for slot, agrees in zip(group.slots, ballots):
            slot.note = agrees
        self.count("label_accuracy", run.score(sample, f"<answer>{most}</answer>")[0])
        self.count("majority_share", sum(ballots) / len(ballots))
        super().credit(run, group)

    def value(self, slot: ffr.Slot, kappa: float, alignment_weight: float) -> float:
        """Return the slot's note, a vote that won or the judge's score, and format on top."""
        return slot.note + slot.first.format


class Judge(Vote):
    """Reward with the teacher's score, 0, 0.1, …, 1, in the accuracy's place.

    Coarse, because standardising a group magnifies small differences. Without a score: accuracy.
    """
    asks, names, credit = True, ("judge_score", "judge_failed"), Method.credit

    def beside(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> None:
        """Ask the teacher to judge every slot."""
        for slot, score in told(run, "judge", groups, phases):
            slot.note = slot.first.accuracy if score is None else round(10 * score) / 10
            self.count("judge_score", slot.note)
            self.count("judge_failed", float(score is None))


def told(run: Any, task: str, groups: list[ffr.Group], phases: Callable) -> list[tuple]:
    """Return every slot of the groups with the teacher's answer to a task, all asked at once."""
    with phases("teach"):
        asked = [(slot, run.teacher.ask(task, group.sample, slot.first.text))
                 for group in groups for slot in group.slots]
        return [(slot, future.result()) for slot, future in asked]


# ---------------------------------------------------------------------------------------------
# Token credit by an informed replay


class Rlsd(Method):
    """RLSD: token credit Â_t ← Â W_t by a copy of the policy that is told the answer.

    W is from Δ_t = sg[log π_T(y_t | x, r, y_<t) − log π_θ(y_t | x, y_<t)], taken before the step's
    first update. The teacher π_T is the copy, overwritten every --sd_sync steps; r the gold answer.
    λ falls from --sd_lambda to 0 over --sd_horizon steps, then the copy goes and all is GRPO. The
    authors run --beta 0, --clip_high 0.28.
    """
    names, horizon, among = ("credit_weight", "credit_change"), 60, False

    def weight(self, step: int) -> float:
        """Return λ = λ₀ (1 − s/60) of a step, counted from 0, whose update is s = step + 1."""
        past = (step + 1) / (self.config.sd_horizon or self.horizon)
        return self.config.sd_lambda * max(0.0, 1 - past)

    def start(self, copied: Callable) -> None:
        """Get the copy: fp32 like what the policy trains, sharded like it, never trained."""
        self.copy = copied() if self.weight(0) else None

    def weigh(self, run: Any, batches: list[ffr.MicroBatch]) -> None:
        """Size every token's credit by the copy, while λ is not 0."""
        for batch in batches if self.weight(run.step) else []:
            self.apply(batch, self.gap(run, batch), self.weight(run.step))

    def apply(self, batch: ffr.MicroBatch, gap_T: Tensor, weight: float) -> None:
        """Set Â_t ← Â_t W_t."""
        W_T = token_credit(batch.advantage_T, gap_T, weight, self.config.sd_clip)
        batch.advantage_T = batch.advantage_T * W_T
        if batch.members:
            self.count("credit_weight", weight)
            self.count("credit_change", *(W_T - 1).abs().tolist())

    def gap(self, run: Any, batch: ffr.MicroBatch) -> Tensor:
        """Return Δ [T]: the same prefixes and completions under [hint, header] and under [header].

        `among`: log-probs renormalised over the teacher's --sd_topk likeliest tokens and y_t.
        """
        hints = [self.hint(group.sample, slot) for group, slot in batch.members]
        informed = [run.prompts.suffix(hint) for hint in hints]
        rest = batch.owners, batch.completions, self.config.temperature
        support = self.config.sd_topk or None if self.among else None
        with torch.no_grad():
            theirs_T, ids_TK = self.copy(batch.prefixes, informed or batch.suffixes, *rest,
                                         support=support)
            ours_T, _ = run.student(batch.prefixes, batch.suffixes, *rest, support=ids_TK)
        return (theirs_T - ours_T).cpu()

    def hint(self, sample: Any, slot: ffr.Slot) -> str:
        """Return what the replay is told and the policy is not."""
        return (f"\nA reference solution ends with the answer {sample.answer}. Make sure you see "
                "why, then solve the question in your own way.")

    def after(self, run: Any, groups: list[ffr.Group]) -> None:
        """Set θ_T ← θ_T + rate (θ − θ_T); drop the copy when λ has come to 0."""
        if self.copy is not None and (rate := self.rate(run.step + 1)):
            self.copy.follow(run.student, rate)
        self.resume(run.step + 1, None)

    def rate(self, steps: int) -> float:
        """Return 1 when a copy is due after so many steps, else 0."""
        return float(steps % self.config.sd_sync == 0)

    def resume(self, step: int, state: Any) -> None:
        """Keep the copy if it is needed from here on."""
        self.copy = self.copy if self.weight(step) else None


class Visd(Rlsd):
    """ViSD: RLSD whose copy is an average over steps (EMA) and is told more.

    r has the evidence and a judge's feedback as well; Δ is on a support of tokens. The authors run
    --rollouts 4, --loss_norm sequence, --beta 0; their reward has five more parts.
    """
    asks, horizon, among = True, 600, True

    def beside(self, run: Any, groups: list[ffr.Group], key: str, phases: Callable) -> None:
        """Ask the teacher for feedback on every slot, while λ is not 0."""
        if self.weight(run.step):
            for slot, feedback in told(run, "feedback", groups, phases):
                slot.note = feedback

    def hint(self, sample: Any, slot: ffr.Slot) -> str:
        """Return verified answer, window, key frames, and the feedback on this rollout."""
        parts = [f"\nFor you alone: the verified answer is {sample.answer}."]
        within = sample.clip.duration + 0.5  # as for a patch: what lies outside is a mistake
        for evidence in (e for e in sample.evidence if e.start < within and e.end <= within):
            times = [t for t in sample.clip.times if evidence.start <= t <= evidence.end]
            shown = f", in the frames at {', '.join(f'{t:.1f}' for t in times)} s" if times else ""
            parts.append(f"It shows from {evidence.start:.1f} s to {evidence.end:.1f} s{shown}.")
        return " ".join([*parts, slot.note or ""]).rstrip()

    def rate(self, steps: int) -> float:
        """Return μ, after every step."""
        return self.config.sd_ema


class FfrVisd(Ffr):
    """FFR with a repair's tokens weighed by Δ = log π(y | x, c) − log π(y | x); first tries: W = 1.

    Both are the sampling policy's: log π(y | x, c) is the repair's old_logp, so one pass will do.
    """
    names, horizon, weight, apply = Rlsd.names, Visd.horizon, Rlsd.weight, Rlsd.apply


METHODS = {"ffr": Ffr, "grpo": Method, "sft": Sft, "sft_teacher": SftTeacher, "tgrpo": Tgrpo,
           "luffy": Luffy, "replay": Replay, "vote": Vote, "judge": Judge, "rlsd": Rlsd,
           "visd": Visd, "ffr_visd": FfrVisd}


def useful(config: Any) -> dict[str, tuple[bool, str]]:
    """Return, for every flag that some runs do not heed, whether this one does, and which do."""
    name, kind = config.method, METHODS[config.method]
    service, tries = kind.asks and config.teacher == "anthropic", kind.repairs and kind.compares
    tools = "tools" in config.teacher_prompt.split(",")
    rules = (
        ("teacher", kind.asks, "methods that ask a teacher"),
        ("teacher_url teacher_model teacher_cache teacher_price teacher_budget teacher_timeout "
         "teacher_step_timeout", service, "methods that ask, with --teacher anthropic"),
        ("no_gt", service and name not in ("luffy", "sft_teacher"),
         "patches, scores and comments of --teacher anthropic"),
        ("teacher_prompt blind_test", service and kind.repairs, "patches of --teacher anthropic"),
        ("teacher_rounds", service and kind.repairs and tools,
         "patches of --teacher anthropic with tools in --teacher_prompt"),
        ("evidence", kind.repairs, "methods that write patches"),
        ("kappa alignment_weight train_on", tries, "--method ffr and ffr_visd"),
        ("score_under", tries and config.train_on == "chosen",
         "--method ffr and ffr_visd with --train_on chosen"),
        ("rollouts top_p select no_std dynamic_sampling beta", kind.compares,
         "methods that compare rollouts"),
        ("clip_low clip_high ratio",
         kind.compares and (config.updates_per_batch > 1 or config.ahead > 0),
         "methods that compare rollouts, with --updates_per_batch above 1 or --ahead"),
        ("ahead", tries, "--method ffr and ffr_visd"),
        ("pass_mark", kind.compares or name == "sft_teacher", "methods that verify answers"),
        ("length_low length_high", name == "tgrpo", "--method tgrpo"),
        ("shape_gamma", name in ("luffy", "replay"), "--method luffy and replay"),
        ("replay_share replay_start", name == "replay", "--method replay"),
        ("sd_lambda sd_horizon sd_clip", name in ("rlsd", "visd", "ffr_visd"),
         "--method rlsd, visd and ffr_visd"),
        ("sd_sync", name == "rlsd", "--method rlsd"), ("sd_ema sd_topk", name == "visd",
                                                       "--method visd"),
        ("lora_alpha lora_vision merge", config.lora, "runs with --lora"),
        ("freeze_vision offload", not config.lora, "runs without --lora"),
        ("eval_every", config.eval_data or not config.model, "runs with --eval_data"),
        ("eval_patches", kind.repairs and bool(config.eval_data or not config.model),
         "methods that write patches, with --eval_data"),
        ("epochs", not config.steps, "runs without --steps"),
        ("decode_seconds", config.decode_workers > 0, "runs with --decode_workers above 0"),
        ("keep_rollouts_mb", config.keep_rollouts > 0, "runs with --keep_rollouts above 0"))
    return {flag_: (bool(heeded), where) for flags, heeded, where in rules
            for flag_ in flags.split()}
