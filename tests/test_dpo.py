"""DPO: the loss against trl (tests/golden), how pairs are chosen, and a run that is killed."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import make_episodes

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.dpo import Args, batch_of, loss, pairs_of, rate
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.packing import Counts, fill, pack
from adaptive_reasoning.run.bank import rows_of, write

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dpo_loss.json").read_text())["cases"]


def view(inputs, dtype):
    """Return what the loss reads of a micro-batch of these pairs, and the policy's log-probs [N] as a leaf."""
    parts = [x for pair in zip(inputs["chosen"], inputs["rejected"]) for x in pair]
    refs = [x for pair in zip(inputs["ref_chosen"], inputs["ref_rejected"]) for x in pair]
    lengths = torch.tensor([len(x) for x in parts])
    sequence = torch.repeat_interleave(torch.arange(len(parts)), lengths)

    def sums(values):
        return values.new_zeros(len(lengths)).index_add(0, sequence, values)

    flat = [torch.tensor([v for x in group for v in x], dtype=dtype) for group in (parts, refs)]
    return SimpleNamespace(ref_logprobs=flat[1], sums=sums, lengths=lengths), flat[0].requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_the_loss_equals_trl(case, dtype):
    inputs, want = case["inputs"], case["expected"]
    mb, logprobs = view(inputs, dtype)
    value, stats = loss(logprobs, mb, Counts(1, len(mb.lengths)), SimpleNamespace(beta=inputs["beta"]))
    value.backward()
    close = {"rel": 1e-12, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-5, "abs": 1e-6}
    assert value.item() == pytest.approx(want["loss"], **close)
    found = logprobs.grad.split(mb.lengths.tolist())
    for got, expected in zip(found, [x for pair in zip(want["grad_chosen"], want["grad_rejected"]) for x in pair]):
        assert got.tolist() == pytest.approx(expected, **close)
    assert float(stats["dpo/margin"]) == pytest.approx(want["mean_margin"], **close)
    assert float(stats["dpo/reward_accuracy"]) == pytest.approx(want["reward_accuracy"])
    assert float(stats["dpo/chosen_reward"]) == pytest.approx(want["mean_reward_chosen"], **close)
    assert float(stats["dpo/rejected_reward"]) == pytest.approx(want["mean_reward_rejected"], **close)


