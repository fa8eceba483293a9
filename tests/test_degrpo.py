"""DeGRPO against the official implementation (tests/golden), hand-computed numbers, and known ways to go wrong."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plot_modes
import pytest
import torch
from small_model import qwen_folder

from adaptive_reasoning import formats
from adaptive_reasoning.benchmark import routers as router
from adaptive_reasoning.benchmark.__main__ import Args as EvaluateArgs
from adaptive_reasoning.benchmark.__main__ import spec_of
from adaptive_reasoning.benchmark.lenient import aime_answer, lenient_answer, lenient_same
from adaptive_reasoning.benchmark.papers import load_paper, paper_table
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.degrpo import Args, advantages, loss, metrics, plan_rollouts, reward
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.thinkless import Thinkless
from adaptive_reasoning.learner.model import load_tokenizer
from adaptive_reasoning.learner.packing import Counts, pack
from adaptive_reasoning.run.evaluation import summarise
from adaptive_reasoning.run.options import parse_args, parse_schedule
from adaptive_reasoning.sft import Args as SftArgs
from adaptive_reasoning.sft import batch_of, check_pairs, load_rows
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.answers import same_answer

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
THINK, SHORT = 303, 302
FORM = object.__new__(Thinkless)  # without a tokenizer: two tokens are all that these tests need
ONE_PROCESS = SimpleNamespace(gather=list)
FORM.tokens = {"think": THINK, "short": SHORT}
EXTRACT = {"first_token": Thinkless.answer_by_first_token, "substring": Thinkless.answer_by_substring}
PLAIN = {"kl_average": "as_loss", "alpha": 0.001, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0,
         "entropy_coef": 0.0, "max_new_tokens": 64}  # fmt: skip


def golden(name, kind=None):
    loaded = json.loads((GOLDEN / name).read_text())["cases"]
    return [pytest.param(c["inputs"], c, id=c["name"]) for c in loaded if kind is None or c["kind"] == kind]


def options(aggregation="paper", **more):
    return SimpleNamespace(**{**PLAIN, "aggregation": aggregation, **more})


def batch(lengths, logprobs, old, A, ref=None, modes=None):
    """A MicroBatch-like view of sequences that start with a control token."""
    lengths = torch.tensor(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return SimpleNamespace(
        old_logprobs=old,
        ref_logprobs=torch.zeros_like(old) if ref is None else ref,
        advantages=A,
        sequence=sequence,
        position=torch.cat([torch.arange(n) for n in lengths]),
        lengths=lengths,
        episodes=[SimpleNamespace(mode=mode) for mode in (modes or ["think"] * len(lengths))],
    )


# --- the loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs, case", golden("degrpo_loss.json", "policy_loss"))
def test_loss_and_gradient_equal_the_official_code(inputs, case, dtype):
    """With one micro-batch: alpha times the mean over control tokens and one mean over all others, or one over all."""
    mask = torch.tensor(inputs["eos_mask"]).bool()
    logprobs = torch.tensor(inputs["log_prob"], dtype=dtype, requires_grad=True)
    old, A = (torch.tensor(inputs[k], dtype=dtype)[mask] for k in ("old_log_prob", "advantages"))
    mb = batch(mask.sum(1).tolist(), None, old, A)
    alpha, clip = inputs["alpha"], inputs["cliprange"]
    args = options("vanilla_code" if alpha is None else "code", alpha=alpha or 0.0, clip_low=clip, clip_high=clip)
    value, stats = loss(logprobs[mask], None, mb, Counts(int(mask.sum()), len(mask)), args)
    value.backward()
    want = case["expected"] if dtype == torch.float64 else case["expected_float32"]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(value, torch.tensor(want["loss"], dtype=dtype), **tolerance)
    gradient = torch.tensor(case["expected"]["grad_log_prob"], dtype=dtype)
    torch.testing.assert_close(logprobs.grad, gradient, **tolerance)
    assert float(stats["loss/clip_fraction"]) == pytest.approx(want["clip_fraction"], abs=1e-6)
    assert float(stats["loss/approx_kl"]) == pytest.approx(want["approx_kl"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("aggregation", ["code", "vanilla_code"])
@pytest.mark.parametrize("inputs, case", golden("degrpo_loss.json", "kl_k3"))
def test_divergence_equals_the_official_code(inputs, case, aggregation, dtype):
    """k3 clamped to [-10, 10], as one mean over all tokens; a clamped token has no gradient."""
    mask = torch.tensor(inputs["eos_mask"]).bool()
    logprobs = torch.tensor(inputs["log_prob"], dtype=dtype, requires_grad=True)
    ref = torch.tensor(inputs["ref_log_prob"], dtype=dtype)[mask]
    old = logprobs.detach()[mask]
    mb = batch(mask.sum(1).tolist(), None, old, torch.zeros_like(old), ref)  # advantage 0: no other gradient
    args = options(aggregation, kl_coef=1.0)
    value, stats = loss(logprobs[mask], None, mb, Counts(int(mask.sum()), len(mask)), args)
    value.backward()
    want = case["expected"]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(value.detach(), torch.tensor(want["kl_mean"], dtype=dtype), **tolerance)
    torch.testing.assert_close(stats["loss/ref_kl"], torch.tensor(want["kl_mean"], dtype=dtype), **tolerance)
    torch.testing.assert_close(logprobs.grad, torch.tensor(want["grad_log_prob"], dtype=dtype), **tolerance)


def two_samples(dtype=torch.float64):
    """The micro-batch of the specification (7.6): ratios of sample A (A = 1) and sample B (A = -0.5)."""
    logprobs = torch.tensor([1.1, 0.9, 1.3, 1.0, 0.7, 1.05], dtype=dtype).log().requires_grad_()
    A = torch.tensor([1.0] * 4 + [-0.5] * 2, dtype=dtype)
    return logprobs, batch([4, 2], None, torch.zeros(6, dtype=dtype), A, modes=["think", "short"]), Counts(6, 2)


@pytest.mark.parametrize(
    "aggregation, want",
    [("paper", -0.2545167), ("code", -0.6441), ("vanilla", -0.29375), ("vanilla_code", -0.5458333)],
)
def test_hand_computed_losses(aggregation, want):
    logprobs, mb, counts = two_samples()
    assert loss(logprobs, None, mb, counts, options(aggregation))[0].item() == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize("logprob, ref, want", [(-1.0, -1.2, 0.01873075), (-2.0, -1.0, 0.71828183)])
def test_hand_computed_divergence(logprob, ref, want):
    logprobs = torch.tensor([logprob], dtype=torch.float64)
    mb = batch([1], None, logprobs, torch.zeros(1), torch.tensor([ref], dtype=torch.float64))
    _, stats = loss(logprobs, None, mb, Counts(1, 1), options(kl_coef=0.1))
    assert stats["loss/ref_kl"].item() == pytest.approx(want, abs=1e-8)


@pytest.mark.parametrize("aggregation, kl_average, want", [
    ("paper", "as_loss", "sequence"), ("vanilla", "as_loss", "sequence"), ("code", "as_loss", "token"),
    ("vanilla_code", "as_loss", "token"), ("paper", "token", "token"), ("vanilla", "token", "token"),
    ("code", "sequence", "sequence"), ("vanilla_code", "sequence", "sequence"), ("paper", "sequence", "sequence"),
    ("code", "token", "token"),
])  # fmt: skip
def test_divergence_and_entropy_by_response_or_by_token(aggregation, kl_average, want):
    """Four tokens of k3 0.01873075 and entropy 0.5, two of 0.71828183 and 2: means of the two means, or of the six."""
    logprobs = torch.tensor([-1.0] * 4 + [-2.0] * 2, dtype=torch.float64)
    ref = torch.tensor([-1.2] * 4 + [-1.0] * 2, dtype=torch.float64)
    entropy = torch.tensor([0.5] * 4 + [2.0] * 2, dtype=torch.float64)
    mb = batch([4, 2], None, logprobs, torch.zeros(6, dtype=torch.float64), ref)
    args = options(aggregation, kl_average=kl_average, kl_coef=0.1, entropy_coef=0.01)
    value, stats = loss(logprobs, entropy, mb, Counts(6, 2), args)
    k3, H = {"sequence": (0.36850629, 1.25), "token": (0.25191444, 1.0)}[want]
    assert (stats["loss/ref_kl"].item(), stats["loss/entropy"].item()) == pytest.approx((k3, H), abs=1e-8)
    assert value.item() == pytest.approx(0.1 * k3 - 0.01 * H, abs=1e-8)


@pytest.mark.parametrize(
    "aggregation, control, response",
    [
        ("paper", [0.1 / 3] * 3, [1 / 9, 1 / 3, 1 / 15]),  # alpha / G and 1 / (G T_i)
        ("code", [0.1 / 3] * 3, [1 / 9] * 3),  # alpha / n_m and 1 / N_m
        ("vanilla", [1 / 12, 1 / 6, 1 / 18], [1 / 12, 1 / 6, 1 / 18]),  # 1 / (G (T_i + 1))
        ("vanilla_code", [1 / 12] * 3, [1 / 12] * 3),  # 1 / (n + N)
    ],
)
def test_weight_of_the_control_token_and_of_the_others(aggregation, control, response):
    """Specification 7.4, read off the gradient: on policy with A = -1 the gradient of a log-prob is its weight."""
    lengths = [4, 2, 6]  # T = 3, 1, 5
    logprobs = torch.full((12,), -0.3, dtype=torch.float64, requires_grad=True)
    mb = batch(lengths, None, logprobs.detach(), -torch.ones(12, dtype=torch.float64))
    loss(logprobs, None, mb, Counts(12, 3), options(aggregation, alpha=0.1))[0].backward()
    per_sample = logprobs.grad.split(lengths)
    assert [g[0].item() for g in per_sample] == pytest.approx(control)
    for g, want in zip(per_sample, response):
        assert g[1:].tolist() == pytest.approx([want] * (len(g) - 1))


def test_alpha_times_the_length_is_what_matters():
    """Eq. 4: a control token weighs alpha T_i of its response tokens; in vanilla GRPO it weighs one, whatever T_i."""
    for T in (10, 4000):
        logprobs = torch.zeros(T + 1, dtype=torch.float64, requires_grad=True)
        mb = batch([T + 1], None, logprobs.detach(), -torch.ones(T + 1, dtype=torch.float64))
        for aggregation, want in (("paper", 0.001 * T), ("vanilla", 1.0)):
            logprobs.grad = None
            loss(logprobs, None, mb, Counts(T + 1, 1), options(aggregation))[0].backward()
            assert (logprobs.grad[0] / logprobs.grad[1]).item() == pytest.approx(want)


@pytest.mark.parametrize("aggregation", ["paper", "code", "vanilla", "vanilla_code"])
def test_a_response_of_one_token_divides_by_nothing(aggregation):
    """The official code gives NaN where every response is one token long (degenerate_cases of the golden file)."""
    logprobs = torch.tensor([-0.7, -1.1, -1.2], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([0.6, 0.7, -1.3], dtype=torch.float64)
    mb = batch([1, 1, 1], None, logprobs.detach(), A, modes=["think", "short", "malformed"])
    value, _ = loss(logprobs, torch.zeros(3), mb, Counts(3, 3), options(aggregation, kl_coef=0.1, entropy_coef=0.1))
    value.backward()
    assert value.isfinite() and logprobs.grad.isfinite().all() and logprobs.grad[0] != 0


@pytest.mark.parametrize("aggregation", ["paper", "code", "vanilla", "vanilla_code"])
def test_a_micro_batch_without_sequences_is_worth_nothing(aggregation):
    mb = pack([])
    logprobs = torch.zeros(0, requires_grad=True)
    value, stats = loss(logprobs, torch.zeros(0), mb, Counts(10, 2), options(aggregation, entropy_coef=0.1))
    assert value == 0 and all(x == 0 for x in stats.values())


def test_a_first_token_that_is_no_control_token_is_a_response_token():
    """Its response has T_i = 3 response tokens, all of weight 1/3: alpha belongs to control tokens."""
    logprobs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    mb = batch([3], None, logprobs.detach(), -torch.ones(3, dtype=torch.float64), modes=["malformed"])
    loss(logprobs, None, mb, Counts(3, 1), options("paper"))[0].backward()
    assert logprobs.grad.tolist() == pytest.approx([1 / 3] * 3)


def episode(mode, tokens, advantage=0.0, reward=0.0, group=0, text="", correct=False, first=None):
    ids = {"think": THINK, "short": SHORT, "malformed": 7}[mode]
    rng = torch.Generator().manual_seed(tokens + 31 * group)
    e = Episode(
        Question(f"q{group}", "1+1", "2"), group, torch.tensor([1, 2]), torch.tensor([ids] + [9] * (tokens - 1)),
        -torch.rand(tokens, generator=rng), torch.ones(tokens, dtype=torch.bool), "stop", mode=mode, reward=reward,
        advantage=advantage, text=text, correct=correct,
    )  # fmt: skip
    if first is not None:
        e.behaviour_logprobs[0] = first
    return e


def total(split, aggregation, kl_average="as_loss"):
    """The loss of a step cut into micro-batches, with log-probs that do not depend on the cut."""
    counts = Counts(sum(e.num_tokens for part in split for e in part), sum(map(len, split)))
    args = options(aggregation, kl_average=kl_average, kl_coef=0.1, entropy_coef=0.1, alpha=0.1)
    value = 0.0
    for part in split:
        mb = pack(part)
        logprobs = mb.behaviour_logprobs * 1.3
        value += loss(logprobs.double(), -logprobs.double(), mb, counts, args)[0].item()
    return value


def test_no_split_changes_the_loss_but_the_official_one():
    es = [
        episode(*e)
        for e in zip(
            ("think", "short", "think", "malformed", "short", "think"),
            (9, 3, 5, 4, 1, 17),
            (1.0, -0.5, 0.25, -0.75, 0.3, -1.0),
        )
    ]
    splits = ([es], [es[:2], es[2:]], [[e] for e in es], [es[4:], es[:1], es[1:4]])
    for aggregation in ("paper", "vanilla", "vanilla_code"):
        for kl_average in ("sequence", "token"):
            values = [total(split, aggregation, kl_average) for split in splits]
            assert values == pytest.approx([values[0]] * 4, rel=1e-6), aggregation
    values = [total(split, "code") for split in splits]
    assert max(values) - min(values) > 0.1, "micro-batches are summed as they are"


# --- the two-mode bandit (specification 13)


def bandit(aggregation, steps=300, short_length=20, think_length=80, alpha=0.05, lr=0.02):
    """P(<think>) over the steps where thinking is right nine times in ten and short answers learn in proportion to what
    the update gives their response tokens: from 0.37 towards 0.9, past 0.75 of 0.9 on the way.

    One logit for the choice, one for the skill of short answers. Expected rewards, so nothing is random.
    """
    choice = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    skill = torch.tensor([math.log(0.37 / 0.63)], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [choice], "lr": lr}, {"params": [skill], "lr": lr}], lr=lr)
    out = []
    for _ in range(steps):
        p_think, p_right = choice.sigmoid().item(), skill.sigmoid().item()
        out.append(p_think)
        # The four outcomes with their probabilities as multiplicities: 1000 samples in all.
        p = {("think", True): 0.9, ("think", False): 0.1, ("short", True): p_right, ("short", False): 1 - p_right}
        outcomes = [(m, right, x * (p_think if m == "think" else 1 - p_think)) for (m, right), x in p.items()]
        numbers = [round(1000 * share) for *_, share in outcomes]
        r = [{"think": 0.5, "short": 1.0}[mode] if right else -1.0 for mode, right, _ in outcomes]
        mean = sum(n * x for n, x in zip(numbers, r)) / sum(numbers)
        value = 0.0
        T = {"think": think_length, "short": short_length}
        count = Counts(sum(n * (T[m] + 1) for n, (m, *_) in zip(numbers, outcomes)), sum(numbers))
        for (mode, right, _), n, x in zip(outcomes, numbers, r):
            first = torch.nn.functional.logsigmoid(choice if mode == "think" else -choice)
            # Of the response tokens only the one that decides the answer is not certain.
            decides = torch.nn.functional.logsigmoid(skill if right else -skill) if mode == "short" else skill * 0
            lp = torch.cat([first, decides, torch.zeros(T[mode] - 1, dtype=torch.float64)])
            mb = batch([T[mode] + 1], None, lp.detach(), torch.full_like(lp, x - mean), modes=[mode])
            value = value + n * loss(lp, None, mb, count, options(aggregation, alpha=alpha))[0]
        optimizer.zero_grad()
        (value * 200).backward()
        optimizer.step()
    return np.array(out)


def test_the_bandit_shows_the_u_curve_under_the_decoupled_loss():
    """The short share falls while short answers pay less than 0.75 p_think, and rises once they have learned."""
    short = 1 - bandit("paper")
    low = short.argmin()
    assert 5 < low < 290 and short[low] < 0.4 and short[-1] > short[low] + 0.3, short[::30]


def test_the_normaliser_changes_the_speed_of_the_choice_and_not_its_direction():
    """Advantages of a group add up to 0. So on policy the logit of `<short>` moves by K (w_s p_t + w_t p_s), with K the
    advantage of all short samples together and w the weights of the control tokens: vanilla GRPO goes where DeGRPO
    goes, only faster where it thinks and slower where it answers short.
    """
    T = {"think": 40, "short": 4}
    modes = ["think"] * 6 + ["short"] * 2
    A = torch.tensor([0.375] * 6 + [-1.125] * 2, dtype=torch.float64)  # short answers are wrong here
    choice = torch.tensor([math.log(3.0)], dtype=torch.float64, requires_grad=True)  # p_think = 3 / 4
    w = {"paper": {"think": 0.1, "short": 0.1}, "vanilla": {m: 1 / (n + 1) for m, n in T.items()}}
    for aggregation, weight in w.items():
        choice.grad = None
        first = [torch.nn.functional.logsigmoid(choice if m == "think" else -choice) for m in modes]
        logprobs = torch.cat([part for x, m in zip(first, modes) for part in (x, torch.zeros(T[m]).double())])
        lengths = [T[m] + 1 for m in modes]
        per_token = torch.repeat_interleave(A, torch.tensor(lengths))
        mb = batch(lengths, None, logprobs.detach(), per_token, modes=modes)
        loss(logprobs, None, mb, Counts(sum(lengths), 8), options(aggregation, alpha=0.1))[0].backward()
        K = -2.25 / 8
        assert choice.grad.item() == pytest.approx(K * (weight["short"] * 0.75 + weight["think"] * 0.25))


# --- reward


def official_reward(inputs, mode_rule):
    """The reward of a golden sequence by our functions, from its response alone."""
    response = (
        inputs["sequence"]
        .split("<\uff5cAssistant\uff5c>", 1)[1]
        .removesuffix("<\uff5cend\u2581of\u2581sentence\uff5c>")
    )
    gold = inputs["gold"][0] if isinstance(inputs["gold"], list) and inputs["gold"] else inputs["gold"]
    answer = EXTRACT[mode_rule](response)
    correct = answer is not None and gold != [] and same_answer(answer, gold)
    e = episode(Thinkless.format_of(response), 3, text=response, correct=correct)
    return reward(e, 0.5, SimpleNamespace(mode_rule=mode_rule))


def differences(mode_rule):
    out = {}
    for case in json.loads((GOLDEN / "degrpo_reward.json").read_text())["cases"]:
        ours, theirs = official_reward(case["inputs"], mode_rule), case["expected"]["reward"]
        if ours != theirs:
            out[case["name"]] = (theirs, ours, case.get("quirk", False))
    return out


# The official code searches the question too; here a question that quotes a tag changes nothing.
IN_THE_QUESTION = {"prompt_mentions_short": (1.0, 0.5), "prompt_mentions_think_pair": (0.5, -1.0)}
# By the first token: what the official code pays although another control token stands in the answer.
STRICTER = {
    "short_then_think_block_right": (1.0, -1.0),  # thinks at length and takes the reward of a short answer
    "short_then_unclosed_think": (1.0, -1.0),
    "think_mentions_short_right": (1.0, -1.0),  # a thinking answer that prints <short>
    "think_mentions_short_after": (1.0, -1.0),
    "unclosed_think_then_short": (1.0, -1.0),
    "two_closing_tags_right_first": (0.5, -1.0),
    "two_short_tokens_right_first": (1.0, -1.0),
    "closing_tag_before_opening": (0.5, -1.0),
    "short_with_stray_closing_tag": (1.0, -1.0),
    "mode_text_before_token": (1.0, -1.0),  # "Sure. <short>": the first token is no control token
}


@pytest.mark.parametrize(
    "mode_rule, listed", [("substring", IN_THE_QUESTION), ("first_token", IN_THE_QUESTION | STRICTER)]
)
def test_rewards_equal_the_official_code_but_for_the_listed_cases(mode_rule, listed):
    """All differences are marked `quirk` in the golden file: outside of those 68 of 68 agree under either rule."""
    found = differences(mode_rule)
    assert {name: pair[:2] for name, pair in found.items()} == listed
    assert all(quirk for *_, quirk in found.values())


@pytest.mark.parametrize(
    "response, first_token, substring",
    [
        ("<short>\n so \\boxed{27}", 1.0, 1.0),
        ("<think>\nx</think>\n\\boxed{27}", 0.5, 0.5),
        ("<think>\n\\boxed{27}", -1.0, -1.0),  # thinking never closed
        ("<think> \\boxed{27}</think> no box", -1.0, -1.0),
        ("\\boxed{27}", -1.0, -1.0),  # no control token
        ("<short>\n27", -1.0, -1.0),  # no box
        ("<short>\n<think>z</think>\\boxed{27}", -1.0, 1.0),  # two modes in one answer
        ("<short><short>\\boxed{27}", -1.0, -1.0),  # official: the text between the two
        ("", -1.0, -1.0),
        ("<short>", -1.0, -1.0),
        ("<think></think>", -1.0, -1.0),
        ("<short>\\boxed{26} no, \\boxed{27}", 1.0, 1.0),
    ],
)
def test_hand_made_rewards(response, first_token, substring):
    for rule, want in (("first_token", first_token), ("substring", substring)):
        assert official_reward({"sequence": "<\uff5cAssistant\uff5c>" + response, "gold": "27"}, rule) == want


def test_a_mode_spelt_with_ordinary_tokens_is_malformed():
    """The mode is a token id: text that only looks like a control token earns nothing, whatever the grader says."""
    e = episode("malformed", 4, text="<short> \\boxed{2}", correct=True)
    assert reward(e, 0.5, SimpleNamespace(mode_rule="first_token")) == -1.0


@pytest.mark.parametrize("gamma, want", [(0.0, 1.0), (0.2, 0.8), (0.5, 0.5)])
def test_gamma_is_what_thinking_costs(gamma, want):
    rule = SimpleNamespace(mode_rule="first_token")
    assert reward(episode("think", 4, correct=True), gamma, rule) == pytest.approx(want)
    assert reward(episode("short", 4, correct=True), gamma, rule) == 1.0
    assert reward(episode("think", 4), gamma, rule) == reward(episode("short", 4), gamma, rule) == -1.0


def test_the_break_even_of_the_modes():
    """Short pays where p_short > (1 - gamma / 2) p_think (specification 5.3)."""
    rule = SimpleNamespace(mode_rule="first_token")
    for gamma in (0.2, 0.5):
        right = {m: reward(episode(m, 4, correct=True), gamma, rule) for m in ("think", "short")}
        expected = {m: lambda p, r=r: p * r - (1 - p) for m, r in right.items()}
        even = (1 - gamma / 2) * 0.8
        assert expected["short"](even) == pytest.approx(expected["think"](0.8))


def test_schedule_of_gamma():
    gammas = parse_schedule("gamma_schedule", "0:0.5,300:0.2", below=1.0)
    at = lambda step: [gamma for done, gamma in gammas if done < step][-1]  # noqa: E731  as in main
    assert [at(1), at(300), at(301), at(480)] == [0.5, 0.5, 0.2, 0.2]


@pytest.mark.parametrize("text", ["", "0.5", "0:0.5;300:0.2", "100:0.5", "0:0.5,300:0.2,200:0.1", "0:1.0", "0:-0.1",
                                  "0:0.5,300:", "0:0.5,0:0.2", "a:b", "0:nan"])  # fmt: skip
def test_a_schedule_that_is_none(text):
    with pytest.raises(UserError, match="--gamma_schedule.*pairs steps:value"):
        parse_schedule("gamma_schedule", text, below=1.0)


# --- advantages


@pytest.mark.parametrize("inputs, case", golden("degrpo_loss.json", "group_advantage"))
def test_advantages_equal_the_official_code(inputs, case):
    groups = {}
    for i, name in enumerate(inputs["group_id"]):
        groups.setdefault(name, []).append(i)
    for std, key in (("none", "advantage_mean_only"), ("unbiased", "advantage_std")):
        got = [0.0] * len(inputs["rewards"])
        for rows in groups.values():
            es = [episode("think", 4, reward=inputs["rewards"][i]) for i in rows]
            for i, a in zip(rows, advantages(es, SimpleNamespace(std=std))):
                got[i] = a
        assert got == pytest.approx(case["expected"][key], abs=2e-6 if std == "unbiased" else 1e-9)


def test_equal_rewards_teach_nothing_even_if_fp32_cannot_hold_them():
    for std in ("none", "unbiased"):
        A = advantages([episode("think", 4, reward=0.8)] * 8, SimpleNamespace(std=std))
        assert A == [0.0] * 8


# --- rollouts, modes, metrics


def test_every_sample_is_free_to_choose_its_mode():
    args = Args(num_generations=8)
    asked = [(i, Question(f"q{i}", "1+1", "2"), [5, 6]) for i in (4, 9)]
    requests = plan_rollouts(asked, args, (3,), step=2)
    assert len(requests) == 16 and all(r.forced == () for r in requests)
    assert len({r.seed for r in requests}) == 16 and [r.tag[1] for r in requests] == [4] * 8 + [9] * 8


def test_mode_is_read_from_the_first_token_alone():
    assert [FORM.mode_of(ids) for ids in ([THINK, 5], [SHORT], [5, SHORT, THINK])] == ["think", "short", "malformed"]
    assert FORM.mode_of(torch.tensor([SHORT, THINK])) == "short"


def test_metrics_by_mode():
    right = dict(correct=True, reward=1.0)
    es = [
        episode("think", 20, group=0, first=math.log(0.7), **right), episode("think", 30, group=0, first=0.0, **right),
        episode("short", 4, group=1, first=math.log(0.4), **right), episode("short", 6, group=1, first=0.0, **right),
        episode("malformed", 5, group=2, first=math.log(0.1)), episode("think", 10, group=2, first=math.log(0.2)),
    ]  # fmt: skip
    got = metrics(es, FORM, ONE_PROCESS)
    assert (got["degrpo/num_think"], got["degrpo/num_short"], got["degrpo/num_malformed"]) == (3, 2, 1)
    assert got["mode/malformed_share"] == pytest.approx(1 / 6)  # token 0 is neither
    assert (got["mode/think_accuracy"], got["mode/short_accuracy"]) == (pytest.approx(2 / 3), 1.0)
    assert (got["mode/think_tokens"], got["mode/short_tokens"]) == (20.0, 5.0)
    assert (got["mode/think_all_correct_groups"], got["mode/short_all_correct_groups"]) == (1, 1)
    assert got["group/all_wrong_share"] == pytest.approx(1 / 3)
    assert got["degrpo/first_think_prob"] == pytest.approx((0.7 + 1.0 + 0.6 + 0.0 + 0.2) / 5)


def test_metrics_of_a_mode_that_is_gone():
    got = metrics([episode("malformed", 4)] * 2, FORM, ONE_PROCESS)
    assert got["mode/think_accuracy"] is None and got["mode/think_share"] == 0 == got["degrpo/num_think"]
    assert got["mode/malformed_share"] == 1 and got["degrpo/first_think_prob"] is None


@pytest.mark.parametrize(
    "option, message",
    [
        (["--aggregation", "mean"], "--aggregation: Expected a Literal"),
        (["--mode_rule", "text"], "--mode_rule: Expected a Literal"),
        (["--std", "biased"], "--std: Expected a Literal"),
        (["--alpha", "-1"], "--alpha: Not of type NonNegative: -1"),
        (["--num_generations", "0"], "--num_generations: Not of type PositiveInt: 0"),
    ],
)
def test_options_that_make_no_sense(option, message):
    with pytest.raises(UserError, match=message):
        parse_args(Args, option)


@pytest.mark.parametrize("name, options", [
    ("degrpo_1_5b", Args), ("degrpo_1_5b_phase2", Args), ("toy_degrpo", Args), ("eval_degrpo_1_5b", EvaluateArgs),
    ("warmup_thinkless_1_5b", SftArgs), ("cold_start_thinkless", SftArgs),
])  # fmt: skip
def test_the_runs_of_the_paper_have_no_misspelt_option(name, options):
    parse_args(options, ["--config", str(ROOT / f"experiments/{name}.yaml")])


def test_the_defaults_are_the_official_run():
    """experiments/degrpo_1_5b.yaml writes out what degrpo.py does anyway, apart from names of files."""
    written = vars(parse_args(Args, ["--config", str(ROOT / "experiments/degrpo_1_5b.yaml")]))
    differ = {key for key, value in vars(Args()).items() if written[key] != value}
    assert differ == {"output_dir", "eval_data"}


# --- control tokens and templates


@pytest.fixture(scope="module")
def lab():
    return formats.tokenizer("thinkless")


def test_control_tokens_of_the_laboratory(lab):
    control = Thinkless(lab, Args())
    assert {lab.decode([token]) for token in control.tokens.values()} == {"<think>", "<short>"}
    assert lab.decode(prompts.render(lab, "1+1")) == "<|begin|><|User|>1+1<|Assistant|>"
    spec = control.eval_spec()
    assert list(spec.settings) == ["adaptive", "always_think", "never_think"]
    assert spec.settings["never_think"] == ((control.tokens["short"], 1.0),)


@pytest.mark.parametrize("end", ["<think>\n", "<think>", "\n", " "])
def test_a_prompt_that_goes_on_after_the_assistants_mark_is_refused(end):
    tokenizer = formats.tokenizer("thinkless")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|Assistant|>{% endif %}", f"<|Assistant|>{end}{{% endif %}}"
    )
    with pytest.raises(UserError, match="must end right at the assistant's mark.*found") as error:
        Thinkless(tokenizer, Args())
    assert repr(("<|Assistant|>" + end)[-8:])[1:-1] in str(error.value)


def test_a_header_that_ends_in_a_newline_in_training_too_is_fine(lab):
    """Qwen2's own template: `<|im_start|>assistant` and a newline stand before finished answers as well."""
    tokenizer = formats.tokenizer("thinkless")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|Assistant|>", "<|Assistant|>\n")
    assert prompts.check_ends_at_assistant(tokenizer) == "<|Assistant|>\n"


