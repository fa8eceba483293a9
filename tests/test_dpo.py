"""Pairs and their losses: against the official programs (tests/golden), by hand, and in runs that are killed."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed_worker import gradients, make_args, make_episodes, make_learner, write_model
from small_model import make_tokenizer

from adaptive_reasoning import formats
from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.dpo import Args, kept_attempts, loss, pairs_dast, pairs_shortest, rate, scores, widest
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats.attempts import cut, outcome_efficiency, split_attempts, thinking_of
from adaptive_reasoning.learner.packing import pack
from adaptive_reasoning.run.bank import rows_of, write
from adaptive_reasoning.tasks import chain


def golden(name, kind=None):
    cases = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())["cases"]
    return [pytest.param(c["inputs"], c["expected"], id=c["name"]) for c in cases if kind in (None, c.get("kind"))]


# --- losses


def options(loss="dpo", **more):
    return SimpleNamespace(**{"loss": loss, "beta": 0.1, "gamma": 0.0, **more})


def sums_of(inputs, chosen, rejected, dtype):
    """Return [B, 2] sums of the log-probs of chosen and rejected answers."""
    pairs = zip(inputs[chosen], inputs[rejected])
    return torch.stack([torch.stack([torch.tensor(x, dtype=dtype).sum() for x in pair]) for pair in pairs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method, inputs, want", [
    *(pytest.param("dpo", *c.values, id=c.id) for c in golden("dpo_loss")),
    *(pytest.param("simpo", *c.values, id=c.id) for c in golden("simpo_loss")),
])  # fmt: skip
def test_the_losses_equal_trl(method, inputs, want, dtype):
    """The value, and -A, the gradient of every token written out, against trl's autograd and against torch's."""
    logp = sums_of(inputs, "chosen", "rejected", dtype).requires_grad_()
    ref = sums_of(inputs, "ref_chosen", "ref_rejected", dtype) if method == "dpo" else None
    tokens = torch.tensor([[len(w), len(y)] for w, y in zip(inputs["chosen"], inputs["rejected"])])
    args = options(method, beta=inputs["beta"], gamma=inputs.get("gamma", 0.0))
    value, A, stats = loss(logp, tokens, ref, len(logp), args)
    value.backward()
    close = {"rel": 1e-10, "abs": 1e-10} if dtype == torch.float64 else {"rel": 1e-5, "abs": 1e-6}
    assert value.item() == pytest.approx(want["loss"], **close)
    by_sum = A * (
        tokens if method == "simpo" else 1
    )  # the mean of an answer has a |y|-th of its gradient in each token
    torch.testing.assert_close(-(A if method == "dpo" else by_sum / tokens), logp.grad, atol=1e-7, rtol=1e-5)
    for n, pair in enumerate(zip(want["grad_chosen"], want["grad_rejected"])):
        for k, gradient in enumerate(pair):
            assert [-A[n, k].item()] * len(gradient) == pytest.approx(gradient, **close)
    if method == "dpo":
        assert stats["dpo/margin"].item() == pytest.approx(want["mean_margin"], **close)
        assert stats["dpo/reward_accuracy"].item() == pytest.approx(want["reward_accuracy"])
        assert stats["dpo/chosen_reward"].item() == pytest.approx(want["mean_reward_chosen"], **close)
        assert stats["dpo/rejected_reward"].item() == pytest.approx(want["mean_reward_rejected"], **close)
    else:
        rewards = [np.mean(want[f"reward_{side}"]) for side in ("chosen", "rejected")]
        assert [stats[f"dpo/{side}_reward"].item() for side in ("chosen", "rejected")] == pytest.approx(
            rewards, **close
        )


def of_one_pair(logp, tokens, ref, args):
    value, A, _ = loss(torch.tensor([logp]).double(), torch.tensor([tokens]), ref and torch.tensor([ref]), 1, args)
    return value.item(), A[0].tolist()


def test_the_losses_by_hand():
    """Section 1 of the specification."""
    value, A = of_one_pair([-9.0, -4.0], [3, 2], [-9.0, -4.0], options())  # policy = reference
    assert value == pytest.approx(math.log(2)) and A == pytest.approx([0.05, -0.05])
    value, A = of_one_pair([-2.0, -4.0], [2, 1], [-4.0, -1.0], options())  # log ratios +2 and -3
    assert value == pytest.approx(0.474077, abs=1e-6) and A == pytest.approx([0.0377541, -0.0377541], abs=1e-6)
    assert of_one_pair([-2.0, -4.0], [2, 1], [3.0, 6.0], options())[1] == pytest.approx(A), "a constant in both refs"
    simpo = options("simpo", beta=2.0, gamma=0.3)
    value, A = of_one_pair([-2.0, -8.0], [4, 10], None, simpo)  # means -0.5 and -0.8
    assert value == pytest.approx(0.554355, abs=1e-6)
    assert A == pytest.approx([0.851115 / 4, -0.851115 / 10], abs=1e-6)
    value, _ = of_one_pair([-2.0, -4.0], [4, 8], None, options("simpo", beta=2.0, gamma=0.5))
    assert value == pytest.approx(0.974077, abs=1e-6), "equal means"
    there, back = (of_one_pair(x, [2, 1], [0.0, 0.0], options())[0] for x in ([-2.0, -4.0], [-4.0, -2.0]))
    assert there == pytest.approx(math.log(1 + math.exp(-0.2))) and back == pytest.approx(math.log(1 + math.exp(0.2)))


def test_a_shared_prefix_cancels_in_dpo_alone():
    """OverThink's positive is a prefix of its negative: SimPO pushes the common tokens up, as 1/|y_w| > 1/|y_l|."""
    _, (w, y) = of_one_pair([-3.0, -7.0], [3, 9], [-3.5, -6.0], options())
    assert w + y == 0
    _, (w, y) = of_one_pair([-3.0, -7.0], [3, 9], None, options("simpo", beta=2.0))
    assert w + y > 0


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_no_split_changes_the_gradient(tmp_path, method):
    """Score, then weigh, then learn in micro-batches of any size: the gradient of autograd through the loss itself."""
    folder, args = write_model(tmp_path, tied=True), options(method, beta=2.0, gamma=0.3)
    episodes, g = make_episodes(8), torch.Generator().manual_seed(1)
    for e in episodes:
        e.forced, e.action_mask = None, torch.ones(e.num_tokens, dtype=torch.bool)
        e.__post_init__()
    tokens = torch.tensor([e.num_tokens for e in episodes]).view(-1, 2)
    ref = -4.5 * tokens + torch.rand(4, 2, generator=g)

    learner = make_learner(folder, make_args(tmp_path / "run"))
    mb = pack(episodes)  # all in one: what autograd goes through
    logprobs, _ = learner.score(mb, temperature=1.0)
    summed = torch.zeros(8).index_add(0, mb.sequence, logprobs).view(-1, 2)
    value = loss(summed, tokens, ref, 4, args)[0]
    learner.backward(value)
    want = gradients(learner)
    for budget in (1, 40, 1000):
        learner = make_learner(folder, make_args(tmp_path / "run", tokens_per_micro_batch=budget))
        logp = torch.stack([x.sum() for x in learner.logprobs(episodes, 1.0)]).view(-1, 2)
        again, A, _ = loss(logp, tokens, ref, 4, args)
        for e, advantage in zip(episodes, A.flatten().tolist()):
            e.advantage = advantage
        (minibatch,) = learner.minibatches(episodes, 1, 0)
        assert len(minibatch) == {1: 8, 1000: 1}.get(budget, len(minibatch))
        for mb in minibatch:
            learner.backward(-(mb.advantages * learner.score(mb, temperature=1.0)[0]).sum())
        assert again.item() == pytest.approx(value.item(), abs=1e-5)
        for name, gradient in gradients(learner).items():
            torch.testing.assert_close(gradient, want[name], atol=1e-5, rtol=1e-4)


