"""The methods FFR is compared with: each test names the mistake it would catch."""

import json
import math
import signal
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import ffr
import methods
import runs
import teacher
import toy
import train
from messages_server import MessagesServer
from processes import launch
from tiny import separate_logits, text, tiny_student, video

TIMINGS = ("seconds", "tokens_per_second", "peak_memory_gb")
PROMISED = set("step reward accuracy format intervention_ratio repair_rate repair_rate_by_error "
               "error_types chosen_accuracy alignment advantage_zero_fraction kl entropy "
               "clip_fraction completion_length grad_norm lr seconds tokens_per_second "
               "peak_memory_gb teacher".split())
CPU = torch.device("cpu"), torch.float32


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.make(folder, train=20, heldout=5, warm=5)
    return folder


def config_of(world, output, **changes):
    return train.Config(**{**dict(
        model=str(world / "model"), data=str(world / "train.json"),
        video_root=str(world / "videos"), template=str(world / "template.txt"), output=str(output),
        frame_cache=str(world / "frames"), max_pixels=56 * 56, max_completion=32, temperature=2.0,
        decode_workers=0, steps=1, batch_prompts=2, rollouts=4, lr=1e-4, beta=0.0, save_every=2,
        replay_start=0.0, sd_sync=2), **changes})


def run_of(world, output, **changes):
    return train.Run(config_of(world, output, **changes), *CPU)


def filled(run, step=0):
    run.step = step
    return run.method.fill(run, step, runs.Phases(run.device))


def lines(path):
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS}
            for line in Path(path).read_text().splitlines()]


def rollout(ids, logp=0.0, said="", right=0.0, suffix=None):
    old_logp = torch.full((len(ids),), float(logp))
    return ffr.Rollout(torch.tensor(ids), old_logp, suffix or text(2), said, right, 1.0,
                       right == 1.0, True)


def batch_of(slots, old, advantages, completions):
    group = SimpleNamespace(sample=SimpleNamespace(id="a"))
    return ffr.MicroBatch([], [], [], completions, torch.tensor(old), torch.tensor(advantages),
                          torch.full((len(old),), 1 / len(old)), [(group, slot) for slot in slots])


# --- the whole of each method


@pytest.mark.slow
def test_every_method_trains_and_resumes_after_a_kill(world, tmp_path):
    """Catches: a method that deadlocks ranks, a buffer, copy or schedule that --resume loses, a
    figure that is missing, a mean per rank. Those that keep something are killed on two processes.
    """
    def configs(name, processes, some=methods.METHODS, **changes):
        settings = {"steps": 5, "batch_prompts": 2 // processes, "sd_horizon": 4,
                    "save_every": 100, **changes}
        return [config_of(world, tmp_path / name / method, method=method, **settings)
                for method in some]

    keep = [method for method in methods.METHODS if method in ("replay", "rlsd", "visd")]
    rest = [method for method in methods.METHODS if method not in keep]
    assert launch(configs("one", 1)) == [0] and launch(configs("two", 2), 2) == [0, 0]
    for some, processes in ((rest, 1), (keep, 2)):
        for config in configs("killed", processes, some, save_every=3):
            codes = launch([config], processes, kill_after=3)
            assert codes == [-signal.SIGKILL] * processes, config.method
        assert launch(configs("killed", processes, some, resume=True), processes) == [0] * processes
    for method in methods.METHODS:
        one, two, killed = (lines(tmp_path / name / method / "metrics.jsonl")
                            for name in ("one", "two", "killed"))
        assert killed == (two if method in keep else one), method
        kept = [lines(tmp_path / name / method / "rollouts.jsonl")
                for name in ("killed", "two" if method in keep else "one")]
        assert kept[0] == kept[1] != [], method
        by_eq_8 = method not in ("sft", "sft_teacher", "tgrpo", "vote", "judge")
        for slot in (slot for row in kept[0] for slot in row["slots"]):
            assert bool(slot["parts"]) == by_eq_8, method
            assert sum(slot["parts"].values()) == pytest.approx(by_eq_8 * slot["reward"]), method
            assert (slot["trained"] == "trace") == (slot["log_ratio"] is None), method
            assert (slot["trained"] == "trace") or not method.startswith("sft")
        assert [row["step"] for row in killed] == list(range(5)), method
        own = methods.METHODS[method].names
        assert (PROMISED - set(TIMINGS)) | set(own) <= one[0].keys() == two[0].keys()
        assert len(two) == 5 and any(row["grad_norm"] > 0 for row in two), method
        assert all((row["accuracy"] is None) == method.startswith("sft") for row in two), method
        for name in ("loss", "grad_norm", "accuracy", *own):  # of the same prompts
            if name != "replay_questions":  # counted on each rank
                assert two[0][name] == pytest.approx(one[0][name], abs=2e-4), (method, name)
    rows = lines(tmp_path / "killed/replay/metrics.jsonl")
    replayed = rows[3]["replayed"] + rows[4]["replayed"]
    assert replayed > 0, "the test wants something replayed after the resume"