def test_a_tokenizer_without_the_control_token_is_refused():
    tokenizer = formats.tokenizer("think")
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n", "")
    with pytest.raises(UserError, match="does not hold '<short>' as one token"):
        Thinkless(tokenizer, Args())


def test_responses_of_the_laboratory_are_right_and_survive_the_tokenizer(lab):
    rng, control, eos = np.random.default_rng(0), Thinkless(lab, Args()), lab.eos_token_id
    for i in range(60):
        q = chain.make_question(rng, i % 6 + 1, "x")
        for mode in Thinkless.tags:
            text = Thinkless.response(q, mode, rng)
            ids = lab(text, add_special_tokens=False)["input_ids"]
            assert control.extract_answer(text) == q.answer and control.mode_of(ids) == mode
            assert prompts.decode(lab, ids + [eos], (eos,)) == text


def test_rows_of_the_laboratory_are_pairs_with_the_control_token_supervised():
    rows = Thinkless.rows(SftArgs(formats="thinkless"), np.random.default_rng(0), 40, 1)
    check_pairs(rows, 40)
    assert all(row.start == 0 for row in rows)


# --- warm-up rows


def write_pairs(path: Path, problems: list[str]) -> Path:
    rows = [{"problem": p, "response": text} for p in problems
            for text in ("<think>\nwell\n</think>\n\\boxed{7}", "<short>\n\\boxed{7}")]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_rows_of_a_pair_are_in_the_same_batch(tmp_path):
    rows = load_rows(write_pairs(tmp_path / "pairs.jsonl", [f"{i}+1" for i in range(10)]))
    check_pairs(rows, 8)
    args = SftArgs(pairs=True, batch_size=8)
    seen = []
    for step in (1, 2):
        batch = batch_of(rows, step, args)
        assert len(batch) == 8
        for one, other in zip(batch[::2], batch[1::2]):
            assert one.question.problem == other.question.problem and one.response != other.response
        seen += [row.question.problem for row in batch[::2]]
    assert len(set(seen)) == 8, "an epoch is a permutation of the pairs"