# --- pairs


def answers(lengths, correct, cut=()):
    return [{"tokens": n, "correct": c, "cut": i in cut, "id": i} for i, (n, c) in enumerate(zip(lengths, correct))]


def chosen(rows, rejected="longest_any"):
    return [(a["id"], b["id"]) for a, b in pairs_shortest(rows, SimpleNamespace(rejected=rejected))]


def test_pairs_by_hand():
    rows = answers((30, 50, 80, 200), (True, True, True, False), cut=(3,))
    assert chosen(rows) == [(0, 3)] and chosen(rows, rejected="longest_correct") == [(0, 2)]
    assert chosen(rows, rejected="kimi") == [(0, 1), (0, 2), (0, 3)]  # 50 and 80 are 1.5 times 30, 200 is wrong
    assert chosen(rows, rejected="two_shortest") == [(0, 2), (1, 2)]
    assert chosen(answers((40, 60, 90), (False, False, True))) == [], "the only right one is the longest"
    assert chosen(answers((40, 60, 90), (False,) * 3)) == [], "none is right"
    assert chosen(answers((10, 50, 80, 120), (False, True, True, True))) == [(1, 3)], "the shortest is wrong"
    assert chosen(answers((50, 50), (True, True)), rejected="two_shortest") == [], "equal lengths are no pair"