def test_without_lambda_visd_is_grpo_bit_for_bit(world, tmp_path):
    """Catches: a copy that is loaded and a replay that is run for nothing, W = 1 by rounding."""
    for method in ("grpo", "visd", "rlsd"):
        settings = dict(method=method, steps=2, sd_lambda=0.0)
        train.train(config_of(world, tmp_path / method, **settings), *CPU)
    plain = lines(tmp_path / "grpo/metrics.jsonl")
    assert plain[0]["grad_norm"] > 0
    for method in ("visd", "rlsd"):
        rows = lines(tmp_path / method / "metrics.jsonl")
        assert [{name: row[name] for name in plain[0] if name != "teacher"} for row in rows] == \
            [{name: row[name] for name in row if name != "teacher"} for row in plain]
        a, b = (runs.newest_checkpoint(tmp_path / m) / "model.safetensors"
                for m in ("grpo", method))
        assert a.read_bytes() == b.read_bytes()


# --- losses


def test_loss_norms_agree_on_completions_of_one_length():
    """Catches: a normaliser over rollouts where tokens are meant; L_max of the batch for that of
    the settings.
    """
    equal = [rollout([1, 2, 3]) for _ in range(4)]
    token, sequence = (ffr.token_weights(norm, 12, 4) for norm in ("token", "sequence"))
    assert all(token(r) == pytest.approx(sequence(r)) for r in equal)
    constant = ffr.token_weights("constant", 12, 4, 100)
    assert constant(equal[0]) == constant(rollout([1])) == pytest.approx(1 / 400)


def test_no_std_takes_off_the_mean_only():
    """Catches: --no_std that still divides (Dr. GRPO)."""
    assert ffr.advantages([1.0, 0.0, 0.0, 0.0], std=False).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_at_the_first_update_all_ratios_give_one_gradient():
    """Catches: a sequence ratio whose gradient is spread or scaled: at π_θ = π_old CLIP, no clip
    and GSPO-token all have A ∇ log π.
    """
    old, advantage = [-1.0, -2.0, -0.5, -3.0, -1.5], [1.5, 1.5, -0.5, -0.5, -0.5]
    batch = batch_of([None, None], old, advantage, [torch.zeros(2), torch.zeros(3)])
    batch.members = []
    for surrogate in (None, methods.clip, methods.sequence):
        logp = torch.tensor(old, requires_grad=True)
        ffr.loss(logp, batch, 0.2, 0.2, 0.0, surrogate)[0].backward()
        assert logp.grad.tolist() == pytest.approx([-a / 5 for a in advantage])


def test_a_sequence_ratio_is_the_geometric_mean_of_its_own_completion():
    """Catches: the sum for the mean, the mean over the batch, a clip on token ratios, a gradient
    through the mean.
    """
    batch = batch_of([None, None], [0.0] * 5, [1.0, 1.0, -2.0, -2.0, -2.0],
                     [torch.zeros(2), torch.zeros(3)])
    logp = torch.tensor([0.5, -0.1, 0.3, 0.3, -0.9], requires_grad=True)
    value, sums = ffr.loss(logp, batch, 0.15, 0.25, 0.0, methods.sequence)
    first, second = math.exp(0.2), math.exp(-0.1)  # in the clip, as three token ratios are not
    assert value.item() == pytest.approx(-(2 * first - 3 * 2 * second) / 5) and sums["clipped"] == 0
    value.backward()
    assert logp.grad.tolist() == pytest.approx([-first / 5] * 2 + [2 * second / 5] * 3)
    logp.grad = None
    value, sums = ffr.loss(logp, batch, 0.15, 0.1, 0.0, methods.sequence)
    value.backward()
    assert sums["clipped"] == 2 and logp.grad[:2].tolist() == [0.0, 0.0]


def test_a_trace_is_shaped_and_not_clipped():
    """Catches: CLIP on the trace (its π_φ = 1 puts each ratio below 1 − ε), shaped own rollouts,
    π for γ π / (π + γ)²; a replayed token right after collection counts 0.083, not 1.
    """
    slots = [ffr.Slot(rollout([1, 2, 3]), off_policy=True), ffr.Slot(rollout([1, 2]))]
    batch = batch_of(slots, [0.0, 0.0, 0.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0],
                     [torch.zeros(3), torch.zeros(2)])
    p = [0.1, 1.0, 0.001]
    logp = torch.tensor([math.log(q) for q in p] + [-1.0, -0.5], requires_grad=True)
    surrogate = partial(methods.shaped, gamma=0.1, otherwise=methods.clip)
    value, sums = ffr.loss(logp, batch, 0.2, 0.2, 0.0, surrogate)
    assert value.item() == pytest.approx(-(sum(q / (q + 0.1) for q in p) + 1 + 1.2) / 5)
    value.backward()
    expected = [0.25, 0.1 / 1.21, 0.1 * 0.001 / 0.101**2, 1.0, 0.0]
    assert (-5 * logp.grad).tolist() == pytest.approx(expected, abs=1e-6)
    assert sums["clipped"] == 1