@pytest.mark.parametrize("break_it", ["order", "odd", "batch", "same mode"])
def test_rows_that_are_no_pairs(tmp_path, break_it):
    rows = load_rows(write_pairs(tmp_path / "pairs.jsonl", ["1+1", "2+2"]))
    rows = {"order": [rows[0], rows[2], rows[1], rows[3]], "odd": rows[:3], "batch": rows,
            "same mode": [rows[0], rows[0]]}[break_it]  # fmt: skip
    message = "have to be even" if break_it in ("odd", "batch") else "line .*have to be a pair"
    with pytest.raises(UserError, match=message):
        check_pairs(rows, 3 if break_it == "batch" else 2)


# --- scoring, routers, tables


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>\n \\boxed{5} and so", "5"),  # inside an unfinished thinking
        ("\\boxed{4} \\boxed{5}", "5"),
        ("<short> it is <answer>12</answer>", "12"),
        ("so\n**Answer:** 8 apples\n", "8 apples"),
        ("**Final Answer**: 9", "9"),
        ("first 3, then 1,250.", "250"),  # commas are kept
        ("at -3.5, so -4", "4"),
        ("it is .5", ".5"),
        ("nothing", None),
    ],
)
def test_lenient_answers(text, answer):
    assert lenient_answer(text) == answer