@pytest.mark.parametrize("inputs, want", golden("overthink_fcs", "pair"))
def test_shortest_pairs_equal_skythought(inputs, want):
    """Its `shortest_longest_right` wants two right answers; AdaptThink's pair follows from the definition."""
    rows = answers(inputs["lengths"], inputs["correct"])
    for rejected, name in (
        ("longest_any", "shortest_right_longest_any"),
        ("longest_correct", "shortest_longest_right"),
    ):
        assert chosen(rows, rejected) == ([tuple(want[name])] if want[name] else [])


@pytest.mark.parametrize("inputs, want", golden("overthink_fcs", "cut"))
def test_kept_attempts_equal_skythought(inputs, want):
    """It counts the final answer as one more attempt; we do not, so without a second right attempt there is no pair."""
    attempts, correct = inputs["segments"][:-1], inputs["correct"][:-1]
    for positive, number in (("fcs", 1), ("fcs_reflection", 2)):
        kept = kept_attempts(correct, positive)
        assert (kept is None) == (sum(correct) < number)
        if kept is not None:
            assert want[positive].split("<|end_of_thought|>")[0] == "\n".join(attempts[:kept])
        elif want[positive] is not None:
            assert all(attempt in want[positive] for attempt in attempts), "all of them: no cut"


@pytest.mark.parametrize("inputs, want", golden("overthink_fcs", "efficiency"))
def test_outcome_efficiency_equals_the_authors(inputs, want):
    assert outcome_efficiency(inputs["lengths"], inputs["correct"]) == pytest.approx(want["outcome"], abs=1e-15)


def test_attempts_by_hand():
    wrong, right = False, True
    assert kept_attempts([wrong, right, right, right], "fcs") == 2
    assert kept_attempts([wrong, right, right, right], "fcs_reflection") == 3
    assert (
        kept_attempts([right, wrong, right], "fcs_reflection") == 3 and kept_attempts([right], "fcs_reflection") is None
    )
    chains = "Alright, let me see.\n3*7=1\n1+4=5\nWait, let me check.\n3*7=1\n1+4=6\nSo it is 6.\n"
    assert split_attempts(chains) == [
        ("Alright, let me see.\n3*7=1\n1+4=5\n", "5"), ("Wait, let me check.\n3*7=1\n1+4=6\nSo it is 6.\n", "6"),
    ]  # fmt: skip
    maths = [
        ("We have 3x + 4 = 19, so x = 5.\n\n", "5"),
        ("Hmm, is there another way?\n\nAlternatively, $x = \\frac{15}{3}$, say.\n\n", "\\frac{15}{3}"),
        ("But wait, the answer is **(3, 4)**.\n\n", "(3, 4)"),
        ("Let me double-check: 2 apples = 1,234 cents. Thus \\boxed{7}.\nWaiting = 3 is no reflection.\n", "7"),
        ("Wait, hmm", ""),
    ]
    assert split_attempts("".join(text for text, _ in maths)) == maths
    assert split_attempts("") == []