@pytest.mark.parametrize("log", (-1e4, -100.0, -5.0, 0.0, 5.0, 88.0, 89.0, 100.0, 1e4))
def test_no_ratio_overflows_in_a_trace_or_a_sequence(log):
    """Catches: r / (r + γ) as inf / inf, and a gradient of NaN for its neighbours as well."""
    slots = [ffr.Slot(rollout([1]), off_policy=True), ffr.Slot(rollout([1, 2]))]
    surrogate = partial(methods.shaped, gamma=0.1, otherwise=methods.sequence)
    r = math.exp(min(max(log, -700.0), 700.0))
    for advantage in (1.0, 0.0, -1.0):
        batch = batch_of(slots, [0.0] * 3, [advantage] * 3, [torch.zeros(1), torch.zeros(2)])
        logp = torch.tensor([log] * 3, requires_grad=True)
        value, _ = ffr.loss(logp, batch, 0.2, 0.2, 0.0, surrogate)
        value.backward()
        own = math.exp(min(log, 20.0))
        own = min(own * advantage, min(max(own, 0.8), 1.2) * advantage)
        assert value.item() == pytest.approx(-(r / (r + 0.1) * advantage + 2 * own) / 3, rel=1e-5)
        slope = (r / (r + 0.1)) * (0.1 / (r + 0.1))
        assert logp.grad[0].item() == pytest.approx(-advantage * slope / 3, rel=1e-4, abs=1e-8)
        assert torch.isfinite(logp.grad).all()


# --- groups and rewards

def group_of(*slots, answer="red", kind="free-form", options=(), media_type="video"):
    sample = SimpleNamespace(id="s", answer=answer, kind=kind, options=options,
                             media_type=media_type)
    return ffr.Group(sample, None, [ffr.Slot(slot) for slot in slots])


def credited(method, group, **settings):
    """Return the group's rewards and advantages by a method, with the verifier of train.py."""
    made = methods.METHODS[method](replace(train.Config(), **settings))
    run = SimpleNamespace(score=partial(train.Run.score, None),
                          answer=partial(train.Run.answer, None))
    made.names = made.names or ()
    if method == "vote":
        sample = group.sample
        group.sample = data.Sample("s", "?", sample.options, sample.answer, sample.kind, "",
                                   "video")
    made.credit(run, group)
    return [slot.reward for slot in group.slots], [slot.advantage for slot in group.slots], made


def tries(*rights, length=400):
    return [rollout([1] * length, right=right) for right in rights]


def test_the_order_bonus_goes_to_right_answers_of_ordered_videos():
    """Catches: a bonus for wrong answers, μ = 1 of the paper, a bonus where shuffled frames do
    better, one for images.
    """
    group = group_of(*tries(1.0, 1.0, 0.05, 0.0))
    group.note = 0.6  # p = 0.5125 ≥ 0.8 · 0.6, though below 0.6
    short = dict(length_low=1, length_high=2)  # no length bonus
    assert credited("tgrpo", group, **short)[0] == pytest.approx([2.3, 2.3, 1.05, 1.0])
    group.note = 0.7
    assert credited("tgrpo", group, **short)[0] == pytest.approx([2.0, 2.0, 1.05, 1.0])
    group.note = None  # an image: nothing was shuffled
    assert credited("tgrpo", group, **short)[0] == pytest.approx([2.0, 2.0, 1.05, 1.0])


def test_the_length_bonus_wants_two_right_answers():
    """Catches: a length bonus for wrong answers or for a single right one, a band that excludes its
    ends.
    """
    lengths = (rollout([1] * n, right=right)
               for n, right in ((320, 1.0), (512, 1.0), (513, 1.0), (400, 0.0)))
    assert credited("tgrpo", group_of(*lengths))[0] == pytest.approx([2.2, 2.2, 2.0, 1.0])
    assert credited("tgrpo", group_of(*tries(1.0, 0.0, 0.0)))[0] == pytest.approx([2.0, 1.0, 1.0])


def test_the_order_bonus_alone_changes_no_advantage():
    """Catches: a bonus that is not the same for all right answers: over 0 and 1 standardising
    undoes it.
    """
    plain = ffr.advantages([2.0, 1.0, 1.0, 2.0, 1.0])
    group = group_of(*tries(1.0, 0.0, 0.0, 1.0, 0.0))
    group.note = 0.0
    rewards, got, _ = credited("tgrpo", group, length_low=1, length_high=2)
    assert rewards[0] == pytest.approx(2.3) and got == pytest.approx(plain.tolist(), abs=2e-4)