@pytest.mark.parametrize("text, gold, right", [
    ("\\boxed{27}", "27", True), ("\\boxed{5} \\boxed{027.0}", "27", True), ("\\boxed{27}", "027", True),
    ("\\boxed{-27}", "27", False), ("\\boxed{27/2}", "27", False), ("\\boxed{27.1}", "27", False),
    ("\\boxed{27 m}", "27", False), ("\\boxed{5}, the final answer is 27", "27", False), ("\\boxed{inf}", "27", False),
    ("The final answer is **27**, not 3", "27", True), ("from 3 to 27.", "27", True),
    ("The final answer is -27.", "27", False), ("nothing", "27", False),
])  # fmt: skip
def test_aime_is_a_float_in_the_last_box(text, gold, right):
    """The general rule takes "27/2" and "-27" for 27, because the first numbers are equal."""
    answer = aime_answer(text)
    assert (answer is not None and lenient_same(answer, gold)) is right


def test_lenient_scoring_reads_aime_by_its_own_script_and_counts_a_later_think(lab):
    args = EvaluateArgs(answer_format="thinkless", scoring="lenient")
    spec = spec_of(lab, args)
    read = {name: spec_of(lab, args, name).extract_answer for name in ("aime24", "aime25_test", "math500")}
    assert read == {"aime24": aime_answer, "aime25_test": aime_answer, "math500": lenient_answer}
    think, short = (lab.convert_tokens_to_ids(f"<{tag}>") for tag in ("think", "short"))
    modes = [(think, 5), (short, 5), (short, 5, think), (5, think), (5, 5)]
    assert [spec.mode_of(list(ids)) for ids in modes] == ["think", "short", "think", "think", "malformed"]
    strict = spec_of(lab, EvaluateArgs(answer_format="thinkless"))
    assert [strict.mode_of(list(ids)) for ids in modes] == ["think", "short", "short", "malformed", "malformed"]


