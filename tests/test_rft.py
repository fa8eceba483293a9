"""RFT_MixThinking: which answers a question teaches with, the loss, and a run that is killed."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import make_episodes

from adaptive_reasoning import formats
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.learner.packing import Counts, pack
from adaptive_reasoning.rft import Args, choose, loss, rate, select, skipping_samples
from adaptive_reasoning.tasks import chain


def pool(mode: str, right: int, samples: int = 16, question: int = 0, tokens: int = 10, cut=()) -> list[dict]:
    """The rows of a bank for one question: the last `right` of `samples` are right."""
    return [
        {
            "question": question,
            "mode": mode,
            "tokens": tokens,
            "correct": k >= samples - right,
            "cut": k in cut,
            "id": k,
        }
        for k in range(samples)
    ]


@pytest.mark.parametrize(
    "nothinking, thinking, mode, rows",
    [
        (16, 16, "nothinking", 16), (8, 8, "nothinking", 8), (4, 8, "thinking", 8), (0, 0, "", 0),
        (1, 0, "nothinking", 1), (0, 1, "thinking", 1),
    ],
)  # fmt: skip
def test_the_mode_by_the_shares_of_right_answers(nothinking, thinking, mode, rows):
    """The specification's rates (1, 1), (0.5, 0.5), (0.25, 0.5), (0, 0), (0.0625, 0)."""
    pools = pool("thinking", thinking), pool("nothinking", nothinking)
    found = select(*pools, SimpleNamespace(rows_per_question=0))
    assert len(found) == rows and all(row["correct"] for row in found)
    assert {row["mode"] for row in found} == ({mode} if mode else set())
    some = select(*pools, SimpleNamespace(rows_per_question=2))
    assert some == found[:2]


def test_rates_count_what_was_sampled():
    """Unequal numbers of samples; without NoThinking ones plain RFT; a right answer that was cut is a wrong one."""
    every = SimpleNamespace(rows_per_question=0)
    assert {r["mode"] for r in select(pool("thinking", 3, 4), pool("nothinking", 8), every)} == {"thinking"}
    assert [r["id"] for r in select(pool("thinking", 2), [], every)] == [14, 15]
    assert select(pool("thinking", 0), [], every) == []
    assert len(select([], pool("nothinking", 2), every)) == 2
    found = select(pool("thinking", 2), pool("nothinking", 2, cut=(15,)), every)
    assert [(r["mode"], r["id"]) for r in found] == [("thinking", 14), ("thinking", 15)]


def test_what_is_chosen_and_told(tmp_path):
    """Two questions without thinking, one with it, one of which nothing is right, one too long. By hand."""
    thinking = {0: pool("thinking", 16), 1: pool("thinking", 4, question=1),
                2: pool("thinking", 8, question=2, tokens=50), 3: pool("thinking", 0, question=3),
                4: pool("thinking", 1, question=4, tokens=95)}  # fmt: skip
    thinking[1][0] |= {"mode": "nothinking", "correct": True}  # it skipped its thinking by itself: not counted
    skipping = {0: pool("nothinking", 16), 1: pool("nothinking", 5, question=1), 2: pool("nothinking", 7, question=2),
                3: pool("nothinking", 0, question=3), 4: pool("nothinking", 0, question=4)}  # fmt: skip
    written = []
    run = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=100), step=0, task=SimpleNamespace(prompts=[[1] * 6] * 5),
        journal=SimpleNamespace(write=written.append, say=lambda text: None),
    )  # fmt: skip
    banks = {"thinking": SimpleNamespace(rows=thinking, needed=range(5), folder=tmp_path)}
    banks["nothinking"] = SimpleNamespace(rows=skipping, needed=range(5), folder=tmp_path)
    rows = choose(run, banks, SimpleNamespace(rows_per_question=0, weighting="questions"))
    modes = [(row["question"], row["mode"]) for row in rows]
    assert modes == [(0, "nothinking")] * 16 + [(1, "nothinking")] * 5 + [(2, "thinking")] * 8
    assert sum(row["weight"] for row in rows) == pytest.approx(29), "1 on average"
    per_question = [sum(row["weight"] for row in rows if row["question"] == i) for i in range(3)]
    assert per_question == pytest.approx([29 / 3] * 3)
    (told,) = written
    want = {"questions": 3, "dropped_rows": 1, "thinking_rows": 8, "thinking_tokens": 400, "nothinking_rows": 21,
            "nothinking_tokens": 210, "nothinking_question_share": 2 / 3, "thinking_accuracy": 29 / 79,
            "nothinking_accuracy": 28 / 80, "skipped_share": 1 / 80}  # fmt: skip
    assert told == {"step": 0, **{f"rft/{key}": pytest.approx(value) for key, value in want.items()}}
    assert {row["weight"] for row in choose(run, banks, SimpleNamespace(rows_per_question=0, weighting="rows"))} == {
        1.0
    }


