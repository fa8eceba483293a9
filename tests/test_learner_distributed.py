"""Two ranks, as data parallelism and as ZeRO-3 on gloo CPU processes, do what one process does (promises P4, P8)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import (
    SHARES,
    accumulate,
    gradients,
    make_args,
    make_episodes,
    make_learner,
    train,
    weights,
    write_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "zero3": {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    },
}


@pytest.fixture(scope="module", params=["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def two_ranks(request, tmp_path_factory):
    """Return (kind, folder, what rank 0 found) of one launch of the worker."""
    kind = request.param
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="ZeRO-3 is tested where DeepSpeed is installed")
    folder = tmp_path_factory.mktemp(kind)
    write_model(folder / "tied", tied=True)
    write_model(folder / "untied", tied=False)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= ENVIRONMENTS[kind]
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(HERE / "distributed_worker.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return kind, folder, torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return what one process with all ten episodes finds, by share (which differ only by the model)."""
    folder = tmp_path_factory.mktemp("one")
    result = {}
    for share, (name, tied) in zip(SHARES, (("tied", True), ("untied", False))):
        episodes = make_episodes()
        learner = make_learner(write_model(folder / name, tied), make_args(folder))
        learner.recompute_logprobs(episodes)
        found = {"old": [e.old_logprobs for e in episodes]}
        (minibatch,) = learner.minibatches(episodes, 1, seed=0)
        found["loss"] = accumulate(learner, minibatch)
        found["gradients"] = gradients(learner)
        found["first"] = learner.step(learner.args.learning_rate)
        found["stats"] = train(learner, episodes, 2, minibatches=2, first=1, skip_zero_advantage=True)
        found["weights"] = weights(learner)
        found["after"] = train(learner, episodes, 2, first=3)
        result[share] = found
    return result


@pytest.mark.parametrize("share", SHARES)
def test_two_ranks_equal_one(two_ranks, one_process, share):
    """P4. Fails if a mean over ranks or accumulation steps is left in, or if a rank without work breaks the step."""
    kind, _, result = two_ranks
    found, expected = result[share], one_process[share]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for name, gradient in expected["gradients"].items():
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-6, name
    assert found["first"]["grad_norm"] == pytest.approx(expected["first"]["grad_norm"], rel=1e-5)
    assert expected["first"]["grad_norm"] > 0.05, "clipping has to be part of what is compared"
    for index, old in zip(SHARES[share][0], found["old"]):
        torch.testing.assert_close(old, expected["old"][index], atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", SHARES)
def test_training_on_two_ranks_equals_one(two_ranks, one_process, share):
    """Clipping, warm-up and AdamW included: five updates, four of them on minibatches of half the questions."""
    _, _, result = two_ranks
    found, expected = result[share], one_process[share]
    assert len(found["stats"]) == len(expected["stats"]) == 4
    for a, b in zip(found["stats"], expected["stats"]):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        # Adam divides by the size of the gradient, so rounding errors of tiny gradients grow to parts of lr = 1e-3.
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-4, rtol=0)


def test_rank_without_episodes_runs_fillers(two_ranks, one_process):
    """All ten episodes on rank 0: same micro-batches as in one process, and the other rank kept up with them."""
    _, _, result = two_ranks
    assert [s["micro_batches"] for s in result["empty"]["stats"]] == [
        s["micro_batches"] for s in one_process["empty"]["stats"]
    ]


def test_checkpoint_continues_exactly(two_ranks, one_process):
    """Saved, loaded into a fresh learner and continued: bit for bit the uninterrupted run."""
    kind, folder, result = two_ranks
    found = result["empty"]
    assert found["state"] == {"step": 3} and found["restored_steps"] == 5
    assert found["skipped"]["skipped_updates"] == 1, "a step that is not finite lies between, and leaves no trace"
    assert found["again"] == found["after"]
    for name, weight in found["after_weights"].items():
        assert torch.equal(weight, found["again_weights"][name]), name
    shards = sorted(p.stem for p in (folder / "step_000003" / "optimizer").iterdir())
    assert shards == (["rank_0", "rank_1"] if kind == "zero3" else ["rank_0"]), "did it run as it should?"
    assert found["after"][-1]["loss"] == pytest.approx(one_process["empty"]["after"][-1]["loss"], abs=2e-4)


def test_checkpoint_opens_with_from_pretrained(two_ranks):
    """Names, shapes and values are those of a Hugging Face folder, also out of ZeRO-3 shards."""
    _, folder, result = two_ranks
    path = folder / "step_000003" / "model"
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert model.dtype == torch.float32 and len(AutoTokenizer.from_pretrained(path)) > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, result["empty"]["weights"][name]), name


def test_full_disk_of_one_rank_is_an_error_on_all_and_leaves_nothing(two_ranks):
    """Under ZeRO-3 the failing rank is not the main one: the others must neither hang nor keep their half."""
    _, folder, result = two_ranks
    for told in result["empty"]["full_disk"]:
        assert "cannot write the checkpoint" in told and "File too large" in told
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_000003"]


def test_reference_policy_scores_the_first_weights(two_ranks, one_process):
    """A frozen learner beside the trained one, as a KL penalty needs it."""
    _, _, result = two_ranks
    for index, values in zip(SHARES["empty"][0], result["empty"]["reference"]):
        torch.testing.assert_close(values, one_process["empty"]["old"][index], atol=1e-6, rtol=0)


def test_nonfinite_loss_on_one_rank_stops_all(two_ranks):
    """P8: rank 0 has a nan loss; both raise before the update and the samples are written down."""
    _, folder, _ = two_ranks
    for rank in (0, 1):
        stopped = json.loads((folder / f"stopped_{rank}.json").read_text())
        assert "is not finite" in stopped["message"] and stopped["same"]
    report = json.loads((folder / "nonfinite_step_0008.json").read_text())
    assert report["optimiser_step"] == 8 and len(report["micro_batches"]) == 1
    assert report["micro_batches"][0]["process"] == 0 and "q0" in report["micro_batches"][0]["questions"]
