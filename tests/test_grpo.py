"""GRPO against the official implementations (tests/golden), hand-computed numbers, and ARM's formats gone wrong."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adaptive_reasoning import formats, grpo
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import SHARED
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.arm import Arm
from adaptive_reasoning.formats.boxed import Boxed
from adaptive_reasoning.formats.statistics import mode_metrics
from adaptive_reasoning.grpo import METRICS, Args, advantages, loss, metrics
from adaptive_reasoning.learner.packing import Counts
from adaptive_reasoning.run.options import parse_args
from adaptive_reasoning.tasks import chain, chat_template, prompts

GOLDEN = Path(__file__).parent / "golden"


def cases(name, kind=None):
    loaded = json.loads((GOLDEN / name).read_text())["cases"]
    return [pytest.param(c["inputs"], c, id=c["name"]) for c in loaded if kind in (None, c.get("kind"))]


def options(**changes):
    """The options a loss reads, by default those of the golden cases: no clip higher, no KL, no entropy."""
    given = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "entropy_coef": 0.0, "aggregation": "token_mean"}
    return SimpleNamespace(**{**given, "max_new_tokens": 10, "std": "unbiased", **changes})


def episode(mode, reward, group=0, tokens=4, advantage=0.0, text=""):
    return Episode(
        Question(f"q{group}", "1+1", "2"), group, torch.tensor([1, 2]), torch.arange(tokens), torch.zeros(tokens),
        torch.ones(tokens, dtype=torch.bool), "stop", mode=mode, reward=float(reward), advantage=advantage, text=text,
        correct=bool(reward),
    )  # fmt: skip


def batch(lengths, dtype=torch.float64, seed=0, **rows):
    """A MicroBatch-like view of random numbers, and its log-probs as a leaf."""
    lengths = torch.tensor(lengths)
    N = int(lengths.sum())
    random = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(N, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    mb = SimpleNamespace(
        old_logprobs=draw() - 2, ref_logprobs=draw() - 2, advantages=draw(), lengths=lengths,
        sequence=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
    )  # fmt: skip
    vars(mb).update(rows)
    return mb, (mb.old_logprobs + 0.3 * draw()).requires_grad_()


# --- loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "inputs, case", [p for p in cases("ppo_gae.json", "policy_loss") if not p.values[0]["dual_clip"]]
)
def test_loss_and_gradient_equal_the_official_code(inputs, case, dtype):
    mask = torch.tensor(inputs["mask"]).bool()
    t = lambda key: torch.tensor(inputs[key], dtype=dtype)  # noqa: E731
    logprobs = t("log_prob").requires_grad_()
    lengths = mask.sum(1)
    mb = SimpleNamespace(
        old_logprobs=t("old_log_prob")[mask], advantages=t("advantages")[mask], lengths=lengths,
        sequence=torch.repeat_interleave(torch.arange(len(mask)), lengths),
    )  # fmt: skip
    args = options(clip_low=inputs["clip"], clip_high=inputs["clip"])
    value, stats = loss(logprobs[mask], None, mb, Counts(int(mask.sum()), len(mask)), args)
    value.backward()
    want = case["expected"]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(value, torch.tensor(want["loss"], dtype=dtype), **tolerance)
    torch.testing.assert_close(logprobs.grad, torch.tensor(want["grad_log_prob"], dtype=dtype), **tolerance)
    assert float(stats["loss/clip_fraction"]) == pytest.approx(want["clip_fraction"], abs=1e-6)
    assert float(stats["loss/approx_kl"]) == pytest.approx(want["approx_kl"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant", "micro_batch"])
def test_aggregation_is_what_its_name_says(aggregation):
    mb, logprobs = batch([3, 1, 6])
    value, _ = loss(logprobs, None, mb, Counts(10, 3), options(aggregation=aggregation))
    ratio = (logprobs - mb.old_logprobs).exp()
    terms = torch.maximum(-mb.advantages * ratio, -mb.advantages * ratio.clamp(0.8, 1.2))
    per_sequence = terms.split([3, 1, 6])
    want = {
        "token_mean": terms.mean(),
        "sequence_mean": sum(part.mean() for part in per_sequence) / 3,
        "constant": terms.sum() / (3 * 10),
        "micro_batch": terms.mean(),  # one micro-batch: its mean, with the weight 3/3
    }[aggregation]
    torch.testing.assert_close(value, want)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_the_split_into_micro_batches_changes_nothing(aggregation):
    """With whole-step counts the shares add up; only the official "micro_batch" mean depends on the split."""
    mb, logprobs = batch([3, 1, 6])
    args = options(aggregation=aggregation, kl_coef=0.001, entropy_coef=0.001)
    entropy = torch.rand(10, dtype=torch.float64)
    counts = Counts(10, 3)
    whole, _ = loss(logprobs, entropy, mb, counts, args)
    parts = 0.0
    for rows, lengths in (((0, 4), [3, 1]), ((4, 10), [6])):
        cut = slice(*rows)
        part = SimpleNamespace(
            old_logprobs=mb.old_logprobs[cut], ref_logprobs=mb.ref_logprobs[cut], advantages=mb.advantages[cut],
            lengths=torch.tensor(lengths),
            sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        )  # fmt: skip
        parts = parts + loss(logprobs[cut], entropy[cut], part, counts, args)[0]
    torch.testing.assert_close(parts, whole)


def test_the_official_micro_batch_mean_depends_on_the_split():
    """Two micro-batches of 4 and 6 tokens with 2 and 1 of 3 sequences: 2/3 and 1/3 of their token means."""
    mb, logprobs = batch([3, 1, 6])
    terms = -mb.advantages * (logprobs - mb.old_logprobs).exp()
    args = options(aggregation="micro_batch", clip_low=1.0, clip_high=1e9)
    for cut, lengths, share in ((slice(0, 4), [3, 1], 2 / 3), (slice(4, 10), [6], 1 / 3)):
        part = SimpleNamespace(
            old_logprobs=mb.old_logprobs[cut], advantages=mb.advantages[cut], lengths=torch.tensor(lengths),
            sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        )  # fmt: skip
        torch.testing.assert_close(loss(logprobs[cut], None, part, Counts(10, 3), args)[0], share * terms[cut].mean())


def test_kl_and_entropy_by_hand():
    """One token, ratio 1, A = 0: 0.5 k3 - 0.25 H with k3 = e^d - d - 1, d = ref - logp = ln 2, so k3 = 1 - ln 2."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    mb = SimpleNamespace(
        old_logprobs=logprobs.detach(), ref_logprobs=logprobs.detach() + math.log(2),
        advantages=torch.zeros(1, dtype=torch.float64), lengths=torch.tensor([1]), sequence=torch.tensor([0]),
    )  # fmt: skip
    entropy = torch.tensor([0.8], dtype=torch.float64)
    value, stats = loss(logprobs, entropy, mb, Counts(1, 1), options(kl_coef=0.5, entropy_coef=0.25))
    assert value.item() == pytest.approx(0.5 * (1 - math.log(2)) - 0.25 * 0.8)
    assert float(stats["loss/ref_kl"]) == pytest.approx(1 - math.log(2)) and float(stats["loss/entropy"]) == 0.8
    value.backward()
    assert logprobs.grad.item() == pytest.approx(0.5 * (1 - 2))  # d k3 / d logp = 1 - e^d


