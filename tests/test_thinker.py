"""Thinker: PPO against official implementations (tests/golden), the ten invariants of the method, and edge cases."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_model import make_folder, make_tokenizer
from test_end_to_end import ROOT, comparable, run_module

from adaptive_reasoning import formats, thinker
from adaptive_reasoning.benchmark.__main__ import Args as EvaluateArgs
from adaptive_reasoning.benchmark.__main__ import check_args
from adaptive_reasoning.benchmark.papers import load_paper
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.dialogue import PROMPTS, STAGES, DialogueFormat
from adaptive_reasoning.learner.packing import Counts
from adaptive_reasoning.rollout import Completion, Decoder, Engine, Sampling
from adaptive_reasoning.rollout.dialogue import CHATML, Dialogue, Turn, converse, turn_marks
from adaptive_reasoning.run.evaluation import Evaluator, evaluate
from adaptive_reasoning.run.stages import stage_rows, stage_table, verification
from adaptive_reasoning.sft import episodes_of
from adaptive_reasoning.tasks import chain
from adaptive_reasoning.tasks.task import Benchmark, ExactGrader
from adaptive_reasoning.thinker import (
    Args,
    gae,
    normalise,
    policy_loss,
    reward,
    value_loss,
)

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = formats.tokenizer("dialogue")


def one_process(values):
    return values


def cases(name, kind):
    loaded = json.loads((GOLDEN / name).read_text())["cases"]
    return [pytest.param(c["inputs"], c["expected"], id=c["name"]) for c in loaded if c["kind"] == kind]


# --- PPO against verl and Open-Reasoner-Zero


@pytest.mark.parametrize("inputs, expected", cases("ppo_gae.json", "gae"))
def test_gae_equals_verl(inputs, expected):
    """Deviation: nothing behind the end of a response is read, so values left there (the official `eos_leak` and
    `garbage` cases) change nothing. They cancel in the official code for lambda = 1 alone."""
    mask = torch.tensor(inputs["mask"]).bool()
    rewards, values = (torch.tensor(inputs[k], dtype=torch.float64) for k in ("token_rewards", "values"))
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros(len(mask), 1).bool()], 1)
    advantages, returns = gae(rewards * mask, values * mask, last, inputs["gamma"], inputs["lam"])
    if inputs["padding_values"] != "zero" and inputs["lam"] < 1:
        clean, _ = gae(rewards * mask, values.masked_fill(~mask, 7.0) * mask, last, inputs["gamma"], inputs["lam"])
        assert torch.equal(clean, advantages)
        return
    for got, key in ((advantages, "advantages_raw"), (returns, "returns")):
        torch.testing.assert_close(got[mask], torch.tensor(expected[key], dtype=torch.float64)[mask], atol=1e-9, rtol=0)
    white = normalise(advantages[mask], one_process, unbiased=True)
    want = torch.tensor(expected["advantages_whitened"], dtype=torch.float64)[mask]
    torch.testing.assert_close(white, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("inputs, expected", cases("ppo_gae.json", "whiten"))
def test_whitening_equals_verl(inputs, expected):
    mask = torch.tensor(inputs["mask"]).bool()
    values = torch.tensor(inputs["values"], dtype=torch.float64)[mask]
    white = normalise(values, one_process, unbiased=True) + (0 if inputs["shift_mean"] else values.mean())
    torch.testing.assert_close(
        white, torch.tensor(expected["whitened"], dtype=torch.float64)[mask], atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs, expected", cases("ppo_gae.json", "value_loss"))
def test_value_loss_equals_verl(inputs, expected, dtype):
    mask = torch.tensor(inputs["mask"]).bool()
    values, old, returns = (torch.tensor(inputs[k], dtype=dtype) for k in ("value_preds", "old_values", "returns"))
    values.requires_grad_()
    settings, counts = SimpleNamespace(value_clip=inputs["cliprange_value"]), Counts(int(mask.sum()), 1)
    mb = SimpleNamespace(column={"values": old[mask], "returns": returns[mask]}.get)
    loss, stats = value_loss(values[mask], mb, counts, settings)
    loss.backward()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance, abs=tolerance)
    torch.testing.assert_close(
        values.grad, torch.tensor(expected["grad_value_preds"], dtype=dtype), atol=tolerance, rtol=0
    )
    assert float(stats["loss/value_clip_fraction"]) == pytest.approx(expected["clip_fraction"], abs=1e-6)


def clipped(inputs, dtype, names, mask=None):
    logprobs, old, advantages = (torch.tensor(inputs[k], dtype=dtype) for k in names)
    mask = torch.ones_like(old, dtype=torch.bool) if mask is None else mask
    logprobs.requires_grad_()
    settings = SimpleNamespace(
        clip_low=inputs["clip"], clip_high=inputs["clip"], dual_clip=inputs.get("dual_clip") or 0.0
    )
    n = Counts(int(mask.sum()), 1)
    entropy = torch.zeros_like(old)[mask]
    mb = SimpleNamespace(old_logprobs=old[mask], advantages=advantages[mask])
    value, stats = policy_loss(logprobs[mask], entropy, mb, n, settings)
    value.backward()
    return value.item(), logprobs.grad, stats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs, expected", cases("ppo_gae.json", "policy_loss"))
def test_policy_loss_equals_verl(inputs, expected, dtype):
    mask = torch.tensor(inputs["mask"]).bool()
    value, gradient, stats = clipped(inputs, dtype, ("log_prob", "old_log_prob", "advantages"), mask)
    tolerance = {"rel": 1e-9, "abs": 1e-9} if dtype == torch.float64 else {"rel": 1e-5, "abs": 1e-6}
    assert value == pytest.approx(expected["loss"], **tolerance)
    want = torch.tensor(expected["grad_log_prob"], dtype=dtype)
    torch.testing.assert_close(gradient, want, atol=tolerance["abs"], rtol=tolerance["rel"])
    assert float(stats["loss/clip_fraction"]) == pytest.approx(expected["clip_fraction"], abs=1e-6)
    assert float(stats["loss/approx_kl"]) == pytest.approx(expected["approx_kl"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("inputs, expected", cases("ppo_orz.json", "packed_gae"))
def test_gae_equals_open_reasoner_zero(inputs, expected):
    """Deviation: rewards are not clamped to [-10, 10]; Thinker's lie between 0 and 1. The test clamps for us."""
    lengths = torch.tensor(inputs["lengths"])
    ends = lengths.cumsum(0) - 1
    rewards = torch.zeros(1, int(lengths.sum()))
    rewards[0, ends] = torch.tensor(inputs["rewards"]).clamp(-10, 10)
    last = torch.zeros_like(rewards).bool()
    last[0, ends] = True
    got = gae(rewards, torch.tensor([inputs["values"]]), last, inputs["gamma"], inputs["lam"])
    for values, key in zip(got, ("advantages", "returns")):
        torch.testing.assert_close(values[0], torch.tensor(expected[key]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inputs, expected", cases("ppo_orz.json", "normalize"))
def test_normalisation_equals_open_reasoner_zero(inputs, expected):
    """Deviation: the result is not rounded to bfloat16."""
    flat = torch.tensor([x for item in inputs["advantages"] for x in item])
    want = torch.tensor([x for item in expected["normalized_bfloat16"] for x in item], dtype=torch.float64)
    torch.testing.assert_close(normalise(flat, one_process), want, atol=2**-8, rtol=2**-7)


@pytest.mark.parametrize("inputs, expected", cases("ppo_orz.json", "value_loss"))
def test_value_loss_equals_open_reasoner_zero(inputs, expected):
    values, old, returns = (torch.tensor(inputs[k], dtype=torch.float64) for k in ("values", "old_values", "returns"))
    values.requires_grad_()
    mb = SimpleNamespace(column={"values": old, "returns": returns}.get)
    loss, _ = value_loss(values, mb, Counts(len(old), 1), SimpleNamespace(value_clip=inputs["clip"] or 0.0))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    torch.testing.assert_close(
        values.grad, torch.tensor(expected["grad_values"], dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("inputs, expected", cases("ppo_orz.json", "policy_loss"))
def test_policy_loss_equals_open_reasoner_zero(inputs, expected):
    value, gradient, _ = clipped(inputs, torch.float64, ("log_probs", "old_log_probs", "advantages"))
    assert value == pytest.approx(expected["loss"], rel=1e-9)
    torch.testing.assert_close(
        gradient, torch.tensor(expected["grad_log_probs"], dtype=torch.float64), atol=1e-9, rtol=0
    )


# --- dialogues with a scripted model


def make_args(**changes) -> Args:
    budgets = dict(fast_budget=14, verify_budget=40, slow_budget=40, summary_budget=14, qa_budget=40)
    return Args(
        **({"stage_prompts": "chain", "max_new_tokens": 108, "rollout_rows": 3, "dtype": "fp32"} | budgets | changes)
    )


class Scripted:
    """Stands for the rollout engine: `reply(problem, stage)` is what the model says, cut at the budget."""

    def __init__(self, reply, prompts=PROMPTS["chain"]):
        self.reply, self.prompts, self.asked = reply, prompts, []

    def run(self, requests, sampling, on_finish, progress):
        for i, r in enumerate(requests):
            before = r.continues
            assert before is None or before.cache is not None, "continues what was kept"
            context = (before.context_ids + before.response_ids.tolist() if before else []) + r.prompt_ids
            text = TOKENIZER.decode(context)
            user = text.rpartition("<|User|>")[2].removesuffix("<|Assistant|>")
            stage = next(s for s, p in self.prompts.items() if user.endswith(p.replace("{q}", "")))
            problem = text.split("<|User|>")[1].split(" ")[0]
            self.asked.append((problem, stage))
            ids = TOKENIZER(self.reply(problem, stage) + "<|end|>")["input_ids"]
            reason = "stop" if len(ids) <= r.max_new_tokens else "length"
            ids = torch.tensor(ids[: r.max_new_tokens])
            ones = torch.ones(len(ids))
            on_finish(i, Completion(r, context, ids, -ones, ones.bool(), ~ones.bool(), reason, cache=torch.zeros(1)))


def form_of(tokenizer, args) -> DialogueFormat:
    return DialogueFormat(tokenizer, args, thinker.next_stage)


def play(reply, setting="train", problems=("1+1",), **changes):
    """Return (dialogues, what was asked for) of questions whose answer is 2."""
    control = form_of(TOKENIZER, make_args(**changes))
    dialogues = [Dialogue(Question(f"q/{i}", p, "2", "1"), i, i) for i, p in enumerate(problems)]
    engine = Scripted(reply)
    converse(engine, ExactGrader(), dialogues, control, Sampling(), setting)
    return dialogues, engine.asked


def says(fast="2", verdict="Yes", slow="2", summary="2"):
    boxes = {"fast": fast, "verify": verdict, "slow": slow, "summary": summary, "qa": fast}
    return lambda problem, stage: f"\\boxed{{{boxes[stage]}}}"


def stages(reply, setting="train", **changes):
    (d,), _ = play(reply, setting, **changes)
    return list(d.turns)


def test_training_goes_by_the_gold_answer_and_inference_by_the_verdict():
    """Invariant 3."""
    assert stages(says(fast="2", verdict="No")) == ["fast", "verify"]
    assert stages(says(fast="3", verdict="Yes")) == ["fast", "verify", "slow", "summary"]
    assert stages(says(fast="3", verdict="Yes", slow="4")) == ["fast", "verify", "slow"]
    assert stages(says(fast="2", verdict="No"), "adaptive") == ["fast", "verify", "slow"]
    assert stages(says(fast="3", verdict="Yes"), "adaptive") == ["fast", "verify"]
    assert stages(says(), "fast") == ["fast"] and stages(says(), "slow") == ["fast", "verify", "slow"]
    assert stages(says(), "qa") == ["qa"] and stages(says(), environment="qa") == ["qa"]


def test_the_final_answer_is_that_of_fast_after_yes_and_of_slow_after_no():
    """Invariant 9, first half."""
    (d,), _ = play(says(fast="2", verdict="Yes", slow="5"), "adaptive")
    assert DialogueFormat.mode_of(d.turns) == "fast" and d.turns["fast"].correct
    (d,), _ = play(says(fast="2", verdict="No", slow="5"), "adaptive")
    assert DialogueFormat.mode_of(d.turns) == "slow" and not d.turns["slow"].correct


@pytest.mark.parametrize("box", ["Maybe", "", "Yes and No", "2"])
def test_an_unparsable_verdict_is_wrong_in_training_and_a_no_at_inference(box):
    (d,), _ = play(says(verdict=box))
    assert d.turns["verify"].answer is None and not d.turns["verify"].correct
    assert reward("verify", d.turns, 0.5, make_args()) == 0
    assert stages(says(verdict=box), "adaptive") == ["fast", "verify", "slow"]


def test_what_counts_as_a_verdict_and_as_an_answer():
    for text in ("\\boxed{Yes}", "\\boxed{ \\text{yes} }", "\\boxed{No} no, \\boxed{YES}"):
        assert DialogueFormat.extract_answer(text, "verify") == "yes"
    for stage, text, answer in (
        ("verify", "Yes", None),
        ("fast", "the answer is 2", None),
        ("fast", "\\boxed{1} or \\boxed{2}", "2"),
        ("slow", "", None),
    ):
        assert DialogueFormat.extract_answer(text, stage) == answer


def test_no_box_and_an_empty_response_are_wrong():
    reply = says()
    for fast in ("2", ""):
        (d,), _ = play(lambda problem, stage, fast=fast: fast if stage == "fast" else reply(problem, stage))
        assert d.turns["fast"].answer is None and not d.turns["fast"].correct
        assert len(d.turns["fast"].ids) >= 1 and list(d.turns) == ["fast", "verify", "slow", "summary"]
        assert reward("verify", d.turns, 0.3, make_args()) == 0, "Yes to an answer that is none is wrong"


def test_a_budget_overrun_is_cut_stays_in_the_history_and_is_closed_by_a_token_that_is_no_action():
    """Invariants 5, 6 and 7."""
    long = "9 " * 30 + "\\boxed{2}"
    reply = says(verdict="No")
    (d,), _ = play(lambda problem, stage: long if stage == "fast" else reply(problem, stage))
    e, turn = d.episode(), d.turns["fast"]
    assert turn.cut and len(turn.ids) == 14 and not turn.correct and e.finish_reason == "length"
    assert e.response_ids[:14].equal(turn.ids) and e.response_ids[14] == TOKENIZER.eos_token_id
    assert not e.action_mask[14] and int(e.action_mask.sum()) == d.num_tokens == e.num_actions
    assert e.behaviour_logprobs[~e.action_mask].eq(0).all()
    for turn in d.turns.values():
        assert e.response_ids[turn.start : turn.start + len(turn.ids)].equal(turn.ids)
        assert e.action_mask[turn.start : turn.start + len(turn.ids)].all()
    text = TOKENIZER.decode([*e.prompt_ids, *e.response_ids])
    user = [part.split("<|Assistant|>")[0] for part in text.split("<|User|>")[1:]]
    assert user == ["1+1 in short", "right?", "no, step by step", "yes, sum up"]
    # A box before the cut counts, unless a response has to end by itself.
    early = "\\boxed{2}" + " 9" * 30
    for require_stop, right in ((False, True), (True, False)):
        (d,), _ = play(lambda problem, stage: early if stage == "fast" else "", require_stop=require_stop)
        assert d.turns["fast"].cut and d.turns["fast"].correct == right


def test_every_context_is_a_strict_prefix_of_the_next_with_a_real_model():
    """Invariants 5, 6 and 7 with the rollout engine, and its log-probs are those of the learner (P3)."""
    args = make_args(temperature=1.0, gradient_checkpointing=False)
    model = chain.tiny_model(TOKENIZER, 32, 2)
    engine, control = Engine(Decoder.from_model(model, "cpu", torch.float32)), form_of(TOKENIZER, args)
    dialogues = [Dialogue(Question(f"q/{i}", f"{i}+1", "2"), i, i) for i in range(5)]
    seen = []
    run = engine.run
    engine.run = lambda requests, *rest: seen.append([c for c in run(requests, *rest)])
    converse(engine, ExactGrader(), dialogues, control, Sampling(), "train")
    assert [len(stage) for stage in seen] == [3, 3, 3, 2, 2, 2], "Fast, Verify, Slow of two waves"
    for first in (0, 3):
        for earlier, later in zip(seen[first : first + 2], seen[first + 1 : first + 3]):
            for a, b in zip(earlier, later):
                whole = a.context_ids + a.response_ids.tolist()
                assert b.context_ids[: len(whole)] == whole and len(b.context_ids) > len(whole)
    assert all(c.cache is None for stage in seen for c in stage), "nothing is kept when the dialogue is over"
    from adaptive_reasoning.learner.learner import Learner
    from adaptive_reasoning.learner.runtime import make_accelerator

    episodes = [d.episode() for d in dialogues]
    for d, e in zip(dialogues, episodes):
        assert int(e.action_mask.sum()) == sum(len(t.ids) for t in d.turns.values())
        assert all(len(t.ids) <= control.budget(stage) for stage, t in d.turns.items())
    for e, logprobs in zip(episodes, Learner(args, model, make_accelerator(args)).logprobs(episodes)):
        torch.testing.assert_close(logprobs, e.behaviour_logprobs, atol=1e-5, rtol=0)


# --- rewards


def turns_of(**correct) -> dict[str, Turn]:
    """A transcript: correctness by stage; the summary has 4 tokens and L = -50."""
    out = {}
    for stage, right in correct.items():
        answer = ("yes" if right == correct["fast"] else "no") if stage == "verify" else "2"
        out[stage] = Turn(0, torch.zeros(4), torch.zeros(4), False, "", answer, right)
        out[stage].logprob = -50.0 if stage == "summary" else 0.0
    return out


WRONG_FAST = dict(fast=False, verify=True, slow=True, summary=True)


@pytest.mark.parametrize("changes, turns, want", [
    ({}, dict(fast=True, verify=True), {"fast": 1, "verify": 0.6}),
    ({}, dict(fast=True, verify=False), {"fast": 1, "verify": 0}),
    ({}, WRONG_FAST, {"fast": 0, "verify": 0.4, "slow": 1, "summary": 0.95}),
    ({}, WRONG_FAST | {"verify": False}, {"fast": 0, "verify": 0, "slow": 1, "summary": 0.95}),
    ({}, WRONG_FAST | {"summary": False}, {"summary": 0}),
    ({"unweighted_verify": True}, WRONG_FAST, {"verify": 1}),
    ({"summary_logprob": "off"}, WRONG_FAST, {"summary": 1}),
    ({"logprob_coef": 0.0}, WRONG_FAST, {"summary": 1}),
    ({"summary_logprob": "ungated_sum"}, WRONG_FAST, {"summary": 0.95}),
    ({"summary_logprob": "ungated_sum"}, WRONG_FAST | {"summary": False}, {"summary": 0}),
    ({"summary_logprob": "gated_mean", "logprob_coef": 0.01}, WRONG_FAST, {"summary": 0.875}),
    ({"logprob_coef": 0.1}, WRONG_FAST, {"summary": 0}),  # 1 - 5 is floored
])  # fmt: skip
def test_hand_computed_rewards(changes, turns, want):
    """Invariants 4 and 10: p = 0.4, L = -50 over 4 tokens, c = 0.001."""
    transcript = turns_of(**turns)
    for stage, value in want.items():
        assert reward(stage, transcript, 0.4, make_args(**changes)) == pytest.approx(value), stage


@pytest.mark.parametrize("changes, reply, want", [
    ({"skip_verify": True}, says(fast="3"), ["fast", "slow", "summary"]),
    ({"skip_verify": True}, says(fast="2"), ["fast"]),
    ({"skip_summary": True}, says(fast="3"), ["fast", "verify", "slow"]),
    ({"verdict_transition": True}, says(fast="3", verdict="Yes"), ["fast", "verify"]),
    ({"verdict_transition": True}, says(fast="2", verdict="No"), ["fast", "verify", "slow", "summary"]),
])  # fmt: skip
def test_ablations_of_the_transitions(changes, reply, want):
    assert stages(reply, **changes) == want


def test_without_verify_every_question_goes_to_slow_at_inference():
    assert stages(says(), "adaptive", skip_verify=True) == ["fast", "slow"]


def test_constant_verdicts_earn_the_same_and_a_perfect_one_twice_that():
    """Invariant 2."""
    p, args = 0.3, make_args()

    def mean(verdict):
        out = 0.0
        for fast, share in ((True, p), (False, 1 - p)):
            right = (verdict(fast) == "yes") == fast
            out += share * reward("verify", turns_of(fast=fast, verify=right), p, args)
        return out

    assert mean(lambda fast: "yes") == pytest.approx(p * (1 - p)) == pytest.approx(mean(lambda fast: "no"))
    assert mean(lambda fast: "yes" if fast else "no") == pytest.approx(2 * p * (1 - p))


def test_the_summary_is_scored_as_a_fast_answer_without_the_dialogue():
    """Invariant 4: the episode that is scored is the Fast prompt and the summary, end of turn included."""
    (d,), _ = play(says(fast="3", verdict="No"))
    scored = []

    class Learner:
        def logprobs(self, episodes):
            scored.extend(episodes)
            return [torch.full((e.num_tokens,), -0.5) for e in episodes]

    thinker.summary_logprobs([d], Learner())
    (e,) = scored
    assert TOKENIZER.decode(e.prompt_ids) == "<|begin|><|User|>1+1 in short<|Assistant|>"
    assert TOKENIZER.decode(e.response_ids) == "\\boxed{2}<|end|>" and e.action_mask.all()
    assert d.turns["summary"].logprob == -0.5 * len(e.response_ids)


def test_trailing_accuracy_uses_past_iterations_alone_and_is_clamped():
    """Invariant 8; on several ranks the counts are summed before, so all of them hold the same history."""
    history, seen = [], []
    for own in ([5.0, 10.0], [10.0, 10.0], [0.0, 10.0], [0.0, 10.0]):
        seen.append(thinker.trailing_accuracy(history, own, window=2))
    assert seen == [0.5, 0.5, 0.75, 0.5] and history == [[0.0, 10.0], [0.0, 10.0]]
    assert (
        thinker.trailing_accuracy(history, [1, 1], 2) == 0.05 and thinker.trailing_accuracy([[9, 9]], [0, 1], 2) == 0.95
    )


# --- credit


def credited(rewards=(0.0, 0.4, 1.0, 0.9), **changes):
    (d,), _ = play(says(fast="3", verdict="No"))
    for turn, r in zip(d.turns.values(), rewards):
        turn.reward = r
    e = d.episode()
    V = torch.linspace(-1, 1, len(e.response_ids)) * e.action_mask
    thinker.fill_advantages([e], [d], [V], make_args(adv_norm="none", **changes), one_process)
    return d, e, V


def test_the_return_of_every_token_of_a_stage_is_its_own_reward():
    """Invariant 1: with gamma = lambda = 1, return = R_k and A = R_k - V; the reward of Slow changes nothing else."""
    d, e, V = credited()
    for turn in d.turns.values():
        here = slice(turn.start, turn.start + len(turn.ids))
        torch.testing.assert_close(e.columns["returns"][here], torch.full((len(turn.ids),), turn.reward))
        torch.testing.assert_close(e.advantages[here], turn.reward - V[here])
    assert e.advantages[~e.action_mask].eq(0).all()
    _, other, _ = credited(rewards=(0.0, 0.4, 0.0, 0.9))
    start, stop = d.turns["slow"].start, d.turns["summary"].start
    changed = e.advantages != other.advantages
    assert (
        changed[start:stop][e.action_mask[start:stop]].all() and not changed[:start].any() and not changed[stop:].any()
    )


def test_propagate_lets_rewards_flow_to_earlier_stages():
    d, e, V = credited(propagate=True)
    total = 0.0 + 0.4 + 1.0 + 0.9
    assert e.columns["returns"][0] == pytest.approx(total, abs=1e-5)
    last = d.turns["summary"]
    torch.testing.assert_close(e.columns["returns"][last.start :][: len(last.ids)], torch.full((len(last.ids),), 0.9))
    # Within a stage gamma and lambda hold, at a border they do not.
    _, e, _ = credited(propagate=True, gamma=0.9)
    summary = 0.9 * 0.9 ** (len(last.ids) - 1)
    slow = d.turns["slow"]
    assert e.columns["returns"][slow.start + len(slow.ids) - 1] == pytest.approx(1.0 + summary, abs=1e-5)


@pytest.mark.parametrize("kind", ["pooled", "per_stage", "none"])
def test_normalisation_over_all_tokens_or_by_stage(kind):
    dialogues, _ = play(says(fast="3", verdict="No"), problems=("1+1", "2+0"))
    for k, d in enumerate(dialogues):
        for turn, r in zip(d.turns.values(), (0.0, 0.4 * k, 1.0, 0.5 + k)):
            turn.reward = r
    episodes = [d.episode() for d in dialogues]
    values = [torch.randn(len(e.response_ids)) * e.action_mask for e in episodes]
    thinker.fill_advantages(episodes, dialogues, values, make_args(adv_norm=kind), one_process)
    parts = {}
    for d, e in zip(dialogues, episodes):
        for stage, t in d.turns.items():
            parts.setdefault(stage, []).append(e.advantages[t.start : t.start + len(t.ids)])
    groups = (
        [torch.cat([x for part in parts.values() for x in part])]
        if kind == "pooled"
        else map(torch.cat, parts.values())
    )
    for A in groups:
        spread = float(A.var(unbiased=False))
        assert kind == "none" or (abs(float(A.mean())) < 1e-5 and spread == pytest.approx(1.0, abs=1e-4))
    assert all(math.isfinite(e.advantage) for e in episodes)


def test_a_process_without_dialogues_takes_part():
    thinker.fill_advantages([], [], [], make_args(adv_norm="per_stage"), one_process)
    thinker.summary_logprobs([], SimpleNamespace(logprobs=lambda episodes: []))
    assert thinker.metrics(stage_rows([], []) + stage_rows(play(says())[0]), 0.5)


# --- numbers


def test_verification_and_stage_numbers():
    assert verification([(True, "yes"), (True, "no"), (False, "no"), (False, None)]) == {
        "balanced_accuracy": 0.5, "yes_when_right": 0.5, "no_when_right": 0.5, "yes_when_wrong": 0.0,
        "no_when_wrong": 0.5, "unparsable_share": 0.25,
    }  # fmt: skip
    assert verification([(True, "yes")])["balanced_accuracy"] is None
    reply = says(fast="3", verdict="No")
    text = {"slow": "Wait, 2? However, wait, yes. \\boxed{2}"}
    dialogues, _ = play(lambda p, s: text.get(s) or reply(p, s), slow_budget=99, max_new_tokens=200)
    table = stage_table(stage_rows(dialogues))
    assert table["stages"]["slow"]["reflection_words"] == 3 and table["stages"]["summary"]["share"] == 1
    for d in dialogues:
        e = d.episode()
        thinker.fill_advantages([e], [d], [torch.zeros(len(e.response_ids))], make_args(), one_process)
        assert thinker.metrics(stage_rows([d], [e]), 0.5).keys() <= thinker.METRICS.keys()


def test_evaluation_holds_dialogues():
    """The verdict decides; tokens are those of all responses; shares of modes by difficulty; samples to read."""
    args = make_args(seed=0)
    control = form_of(TOKENIZER, args)
    questions = [Question(f"q/{i}", p, "2", str(1 + i % 2)) for i, p in enumerate(("1+1", "5+7", "3-1", "4-2"))]
    reply = says()

    def answer(problem, stage):
        if problem == "4-2":
            return {"fast": "\\boxed{9}", "verify": "\\boxed{No}"}.get(stage) or reply(problem, stage)
        return reply(problem, stage)

    engine, grader = Scripted(answer), ExactGrader()
    benchmark = Benchmark("chain", questions, 2)
    got = {}
    for setting in control.eval_spec().settings:
        on = Evaluator(engine, grader, TOKENIZER, control.stop_ids, control.eval_spec(), args)
        got[setting], samples, rows = evaluate(on, benchmark, setting)
        assert len(rows) == 8
    result = got["adaptive"]
    assert result["accuracy"] == 1 and result["modes"]["slow"]["share"] == 0.25
    assert result["by_difficulty"]["2"]["modes"] == {"fast": 0.5, "slow": 0.5, "qa": 0}
    assert result["by_difficulty"]["2"]["stages"]["slow"]["share"] == 0.5
    assert result["by_difficulty"]["1"]["verification"]["yes_when_right"] == 1
    assert result["verification"]["balanced_accuracy"] == 1 and result["stages"]["slow"]["share"] == 0.25
    assert got["fast"]["accuracy"] == 0.75 and got["slow"]["modes"]["slow"]["share"] == 1
    assert got["qa"]["modes"]["qa"]["share"] == 1 and result["mean_tokens"] > got["fast"]["mean_tokens"]
    assert samples[0]["response"].startswith("[qa] ") and len(samples) == 8


def test_rows_of_the_cold_start():
    """Wrong fast answers carry no loss, verdicts are right, and what a model should learn to fit fits the budgets."""
    args = SimpleNamespace(chain_mix="0.3,0.3,0.2,0.2", max_steps=100)
    control = form_of(TOKENIZER, make_args(fast_budget=20, max_new_tokens=200))
    first = DialogueFormat.rows(args, np.random.default_rng(0), 99, 1)
    assert not any(r.turns for r in first) and {r.prompt.split()[-1] for r in first} == {"short", "step"}
    assert {r.question.difficulty for r in first if r.prompt.endswith("short")} == {"1"}
    rows = DialogueFormat.rows(args, np.random.default_rng(0), 300, 100)
    kinds = set()
    for row, e in zip(rows, episodes_of(rows, TOKENIZER, 512)):
        if not row.turns:
            continue
        answer = DialogueFormat.extract_answer(row.response, "fast")
        right = answer == row.question.answer
        verdict = DialogueFormat.extract_answer(row.turns[0][1], "verify")
        kinds.add((right, verdict, len(row.turns)))
        n = len(TOKENIZER(row.response)["input_ids"]) + 1
        assert e.action_mask[:n].all() if right else not e.action_mask[:n].any()
        assert n <= control.budget("fast") and "\n" not in row.response
        # The dialogue is the one that training builds: turn by turn, with the same tokens between.
        text = TOKENIZER.decode([*e.prompt_ids, *e.response_ids])
        assert TOKENIZER.decode(control.ids("fast", row.question.problem)) + row.response + "<|end|>" in text
        assert TOKENIZER.decode(control.ids("verify", None)) in text
    assert kinds == {(True, "yes", 1), (False, "no", 3)}


# --- marks of a turn


def test_marks_of_a_turn():
    assert turn_marks(TOKENIZER).start == "<|begin|><|User|>" and turn_marks(TOKENIZER).header == "<|Assistant|>"
    r1 = make_tokenizer(["some text"])
    marks = turn_marks(r1)
    assert marks.think == "<think>\n" and marks.end == r1.eos_token_id and not marks.header.endswith("\n")
    control = form_of(r1, Args())
    opened = {stage: r1.decode(control.ids(stage, None)).endswith("<think>\n") for stage in STAGES}
    assert opened == {"fast": False, "verify": True, "slow": True, "summary": False, "qa": True}
    with pytest.raises(UserError, match="has no <|im_start|>"):
        turn_marks(r1, "chatml")
    r1.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match="does not show how a dialogue goes on"):
        turn_marks(r1)
    r1.add_special_tokens({"additional_special_tokens": list(CHATML)})
    control = form_of(r1, Args())
    text = r1.decode(control.ids("fast", "1+1") + control.ids("verify", None))
    assert text.startswith("<|im_start|>user\n") and "<|im_end|>\n<|im_start|>assistant\n\n<|im_start|>user\n" in text
    assert control.stop_ids == (r1.convert_tokens_to_ids("<|im_end|>"), r1.eos_token_id)


@pytest.mark.parametrize("changes, message", [
    ({"max_new_tokens": 107}, "--max_new_tokens 107: the budgets of the stages add up to 108"),
    ({"qa_budget": 109}, "--max_new_tokens 108: --qa_budget 109 is longer. The evaluations of a dialogue"),
    ({"environment": "qa", "qa_budget": 109}, "--max_new_tokens 108: --qa_budget 109 is longer"),
])  # fmt: skip
def test_budgets_have_to_fit(changes, message):
    """That of the baseline too, which the evaluation before step 1 takes: it was found too long when that began."""
    with pytest.raises(UserError, match=message):
        make_args(**changes)
    assert make_args(environment="qa", max_new_tokens=40).holds().least_new_tokens == 40, "no dialogue, one turn"
    args = EvaluateArgs(answer_format="dialogue", max_new_tokens=7_999, fast_budget=1, verify_budget=1, slow_budget=1)
    with pytest.raises(UserError, match="--qa_budget 8000 is longer"):
        check_args(args)


def test_paper_table_and_its_average():
    """Invariant 9, second half: Avg is the plain mean of the eight columns."""
    for size in ("q1.5b", "r1.5b", "r7b"):
        paper = load_paper(f"thinker-{size}")
        for name, cells in paper["rows"].items():
            if "mean" in cells:
                mean = sum(cells[b][0] for b in paper["benchmarks"]) / 8
                assert mean == pytest.approx(cells["mean"][0], abs=0.011), name


# --- whole runs

SMALL = (
    "--task chain --chain_questions 24 --chain_eval_questions 12 --prompts_per_step 4 --num_generations 2 "
    "--critic_minibatches 2 --rollout_rows 64 --eval_every 1 --save_every 1"
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    chain.tiny_model(TOKENIZER, 32, 2).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def run(folder, model, steps, *options, config="toy_thinker"):
    done = run_module(
        "thinker", "--config", f"experiments/{config}.yaml", "--model", str(model), "--output_dir", str(folder),
        "--max_steps", str(steps), *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(laboratory, tmp_path):
    """P6: weights of policy and critic, both optimisers and the trailing accuracy come back from a checkpoint."""
    run(tmp_path / "whole", laboratory, 2, *SMALL.split())
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_000002")
    run(tmp_path / "resumed", laboratory, 2, *SMALL.split())
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "whole")
    for part in ("model", "critic/model"):
        files = [tmp_path / n / "checkpoints/step_000002" / part / "model.safetensors" for n in ("whole", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    state = json.loads((tmp_path / "resumed/checkpoints/step_000002/state.json").read_text())["state"]["state"]
    assert len(state["memory"]["fast"]) == 2
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["check/logprob_gap_max"] < 1e-4 and row["loss/clip_fraction"] == 0 for row in rows)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert set(summary["after"]["modes"]) == {"fast", "slow", "qa"} and summary["algorithm"] == "thinker"


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    "--environment qa",
    "--verdict_transition true --adv_norm per_stage --minibatches_per_step 2 --propagate true --lam 0.95 --dual_clip 3 "
    "--summary_logprob ungated_sum --unweighted_verify true --require_stop true --value_clip 0",
])  # fmt: skip
def test_every_switch_trains(laboratory, tmp_path, options):
    run(tmp_path / "run", laboratory, 1, *SMALL.split(), *options.split())


@pytest.mark.slow
def test_real_questions_two_steps_and_resume(tmp_path):
    """A run of the paper on GSM8K with a small model; the other two, and an evaluation, are in test_targets.py."""
    folder = os.environ.get("ADAPTIVE_REASONING_DATA")
    if not folder:
        pytest.skip("ADAPTIVE_REASONING_DATA is not set: no real questions here")
    make_folder(tmp_path / "model")
    data = str(Path(folder) / "gsm8k_train.jsonl")
    small = (
        f"--data {data} --train_limit 40 --eval_data gsm8k,math500 --eval_limit 4 --eval_samples 1 "
        "--prompts_per_step 4 --num_generations 2 --critic_minibatches 2 --fast_budget 8 --verify_budget 12 "
        "--slow_budget 12 --summary_budget 8 --qa_budget 16 --grader_workers 1 --dtype fp32 --save_every 1 "
        "--rollout_rows 32 --tokens_per_micro_batch 4096"
    ).split()
    run(tmp_path / "run", tmp_path / "model", 1, *small, config="thinker_r7b")
    assert "continuing" in run(tmp_path / "run", tmp_path / "model", 2, *small, config="thinker_r7b")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["thinker/verify_share"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_two_processes_train_like_one(laboratory, tmp_path, kind):
    """Dialogues, p, normalised advantages, both losses: two steps on two processes are those of one (P4)."""
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="ZeRO-3 is tested where DeepSpeed is installed")
    run(tmp_path / "one", laboratory, 2, *SMALL.split())
    launch = {
        "ddp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "zero3": ["accelerate.commands.launch", "--main_process_port", "0", "--config_file",
                  "experiments/launch/zero3_cpu.yaml"],
    }[kind]  # fmt: skip
    command = [sys.executable, "-m", *launch, "-m", "adaptive_reasoning.thinker", *SMALL.split()]
    command += ["--config", "experiments/toy_thinker.yaml", "--model", str(laboratory), "--max_steps", "2"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    env |= {"ACCELERATE_USE_CPU": "true"} if kind == "ddp" else {"DS_ACCELERATOR": "cpu"}
    command += ["--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for a, b in zip(comparable(tmp_path / "one"), comparable(tmp_path / "two")):
        assert a.keys() == b.keys()
        for key in a.keys() - {"learner/micro_batches"}:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=5e-4), key
