"""AdaptThink against the official implementation (tests/golden), hand-computed numbers, and known ways to go wrong."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import make_args, make_episodes, make_learner, write_model
from test_rollout import engine_of

from adaptive_reasoning import adaptthink, formats
from adaptive_reasoning.adaptthink import Args, advantage, baselines, loss, metrics, plan_rollouts
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.think import Think
from adaptive_reasoning.learner.packing import Counts, pack
from adaptive_reasoning.rollout import Forced, Request, Sampling
from adaptive_reasoning.run.options import parse_args
from adaptive_reasoning.tasks.think_template import ThinkTemplate, answer_behind

GOLDEN = Path(__file__).parent / "golden"
NOTHING, THINK = 303, [294]


def cases(name):
    loaded = json.loads((GOLDEN / name).read_text())["cases"]
    return [pytest.param(c["inputs"], c, id=c["name"]) for c in loaded]


def flat(mask, *matrices):
    """The tokens inside the mask of padded matrices [B, T], as the packed layout holds them."""
    return [m[mask] for m in matrices]


def packed(inputs, dtype):
    """A MicroBatch-like view of a golden case, and its log-probs as a leaf."""
    mask = torch.tensor(inputs["response_mask"]).bool()
    t = lambda key: torch.tensor(inputs[key], dtype=dtype)  # noqa: E731
    logprobs, old, advantages = t("log_prob").requires_grad_(), t("old_log_prob"), t("advantages")
    if inputs["adjust_old_log_prob"]:
        # The rollout loop returns log q for forced first tokens: what the official code writes over column 0.
        q = inputs["nothinking_ratio"]
        for row, nothinking in enumerate(inputs["enforce_nothinking"]):
            old[row, 0] = math.log(q if nothinking else 1 - q)
    lengths = mask.sum(1)
    mb = SimpleNamespace(
        old_logprobs=old[mask],
        advantages=advantages[mask],
        sequence_advantages=advantages[:, 0],
        sequence=torch.repeat_interleave(torch.arange(len(mask)), lengths),
        lengths=lengths,
    )
    return mb, logprobs, mask, Counts(int(mask.sum()), len(mask))


AVERAGES = {"token-mean": "token_mean", "seq-mean-token-sum": "seq_mean_token_sum",
            "seq-mean-token-mean": "seq_mean_token_mean"}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs, case", cases("adaptthink_loss.json"))
def test_loss_and_gradient_equal_the_official_code(inputs, case, dtype):
    mb, logprobs, mask, counts = packed(inputs, dtype)
    sequence_path = inputs["adjust_old_log_prob"]
    args = SimpleNamespace(
        ratio="sequence_mean" if sequence_path else "token",
        token_average=AVERAGES.get(inputs.get("loss_agg_mode"), "token_mean"),
        clip_low=inputs["clip_low"],
        clip_high=inputs["clip_high"],
    )
    value, stats = loss(logprobs[mask], mb, counts, args)
    value.backward()
    want = case["expected"] if dtype == torch.float64 else case["expected_float32"]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(value, torch.tensor(want["loss"], dtype=dtype), **tolerance)
    gradient = torch.tensor(case["expected"]["grad_log_prob"], dtype=dtype)
    torch.testing.assert_close(logprobs.grad, gradient, **tolerance)
    if not sequence_path and args.token_average == "token_mean":
        assert float(stats["loss/clip_fraction"]) == pytest.approx(want["clip_fraction"], abs=1e-6)
        assert float(stats["loss/approx_kl"]) == pytest.approx(want["approx_kl"], rel=1e-4, abs=1e-6)


def one_sequence(T, lp, A, ratio="sequence_mean"):
    logprobs = torch.tensor(lp, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach().clone()
    old[0] = math.log(0.5)
    mb = SimpleNamespace(
        old_logprobs=old,
        advantages=torch.full((T,), A, dtype=torch.float64),
        sequence_advantages=torch.tensor([A], dtype=torch.float64),
        sequence=torch.zeros(T, dtype=torch.int64),
        lengths=torch.tensor([T]),
    )
    args = SimpleNamespace(ratio=ratio, token_average="token_mean", clip_low=0.2, clip_high=0.2)
    value, stats = loss(logprobs, mb, Counts(T, 1), args)
    value.backward()
    return value.item(), logprobs.grad, stats


@pytest.mark.parametrize(
    "T, lp, A, want, clipped",
    [
        (4, [-3.0, -0.2, -0.1, -0.3], 0.55, -0.308958, False),
        (4, [-3.0, -0.2, -0.1, -0.3], -0.45, 0.36, True),
        (10, [-0.1] + [-1.0] * 9, 0.5, -0.530555, False),
        (10, [-0.1] + [-1.0] * 9, -0.5, 0.530555, False),
    ],
)
def test_hand_computed_sequences(T, lp, A, want, clipped):
    """rho = exp((log pi(y_1) - log 0.5) / T), because all other tokens are on policy (specification, section 3)."""
    value, gradient, stats = one_sequence(T, lp, A)
    assert value == pytest.approx(want, abs=1e-6)
    assert float(stats["loss/clip_fraction"]) == float(clipped)
    # The mode decision weighs 1/T, like any other token; a clipped sequence teaches nothing.
    expected = 0.0 if clipped else value / T
    assert gradient.tolist() == pytest.approx([expected] * T)


def test_the_literal_product_ratio():
    """Eq. 9 on policy: the ratio is 2 pi(y_1), so p = 0.7 and A > 0 is clipped at 1.2 and p = 0.55 is not."""
    assert one_sequence(5, [math.log(0.7)] + [-1.0] * 4, 0.5, "sequence_product")[0] == pytest.approx(-0.6)
    assert one_sequence(5, [math.log(0.55)] + [-1.0] * 4, 0.5, "sequence_product")[0] == pytest.approx(-0.55)


@pytest.mark.parametrize("ratio, low, high", [("sequence_mean", 0.95, 1.0), ("sequence_product", 0.4, 0.75)])
def test_bandit_from_a_millionth(ratio, low, high):
    """One prompt, p(</think>) = 1e-6 at the start, both modes right nine times in ten, delta 0.05: where does p end?

    The length-normalised ratio of the code goes to 1. The product of Eq. 9 is pinned near 0.6 by its own clip range:
    from there on right answers are clipped and wrong ones are not.
    """
    logit = torch.tensor([math.log(1e-6), 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    mode = torch.tensor([0] * 10 + [1] * 10)
    right = torch.tensor(([1.0] * 9 + [0.0]) * 2, dtype=torch.float64)
    A = right - 0.9 + 0.05 * (mode == 0)
    # Every token but the first is on policy: its log ratio is 0, so it is left out and `lengths` keeps its weight.
    mb = SimpleNamespace(
        old_logprobs=torch.full((20,), math.log(0.5), dtype=torch.float64),
        sequence_advantages=A, sequence=torch.arange(20), lengths=torch.tensor([400, 5000])[mode], advantages=A,
    )  # fmt: skip
    args = SimpleNamespace(ratio=ratio, token_average="token_mean", clip_low=0.2, clip_high=0.2)
    for _ in range(400):
        value, _ = loss(logit.log_softmax(-1)[mode], mb, Counts(54_000, 20), args)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert low < logit.softmax(-1)[0].item() < high


@pytest.mark.parametrize("inputs, case", cases("adaptthink_advantage.json"))
def test_advantage_equals_the_official_code(inputs, case):
    args = SimpleNamespace(delta=inputs["delta"], delta_on="all")
    for i, want in enumerate(case["expected"]["advantage"]):
        e = episode("nothinking" if inputs["nothinking"][i] else "thinking", inputs["correct"][i])
        assert advantage(e, inputs["ref_accuracy"][i], args) == pytest.approx(want, abs=1e-15)


def episode(mode, reward, group=0, tokens=4, first=None):
    ids = [NOTHING if mode == "nothinking" else THINK[0]] + [9] * (tokens - 1)
    logprobs = torch.zeros(tokens)
    logprobs[0] = math.log(0.5)
    e = Episode(
        Question(f"q{group}", "1+1", "2"), group, torch.tensor([1, 2]), torch.tensor(ids), logprobs,
        torch.ones(tokens, dtype=torch.bool), "stop", mode=mode, reward=float(reward),
        correct=bool(reward),
    )  # fmt: skip
    if first is not None:
        e.info["first_logprob"] = first
    return e


def test_delta_may_be_withheld_from_wrong_answers():
    """With a question the reference never solves, a wrong NoThinking answer has advantage +delta unless withheld."""
    wrong = episode("nothinking", 0)
    assert advantage(wrong, 0.0, SimpleNamespace(delta=0.05, delta_on="all")) == 0.05
    assert advantage(wrong, 0.0, SimpleNamespace(delta=0.05, delta_on="correct")) == 0.0


def test_online_baseline_is_the_mean_thinking_reward_of_the_group():
    episodes = [episode("thinking", r, g) for g, r in ((0, 1), (0, 0), (0, 1), (3, 0))] + [episode("nothinking", 1, 0)]
    assert baselines(episodes, None) == {0: pytest.approx(2 / 3), 3: 0.0}
    assert baselines(episodes, [0.1, 0.2, 0.3, 0.4]) == {0: 0.1, 3: 0.4}


# --- rollouts


def form_of(eot: int, word: list[int]) -> Think:
    """The format without a tokenizer."""
    form = object.__new__(Think)
    form.template = SimpleNamespace(nothinking=(eot,))
    form.template.mode_of = partial(ThinkTemplate.mode_of, form.template)
    form.eot, form.word = eot, word
    return form


def planned(**options):
    args = Args(task="chain", **options)
    control = form_of(NOTHING, THINK)
    questions = [(i, Question(f"q{i}", "1+1", "2"), [5, 6, 7]) for i in (4, 9)]
    return plan_rollouts(questions, control, args, (3,), step=2), control


def test_exactly_half_of_every_question_is_forced_to_skip_thinking():
    requests, control = planned()
    assert len(requests) == 32
    for start in (0, 16):
        group = requests[start : start + 16]
        assert [r.forced[0] for r in group] == [(NOTHING, 0.5)] * 8 + [(THINK[0], 0.5)] * 8
        assert [r.max_new_tokens for r in group] == [4096] * 8 + [16384] * 8
    assert len({r.seed for r in requests}) == 32
    assert [r.tag[1] for r in requests] == [4] * 16 + [9] * 16


@pytest.mark.parametrize("share, per_group", [(0.25, 4), (0.75, 12)])
def test_another_share_is_forced_with_its_own_probability(share, per_group):
    requests, _ = planned(nothinking_share=share)
    firsts = [r.forced[0] for r in requests[:16]]
    assert firsts == [(NOTHING, share)] * per_group + [(THINK[0], 1 - share)] * (16 - per_group)


def test_coin_flips_differ_between_questions_and_repeat_with_the_seed():
    requests, _ = planned(forcing="coin", num_generations=64)
    again, _ = planned(forcing="coin", num_generations=64)
    skipped = [r.forced[0][0] == NOTHING for r in requests]
    assert skipped == [r.forced[0][0] == NOTHING for r in again]
    assert 0.3 < sum(skipped) / 128 < 0.7 and skipped[:64] != skipped[64:]


def test_without_forcing_the_policy_starts_freely():
    requests, _ = planned(forcing="off")
    assert all(r.forced == () and r.max_new_tokens == 16384 for r in requests)


@pytest.mark.parametrize("count", [False, True])
def test_of_a_first_word_of_several_tokens_the_first_alone_is_a_choice(count):
    control = form_of(NOTHING, [40, 41, 42])
    rest = Forced(((41, 1.0), (42, 1.0)), at=1, action=count)
    assert adaptthink.forced(control, "thinking", 0.25, count) == ((40, 0.75), rest)
    assert adaptthink.forced(control, "nothinking", 0.25, count) == ((NOTHING, 0.25),)


def test_mode_is_read_from_the_first_token_alone():
    control = form_of(NOTHING, THINK)
    assert control.mode_of([NOTHING, 5]) == "nothinking"
    assert control.mode_of([5, NOTHING]) == "thinking"


@pytest.mark.parametrize("T, counted, masked, naive", [(12, 0.5901, 0.5372, 0.6623), (300, 0.97912, 0.97936, 0.98366)])
def test_the_ratio_of_an_opening_of_several_tokens(T, counted, masked, naive):
    """pi = (.001, .9, .99): the first is the choice (q = 1/2), the others follow (q = 1), or are no actions at all.
    With q = 1/2 for each the ratio is too large by 4^(1/T)."""
    pi = torch.tensor([0.001, 0.9, 0.99], dtype=torch.float64).log()
    half = math.log(0.5)
    args = SimpleNamespace(ratio="sequence_mean", clip_low=0.2, clip_high=0.2)
    for want, logprobs, q, length in (
        (counted, pi, [half, 0, 0], T),
        (masked, pi[:1], [half], T - 2),
        (naive, pi, [half] * 3, T),
    ):
        free = torch.zeros(length - len(logprobs), dtype=torch.float64)  # on policy: pi is pi_old
        old = torch.cat([torch.tensor(q, dtype=torch.float64), free])
        mb = SimpleNamespace(
            sequence_advantages=torch.ones(1, dtype=torch.float64), sequence=torch.zeros(length, dtype=torch.int64),
            lengths=torch.tensor([length]), old_logprobs=old,
        )  # fmt: skip
        value, _ = loss(torch.cat([logprobs, free]), mb, Counts(length, 1), args)
        assert -value.item() == pytest.approx(want, abs=5e-5 if T == 12 else 5e-6)


@pytest.mark.parametrize("count", [False, True])
def test_what_follows_from_the_choice_is_no_action(model, count):
    """The whole opening stands in the response, and the learner sees its first token alone (unless all count)."""
    forced = adaptthink.forced(form_of(7, [40, 41, 42]), "thinking", 0.25, count)
    (c,) = engine_of(model).run([Request([1, 2, 3], 9, (), 3, forced)], Sampling(0.6))
    assert c.response_ids[:3].tolist() == [40, 41, 42] and c.forced.tolist() == [True] * 3 + [False] * 6
    assert c.action_mask.tolist() == [True] + [count] * 2 + [True] * 6
    assert c.logprobs[:3].exp().tolist() == [0.75, 1.0, 1.0]
    c.request.tag = (None, 0)
    mb = pack([Episode.of(c, advantage=1.0)])
    assert mb.lengths.tolist() == [9 if count else 7] and mb.position[:2].tolist() == ([0, 1] if count else [0, 3])


# --- reward


@pytest.mark.parametrize(
    "response, answer",
    [
        ("</think>\n\\boxed{7}", "7"),
        ("Alright.\n</think>\n\\boxed{7}", "7"),
        ("Alright.\n</think>\n\\boxed{6} no, \\boxed{7}", "7"),
        ("Alright, \\boxed{7}", None),  # thinking never closed
        ("</think>\n</think>\n\\boxed{7}", None),  # closed twice
        ("Alright <think> hm</think>\\boxed{7}", None),
        ("Alright \\boxed{7}</think>the answer", None),  # box before the answer only
        ("</think>\\boxed 7", None),
        ("</think>\\boxed {7}", None),
        ("</think>\\boxed{7", None),
    ],
)
def test_format_gate(response, answer):
    assert answer_behind(response) == answer


# --- metrics and options


def test_metrics_by_mode():
    episodes = [
        episode("nothinking", 1, tokens=4, first=math.log(0.2)),
        episode("nothinking", 0, tokens=6, first=math.log(0.4)),
        episode("thinking", 1, tokens=20, first=math.log(0.6)),
        episode("thinking", 1, tokens=30),
    ]
    for e in episodes:
        e.advantage = advantage(e, 0.75, SimpleNamespace(delta=0.1, delta_on="all"))
    args = Args(num_generations=4)
    got = metrics(adaptthink.metric_rows(episodes, {0: 0.75}), args)
    want = {
        "forced_nothinking_share": 0.5, "forced_share_gap": 0.0, "nothinking_accuracy": 0.5, "thinking_accuracy": 1.0,
        "nothinking_reward": 0.5, "thinking_reward": 1.0, "reward_gap": -0.5, "nothinking_tokens": 5.0,
        "thinking_tokens": 25.0, "first_eot_prob": 0.3, "first_eot_logprob": (math.log(0.2) + math.log(0.4)) / 2,
        "first_ratio_mean": (0.4 + 0.8 + 1.2) / 3, "advantage_mean": (0.35 - 0.65 + 0.25 + 0.25) / 4,
        "ref_accuracy_mean": 0.75,
    }  # fmt: skip
    assert got == {f"adapt_think/{k}": pytest.approx(v) for k, v in want.items()}


def test_first_token_counts_for_every_nothinking_response():
    """Responses with advantage 0 are not scored in the update; those of the same prompt have the same probability."""
    scored = [
        episode("nothinking", 0, group=0, first=math.log(0.2)),
        episode("nothinking", 1, group=0),
        episode("nothinking", 1, group=1),
        episode("nothinking", 1, group=1),
        episode("thinking", 1, group=1),
    ]
    scored[0].advantage = -1.0
    asked = []

    def logprobs(firsts):
        asked.extend(firsts)
        return [torch.tensor([math.log(0.8)])] * len(firsts)

    adaptthink.score_first_token(scored, SimpleNamespace(logprobs=logprobs))
    (one,) = asked  # group 1 has no response that gets gradient; its prompt is read once
    assert (one.group, one.response_ids.tolist(), one.action_mask.tolist()) == (1, [NOTHING], [True])
    assert not one.forced.any(), "a forced token would keep log 0.5"
    got = metrics(adaptthink.metric_rows(scored, {0: 1.0, 1: 1.0}), Args(num_generations=4))
    assert got["adapt_think/first_eot_prob"] == pytest.approx((0.2 + 0.2 + 0.8 + 0.8) / 4)
    assert got["adapt_think/first_eot_logprob"] == pytest.approx((2 * math.log(0.2) + 2 * math.log(0.8)) / 4)
    assert got["adapt_think/first_ratio_mean"] == pytest.approx((0.2 / 0.5 + 0.8 / 0.5) / 2), "of those read"


def test_first_token_read_alone_is_that_of_the_whole_response(tmp_path):
    learner = make_learner(write_model(tmp_path / "model", tied=True), make_args(tmp_path))
    forced = make_episodes()[1]
    forced.mode, forced.advantage, forced.info = "nothinking", 0.0, {}
    adaptthink.score_first_token([forced], learner)
    (whole,) = learner.logprobs([replace(forced, forced=None)])
    assert (
        forced.info["first_logprob"] == pytest.approx(float(whole[0]), abs=1e-5) != float(forced.behaviour_logprobs[0])
    )


@pytest.mark.parametrize("theirs, ours", [
    ("Is it 3.", "Is it 3 .\n"), ("caf\u00e9 don't", "cafe\u0301 do n't"), ("a $x$, (b)", " a  $x$ , ( b )"),
])  # fmt: skip
def test_the_authors_table_is_matched_whatever_their_tokenizer_did_to_the_text(tmp_path, theirs, ours):
    """Their keys went through encode and decode; the very text goes first, and what may be two rows is refused."""

    def read(rows, problem):
        table = [{"problem": p, "answer": "", "metrics": {"avg_acc_thinking": v}} for p, v in rows]
        (tmp_path / "ref.json").write_text(json.dumps(table))
        return adaptthink.read_authors_table(str(tmp_path / "ref.json"), {7: Question("q7", problem, "1")})

    assert read([("other", 0.0), (theirs, 0.5)], ours) == {7: 0.5}
    assert read([(ours, 0.25), (theirs, 0.5)], ours) == {7: 0.25} == read([(ours, 0.25), (theirs, 0.5)], ours.strip())
    assert read([(theirs + " ", 0.5), (theirs, 0.5)], ours) == {7: 0.5}
    with pytest.raises(UserError, match="1 of 1 questions have rows of different accuracies, the first is q7"):
        read([(theirs + " .", 0.5), (theirs + ".", 0.25)], ours + ".")


@pytest.mark.parametrize("theirs, ours", [("1 1", "11"), ("not a", "nota"), ("x^2", "x2"), ("A", "a")])
def test_texts_that_no_tokenizer_confuses_are_other_questions(theirs, ours):
    assert adaptthink.comparable(theirs) != adaptthink.comparable(ours)


def test_the_alarm_of_the_forced_share():
    """Half was asked for, a quarter came: forcing is broken, and nothing else would tell."""
    rows = adaptthink.metric_rows([episode("nothinking", 1, first=-0.7)] + [episode("thinking", 1)] * 3, {0: 1.0})
    assert metrics(rows, Args(num_generations=4))["adapt_think/forced_share_gap"] == 0.25


@pytest.mark.parametrize(
    "option, message",
    [
        (["--ratio", "gspo"], "--ratio: Expected a Literal"),
        (["--nothinking_share", "1.5"], "--nothinking_share: Not of type ClosedUnitInterval: 1.5"),
        (["--num_generations", "0"], "--num_generations: Not of type PositiveInt: 0"),
    ],
)
def test_options_that_make_no_sense(option, message):
    with pytest.raises(UserError, match=message):
        parse_args(Args, option)


def test_control_tokens_of_the_laboratory():
    control = Think(formats.tokenizer("think"), Args())
    tokenizer = formats.tokenizer("think")
    assert tokenizer.decode([control.eot]) == "</think>" and tokenizer.decode(control.word) == "Alright"


def test_a_template_without_a_thinking_block_is_refused():
    tokenizer = formats.tokenizer("think")
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>", "") + "{# </think> #}"
    with pytest.raises(UserError, match=r"must end in an opened thinking block or .* found '<.Assistant.>\\n'"):
        Think(tokenizer, Args())


def test_a_tokenizer_that_splits_the_control_token_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordLevel({c: i for i, c in enumerate("</>thinkAlrgOay\n")}, unk_token="<"))
    pieces.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, chat_template="{{ '<think>\n' }}", eos_token="k")
    with pytest.raises(UserError, match="does not hold '</think>' as one token"):
        Think(tokenizer, Args())
