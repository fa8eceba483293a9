"""O1-Pruner: rewards, weights and loss against the official code (tests/golden), by hand, and a run that is killed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.packing import Counts
from adaptive_reasoning.o1_pruner import Args, choose, key_of, loss, rate, rewards, weights

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "o1_pruner.json").read_text())
WEIGHTS, LOSSES = ([c for c in GOLDEN["cases"] if c["kind"] == kind] for kind in ("weights", "loss"))


def options(**changes):
    given = {"lam": 2.0, "normalise": "zscore", "ratio": "sequence_mean", "clip_low": 0.2, "clip_high": 0.2}
    return SimpleNamespace(**{**given, **changes})


def answers(lengths, correct, cut=()):
    return [{"tokens": n, "correct": bool(c), "cut": i in cut} for i, (n, c) in enumerate(zip(lengths, correct))]


def paid(lengths, correct, lam=2.0, **more):
    return rewards(answers(lengths, correct, **more), options(lam=lam))


def view(logp, ref_logp, weight, dtype=torch.float64):
    """Return what the loss reads of a micro-batch of these rows, and the policy's log-probs [N] as a leaf."""
    lengths = torch.tensor([len(row) for row in logp])
    flat = [torch.tensor([v for row in rows for v in row], dtype=dtype) for rows in (logp, ref_logp)]
    mb = SimpleNamespace(
        old_logprobs=flat[1], sequence_advantages=torch.tensor(weight, dtype=dtype), lengths=lengths,
        sequence=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
    )  # fmt: skip
    return mb, flat[0].requires_grad_()


# --- rewards and weights


@pytest.mark.parametrize("case", WEIGHTS, ids=[case["name"] for case in WEIGHTS])
def test_weights_equal_the_official_code(case):
    inputs, want = case["inputs"], case["expected"]
    args = options(lam=inputs["lambda"])
    R = [rewards(answers(*rows), args) for rows in zip(inputs["lengths"], inputs["correct"])]
    drawn = [R[problem][sample] for problem, sample in inputs["selected"]]
    assert [min(max(r, -2), 4) for r in drawn] == pytest.approx(want["clipped"], abs=1e-12)
    assert weights(drawn, args) == pytest.approx(want["weight"], abs=1e-11)
    assert weights(drawn, options(normalise="none")) == drawn, "the paper's: neither clipped nor moved"


def test_rewards_by_hand():
    """Specification 5.6."""
    for lam in (0, 2, 5):
        assert paid((10, 20, 30, 40), (1, 1, 1, 1), lam) == pytest.approx([1.5, 0.25, -0.166667, -0.375], abs=1e-6)
    assert paid((7, 7, 7, 7), (1, 0, 0, 0)) == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert paid((7, 7), (1, 1), cut=(1,)) == pytest.approx([1, -1]), "cut, so wrong, whatever stands in its box"


def test_what_changes_a_reward_and_what_does_not():
    lengths, correct = (12, 40, 33, 21), (1, 1, 0, 1)
    base = paid(lengths, correct)
    assert paid([n * 10 for n in lengths], correct) == pytest.approx(base), "scale of the lengths"
    right = [a - b for a, b in zip(base, paid(lengths, correct, lam=0))]
    assert sum(right) == pytest.approx(0), "lambda (A - Abar) sums to 0 over the K answers"
    assert sum(paid(lengths, correct, lam=0)) > 0, "the mean of Lbar / L is at least 1"


def test_weights_have_mean_0_and_a_population_std_of_1():
    w = torch.tensor(weights([-7.0, 0.0, 1.0, 9.0], options()), dtype=torch.float64)  # clipped to -2, 0, 1, 4
    assert w.tolist() == pytest.approx([(x - 0.75) / 2.165064 for x in (-2, 0, 1, 4)], abs=1e-6)


def test_equal_rewards_stop_the_run():
    """The official code divides 0 by 0 and trains on NaN."""
    inputs = GOLDEN["degenerate_cases"][0]["inputs"]
    R = rewards(answers(inputs["lengths"][0], inputs["correct"][0]), options())
    for normalise in ("zscore", "none"):
        with pytest.raises(UserError, match="rewards of all 2 answers are 0: nothing tells them apart"):
            weights(R, options(normalise=normalise))