def test_shuffled_frames_are_looked_at_and_forgotten(world, tmp_path):
    """Catches: shuffled rollouts in the group (gradient, metrics), frames left in order, a shuffled
    prompt in the cache of prompts.
    """
    run = run_of(world, tmp_path / "run", method="tgrpo")
    seen = []
    prefill = run.student.prefill
    run.student.prefill = lambda prefixes: (seen.append(prefixes), prefill(prefixes))[1]
    groups = filled(run)
    ordered, mixed = seen
    assert [len(group.slots) for group in groups] == [4, 4]
    assert all(0 <= group.note <= 1 for group in groups)
    for a, b in zip(ordered, mixed):
        assert torch.equal(a.ids, b.ids)
        assert a.pixels.shape == b.pixels.shape and not torch.equal(a.pixels, b.pixels)
    assert all(prefix in [id(p) for p in ordered] for prefix in map(id, run.prefixes.values()))
    assert run.method.figures()["shuffled_accuracy"][1] == 2


def said(answer):
    return rollout([1], said=f"<think>.</think><answer>{answer}</answer>", right=0.0)


def test_the_majority_is_the_label_and_no_answer_cannot_win():
    """Catches: empty answers that vote, the gold answer in the reward, answers compared as strings,
    a tie for the last met.
    """
    silent = rollout([1], said="I do not know", right=0.0)
    group = group_of(silent, silent, silent, said("blue"), said("Blue"), answer="red")
    rewards, _, made = credited("vote", group)
    assert rewards == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert made.figures() == {"label_accuracy": [0.0, 1], "majority_share": [0.4, 1]}
    options = ("A. red", "B. blue")
    group = group_of(said("A"), said("(B)"), said("blue"), said("A. red"), answer="B",
                     kind="multiple choice", options=options)
    assert credited("vote", group)[0] == [2.0, 1.0, 1.0, 2.0]  # two each: A was met first
    group = group_of(silent, silent, silent)
    assert credited("vote", group)[0] == [1.0, 1.0, 1.0]


def test_the_judge_replaces_the_accuracy_in_steps_of_a_tenth(world, tmp_path):
    """Catches: score added to the accuracy, noise that standardising magnifies, a failed call that
    costs the rollout its reward, the judge's score in the metrics' accuracy.
    """
    run = run_of(world, tmp_path / "run", method="judge")
    answers = iter([0.84, 0.79, 0.81, None, 0.12, 0.1, 0.08, 0.1])
    asked = []

    def ask(task, sample, response):
        asked.append((task, sample.id, response))
        future = Future()
        future.set_result(next(answers))
        return future

    run.teacher.ask = ask
    groups = filled(run)
    slots = [slot for group in groups for slot in group.slots]
    scores = [0.8, 0.8, 0.8, slots[3].first.accuracy, 0.1, 0.1, 0.1, 0.1]
    assert [slot.reward - slot.first.format for slot in slots] == pytest.approx(scores)
    assert asked == [("judge", g.sample.id, s.first.text) for g in groups for s in g.slots]
    assert run.method.figures()["judge_failed"] == [1.0, 8]
    accuracy = sum(slot.first.accuracy for slot in slots)
    assert runs.measure(groups)["accuracy"][0] == pytest.approx(accuracy)


def traces(run, **changed):
    """Let the teacher's traces be the data's but where `changed` (id -> text) has another."""
    def ask(task, sample, response=""):
        future, own = Future(), f"{sample.process}\n<answer>{sample.answer}</answer>"
        future.set_result(changed.get(sample.id, own))
        return future

    run.teacher.ask = ask


def test_luffy_puts_one_verified_trace_into_a_group(world, tmp_path):
    """Catches: G rollouts and a trace, a wrong trace that is trained on, a trace in the accuracy,
    an advantage that leaves the trace out of the group's mean, π_φ other than 1.
    """
    run = run_of(world, tmp_path / "run", method="luffy")
    first, second = (sample.id for sample in run.step_samples(0))
    traces(run, **{second: "<think>x</think>\n<answer>no such thing</answer>"})
    groups = filled(run)
    off_policy = [[slot.off_policy for slot in group.slots] for group in groups]
    assert off_policy == [[False] * 3 + [True], [False] * 4]
    trace = groups[0].slots[3].first
    assert trace.correct and (trace.old_logp_C == 0).all()
    assert int(trace.ids_C[-1]) in run.student.eos_ids
    for group in groups:
        expected = ffr.advantages([slot.first.accuracy + slot.first.format for slot in group.slots])
        assert [slot.advantage for slot in group.slots] == pytest.approx(expected.tolist())
    own = [slot.first.accuracy for group in groups for slot in group.slots if not slot.off_policy]
    assert runs.measure(groups)["accuracy"] == [pytest.approx(sum(own)), 7]
    assert run.method.figures()["trace_used"] == [1.0, 2]


def test_distillation_leaves_refused_traces_out(world, tmp_path):
    """Catches: a student that imitates wrong answers, or traces longer than a completion may be."""
    run = run_of(world, tmp_path / "run", method="sft_teacher", batch_prompts=3)
    wrong, long, _ = run.step_samples(0)
    much = f"<think>{'red ' * 99}</think><answer>{long.answer}</answer>"
    traces(run, **{wrong.id: "<think>x</think><answer>none</answer>", long.id: much})
    groups = filled(run)
    assert [len(group.slots) for group in groups] == [0, 0, 1]
    assert run.method.figures()["trace_used"] == [1.0, 3]
    assert torch.equal(groups[2].slots[0].trained.suffix.ids, run.prompts.header.ids)