def test_k3_is_clamped_and_then_gives_no_gradient():
    logprobs = torch.tensor([-9.0], dtype=torch.float64, requires_grad=True)
    mb, zero = batch([1])[0], torch.zeros(1, dtype=torch.float64)
    mb.old_logprobs, mb.ref_logprobs, mb.advantages = logprobs.detach(), zero, zero
    value, stats = loss(logprobs, None, mb, Counts(1, 1), options(kl_coef=1.0))
    value.backward()
    assert float(stats["loss/ref_kl"]) == 10 and logprobs.grad.item() == 0


def test_clip_high_alone():
    """DAPO's wider upper bound: ratio 1.25, A = 1 is clipped at 1.2 but not at 1.28."""
    mb, _ = batch([1])
    mb.advantages = torch.ones(1, dtype=torch.float64)
    logprobs = mb.old_logprobs + torch.log(torch.tensor(1.25, dtype=torch.float64))
    for high, want in ((0.2, -1.2), (0.28, -1.25)):
        value, _ = loss(logprobs, None, mb, Counts(1, 1), options(clip_high=high))
        assert float(value) == pytest.approx(want)


# --- advantage


@pytest.mark.parametrize("inputs, case", cases("grpo_advantage.json"))
def test_advantage_equals_the_official_code(inputs, case):
    groups = {}
    for i, (reward, group) in enumerate(zip(inputs["rewards"], inputs["group_id"])):
        groups.setdefault(group, []).append((i, episode("cot", reward)))
        groups[group][-1][1].reward = reward
    for members in groups.values():
        values = advantages([e for _, e in members], options())
        # 1 + 1e-6 of a group of one is held in fp32 by the official code, rounding / 1e-6 is what equal rewards give.
        equal = len({e.reward for _, e in members}) == 1
        tolerance = 1e-7 if len(members) == 1 else 1e-9 if equal else 1e-12
        for (i, _), value in zip(members, values):
            assert value == pytest.approx(case["expected"]["advantage"][i], rel=tolerance, abs=tolerance)