def test_a_thinking_is_cut_by_its_tokens():
    """Nothing is tokenised anew: what is kept are the first tokens of the response, whatever their pieces."""
    tokenizer = make_tokenizer(["The answer is 12. Wait, let me check.", ".\n\n.\n\n.\n\n", "=5=5=5"])
    text = "x=5.\n\nWait, the answer is 12\u00b0 \U0001f600. Wait"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for end in range(1, len(text)):
        found = cut(tokenizer, ids, text[:end])
        inside = not any(tokenizer.decode(ids[:n]).rstrip() == text[:end].rstrip() for n in range(len(ids) + 1))
        assert (found is None) == inside, text[:end]
        if found:
            kept, close = found
            whole = tokenizer.decode([*ids[:kept], *close])
            assert whole.startswith(text[:end].rstrip()) and whole.endswith("\n</think>")
            assert whole.removesuffix("</think>").rstrip() == text[:end].rstrip()
            assert close == tokenizer.encode(
                "</think>" if tokenizer.decode(ids[:kept]).endswith("\n") else "\n</think>"
            )
    assert cut(tokenizer, ids, "x=5.\n\nWait, the an") is None, "inside a token"
    response = torch.tensor([*ids, *tokenizer.encode("</think>5")])
    assert thinking_of(tokenizer, response) == ids == thinking_of(tokenizer, torch.tensor(ids))


@pytest.mark.parametrize("inputs, want", golden("dast_score", "score"))
def test_dast_scores_and_pairs(inputs, want):
    found = scores(inputs["lengths"], inputs["correct"], inputs["max_length"])
    assert found == pytest.approx(want["score"], abs=1e-12)
    rows = answers(inputs["lengths"], inputs["correct"])
    pairs = pairs_dast(rows, SimpleNamespace(l_max=inputs["max_length"], drop_cut=False))
    expected = [pair for pair in (want["dual_correct"], want["dual_incorrect"]) if pair]
    assert [margin for margin, _, _ in pairs] == pytest.approx([pair["margin"] for pair in expected], abs=1e-12)
    assert [(a["id"], b["id"]) for _, a, b in pairs] == [(p["chosen"][0], p["rejected"][0]) for p in expected]


def test_dast_by_hand():
    lengths, correct = (100, 300, 400, 800), (True, True, False, False)
    assert scores(lengths, correct, 1000) == pytest.approx([0.916667, 0.75, -0.4, -0.1], abs=1e-6)
    args = SimpleNamespace(l_max=0, max_new_tokens=1000, drop_cut=False)
    pairs = pairs_dast(answers(lengths, correct, cut=(3,)), args)
    assert [(margin, a["id"], b["id"]) for margin, a, b in pairs] == [
        (pytest.approx(0.166667, abs=1e-6), 0, 1), (pytest.approx(0.3), 3, 2),
    ]  # fmt: skip
    args.drop_cut = True  # its length still counts in the budget
    assert len(pairs_dast(answers(lengths, correct, cut=(3,)), args)) == 1
    assert pairs_dast(answers((1000, 1000, 1200), (False,) * 3), args) == [], "at or beyond the budget all score -0.1"


@pytest.mark.parametrize("inputs, want", golden("dast_score", "truncate"))
def test_the_smallest_margins_go(inputs, want):
    assert widest(inputs["margin"], inputs["share"]) == want["kept"]
    assert widest([0.3, 0.1, 0.1, 0.2], 0.25) == [0, 2, 3] and len(widest([1.0] * 100, 0.29)) == 71