def test_all_equal_groups_make_room_for_fresh_prompts(world, tmp_path, monkeypatch):
    """Catches: DAPO that keeps empty groups in the normaliser, tries without end, draws a prompt
    twice, or hides the solved prompts from the accuracy.
    """
    run = run_of(world, tmp_path / "run", method="grpo", dynamic_sampling=2)
    first = [sample.id for sample in run.step_samples(0)]

    def uneven(sample, text):  # the step's own prompts are all wrong, others are scored by length
        return (0.0, 0.0, True) if sample.id in first else (float(len(text) % 2), 0.0, True)

    run.score = uneven
    groups = filled(run)
    ids = [group.sample.id for group in groups]
    assert ids[:2] == first and 2 < len(ids) <= 6 and len(set(ids)) == len(ids)
    for group in groups:
        equal = len({slot.reward for slot in group.slots}) == 1
        assert all((slot.trained is None) == equal for slot in group.slots)
    trained = [slot.trained for group in groups for slot in group.slots if slot.trained is not None]
    batch, = ffr.micro_batches(groups, 10**6, lambda rollout: 1.0)
    assert trained and len(batch.completions) == len(trained)
    assert runs.measure(groups)["accuracy"][1] == 4 * len(groups)
    run.score = lambda sample, text: (0.0, 0.0, True)
    assert len(filled(run)) == 6, "2 prompts, replaced twice"


# --- replay


def replay(**settings):
    return methods.Replay(replace(train.Config(), rollouts=8, **settings))


def group_with(name, right, rollouts=8):
    slots = [ffr.Slot(rollout([i, 9], -0.1 * i, right=float(i < right))) for i in range(rollouts)]
    return ffr.Group(SimpleNamespace(id=name), None, slots)


def alone(value):
    return [value]


def test_replay_waits_for_a_student_that_can_answer():
    """Catches: a buffer of lucky guesses from the start, or of the batch that switches it on; a
    switch that goes back; a question solved before it replayed later.
    """
    method, run = replay(replay_start=0.35), SimpleNamespace(everyone=alone)
    method.after(run, [group_with("a", 2)])
    method.after(run, [group_with("s", 8), group_with("t", 0), group_with("u", 0)])
    assert not method.started and not method.buffer and method.retired == {"s"}
    method.after(run, [group_with("b", 3)])
    assert method.started and not method.buffer
    method.after(run, [group_with("c", 1), group_with("s", 5)])
    assert method.started and set(method.buffer) == {"c"}


def test_replay_keeps_successes_with_their_own_log_probs_and_retires_the_solved():
    """Catches: failures kept, log-probs of another time, texts kept twice, a solved question
    replayed.
    """
    method = replay()
    method.started = True
    method.keep(group_with("a", 3))
    assert method.buffer["a"]["k"] == 3
    assert [ids.tolist() for ids, _ in method.buffer["a"]["kept"]] == [[0, 9], [1, 9], [2, 9]]
    assert method.buffer["a"]["kept"][2][1].tolist() == pytest.approx([-0.2, -0.2])
    method.keep(group_with("a", 2))
    assert method.buffer["a"]["k"] == 2 and len(method.buffer["a"]["kept"]) == 3
    method.keep(group_with("a", 0))  # a question that fails now stays in its bucket
    assert method.buffer["a"]["k"] == 2 and len(method.buffer["a"]["kept"]) == 3
    method.keep(group_with("a", 8))
    method.keep(group_with("a", 4))
    assert not method.buffer and method.retired == {"a"}


def test_replay_draws_buckets_by_how_often_a_question_is_solved():
    """Catches: the paper's N(k/K; 0.5, 1), which is all but uniform; a bucket weighted by its size;
    a question drawn twice or without a success.
    """
    method = replay()
    method.started = True
    method.buffer = {f"{k}-{i}": {"k": k, "kept": []}
                     for k in range(8) for i in range(20 if k == 4 else 5)}
    counts = [0] * 8
    for step in range(400):
        picked = method.pick(3, {"4-0"}, str(step))
        assert len(set(picked)) == 3 and "4-0" not in picked
        counts[int(picked[0][0])] += 1
    weights = [0] + [math.exp(-(k - 4)**2 / 2) for k in range(1, 8)]
    for k in range(8):
        assert counts[k] / 400 == pytest.approx(weights[k] / sum(weights), abs=0.07), k
    method.buffer = {"1-0": {"k": 1, "kept": []}}
    assert method.pick(3, set(), "x") == ["1-0"]
    method.started = False
    assert method.pick(3, set(), "x") == []