# --- loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", LOSSES, ids=[case["name"] for case in LOSSES])
def test_the_loss_equals_the_official_code(case, dtype):
    inputs, want = case["inputs"], case["expected"]
    mb, logprobs = view(inputs["logp"], inputs["ref_logp"], inputs["weight"], dtype)
    value, _ = loss(logprobs, mb, Counts(len(logprobs), len(mb.lengths)), options())
    value.backward()
    exact = dtype == torch.float64
    close = {"rel": 1e-10, "abs": 1e-11} if exact else {"rel": 1e-5, "abs": 1e-6}
    assert value.item() == pytest.approx(want["loss"], **close)
    if exact:  # a ratio on the edge of the clip range is in it or not by the rounding of fp32
        assert logprobs.grad.tolist() == pytest.approx([g for row in want["grad"] for g in row], **close)


def test_the_loss_at_the_start_is_minus_the_mean_weight():
    """Policy = reference: gradient -w / (T rows) a token; the product's -w / rows. And the clip's four corners."""
    ref = [[-1.0, -2.0], [-0.5, -0.5, -3.0, -1.0]]
    for ratio, each in (("sequence_mean", [-0.75] * 2 + [0.125] * 4), ("sequence_product", [-1.5] * 2 + [0.5] * 4)):
        mb, logprobs = view(ref, ref, [3.0, -1.0])
        value, stats = loss(logprobs, mb, Counts(6, 2), options(ratio=ratio))
        value.backward()
        assert value.item() == -1.0 and logprobs.grad.tolist() == pytest.approx(each)
        assert float(stats["o1_pruner/ratio_mean"]) == 1 and float(stats["loss/clip_fraction"]) == 0
    for w, moved, clipped in ((1, 0.2, True), (1, -0.3, False), (-1, 0.2, False), (-1, -0.3, True)):
        mb, logprobs = view([[-1.0 + moved] * 2], [[-1.0] * 2], [w])
        value, stats = loss(logprobs, mb, Counts(2, 1), options())
        value.backward()
        assert (logprobs.grad.tolist() == [0, 0]) == clipped == (float(stats["loss/clip_fraction"]) == 1)


def test_the_product_is_the_ratio_of_the_whole_sequence():
    """Log-ratios 0.05 and 0.1: the product is e^0.15, their mean e^0.075; micro-batches add up."""
    mb, logprobs = view([[-1.0, -1.0], [-2.0]], [[-1.05, -1.1], [-2.0]], [1.0, 2.0])
    counts = Counts(3, 2)
    for ratio, first in (("sequence_product", 1.161834), ("sequence_mean", 1.077884)):
        value, _ = loss(logprobs, mb, counts, options(ratio=ratio))
        assert value.item() == pytest.approx(-(first + 2.0) / 2, abs=1e-6)
        parts = [view([[-1.0, -1.0]], [[-1.05, -1.1]], [1.0]), view([[-2.0]], [[-2.0]], [2.0])]
        split = sum(float(loss(x.detach(), part, counts, options(ratio=ratio))[0]) for part, x in parts)
        assert split == pytest.approx(value.item())


# --- which answers, and when


def drawn(seed=0, room=200, **changes):
    """Return what `choose` draws of three questions with four answers each, and what it wrote down."""
    lengths = ((10, 20, 30, 40), (5, 5, 60, 90), (8, 9, 10, 11))
    own = {i: [{**row, "question": i, "sample": k} for k, row in enumerate(answers(row, (1, 1, 0, 1), cut=(3,)))]
           for i, row in enumerate(lengths)}  # fmt: skip
    said = []
    run = SimpleNamespace(
        step=0, config=SimpleNamespace(max_position_embeddings=room), task=SimpleNamespace(prompts=[[1] * 20] * 3),
        journal=SimpleNamespace(write=said.append, say=lambda text: None),
    )  # fmt: skip
    args = options(**{"seed": seed, "trained_samples": 2, **changes})
    return choose(run, SimpleNamespace(needed=[0, 1, 2], rows=own), args), said[0]