# --- the loop


def test_the_learning_rate():
    args = SimpleNamespace(max_steps=100, warmup_share=0.1, learning_rate=2.0, lr_schedule="cosine")
    assert [rate(args, step) for step in (1, 10, 11)] == [0.2, 2.0, 2.0]
    assert rate(args, 56) == pytest.approx(1.0) and 0 < rate(args, 100) < 0.01


OPTIONS = (
    "--chain_mix 1 --chain_questions 12 --chain_eval_questions 8 --samples 4 --pairs_per_step 4 --max_steps 3 "
    "--save_every 1 --keep_checkpoints 0 --eval_every 2 --max_new_tokens 64 --rollout_rows 64 --patience 100 "
    "--temperature 1"
)


QUESTIONS = chain.questions(12, "1", 0, "chain/train")


def response(problem, checks, slip=False):
    """A thinking response as the cold start writes it, with any number of checks, or whose first pass is wrong."""
    work = "\n".join(text for text, _ in chain.steps(problem))
    answer = chain.steps(problem)[-1][1]
    first = f"{work[:-1]}{(answer + 1) % 10}" if slip else work
    more = "".join(f"Wait, let me check.\n{work}\n" for _ in range(checks))
    final = answer if checks or not slip else (answer + 1) % 10
    return f"Alright, let me see.\n{first}\n{more}So it is {final}.\n</think>\n\\boxed{{{final}}}"


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """(options of a run, its tokenizer): an untrained tiny model, in whose bank handmade answers stand.

    Of every question: 0, 1 and 3 checks, all right; a wrong one, which is cut for even questions; a short wrong one.
    """
    folder = tmp_path_factory.mktemp("laboratory")
    tokenizer = formats.tokenizer("think")
    tokenizer.save_pretrained(folder / "model")
    chain.tiny_model(tokenizer, hidden=32, layers=2).save_pretrained(folder / "model")
    where = f"--model {folder / 'model'} --bank {folder / 'bank'}"
    return folder, [*OPTIONS.split(), *where.split()], tokenizer


def fill_bank(folder, tokenizer):
    """Write handmade answers over those that an untrained model gave."""
    (path,) = folder.glob("bank/*/*.safetensors")
    episodes = []
    for i, q in enumerate(QUESTIONS):
        texts = [response(q.problem, k) for k in (0, 1, 3)] + [
            response(q.problem, 0, slip=True),
            "</think>\n\\boxed{?}",
        ]
        for k, text in enumerate(texts):
            ids = tokenizer.encode(text, add_special_tokens=False)
            whole = k != 3 or i % 2
            ids = torch.tensor([*ids, tokenizer.eos_token_id] if whole else (ids * 3)[:64])
            e = Episode(q, i, torch.arange(2), ids, torch.zeros(len(ids)), torch.ones(len(ids)).bool(),
                        "stop" if whole else "length", mode="thinking", answer=q.answer, correct=k < 3)  # fmt: skip
            episodes.append(e)
    write(path, episodes)