@pytest.mark.parametrize(
    "answer, gold, lenient, strict",
    [
        ("3/4", "3/5", True, False),  # the first numbers are equal: how the paper's scores are inflated
        ("-3", "3", True, False),
        ("-3.5", "3.5", False, False),
        ("12 apples", "12", True, True),
        ("x", "y", False, False),
        ("\\frac{1}{2}", "0.5", True, True),
        ("1,250", "1250", True, True),  # by math-verify
        ("1,000", "1,200", True, False),  # commas are kept: the first number of both is 1
        (".5", "5", False, False),
        ("+0.5", "0.5", True, True),
    ],
)
def test_lenient_and_strict_equality(answer, gold, lenient, strict):
    assert lenient_same(answer, gold) is lenient
    assert same_answer(answer, gold) is strict


def graded(mode, n=6, samples=2):
    return [{"question": i, "sample": k, "mode": mode, "difficulty": None, "correct": (mode == "think") or i == 0,
             "tokens": 50 if mode == "think" else 5} for i in range(n) for k in range(samples)]  # fmt: skip


def test_a_router_takes_the_rows_of_the_mode_it_picked():
    rows = {"always_think": graded("think"), "never_think": graded("short")}
    picks = ["short", "think", "think", "short", "think", "short"]
    routed = router.routed_rows(rows, picks)
    assert [(r["question"], r["sample"]) for r in routed] == [(i, k) for i in range(6) for k in range(2)]
    assert [r["mode"] for r in routed[::2]] == picks
    result = summarise(routed, ("think", "short"))
    assert result["accuracy"] == pytest.approx(4 / 6) and result["mean_tokens"] == pytest.approx(27.5)
    assert result["modes"]["think"]["share"] == 0.5