def test_advantage_without_the_std():
    group = [episode("cot", r) for r in (1, 0, 0, 1)]
    assert advantages(group, options(std="none")) == [0.5, -0.5, -0.5, 0.5]


def test_groups_without_a_signal():
    assert advantages([episode("cot", 0) for _ in range(8)], options()) == [0.0] * 8
    assert advantages([episode("cot", 1) for _ in range(8)], options()) == [0.0] * 8
    assert advantages([episode("cot", 1)], options()) == [pytest.approx(1.0)]


# --- formats


@pytest.mark.parametrize(
    "response, mode, answer",
    [
        ("<ANSWER>\nB\n</ANSWER>", "direct", "B"),
        ("<COT>\nso\n</COT>\n<ANSWER>\n 72 \n</ANSWER>", "cot", "72"),
        ("<CODE>\nx=1\n</CODE>\n<ANSWER>\n1\n</ANSWER>", "code", "1"),
        ("<LONG_COT>\nhm\n</LONG_COT>\n<ANSWER>\n1\n</ANSWER>", "long_cot", "1"),
        ("<LONG_COT>\nhm\n<ANSWER>\n1\n</ANSWER>", "long_cot", "1"),  # closing rationale tag not asked for
        ("<COT>\n</COT>\n<ANSWER>\n1\n</ANSWER>", "cot", "1"),  # nor a rationale
        ("<COT>\nhm\n</COT>\n<ANSWER>\n1", "cot", None),  # no closing answer: truncated
        ("<COT>\nhm, it is 1", "cot", None),  # truncated in the rationale
        ("<COT>\nhm\n</COT>\n1\n</ANSWER>", "cot", None),  # no opening answer
        ("</ANSWER> <ANSWER>", "unknown", None),
        ("<COT>\n</ANSWER>\n<ANSWER>", "cot", None),  # closed before it is opened
        ("1", "unknown", None),
        ("", "unknown", None),
        (" <COT>\nhm\n</COT>\n<ANSWER>\n1\n</ANSWER>", "unknown", None),  # a space before the tag
        ("<SHORT_COT>\nhm\n<ANSWER>\n1\n</ANSWER>", "unknown", None),
        ("<COT>\n<CODE>\n</COT>\n<ANSWER>\n1\n</ANSWER>", "cot", None),  # two formats in one response
        ("<CODE>\n</LONG_COT>\n</CODE>\n<ANSWER>\n1\n</ANSWER>", "code", None),
        ("<LONG_COT>\n<COT>\n</LONG_COT>\n<ANSWER>\n1\n</ANSWER>", "long_cot", None),
        ("<ANSWER>\n1\n</ANSWER>\n<COT>\nhm\n</COT>", "direct", None),
        ("<ANSWER>\n\n</ANSWER>", "direct", ""),  # empty: graded, and wrong
        ("<ANSWER>\n1\n</ANSWER>\n<ANSWER>\n2\n</ANSWER>", "direct", "1\n</ANSWER>\n<ANSWER>\n2"),
        ("<ANSWER>\n1\n</ANSWER> and more", "direct", "1"),  # text after it is not looked at
    ],
)
def test_format_gate(response, mode, answer):
    assert (Arm.format_of(response), Arm.extract_answer(response)) == (mode, answer)
    assert Arm.passes_gate(response) or answer is None