def weights_of(folder):
    return (folder / "checkpoints/step_000003/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("pairs", ["dpo", "overthink", "dast"])
def test_a_run_continues_to_the_same_weights(go, laboratory, tmp_path, pairs):
    """P6, end to end on chains: killed behind step 1; bank, pairs and reference are read, not made again."""
    folder, more, tokenizer = laboratory

    def start(name):
        where = f"--config experiments/toy_{pairs}.yaml --output_dir {tmp_path / name}"
        return go("dpo", *where.split(), *more)

    if not (folder / "bank").exists():
        code, error = start("whole")
        assert code == 2 and "gives no pair" in error, "an untrained model is never right"
        fill_bank(folder, tokenizer)
    assert start("whole") == (0, "")
    whole = tmp_path / "whole"
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    made = [[(a["sample"], b["sample"]) for a, b in json.loads((whole / "pairs.json").read_text())]]
    if pairs == "dpo":
        assert rows[1]["loss/policy"] == pytest.approx(0.693147, abs=1e-5), "policy = reference: ln 2"
        assert rows[1]["dpo/margin"] == pytest.approx(0, abs=1e-5)
        assert rows[3]["loss/policy"] < rows[1]["loss/policy"]
        assert made == [[(0, 3), (0, 2)] * 6], "cut answers are the longest"
        assert rows[0]["dpo/rejected_cut_share"] == rows[0]["dpo/rejected_wrong_share"] == 0.5
    elif pairs == "overthink":
        assert made == [[(2, 2)] * 12], "one with three checks is the only one with more than two right attempts"
        assert rows[0]["dpo/outcome_efficiency"] == 0 and "dpo/outcome_efficiency" in rows[3]
        for (w, _), q in zip(json.loads((whole / "pairs.json").read_text()), QUESTIONS):
            ids = [*tokenizer.encode(response(q.problem, 3), add_special_tokens=False), tokenizer.eos_token_id]
            text = tokenizer.decode([*ids[: w["kept"]], *w["close"], *ids[w["behind"] :]])
            assert text == response(q.problem, 1).replace(f"So it is {q.answer}.\n", "") + tokenizer.eos_token
            assert w["tokens"] == 31
    else:
        assert made[0].count((0, 2)) == 12 and made[0].count((3, 4)) == rows[0]["dpo/wrong_pairs"] == 9
        assert rows[0]["dpo/small_margins"] == 3 and rows[0]["dpo/pairs"] == 21, "0.15 of 24, rounded down"
        return  # what a kill leaves of it is no other than of the two
    evaluated = [(row["step"], row["setting"]) for row in read_jsonl(whole / "evaluations.jsonl")]
    assert (2, "adaptive") in evaluated and (3, "never_think") in evaluated

    shutil.copytree(whole, tmp_path / "killed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step_{step:06d}")
    (tmp_path / "killed" / "summary.json").unlink()
    kept = [path for path in (*folder.rglob("bank/*/*.safetensors"), *(tmp_path / "killed").glob("reference/*"),
                              tmp_path / "killed" / "pairs.json")]  # fmt: skip
    times = [path.stat().st_mtime_ns for path in kept]
    (bank,) = (folder / "bank").iterdir()
    (bank / ".00000099.safetensors.7.tmp").write_bytes(b"half")  # what a kill leaves while a round is written
    assert start("killed") == (0, "")
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert weights_of(tmp_path / "killed") == weights_of(whole)
    again = read_jsonl(tmp_path / "killed" / "metrics.jsonl")
    clean = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in part] for part in (rows, again)]
    assert clean[0] == clean[1]


def test_a_damaged_round_of_the_bank_is_named(tmp_path):
    e = Episode(None, 3, torch.arange(2), torch.arange(4), torch.zeros(4), torch.ones(4, dtype=torch.bool), "stop")
    write(tmp_path / "3.safetensors", [e, e])
    rows = rows_of(tmp_path / "3.safetensors")
    assert [(row["question"], row["sample"], row["tokens"]) for row in rows] == [(3, 0, 4), (3, 1, 4)]
    whole = (tmp_path / "3.safetensors").read_bytes()
    for broken in (whole[:-1], whole[:20], b""):
        (tmp_path / "3.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match="3.safetensors is damaged: .*Delete it"):
            rows_of(tmp_path / "3.safetensors")


def test_defaults():
    args = Args()
    assert (args.pairs, args.loss, args.rejected) == ("shortest", "dpo", "longest_any")
    assert (args.positive, args.negative, args.delta) == ("fcs_reflection", "same", 0.15)
    assert (args.beta, args.samples, args.score_temperature, args.learning_rate) == (0.1, 16, 1.0, 5e-6)