def test_the_loss_by_hand():
    """Specification: log-ratios +2 and -3 at beta 0.1 are u = 0.5, loss 0.474077, gradient -+0.0377541 a token."""
    inputs = {"chosen": [[-1.0, -1.0]], "ref_chosen": [[-2.0, -2.0]], "rejected": [[-4.0]], "ref_rejected": [[-1.0]]}
    mb, logprobs = view(inputs, torch.float64)
    value, _ = loss(logprobs, mb, Counts(3, 2), SimpleNamespace(beta=0.1))
    value.backward()
    assert value.item() == pytest.approx(0.474077, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([-0.0377541, -0.0377541, 0.0377541], abs=1e-6)


def answers(lengths, correct, cut=()):
    return [{"tokens": n, "correct": c, "cut": i in cut, "id": i} for i, (n, c) in enumerate(zip(lengths, correct))]


def chosen(rows, **options):
    args = SimpleNamespace(**{"rejected": "longest_any", "drop_cut": False, **options})
    return [(a["id"], b["id"]) for a, b in pairs_of(rows, args)]


def test_pairs_by_hand():
    rows = answers((30, 50, 80, 200), (True, True, True, False), cut=(3,))
    assert chosen(rows) == [(0, 3)] and chosen(rows, rejected="longest_correct") == [(0, 2)]
    assert chosen(rows, rejected="kimi") == [(0, 1), (0, 2), (0, 3)]  # 50 and 80 are 1.5 times 30, 200 is wrong
    assert chosen(rows, rejected="two_shortest") == [(0, 2), (1, 2)]
    assert chosen(rows, drop_cut=True) == [(0, 2)]
    assert chosen(answers((40, 60, 90), (False, False, True))) == [], "the only right one is the longest"
    assert chosen(answers((40, 60, 90), (False,) * 3)) == [], "none is right"
    assert chosen(answers((10, 50, 80, 120), (False, True, True, True))) == [(1, 3)], "the shortest is wrong"
    assert chosen(answers((50, 50), (True, True)), rejected="two_shortest") == [], "equal lengths are no pair"


def test_batches_are_epochs_one_behind_the_other():
    args = SimpleNamespace(pairs_per_step=4, seed=0)
    drawn = [n for step in range(1, 6) for n in batch_of(10, step, args)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert len(batch_of(3, 1, args)) == 4, "fewer pairs than a step needs: some come twice"


def test_the_learning_rate():
    args = SimpleNamespace(max_steps=100, warmup_share=0.1, learning_rate=2.0, lr_schedule="cosine")
    assert [rate(args, step) for step in (1, 10, 11)] == [0.2, 2.0, 2.0]
    assert rate(args, 56) == pytest.approx(1.0) and 0 < rate(args, 100) < 0.01


@pytest.mark.parametrize("one_row", [False, True])
def test_a_pair_shares_its_micro_batch_in_order(one_row):
    """Without `together` the longest first: three pairs of unlike lengths were torn apart."""
    episodes = []
    for i, length in enumerate((9, 3, 7, 20, 1, 6)):
        (e,) = make_episodes(1)
        e.prompt_ids, e.response_ids = torch.tensor([1, 2]), torch.arange(length)
        e.behaviour_logprobs, e.action_mask = -torch.ones(length), torch.ones(length, dtype=torch.bool)
        e.forced, e.pair = ~e.action_mask, i // 2
        episodes.append(e)
    torn = fill(episodes, 24, one_row)
    assert any(len([e for e in part if e.pair == n]) == 1 for part in torn for n in range(3))
    for budget in (1, 24, 60, 1000):
        split = fill(episodes, budget, one_row, together="pair")
        for part in split:
            assert [e.pair for e in part[::2]] == [e.pair for e in part[1::2]]
        order = [episodes.index(e) for part in split for e in part]
        assert sorted(order) == list(range(6)) and all(order.index(i + 1) == order.index(i) + 1 for i in (0, 2, 4))
    mb = pack(fill(episodes, 1000, one_row, together="pair")[0])
    assert mb.sums(torch.ones(len(mb.targets))).view(-1, 2).tolist() == [[7, 20], [9, 3], [1, 6]]


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A model of the laboratory that knows its format and guesses: some answers are right, of unlike lengths."""
    folder, argv = tmp_path_factory.mktemp("cold"), sys.argv
    options = "--config experiments/cold_start_adaptthink.yaml --max_steps 80 --batch_size 16 --chain_mix 1"
    sys.argv = ["sft", *options.split(), "--nothinking_supervised", "1", "--output_dir", str(folder)]
    try:
        importlib.import_module("adaptive_reasoning.sft").main()
    finally:
        sys.argv = argv
    return folder / "model"


TOY = (
    "--config experiments/toy_dpo.yaml --chain_mix 1 --chain_questions 24 --chain_eval_questions 8 --samples 6 "
    "--pairs_per_step 4 --max_steps 3 --save_every 1 --keep_checkpoints 0 --eval_every 2 --max_new_tokens 24 "
    "--rollout_rows 64 --temperature 1.0 --patience 100"
)


def test_a_run_continues_to_the_same_weights(go, cold, tmp_path):
    """P6, end to end on chains: killed behind step 1; bank and reference log-probs are read, not made again."""

    def start(name):
        where = f"--model {cold} --bank {tmp_path / 'bank'} --output_dir {tmp_path / name}"
        return go("dpo", *TOY.split(), *where.split())

    assert start("whole") == (0, "")
    whole = tmp_path / "whole"
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[0]["dpo/pairs"] >= 1
    assert rows[1]["loss/policy"] == pytest.approx(0.693147, abs=1e-5), "policy = reference: ln 2"
    assert rows[1]["dpo/margin"] == pytest.approx(0, abs=1e-5) and rows[3]["loss/policy"] < rows[1]["loss/policy"]
    evaluated = [(row["step"], row["setting"]) for row in read_jsonl(whole / "evaluations.jsonl")]
    assert (2, "adaptive") in evaluated and (3, "never_think") in evaluated
    bank = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "bank").rglob("*.safetensors")}

    shutil.copytree(whole, tmp_path / "killed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step_{step:06d}")
    (tmp_path / "killed" / "summary.json").unlink()
    kept = (tmp_path / "killed" / "reference" / "0.safetensors").stat().st_mtime_ns
    (folder,) = (tmp_path / "bank").iterdir()
    (folder / ".00000099.safetensors.7.tmp").write_bytes(b"half")  # what a kill leaves while a round is written
    assert start("killed") == (0, "")
    assert (tmp_path / "killed" / "reference" / "0.safetensors").stat().st_mtime_ns == kept
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "bank").rglob("*.safetensors")} == bank
    weights = "checkpoints/step_000003/model/model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (whole / weights).read_bytes()
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
    assert (args.beta, args.rejected, args.samples, args.score_temperature) == (0.1, "longest_any", 16, 1.0)