@pytest.mark.parametrize(
    "response, empty",
    [
        ("<COT>\nThe answer is B\n</COT>\n<ANSWER>\nB\n</ANSWER>", True),
        ("<COT>\n</COT>\n<ANSWER>\nB\n</ANSWER>", True),
        ("<LONG_COT>\nSo the answer is B.\n</LONG_COT>", True),
        ("<COT>\nMilk is kept cold. The answer is B\n</COT>", False),
        ("<COT>\nThe answer is 7\nbecause 3+4=7\n</COT>", False),
        ("<ANSWER>\nB\n</ANSWER>", None),
        ("hello", None),
    ],
)
def test_empty_rationales(response, empty):
    assert Arm.empty_rationale(response) is empty


def test_a_response_is_classified_by_its_first_tokens():
    """A later turn inside the response does not change its format, as it does in the official code."""
    tokenizer = formats.tokenizer("arm")
    form = Arm(tokenizer, Args())
    for mode, tag in Arm.tags.items():
        text = f"<{tag}>\n7\nAssistant:<COT>\n1"
        assert form.mode_of(tokenizer.encode(text, add_special_tokens=False)) == mode
    assert form.mode_of([]) == "unknown"


def test_a_forced_tag_keeps_its_newline():
    """The very tokens with which a response of the cold start begins: the tag, and the newline behind it."""
    tokenizer = formats.tokenizer("arm")
    form = Arm(tokenizer, Args())
    for mode, tag in Arm.tags.items():
        ids = list(form.opening(mode))
        assert tokenizer.decode(ids) == f"<{tag}>\n"
        whole = tokenizer.encode(f"<{tag}>\n3*7=1\n", add_special_tokens=False)
        assert whole[: len(ids)] == ids


@pytest.mark.parametrize("end", ["Assistant: ", "Assistant:\n", "Assistant:<think>\n", "<|im_start|>assistant\n"])
def test_a_prompt_that_does_not_end_right_behind_the_mark_is_refused(end):
    tokenizer = formats.tokenizer("arm")
    tokenizer.chat_template = tokenizer.chat_template.replace("%}Assistant:{% endif", f"%}}{end}{{% endif")
    with pytest.raises(
        UserError, match=r"must end right at the assistant's mark.*--chat_template (thinkless does it; )?plain keeps"
    ):
        Arm(tokenizer, Args())
    for mend in ("plain", "arm"):
        tokenizer.chat_template, refused = chat_template.chat_template(tokenizer, mend), tokenizer.chat_template
        Arm(tokenizer, Args())
        tokenizer.chat_template = refused
    boxed = Boxed(tokenizer, Args())
    assert list(boxed.modes) == ["response"] and boxed.extract_answer("so \\boxed{7}") == "7"


def test_every_question_gets_g_free_samples():
    args = Args(num_generations=3)
    questions = [(i, Question(f"q{i}", "1+1", "2"), [5, 6]) for i in (4, 9)]
    requests = grpo.plan_rollouts(questions, args, (3,), step=2)
    assert [r.tag[1] for r in requests] == [4] * 3 + [9] * 3
    assert all(r.forced == () for r in requests) and len({r.seed for r in requests}) == 6


