"""A run goes on with another number of processes than its checkpoint was written by: one, two and three, ZeRO-3 or not,
optimiser on the GPU or offloaded. Policy, critic and Adam's moments are the same numbers bit for bit afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from critic_worker import fresh_episodes, learn, make_pair
from distributed_worker import make_args, train, weights, write_model
from safetensors.torch import load_file

from adaptive_reasoning.learner.checkpoint import load_checkpoint, save_checkpoint
from adaptive_reasoning.learner.model import load_model
from adaptive_reasoning.learner.runtime import make_accelerator

HERE = Path(__file__).resolve().parent


def launch(folder: Path, ranks: int, source: str, target: str, **more) -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent), **more}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(HERE / "reshard_worker.py"), str(folder), source, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return json.loads((folder / f"{target}.json").read_text())


def pieces(folder: Path) -> dict[str, torch.Tensor]:
    """Return what the optimiser files of a checkpoint hold, end to end, policy and critic."""
    whole = {}
    for part in (folder, folder / "critic"):
        for file in sorted((part / "optimizer").iterdir()):
            for name, piece in load_file(file).items():
                whole.setdefault(f"{part.name}/{name}", []).append(piece.reshape(-1))
    return {name.replace(folder.name, "policy"): torch.cat(parts) for name, parts in whole.items()}


def put_a_damaged_one_on_top(root: Path) -> None:
    shutil.copytree(root / "step_000002", root / "step_000003")
    with open(root / "step_000003" / "optimizer" / "rank_0.safetensors", "r+b") as file:
        file.truncate(1000)


@pytest.mark.slow
def test_one_two_three_one(tmp_path):
    """One process -> ZeRO-3 on two -> ZeRO-3 on three, offloaded -> one process.

    On top of each checkpoint lies a damaged newer one, which all ranks agree to pass over.
    """
    pytest.importorskip("deepspeed", reason="ZeRO-3 is tested where DeepSpeed is installed")
    path = write_model(tmp_path / "model", tied=True)
    accelerator = make_accelerator(make_args(tmp_path))
    learner, critic = make_pair(path, tmp_path, accelerator)
    episodes = fresh_episodes(range(10))
    train(learner, episodes, 2)
    learn(critic, episodes, 2)
    tokenizer = load_model(path, learner.args)[1]
    save_checkpoint(tmp_path / "one" / "step_000002", learner, tokenizer, {"step": 2}, critic)
    saved = weights(learner), weights(critic)
    following = [s["loss"] for s in train(learner, episodes, 1, first=2)] + learn(critic, episodes, 1, first=2)
    after = weights(learner), weights(critic)

    put_a_damaged_one_on_top(tmp_path / "one")
    two = launch(tmp_path, 2, "one", "two")
    put_a_damaged_one_on_top(tmp_path / "two")
    three = launch(tmp_path, 3, "two", "three", ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    assert (two["offload"], three["offload"]) == ("none", "cpu")

    first = pieces(tmp_path / "one" / "step_000002")
    for name, ranks in (("two", 2), ("three", 3)):
        folder = tmp_path / name / "step_000002"
        assert (
            len(list((folder / "optimizer").iterdir())) == len(list((folder / "critic/optimizer").iterdir())) == ranks
        )
        again = pieces(folder)
        assert all(torch.equal(again[key], value) for key, value in first.items())
        for part, values in zip(("policy", "critic"), saved):
            masters = {k: v for k, v in again.items() if k.startswith(part) and k.endswith(".master")}
            assert len(masters) == len(values)
            assert all(torch.equal(masters[f"{part}/{k}.master"], v.reshape(-1)) for k, v in values.items())
    for found in (two, three):
        assert found["next"] == pytest.approx(following, abs=1e-5)
        assert all(told == found["same"][0] for told in found["same"])
        most, layer, everything = found["gathered"]
        assert 0 < most <= layer < everything, "weights are gathered one layer at a time and let go of"

    fresh, fresh_critic = make_pair(path, tmp_path, accelerator)
    assert load_checkpoint(tmp_path / "three" / "step_000002", fresh, fresh_critic) == {"step": 2}
    assert (fresh.steps, fresh_critic.steps) == (learner.steps - 1, critic.steps - 2)
    again = [s["loss"] for s in train(fresh, episodes, 1, first=2)] + learn(fresh_critic, episodes, 1, first=2)
    assert again == following, "back in one process it goes on as if it had never been away"
    for part, values in zip((fresh, fresh_critic), after):
        assert all(torch.equal(values[name], tensor) for name, tensor in weights(part).items())