def test_the_coin_is_fair_and_repeats_with_the_seed():
    picks = router.coin_picks(1000, seed=3)
    assert picks == router.coin_picks(1000, seed=3) != router.coin_picks(1000, seed=4)
    assert 440 < picks.count("think") < 560


@pytest.mark.parametrize(
    "reply, want",
    [
        ("EASY", "short"), ("Hard.", "think"), ("It is not easy, so: HARD", "think"),
        ("<think>\nhard? no.</think>\nEASY", "short"), ("<think>\nlooks easy", None), ("uneasy", None), ("", None),
    ],
)  # fmt: skip
def test_the_verdict_of_a_judge(reply, want):
    assert router.verdict(reply) == want


def test_a_router_needs_both_forced_settings():
    router.check_routers(["adaptive", "always_think"])
    with pytest.raises(UserError, match="router_random takes its rows from never_think"):
        router.check_routers(["always_think", "router_random"])


def test_tokens_as_the_paper_counts_them(lab):
    """The template around a question and an answer: begin, user's mark, assistant's mark, end."""
    assert prompts.template_tokens(lab) == 4


def test_the_papers_rows_stand_beside_ours():
    result = {"accuracy": 0.5, "mean_tokens": 100.0, "mean_tokens_paper": 160.0, "modes": {"think": {"share": 0.25}}}
    rows = [{"setting": "adaptive", "benchmark": "gsm8k", "result": result}]
    table = paper_table(rows, load_paper("thinkless-1.5b"))
    assert "50.0 / 160 / 25.0" in table and "84.18" not in table and "84.2 / 624 / 13.31" in table
    paper = load_paper("adaptthink-1.5b")
    assert list(paper["rows"])[-1] == "AdaptThink" and "NoThinking %" in paper["title"]