# --- metrics and options


def test_metrics():
    form = Arm(formats.tokenizer("arm"), Args())
    episodes = [
        episode("long_cot", 1, 0, 40, -0.5, "<LONG_COT>\nhm\n</LONG_COT>"),
        episode("cot", 1, 0, 10, 0.5, "<COT>\nThe answer is 2\n</COT>"),
        episode("cot", 1, 1, 12, 0.0, "<COT>\n1+1=2\n</COT>"),
        episode("cot", 1, 1, 14, 0.0, "<COT>\n</COT>"),
        episode("unknown", 0, 2, 3, -1.0, "2"),
        episode("direct", 0, 2, 5, 1.0, "<ANSWER>\n3\n</ANSWER>"),
    ]
    got = metrics(episodes, form, SimpleNamespace(gather=list))
    assert got["mode/cot_share"] == 0.5 and got["mode/cot_tokens"] == 12 and got["mode/cot_accuracy"] == 1
    assert got["mode/code_share"] == 0 and got["mode/code_accuracy"] is None
    assert got["mode/cot_all_correct_groups"] == 1 and got["mode/long_cot_all_correct_groups"] == 0
    assert got["group/all_wrong_share"] == pytest.approx(1 / 3)
    assert got["group/all_correct_share"] == pytest.approx(2 / 3)
    assert got["group/all_correct_mixed_share"] == pytest.approx(1 / 3)
    assert got["reward/correct_negative_share"] == 0.25  # of four right ones
    assert got["rollout/empty_rationale_share"] == 0.5  # of four rationales
    assert got.keys() <= (METRICS | mode_metrics(form)).keys() and not METRICS.keys() & SHARED.keys()


@pytest.mark.parametrize(
    "option, message",
    [
        (["--aggregation", "mean"], "--aggregation: Expected a Literal"),
        (["--kl_coef", "-1"], "--kl_coef: Not of type NonNegative: -1"),
        (["--num_generations", "0"], "--num_generations: Not of type PositiveInt: 0"),
    ],
)
def test_options_that_make_no_sense(option, message):
    with pytest.raises(UserError, match=message):
        parse_args(Args, option)


# --- the formats on chains


def test_chain_responses_pass_the_gate_and_survive_the_tokenizer():
    tokenizer, rng = formats.tokenizer("arm"), np.random.default_rng(0)
    form = Arm(tokenizer, Args())
    for i in range(60):
        question = chain.make_question(rng, i % 6 + 1, "x")
        lengths = []
        for mode in Arm.tags:
            text = Arm.response(question, mode, rng)
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert Arm.extract_answer(text) == question.answer and form.mode_of(ids) == mode
            assert Arm.empty_rationale(text) is (None if mode == "direct" else False)
            assert prompts.decode(tokenizer, [*ids, tokenizer.eos_token_id], (tokenizer.eos_token_id,)) == text
            lengths.append(len(ids))
        assert lengths == sorted(lengths), "from cheap to dear"


def test_the_cold_start_shows_every_question_in_all_formats():
    """First what the paper's base model knows already, then each question four times, with one and the same prompt."""
    args = SimpleNamespace(chain_mix="1,1,1", max_steps=10, task="chain", model="")
    rows = Arm.rows(args, np.random.default_rng(0), 16, 10)
    assert [Arm.format_of(row.response) for row in rows] == [*Arm.tags] * 4
    assert all(len({row.question.problem for row in rows[i : i + 4]}) == 1 for i in range(0, 16, 4))
    assert all(row.prompt == "" and row.start == 0 for row in rows)
    plain = Arm.rows(args, np.random.default_rng(0), 16, 3)
    assert {Arm.format_of(row.response) for row in plain} == {"direct", "unknown"}
