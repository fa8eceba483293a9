"""The critic: values at the right tokens, a head of zeros, checkpoints beside the policy's; two ranks equal one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from critic_worker import SHARES, check, fresh_episodes, learn, make_pair
from distributed_worker import make_args, train, write_model

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.checkpoint import load_checkpoint, save_checkpoint
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.packing import pack
from adaptive_reasoning.learner.runtime import make_accelerator

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "zero3": {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    },
}


@pytest.mark.parametrize("tied", [True, False])
def test_it_starts_as_the_policy_with_a_head_of_zeros_and_learns(tmp_path, tied):
    path = write_model(tmp_path / "model", tied)
    learner, critic = make_pair(path, tmp_path, make_accelerator(make_args(tmp_path)))
    for name, parameter in critic.model.named_parameters():
        if name.startswith("model."):
            assert torch.equal(parameter, learner.model.get_parameter(name)), name
    episodes = fresh_episodes(range(10))
    assert all(v.eq(0).all() and len(v) == e.num_tokens for e, v in zip(episodes, critic.values(episodes)))
    losses = learn(critic, episodes, 12)
    assert losses[-1] < 0.7 * losses[0]
    assert learner.args.learning_rate == 1e-3, "the policy keeps its own rate"


def test_the_value_of_an_action_is_read_at_the_token_before_it(tmp_path):
    """Changing an action leaves its own value alone and moves those after it; values do not depend on the packing."""
    path = write_model(tmp_path / "model", True)
    _, critic = make_pair(path, tmp_path, make_accelerator(make_args(tmp_path)))
    with torch.no_grad():
        critic.model.score.weight.normal_()
    e, other = fresh_episodes([0, 1])
    before, together = critic.values([e])[0], critic.values([other, e])[1]
    torch.testing.assert_close(before, together, atol=1e-5, rtol=0)
    hidden = critic.model.model(torch.cat([e.prompt_ids, e.response_ids])[None]).last_hidden_state[0]
    P = len(e.prompt_ids)
    want = (hidden @ critic.model.score.weight[0])[P - 1 : -1]
    torch.testing.assert_close(before[e.action_mask], want[e.action_mask], atol=1e-5, rtol=0)
    e.response_ids = e.response_ids.clone()
    e.response_ids[3] = (e.response_ids[3] + 1) % 97
    after = critic.values([e])[0]
    torch.testing.assert_close(after[:4], before[:4], atol=1e-6, rtol=0)
    assert (after[4:] - before[4:]).abs().max() > 1e-3
    one_row = pack([e, other], one_row=True)
    values, _ = critic.score(one_row)
    torch.testing.assert_close(values[: int(e.action_mask.sum())].detach(), after[e.action_mask], atol=1e-5, rtol=0)


def test_a_checkpoint_holds_both_and_continues_exactly(tmp_path):
    path = write_model(tmp_path / "model", True)
    learner, critic = make_pair(path, tmp_path, make_accelerator(make_args(tmp_path)))
    episodes = fresh_episodes(range(10))
    train(learner, episodes, 1)
    learn(critic, episodes, 1)
    tokenizer = load_model(path, learner.args)[1]
    save_checkpoint(tmp_path / "step_000001", learner, tokenizer, {"step": 1, "memory": {"fast": [[1.0, 2.0]]}}, critic)
    after = train(learner, episodes, 1, first=1), learn(critic, episodes, 2, first=1)
    fresh, fresh_critic = make_pair(path, tmp_path, learner.accelerator)
    state = load_checkpoint(tmp_path / "step_000001", fresh, fresh_critic)
    assert state == {"step": 1, "memory": {"fast": [[1.0, 2.0]]}} and fresh_critic.steps == 2
    assert (train(fresh, episodes, 1, first=1), learn(fresh_critic, episodes, 2, first=1)) == after
    for (name, a), (_, b) in zip(critic.named_weights(), fresh_critic.named_weights()):
        assert torch.equal(a, b), name
    load_checkpoint(tmp_path / "step_000001", fresh)  # the policy alone
    save_checkpoint(tmp_path / "step_000002", learner, tokenizer, {})
    with pytest.raises(UserError, match="holds no critic"):
        load_checkpoint(tmp_path / "step_000002", fresh, fresh_critic)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(kind, tmp_path):
    """Losses, values and normalised advantages of two processes are those of one; a checkpoint goes on exactly."""
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="ZeRO-3 is tested where DeepSpeed is installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | ENVIRONMENTS[kind]
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "two").mkdir()
    done = subprocess.run(
        [*launch, str(HERE / "critic_worker.py"), str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    write_model(tmp_path / "one" / "model", tied=True)
    accelerator = make_accelerator(make_args(tmp_path))
    order = [i for share in SHARES for i in share]
    expected = check(tmp_path / "one", accelerator, fresh_episodes(order))
    assert found["first"] == pytest.approx(expected["first"], abs=2e-5)
    assert found["policy"] == pytest.approx(expected["policy"], abs=2e-5)
    assert found["again"] == found["after"], "what was saved goes on exactly"
    assert found["after"] == pytest.approx(expected["after"], abs=2e-4)
    for a, b in zip(found["values"], expected["values"]):  # the episodes of rank 0 come first
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)
    n = len(found["normalised"])
    torch.testing.assert_close(found["normalised"], expected["normalised"][:n], atol=2e-3, rtol=0)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=3e-4, rtol=0)