def test_what_is_replayed_is_the_success_of_lowest_entropy(world, tmp_path):
    """Catches: the entropy of padding or of the prompt, the highest; log-probs recomputed instead
    of those at the time; a replayed group with more than G members.
    """
    run = run_of(world, tmp_path / "run", method="replay", replay_share=0.5)
    texts = "<think>red red red card</think><answer>red</answer>", "<answer>2</answer>"
    ids = [run.prompts.completion(said) for said in texts]
    old = run.samples[-1] if run.samples[-1] not in run.step_samples(0) else run.samples[-2]
    run.method.started = True
    run.method.buffer = {old.id: {"k": 2, "kept": [(i, torch.full((len(i),), -7.0)) for i in ids]}}
    groups = filled(run)
    assert [group.sample.id for group in groups] == [run.step_samples(0)[0].id, old.id]
    replayed = groups[1].slots[-1]
    assert [slot.off_policy for slot in groups[1].slots] == [False] * 3 + [True]
    assert (replayed.first.old_logp_C == -7).all()
    means = []
    for completion in ids:
        with torch.no_grad():
            _, entropy = run.student([groups[1].prefix], [run.prompts.header], [0], [completion],
                                     run.config.temperature, True)
        means.append(entropy.mean().item())
    assert torch.equal(replayed.first.ids_C, ids[means.index(min(means))])
    assert abs(means[0] - means[1]) > 1e-3


# --- token credit


def test_token_credit_is_bounded_and_keeps_the_sign():
    """Catches: a weight that turns a penalty into a reward, the sign of Â left out of the exponent,
    RLSD's Eq. 16, whose weight is not bounded.
    """
    gap = torch.tensor([-50.0, -0.1, 0.0, 0.1, 50.0])
    for advantage in (2.0, -0.5):
        A = torch.full((5,), advantage)
        W = methods.token_credit(A, gap, 0.5, 0.2)
        sign = math.copysign(1, advantage)
        expected = [0.5 + 0.5 * min(1.2, max(0.8, math.exp(sign * d))) for d in gap.tolist()]
        assert W.tolist() == pytest.approx(expected) and W[2] == 1
        assert ((A * W).sign() == A.sign()).all()
        assert W.min() >= 0.9 - 1e-6 and W.max() <= 1.1 + 1e-6
    assert (methods.token_credit(torch.zeros(5), gap, 0.5, 0.2) * torch.zeros(5) == 0).all()


def test_lambda_falls_to_zero_and_the_copy_goes(world, tmp_path):
    """Catches: λ₀ (1 − s/60) with s from 0, never zero, a copy kept or paid for by others."""
    run = run_of(world, tmp_path / "run", method="visd", sd_horizon=4)
    weights = [run.method.weight(step) for step in range(6)]
    assert weights == pytest.approx([0.375, 0.25, 0.125, 0, 0, 0])  # s = 1 at the first update
    run.step = 1
    run.method.after(run, [])
    assert run.method.copy is not None
    run.step = 2
    run.method.after(run, [])
    assert run.method.copy is None
    assert run_of(world, tmp_path / "other", method="ffr").method.copy is None


@pytest.mark.parametrize("method", ("rlsd", "visd"))
def test_the_copy_follows_the_policy(world, tmp_path, method):
    """Catches: an average with μ and 1 − μ swapped, a copy that shares the policy's memory or is
    trained itself, one synced a step late.
    """
    run = run_of(world, tmp_path / "run", method=method, sd_sync=2)

    def weight(student):
        return student.model.lm_head.weight

    start = weight(run.student).detach().clone()
    assert torch.equal(weight(run.method.copy), start) and not weight(run.method.copy).requires_grad
    with torch.no_grad():
        weight(run.student).add_(1.0)
    run.step = 0
    run.method.after(run, [])
    moved = 0.01 if method == "visd" else 0.0
    assert torch.allclose(weight(run.method.copy), start + moved, atol=1e-6)
    run.step = 1
    run.method.after(run, [])
    moved = 0.0199 if method == "visd" else 1.0
    assert torch.allclose(weight(run.method.copy), start + moved, atol=1e-6)


def batches_of(run, groups):
    return ffr.micro_batches(groups, 10**6, ffr.token_weights("token", 100, 8))


def plain_logp(student, prefix, suffix, completion, temperature):
    with torch.no_grad():
        return student([prefix], [suffix], [0], [completion], temperature)[0]


def test_an_informed_replay_is_the_same_completion_under_the_hint(world, tmp_path):
    """Catches: completions shifted by the hint's length, the hint of another rollout, Δ with its
    sign turned or at another temperature than rollouts have (the official code's; half of what it
    is at 1 here); log-probs of a batch of its own that differ from the tree's.
    """
    run = run_of(world, tmp_path / "run", method="rlsd")
    with torch.no_grad():
        for p in run.method.copy.parameters():
            p.mul_(1.02)  # another teacher than the student
    groups = filled(run)
    batch, = batches_of(run, groups)
    before = batch.advantage_T.clone()
    gap = run.method.gap(run, batch)
    expected = []
    for group, slot in batch.members:
        hint = run.prompts.patch(run.method.hint(group.sample, slot))
        assert group.sample.answer in run.prompts.text(hint.ids)
        informed = replace(hint, ids=torch.cat([hint.ids, run.prompts.header.ids]))
        ids = slot.trained.ids_C
        expected.append(plain_logp(run.method.copy, group.prefix, informed, ids, 2.0)
                        - plain_logp(run.student, group.prefix, run.prompts.header, ids, 2.0))
    expected = torch.cat(expected)
    assert (gap - expected).abs().max() < 2e-4 and gap.abs().max() > 0.1
    run.method.weigh(run, [batch])
    size, weight = (before.sign() * expected).exp().clamp(0.8, 1.2), 0.5 * 59 / 60
    W = 1 - weight + weight * size
    assert torch.allclose(batch.advantage_T, before * W, atol=2e-4)


