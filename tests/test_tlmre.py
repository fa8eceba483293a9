"""TLMRE: rewards, advantages and loss against the official code (tests/golden), by hand, and a run that is killed."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.packing import Counts, pack
from adaptive_reasoning.tlmre import Args, advantages, loss, metrics, rewards

ROOT = Path(__file__).parent.parent
CASES = json.loads((ROOT / "tests" / "golden" / "tlmre_reward.json").read_text())["cases"]
# With the official check_eos off a cut response may earn a reward: left out.
REWARDS = [c for c in CASES if c["kind"] == "reward" and c["inputs"]["check_eos"]]
PIPELINES = [c for c in CASES if c["kind"] == "pipeline"]
ALONE = SimpleNamespace(sum=list, gather=list)  # what `advantages` and `metrics` need of a run of one process


def options(**changes):
    given = {"alpha": 0.1, "advantage": "rloo", "kl_coef": 0.0, "clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.0}
    return SimpleNamespace(**{**given, "aggregation": "sequence_mean", "max_new_tokens": 10, **changes})


def episode(tokens, correct=True, group=0, cut=False, reward=0.0):
    return Episode(
        Question(f"q{group}", "1+1", "2"), group, torch.tensor([1, 2]), torch.arange(tokens), torch.zeros(tokens),
        torch.ones(tokens, dtype=torch.bool), "length" if cut else "stop", correct=bool(correct), reward=reward,
    )  # fmt: skip


def scored(inputs) -> list[Episode]:
    """Return the episodes of a golden pipeline, with log-probs in float64."""
    episodes = []
    for i, (r, old, ref) in enumerate(zip(inputs["reward"], inputs["old_logp"], inputs["ref_logp"])):
        e = episode(len(old), group=i // inputs["group_size"], reward=r)
        e.old_logprobs, e.ref_logprobs = (torch.tensor(x, dtype=torch.float64) for x in (old, ref))
        episodes.append(e)
    return episodes


def paid(lengths, correct, **more):
    return rewards([episode(n, c) for n, c in zip(lengths, correct)], options(**more))


# --- reward


@pytest.mark.parametrize("case", REWARDS, ids=[case["name"] for case in REWARDS])
def test_rewards_and_leave_one_out_equal_the_official_code(case):
    inputs, want = case["inputs"], case["expected"]
    episodes = [
        episode(n, correct, group, cut=not eos)
        for group, rows in enumerate(zip(inputs["lengths"], inputs["correct"], inputs["has_eos"]))
        for n, correct, eos in zip(*rows)
    ]
    got = rewards(episodes, options(alpha=inputs["alpha"]))
    assert got == pytest.approx([r for group in want["reward"] for r in group], abs=1e-9)
    for e, r in zip(episodes, got):
        e.reward = r
    A = advantages(episodes, options(), ALONE)
    assert [len(a) for a in A] == [e.num_tokens for e in episodes]
    wanted = [a for group in want["rloo_advantage"] for a in group]
    for got, a in zip(A, wanted):
        assert got.tolist() == pytest.approx([a] * len(got), abs=1e-7)  # fp32


def test_rewards_by_hand():
    """Specification: alpha 0.2, right lengths 10, 20, 30: z = -1.224745, 0, 1.224745."""
    assert paid((10, 20, 30), (1, 1, 1), alpha=0.2) == pytest.approx([0.954579, 0.9, 0.845421], abs=1e-6)
    low, high = 0.1 / (1 + 2.718281828), 0.1 / (1 + 1 / 2.718281828)  # two right ones: z = -1 and 1, whatever they are
    for lengths in ((10, 20), (7, 900)):
        assert paid(lengths, (1, 1)) == pytest.approx([1 - low, 1 - high])
    assert paid((15, 80, 15), (0, 1, 0)) == [0, 0.95, 0], "one right response: z = 0"
    assert paid((15, 15), (1, 1)) == [0.95, 0.95] and paid((4, 5), (0, 0)) == [0, 0]
    assert rewards([], options()) == [], "a process without questions"


def test_what_changes_a_reward_and_what_does_not():
    lengths, correct = (12, 40, 33, 21), (1, 1, 0, 1)
    base = paid(lengths, correct)
    for other in (1, 34, 900):
        assert paid((12, 40, other, 21), correct) == base, "the length of a wrong response"
    assert paid([n + 1000 for n in lengths], correct) == pytest.approx(base, abs=1e-7)
    assert paid([n * 10 for n in lengths], correct) == pytest.approx(base, abs=1e-7)
    assert paid(lengths, correct, alpha=0.0) == [1, 1, 0, 1]
    cut = [episode(n, c, cut=n == 40) for n, c in zip(lengths, correct)]
    assert rewards(cut, options()) == paid((12, 40, 33, 21), (1, 0, 0, 1)), "cut, so wrong, whatever stands in its box"


# --- advantage


@pytest.mark.parametrize("case", PIPELINES, ids=[case["name"] for case in PIPELINES])
def test_returns_whitening_loss_and_gradient_equal_the_official_code(case):
    inputs, want = case["inputs"], case["expected"]
    episodes = scored(inputs)
    for name, advantage in (("return_to_go", "rloo"), ("whitened", "whitened")):
        found = advantages(episodes, options(advantage=advantage, kl_coef=inputs["kl_coef"]), ALONE)
        for got, expected in zip(found, want[name]):
            assert got.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for e, a in zip(episodes, found):
        e.advantages = a.double()
    logprobs = torch.tensor([v for row in inputs["new_logp"] for v in row], dtype=torch.float64, requires_grad=True)
    counts = Counts(len(logprobs), len(episodes))
    mb = pack(episodes)
    value, stats = loss(logprobs, None, mb, counts, options(kl_coef=inputs["kl_coef"]))
    value.backward()
    assert value.item() == pytest.approx(want["loss"], rel=1e-5, abs=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([g for row in want["grad"] for g in row], rel=1e-5, abs=1e-6)
    if inputs["kl_coef"]:
        k1 = [o - r for a, b in zip(inputs["old_logp"], inputs["ref_logp"]) for o, r in zip(a, b)]
        assert float(stats["loss/ref_kl"]) == pytest.approx(sum(k1) / len(k1), abs=1e-6)
    # Two micro-batches add up to the same.
    cut = sum(e.num_tokens for e in episodes[:3])
    parts = zip((episodes[:3], episodes[3:]), (logprobs[:cut], logprobs[cut:]))
    split = [loss(part, None, pack(some), counts, options())[0] for some, part in parts]
    assert float(sum(split).detach()) == pytest.approx(value.item(), abs=1e-6)


def test_leave_one_out_by_hand():
    """Rewards 1, 0, 0, 0: A = 1, and -1/3 for the others. They sum to 0 in every group."""
    episodes = [episode(3, group=i // 4, reward=r) for i, r in enumerate((1.0, 0, 0, 0, 0.95, 0.95, 0.9, 0))]
    A = [float(a[0]) for a in advantages(episodes, options(), ALONE)]
    assert A[:4] == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert sum(A[:4]) == pytest.approx(0, abs=1e-6) and sum(A[4:]) == pytest.approx(0, abs=1e-6)
    white = torch.cat(advantages(episodes, options(advantage="whitened"), ALONE)).double()
    assert float(white.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.square().mean()) == pytest.approx(1, abs=1e-6), "population variance"


def test_equal_rewards_stay_at_zero():
    """All wrong, or all right and equally long: nothing to whiten, and nothing becomes something."""
    for r in (0.0, 0.95):
        for a in advantages([episode(5, reward=r) for _ in range(8)], options(advantage="whitened"), ALONE):
            assert a.tolist() == [0.0] * 5


def test_the_divergence_is_that_of_the_tokens_still_to_come():
    """Log-ratios 1, 2, 4 at beta 0.5: the returns lack 3.5, 3 and 2. A reward beyond 10 is clamped before that."""
    pair = [episode(3, reward=100.0), episode(1)]
    for e, ratio in zip(pair, ((1.0, 2.0, 4.0), (0.0,))):
        e.old_logprobs, e.ref_logprobs = torch.tensor(ratio), torch.zeros(len(ratio))
    assert advantages(pair, options(kl_coef=0.5), ALONE)[0].tolist() == [6.5, 7.0, 8.0]


@pytest.mark.parametrize("shares", [((0, 1, 2, 3), (4, 5, 6, 7)), ((), tuple(range(8)))])
def test_whitening_is_over_all_processes(shares):
    """Two processes, one of them perhaps without a question, get what one process gets. The exchange itself is that of
    `learner/runtime.py`; with real processes: test_two_processes.py."""
    episodes = scored(PIPELINES[0]["inputs"])
    args = options(advantage="whitened", kl_coef=0.001)
    want = advantages(episodes, args, ALONE)
    barrier, told, found = threading.Barrier(2, timeout=20), {}, {}

    def process(rank):
        def exchange(values):
            told[rank] = values
            barrier.wait()
            total = [a + b for a, b in zip(told[0], told[1])]
            barrier.wait()
            return total

        found[rank] = advantages([episodes[i] for i in shares[rank]], args, SimpleNamespace(sum=exchange))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, share in enumerate(shares):
        assert len(found[rank]) == len(share)
        for got, i in zip(found[rank], share):
            torch.testing.assert_close(got, want[i], rtol=1e-6, atol=1e-6)


# --- metrics, options, files


def test_metrics():
    form = SimpleNamespace(modes={"thinking": "Thinking"})
    episodes = [
        episode(10, reward=0.9),
        episode(30, reward=0.9),
        episode(5, correct=False),
        episode(20, 1, 1, reward=1),
    ]
    got = metrics(episodes, form, ALONE)
    assert got["tlmre/right_tokens"] == 20 and got["tlmre/right_spread"] == 10
    got = metrics([episode(3, correct=False)], form, ALONE)
    assert got["tlmre/right_tokens"] is None and got["tlmre/right_spread"] is None


def test_the_run_file_is_the_default():
    written = yaml.safe_load((ROOT / "experiments" / "tlmre_1_5b.yaml").read_text())
    where = {"output_dir", "eval_data", "seed", "eval_every", "save_every"}
    assert {k: v for k, v in written.items() if k not in where and getattr(Args(), k) != v} == {}
    assert Args().holds().reference and not Args(kl_coef=0.0).holds().reference
    with pytest.raises(UserError, match="--num_generations 1: the baseline is the mean of the other samples"):
        Args(num_generations=1)


# --- end to end on chains

TOY = (
    "--config experiments/toy_tlmre.yaml --chain_mix 1 --chain_questions 24 --chain_eval_questions 8 "
    "--prompts_per_step 6 --num_generations 4 --max_steps 2 --save_every 1 --keep_checkpoints 0 --eval_every 0 "
    "--max_new_tokens 24 --rollout_rows 64 --patience 100"
)


def test_a_run_continues_to_the_same_weights(go, guesser, tmp_path):
    """P6: killed behind step 1, the same command ends in the same metrics and weights."""

    def start(name):
        return go("tlmre", *TOY.split(), "--model", guesser, "--output_dir", tmp_path / name)

    assert start("whole") == (0, "")
    whole = tmp_path / "whole"
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss/ref_kl"] == pytest.approx(0, abs=1e-5), "the policy is the starting model"
    assert all(row["check/logprob_gap_max"] < 1e-4 for row in rows) and rows[1]["loss/ref_kl"] != 0
    assert 0 < rows[0]["reward/mean"] < rows[0]["reward/accuracy"], "length has its price"
    assert all(abs(row["mode/thinking_advantage"]) < 3 and row["loss/grad_norm"] > 0 for row in rows)
    known = json.loads((whole / "metrics.json").read_text())
    assert set(rows[1]) <= set(known), "every metric says what it means"

    shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_000002")
    (tmp_path / "killed" / "summary.json").unlink()
    assert start("killed") == (0, "")
    weights = "checkpoints/step_000002/model/model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (whole / weights).read_bytes()
    again = read_jsonl(tmp_path / "killed" / "metrics.jsonl")
    timed = ("time/", "rollout/tokens_per_s", "grader/")
    clean = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in part] for part in (rows, again)]
    assert clean[0] == clean[1]


@pytest.mark.slow
def test_the_users_command_survives_a_kill(guesser, tmp_path):
    """A process of its own, killed with SIGKILL once its first checkpoint stands; the command again ends the run."""
    command = [sys.executable, "-m", "adaptive_reasoning.tlmre", *TOY.split(), "--model", guesser]
    command = [*map(str, command), "--output_dir", str(tmp_path / "run")]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoints" / "step_000001").is_dir():
        assert killed.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(20)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stdout + done.stderr
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "run" / "summary.json").is_file()