def test_the_curves_of_both_modes_beside_each_other(tmp_path):
    for name in ("a", "b", "c"):
        rows = [{"step": i, "mode/think_share": 1 / i, "mode/short_share": 1 - 1 / i, "mode/think_accuracy": None,
                 "mode/short_accuracy": 0.5, "mode/short_all_correct_groups": i} for i in range(1, 9)]  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = [f"DeGRPO={tmp_path / 'a'},{tmp_path / 'b'}", f"vanilla $1={tmp_path / 'c'}"]
    plot_modes.main([*groups, "--plot", str(tmp_path / "modes.png")])
    assert (tmp_path / "modes.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="NAME=RUN_DIR"):
        plot_modes.main(["a=", "--plot", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="Name the file"):
        plot_modes.main([*groups, "--plot", str(tmp_path / "x.txt")])


# --- the user's own commands

CHAIN = (
    "--chain_questions 16 --chain_eval_questions 24 --prompts_per_step 4 --num_generations 4 --max_new_tokens 48 "
    "--rollout_rows 64 --eval_every 2 --save_every 1"
)


def run_module(module: str, *args: str):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    python = ROOT / ".venv/bin/python"
    command = [str(python) if python.exists() else "python3", "-m", f"adaptive_reasoning.{module}", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """A chain model that has learned nothing: enough for the plumbing, and made in no time."""
    folder, tokenizer = tmp_path_factory.mktemp("lab"), formats.tokenizer("thinkless")
    model = chain.tiny_model(tokenizer, hidden=32, layers=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def comparable(folder: Path) -> list[dict]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and "per_s" not in k} for row in rows]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(laboratory, tmp_path):
    """Two steps at once, and one after a kill: metrics, weights and the schedule of gamma are the same."""
    config = ["--config", "experiments/toy_degrpo.yaml", "--model", laboratory, *CHAIN.split()]
    config += ["--kl_coef", "0.01", "--entropy_coef", "0.01", "--gamma_schedule", "0:0.5,1:0.2", "--max_steps", "2"]
    assert run_module("degrpo", *config, "--output_dir", tmp_path / "whole").returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_000002")
    done = run_module("degrpo", *config, "--output_dir", tmp_path / "resumed")
    assert done.returncode == 0 and "continuing" in done.stdout, done.stderr[-2000:]
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "whole")
    weights = [tmp_path / n / "checkpoints/step_000002/model/model.safetensors" for n in ("whole", "resumed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert 0 < rows[0]["degrpo/first_think_prob"] < 1 and rows[0]["step"] == 0
    steps = rows[1:]
    assert all(row["check/logprob_gap_max"] < 1e-4 for row in steps)
    assert all(row["loss/clip_fraction"] == 0 for row in steps), "one update a step: every ratio is 1"
    assert all(row["degrpo/num_think"] + row["degrpo/num_short"] + row["degrpo/num_malformed"] == 16 for row in steps)
    settings = {row["setting"] for row in read_jsonl(tmp_path / "whole" / "evaluations.jsonl")}
    assert settings == {"adaptive", "always_think", "never_think"}
    assert (tmp_path / "whole" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("switches", [
    "--aggregation code --minibatches_per_step 2 --mode_rule substring --kl_coef 0.001 --tokens_per_micro_batch 128",
    "--aggregation vanilla --std unbiased --entropy_coef 0.001 --gamma 0 --kl_average token",
    "--aggregation vanilla_code --alpha 0",
])  # fmt: skip
def test_every_switch_trains(laboratory, tmp_path, switches):
    done = run_module("degrpo", "--config", "experiments/toy_degrpo.yaml", "--model", laboratory, *CHAIN.split(),
                      "--output_dir", tmp_path / "run", "--max_steps", 1, *switches.split())  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_evaluation_with_routers_and_both_ways_of_counting(laboratory, tmp_path):
    done = run_module(
        "benchmark", "--answer_format", "thinkless", "--model", laboratory, "--task", "chain",
        "--chain_eval_questions", 12, "--eval_samples", 2, "--max_new_tokens", 48, "--dtype", "fp32",
        "--output_dir", tmp_path,
        "--scoring", "lenient",
        "--settings", "adaptive,always_think,never_think,router_random,router_judge", "--judge_max_new_tokens", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["setting"]: row["result"] for row in json.loads((tmp_path / "evaluation.json").read_text())}
    assert list(rows) == ["adaptive", "always_think", "never_think", "router_random", "router_judge"]
    assert rows["always_think"]["modes"]["think"]["share"] == 1
    never = [row["response"] for row in read_jsonl(tmp_path / "samples.jsonl") if row["setting"] == "never_think"]
    assert len(never) == 24 and all(text.startswith("<short>") for text in never)
    thinks = sum("<think>" in text for text in never) / 24  # wherever it stands in the response
    assert rows["never_think"]["modes"]["think"]["share"] == pytest.approx(thinks)
    assert rows["never_think"]["modes"]["short"]["share"] == pytest.approx(1 - thinks)
    assert all(r["mean_tokens_paper"] > r["mean_tokens"] + 4 for r in rows.values())
    assert 0 <= rows["router_judge"]["judge_unclear_share"] <= 1 and rows["router_judge"]["judge_tokens"] > 0


@pytest.mark.slow
def test_warm_up_and_two_steps_on_real_questions(tmp_path):
    """Pairs of GSM8K questions, `<short>` from a reserved slot, two steps of warm-up, two of DeGRPO, then the rest."""
    data = os.environ.get("ADAPTIVE_REASONING_DATA")
    if not data:
        pytest.skip("ADAPTIVE_REASONING_DATA is not set: no real questions here")
    base, questions = qwen_folder(tmp_path / "base"), Path(data) / "gsm8k_train.jsonl"
    rows = read_jsonl(questions)[:16]
    pairs = write_pairs(tmp_path / "pairs.jsonl", [row["problem"] for row in rows])
    done = run_module(
        "sft", "--config", "experiments/warmup_thinkless_1_5b.yaml", "--model", base, "--data", pairs,
        "--dtype", "fp32",
        "--max_steps", 2, "--batch_size", 8, "--max_new_tokens", 64, "--output_dir", tmp_path / "warm",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer = load_tokenizer(str(tmp_path / "warm" / "model"))
    Thinkless(tokenizer, Args())
    common = [
        "--config", "experiments/degrpo_1_5b.yaml", "--model", tmp_path / "warm" / "model", "--data", questions,
        "--train_limit", 64, "--dtype", "fp32", "--prompts_per_step", 4, "--num_generations", 4, "--max_new_tokens", 24,
        "--eval_data", questions, "--eval_limit", 4, "--grader_workers", 1, "--rollout_rows", 32,
        "--tokens_per_micro_batch", 2048, "--save_every", 1, "--output_dir", tmp_path / "run",
    ]  # fmt: skip
    for steps in (1, 2):
        done = run_module("degrpo", *common, "--max_steps", steps)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "continuing" in done.stdout
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert all(row["check/logprob_gap_max"] < 1e-3 for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")[1:])