def test_an_uninformed_copy_changes_nothing(world, tmp_path):
    """Catches: Δ that is not exactly zero where teacher and student see and are the same."""
    for method in ("rlsd", "visd"):
        run = run_of(world, tmp_path / method, method=method)
        groups = filled(run)
        run.method.hint = lambda sample, slot: ""
        batch, = batches_of(run, groups)
        before = batch.advantage_T.clone()
        run.method.weigh(run, [batch])
        assert before.abs().max() > 0 and torch.equal(batch.advantage_T, before)


def test_a_support_of_all_tokens_is_the_sampled_form():
    """Catches: y_t counted twice when it is among the K, or left out when it is not; the student's
    own top K in place of the teacher's.
    """
    student, prefix = tiny_student("qwen2_5_vl"), video("qwen2_5_vl", 2, 4, 4, 3)
    completion = text(6, 3).ids

    def among(t, ids):  # the t-th token's log-prob among `ids`
        return (logits[t, completion[t]] - logits[t, ids].logsumexp(0)).item()

    with torch.no_grad():
        logits = separate_logits(student, prefix, text(2), completion)[:-1]
        ask = partial(student, [prefix], [text(2)], [0], [completion])
        whole, _ = ask()
        assert torch.allclose(ask(support=10**6)[0], whole, atol=1e-5)
        few, ids = ask(support=3)
        assert torch.equal(ids.sort(-1).values, logits.topk(3).indices.sort(-1).values)
        for t, y in enumerate(completion.tolist()):
            expected = among(t, sorted({y, *ids[t].tolist()}))
            assert few[t].item() == pytest.approx(expected, abs=1e-4)
        others = torch.full((6, 2), 7)
        others[:, 1] = 8
        given, same = ask(support=others)
        assert same is not ids and torch.equal(same, others)
        for t, y in enumerate(completion.tolist()):
            assert given[t].item() == pytest.approx(among(t, sorted({y, 7, 8})), abs=1e-4)


def test_visd_tells_the_copy_what_was_annotated_and_what_the_judge_said(world, tmp_path):
    """Catches: a hint without window or feedback, one rollout's feedback for another, feedback
    after λ has come to 0.
    """
    run = run_of(world, tmp_path / "run", method="visd", sd_horizon=3)
    groups = filled(run)
    for group in groups:
        evidence, = group.sample.evidence
        for slot in group.slots:
            hint = run.method.hint(group.sample, slot)
            assert group.sample.answer in hint and slot.note in hint
            assert f"{evidence.start:.1f} s to {evidence.end:.1f} s" in hint
            right = slot.first.correct
            assert ("is right" in slot.note) == right or "no answer" in slot.note
    assert all(slot.note is None for group in filled(run, 3) for slot in group.slots)


@pytest.fixture(scope="module")
def repaired(world, tmp_path_factory):
    """Make a run of ffr and its groups, in which something was repaired."""
    run = run_of(world, tmp_path_factory.mktemp("ffr") / "run")
    groups = filled(run)
    assert {slot.repair is not None for group in groups for slot in group.slots} == {True, False}
    return run, groups


def under(run, batch, suffixes):
    with torch.no_grad():
        return run.student(batch.prefixes, suffixes, batch.owners, batch.completions,
                           run.config.temperature)[0]


def is_repair(batch):
    return torch.cat([torch.full((len(slot.trained.ids_C),), slot.trained is slot.repair)
                      for _, slot in batch.members])


def test_ffr_visd_weighs_repairs_by_what_the_patch_changed(repaired):
    """Catches: first tries reweighed, Δ with x and (x, c) swapped, a completion scored under the
    patch of another slot.
    """
    run, groups = repaired
    batch, = batches_of(run, groups)
    before = batch.advantage_T.clone()
    repaired, headers = is_repair(batch), [run.prompts.header] * len(batch.suffixes)
    gap = under(run, batch, batch.suffixes) - under(run, batch, headers)
    methods.FfrVisd(replace(run.config, method="ffr_visd")).weigh(run, [batch])
    size, weight = (before.sign() * gap).exp().clamp(0.8, 1.2), 0.5 * 599 / 600
    W = torch.where(repaired, 1 - weight + weight * size, 1.0)
    assert torch.allclose(batch.advantage_T, before * W, atol=1e-4)
    assert torch.equal(batch.advantage_T[~repaired], before[~repaired])
    assert gap[repaired].abs().max() > 0.1


