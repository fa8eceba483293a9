"""Methods on kernels: they take the operations, and the same training with torch and with Triton is the same curve."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaptive_reasoning import ada_grpo, grpo, kernels
from adaptive_reasoning.core.files import read_jsonl

ROOT = Path(__file__).parent.parent
SMALL = (
    "--prompts_per_step 2 --num_generations 4 --ref_samples 1 --max_new_tokens 24 --nothinking_max_new_tokens 8 "
    "--chain_questions 40 --chain_eval_questions 6 --eval_every 0 --save_every 0 --rollout_rows 16 --max_steps 20"
)


def run(module: str, kernels: str, *options: str) -> None:
    environment = os.environ | {
        "ADAPTIVE_REASONING_KERNELS": kernels, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", f"adaptive_reasoning.{module}", *options],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["grpo", "ada_grpo"])
def test_the_methods_take_the_kernel(monkeypatch, name):
    """No second copy of the normalisation: what the method returns is what the operation returns."""
    called = []
    real = kernels.group_advantage
    monkeypatch.setattr(kernels, "group_advantage", lambda *a, **k: called.append(a) or real(*a, **k))
    episodes = [SimpleNamespace(group=i // 4, reward=float(i % 3 == 0), mode="cot") for i in range(12)]
    if name == "grpo":
        grpo.advantages(episodes, grpo.Args())
    else:
        ada_grpo.advantages(episodes, ada_grpo.Args(), 5)
    assert len(called) == 1


@pytest.mark.slow
def test_same_curve(tmp_path):
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    cold = ["--config", "experiments/cold_start_adaptthink.yaml", "--max_steps", "4", "--batch_size", "16"]
    run("sft", "torch", *cold, "--output_dir", str(tmp_path / "cold"))
    toy = ["--config", "experiments/toy_adaptthink.yaml", "--model", str(tmp_path / "cold" / "model"), *SMALL.split()]
    curves = []
    for side in ("torch", "triton"):
        run("adaptthink", side, *toy, "--output_dir", str(tmp_path / side), "--ref_cache", str(tmp_path / "ref"))
        curves.append([row for row in read_jsonl(tmp_path / side / "metrics.jsonl") if "loss/policy" in row])
    assert len(curves[0]) == len(curves[1]) == 20
    for a, b in zip(*curves):
        for key in ("loss/policy", "loss/approx_kl", "loss/grad_norm", "adapt_think/advantage_mean"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (key, a, b)
    # Equal to the last bit everywhere would mean that the switch did nothing.
    assert [row["loss/grad_norm"] for row in curves[0]] != [row["loss/grad_norm"] for row in curves[1]]