def test_two_answers_of_each_question_are_drawn():
    rows, said = drawn()
    assert [row["question"] for row in rows] == [0, 0, 1, 1, 2, 2] and len({key_of(row) for row in rows}) == 6
    assert drawn()[0] == rows and any(drawn(seed)[0] != rows for seed in (1, 2, 3))
    assert sum(row["weight"] for row in rows) == pytest.approx(0)
    assert said["o1_pruner/rows"] == 6 and said["o1_pruner/dropped_rows"] == 0
    rows, said = drawn(trained_samples=4, room=79)  # 20 tokens of prompt: those of 60 and 90 tokens have no room
    assert said["o1_pruner/dropped_rows"] == 2 and max(row["tokens"] for row in rows) == 40
    assert said["o1_pruner/right_share"] == 0.6 and said["o1_pruner/cut_share"] == 0.2
    # Their rewards are nevertheless those among all four answers.
    assert [row["reward"] for row in rows if row["question"] == 1] == pytest.approx([8.0, 8.0])
    assert said["o1_pruner/clipped_share"] == 0.2
    with pytest.raises(UserError, match="all 6 answers are longer than the model's 10 positions"):
        drawn(room=10)


def test_the_learning_rate():
    args = SimpleNamespace(max_steps=100, warmup_share=0.1, learning_rate=2.0, lr_schedule="cosine")
    assert [rate(args, step) for step in (1, 10, 11)] == [0.2, 2.0, 2.0]
    assert rate(args, 56) == pytest.approx(1.0) and 0 < rate(args, 100) < 0.01


def test_the_run_file_is_the_default():
    written = yaml.safe_load((ROOT / "experiments" / "o1_pruner_1_5b.yaml").read_text())
    where = {"output_dir", "eval_data", "seed", "eval_every", "save_every"}
    assert {k: v for k, v in written.items() if k not in where and getattr(Args(), k) != v} == {}
    holds = Args(eval_top_p=1.0, sample_top_p=0.5).holds()
    assert (holds.top_p, holds.reference) == (0.5, False), "no second model"
    with pytest.raises(UserError, match="--trained_samples 3: there are only --samples 2"):
        Args(samples=2, trained_samples=3)


# --- end to end on chains

TOY = (
    "--config experiments/toy_o1_pruner.yaml --chain_mix 1 --chain_questions 24 --chain_eval_questions 8 --samples 6 "
    "--rows_per_step 8 --max_steps 2 --save_every 1 --keep_checkpoints 0 --eval_every 0 --max_new_tokens 24 "
    "--rollout_rows 64 --temperature 1.0 --patience 100"
)


def test_a_run_continues_to_the_same_weights(go, guesser, tmp_path):
    """P6: killed behind step 1; bank and reference log-probs are read, not made again."""

    def start(name):
        where = f"--model {guesser} --bank {tmp_path / 'bank'} --output_dir {tmp_path / name}"
        return go("o1_pruner", *TOY.split(), *where.split())

    assert start("whole") == (0, "")
    whole = tmp_path / "whole"
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["o1_pruner/rows"] == 48
    assert rows[1]["o1_pruner/ratio_mean"] == pytest.approx(1, abs=1e-5), "policy = reference"
    assert rows[2]["o1_pruner/ratio_mean"] != pytest.approx(1, abs=1e-5) and rows[1]["loss/grad_norm"] > 0
    known = json.loads((whole / "metrics.json").read_text())
    assert {key for row in rows for key in row} <= set(known), "every metric says what it means"

    def made():
        kept = [*(tmp_path / "bank").rglob("*.safetensors"), tmp_path / "killed" / "reference" / "0.safetensors"]
        return [path.stat().st_mtime_ns for path in kept]

    shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_000002")
    (tmp_path / "killed" / "summary.json").unlink()
    before = made()
    assert start("killed") == (0, "")
    assert made() == before
    weights = "checkpoints/step_000002/model/model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (whole / weights).read_bytes()
    again = read_jsonl(tmp_path / "killed" / "metrics.jsonl")
    clean = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in part] for part in (rows, again)]
    assert clean[0] == clean[1]


@pytest.mark.slow
def test_the_users_command_survives_a_kill(guesser, tmp_path):
    """A process of its own, killed with SIGKILL once its first checkpoint stands; the command again ends the run."""
    command = [sys.executable, "-m", "adaptive_reasoning.o1_pruner", *TOY.split(), "--model", guesser]
    command = [*map(str, command), "--bank", str(tmp_path / "bank"), "--output_dir", str(tmp_path / "run")]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoints" / "step_000001").is_dir():
        assert killed.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(20)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stdout + done.stderr
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "run" / "summary.json").is_file()