def test_score_under_plain_teaches_repairs_without_their_patch(repaired):
    """Catches: π_old left under (x, c), so that the ratio is not 1 before the first update; the
    patch left in the suffix; first tries touched; failed repairs pushed down without bound.
    """
    run, groups = repaired
    batch, = batches_of(run, groups)
    batch.advantage_T = torch.linspace(-1, 1, len(batch.advantage_T))
    old, given = batch.old_logp_T.clone(), batch.advantage_T.clone()
    methods.Ffr(replace(run.config, score_under="plain")).weigh(run, [batch])
    repaired = is_repair(batch)
    assert all(torch.equal(suffix.ids, run.prompts.header.ids) for suffix in batch.suffixes)
    assert (under(run, batch, batch.suffixes) - batch.old_logp_T).abs().max() < 1e-5
    assert torch.equal(batch.old_logp_T[~repaired], old[~repaired])
    assert (batch.old_logp_T - old)[repaired].abs().max() > 0.1
    assert torch.equal(batch.advantage_T, torch.where(repaired, given.clamp(min=0), given))
    assert (given[repaired] < 0).any() and (given[~repaired] < 0).any()


def test_score_under_plain_in_the_loop(world, tmp_path):
    """Catches: a reference that still scores under (x, c), π_old rescored again after an update."""
    settings = dict(score_under="plain", beta=0.1, updates_per_batch=2, micro_tokens=400)
    train.train(config_of(world, tmp_path / "run", **settings), *CPU)
    row, = lines(tmp_path / "run/metrics.jsonl")
    assert row["intervention_ratio"] > 0 and abs(row["kl"]) < 1e-9 and row["logp_mismatch"] < 1e-5
    for refused in (dict(method="grpo"), dict(train_on="original")):
        with pytest.raises(ValueError, match="--score_under changes nothing in this run"):
            train.refuse_useless(replace(train.Config(), **refused), {"score_under"})


# --- what teachers say besides patches


def sample_of(world, run):
    return run.decoded(run.samples[:1])[0]


def test_the_annotated_teacher_judges_by_rule(world, tmp_path):
    """Catches: a judge that pays for the answer alone, or for a place named without one."""
    sample = sample_of(world, run_of(world, tmp_path / "run"))
    trace, answer = sample.process, sample.answer

    def judge(words):
        return teacher.Annotated().ask("judge", sample, words).result()

    assert judge(f"{trace}<answer>{answer}</answer>") == pytest.approx(1.0)
    assert judge(f"<think>I guess.</think><answer>{answer}</answer>") == pytest.approx(0.6)
    assert judge("<think>I guess nothing.</think><answer>nothing</answer>") == pytest.approx(0.2)
    assert judge(trace) == pytest.approx(0.2) and judge("") == 0
    assert teacher.Annotated().ask("trace", replace(sample, process="")).result() is None


def test_the_service_is_asked_once_more_and_then_given_up(world, tmp_path, monkeypatch):
    """Catches: a score in prose that is guessed at, one outside [0, 1], retries without end, the
    same question paid for twice, a failure that is not counted, the gold answer shown to the writer
    of a trace.
    """
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    sample, replies = sample_of(world, run_of(world, tmp_path / "run")), []

    def ask(*rest):
        return service.ask(*rest).result()

    with MessagesServer(lambda body: [{"type": "text", "text": replies.pop(0)}]) as server:
        config = teacher.TeacherConfig(url=server.url, cache=str(tmp_path / "cache"))
        service = teacher.Service(config)
        replies += ["about 0.7", '{"score": 0.7}']
        assert ask("judge", sample, "first") == 0.7 and not replies
        assert ask("judge", sample, "first") == 0.7
        assert len(server.bodies) == 2, "the answer is from the cache"
        replies += ['{"score": 7}', '{"score": true}', '{"score": 0}']
        assert ask("judge", sample, "second") is None and len(replies) == 1
        assert ask("judge", sample, "third") == 0.0
        replies += ['{"response": "<think>frames 2 to 3</think><answer>x</answer>"}',
                    '{"feedback": "It <b>is</b> wrong."}']
        assert ask("trace", sample) == "<think>frames 2 to 3</think><answer>x</answer>"
        assert "Right answer" in json.dumps(server.bodies[0])
        assert "Right answer" not in json.dumps(server.bodies[-1])
        assert ask("feedback", sample, "fourth") == "It is wrong."
        stats = service.stats()
        counted = [stats[name] for name in ("calls", "answered", "failures", "cached")]
        assert counted == [6, 5, 1, 2]
        service.close()
    config = teacher.TeacherConfig(url="http://127.0.0.1:9", retries=0, timeout=5.0)
    service = teacher.Service(config)
    assert service.ask("judge", sample, "x").result() is None and service.stats()["failures"] == 1
    service.close()