def test_the_loss_by_hand():
    """Rows of 1 and 3 tokens, weights 0.5 and 1.5: mean over tokens, over rows, over weighted rows; all of the first
    token's gradient is there."""
    episodes = make_episodes(2)
    for e, tokens, weight in zip(episodes, (1, 3), (0.5, 1.5)):
        e.prompt_ids, e.response_ids, e.advantage = torch.tensor([1, 2]), torch.arange(tokens), weight
        e.behaviour_logprobs, e.action_mask = -torch.ones(tokens), torch.ones(tokens, dtype=torch.bool)
        e.forced = ~e.action_mask
    mb = pack(episodes)
    logprobs = torch.tensor([-4.0, -1.0, -2.0, -3.0], requires_grad=True)
    value, stats = loss(logprobs, mb, Counts(4, 2), SimpleNamespace(weighting="tokens"))
    value.backward()
    assert value.item() == 2.5 == stats["loss/policy"].item() and logprobs.grad.tolist() == [-0.25] * 4
    logprobs.grad = None
    value, _ = loss(logprobs, mb, Counts(4, 2), SimpleNamespace(weighting="questions"))
    value.backward()
    assert value.item() == pytest.approx((0.5 * 4 + 1.5 * 2) / 2)
    assert logprobs.grad.tolist() == pytest.approx([-0.25, -0.25, -0.25, -0.25])
    for e in episodes:
        e.advantage = 1.0
    value, _ = loss(logprobs, pack(episodes), Counts(4, 2), SimpleNamespace(weighting="rows"))
    assert value.item() == pytest.approx((4 + 2) / 2)


def test_the_learning_rate():
    args = SimpleNamespace(max_steps=100, warmup_share=0.1, learning_rate=2.0, lr_schedule="cosine")
    assert [rate(args, step) for step in (1, 10, 11)] == [0.2, 2.0, 2.0]
    assert rate(args, 56) == pytest.approx(1.0) and 0 < rate(args, 100) < 0.01


TOY = (
    "--config experiments/toy_rft_mixthinking.yaml --chain_mix 1 --chain_questions 24 --chain_eval_questions 8 "
    "--samples 6 --nothinking_samples 6 --batch_size 4 --max_steps 3 --save_every 1 --eval_every 2 "
    "--keep_checkpoints 0 --max_new_tokens 24 --rollout_rows 64 --temperature 1.0 --patience 100"
)


def test_a_run_continues_to_the_same_weights(go, guesser, tmp_path):
    """P6, end to end on chains: killed behind step 1; the banks are read, not made again."""

    def start(name, *more):
        where = f"--model {guesser} --bank {tmp_path / 'bank'} --output_dir {tmp_path / name}"
        return go("rft", *TOY.split(), *where.split(), *more)

    assert start("whole") == (0, "")
    whole = tmp_path / "whole"
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    told = rows[0]
    assert told["rft/questions"] == told["rft/thinking_rows"] + told["rft/nothinking_rows"] >= 1, "one row a question"
    assert 0 <= rows[1]["rft/nothinking_token_share"] <= rows[1]["rft/nothinking_row_share"] <= 1
    bank = {p: p.stat().st_mtime_ns for p in (tmp_path / "bank").rglob("*.safetensors")}
    assert len({p.parent for p in bank}) == 2, "one bank a mode"

    shutil.copytree(whole, tmp_path / "killed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step_{step:06d}")
    (tmp_path / "killed" / "summary.json").unlink()
    assert start("killed") == (0, "")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "bank").rglob("*.safetensors")} == bank
    weights = "checkpoints/step_000003/model/model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (whole / weights).read_bytes()
    again = read_jsonl(tmp_path / "killed" / "metrics.jsonl")
    clean = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in part] for part in (rows, again)]
    assert clean[0] == clean[1]

    # What the bank holds was sampled from the starting model: later weights must not add to it.
    for path in bank:
        path.unlink()
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_000003")
    code, error = start("killed")
    assert code == 2 and "24 of the questions" in error and not list((tmp_path / "bank").rglob("*.safetensors"))


def test_a_format_without_the_two_modes(go, guesser, tmp_path):
    options = f"--task chain --model {guesser} --answer_format boxed --dtype fp32 --output_dir {tmp_path / 'run'}"
    code, error = go("rft", *options.split())
    assert (
        code == 2 and "--answer_format boxed: its modes are response, not" in error and not (tmp_path / "run").exists()
    )


def test_what_a_question_is_asked():
    """The forced token is `</think>`, its row is capped, and its response is supervised from it on."""
    tokenizer = chain.tokenizer(formats.load("think"))
    form = formats.load("think")(tokenizer, Args(task="chain"))
    run = SimpleNamespace(
        form=form, args=SimpleNamespace(max_new_tokens=64, seed=0), stop_ids=(3,),
        task=SimpleNamespace(questions=["q"], prompts=[[5, 6]]),
    )  # fmt: skip
    asked = skipping_samples(
        run, SimpleNamespace(nothinking_samples=2, nothinking_max_new_tokens=9, max_new_tokens=64)
    )(0)
    assert [(r.forced, r.max_new_tokens, r.tag) for r in asked] == [(((form.eot, 1.0),), 9, ("q", 0))] * 2
    assert asked[0].seed != asked[1].seed


def test_defaults():
    args = Args()
    assert (args.samples, args.nothinking_samples, args.rows_per_question, args.weighting) == (16, 16, 1, "tokens")
    assert (args.nothinking_max_new_tokens, args.batch_size, args.learning_rate, args.score_temperature) == (
        4096, 128, 1e-5, 1.0,
    )  # fmt: skip
