"""The paper's launch path on the CPU: AdaptThink under ZeRO-3 on two gloo processes against one plain process (P4)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import make_folder

from adaptive_reasoning.report.files import read_jsonl

ROOT = Path(__file__).parent.parent
OPTIONS = (
    "--config experiments/adaptthink_1_5b.yaml --dtype fp32 --max_steps 2 --prompts_per_step 5 --num_generations 4 "
    "--ref_samples 2 --max_new_tokens 24 --nothinking_max_new_tokens 12 --eval_limit 5 --grader_workers 1 "
    "--tokens_per_micro_batch 256 --learning_rate 1e-3 --eval_every 0"
)


@pytest.mark.slow
def test_zero3_on_two_processes_trains_like_one(tmp_path):
    """Same samples, same losses to 1e-4, a checkpoint that opens, and a second launch that continues it.

    Five questions on two processes: one has three of them and the other two, and micro-batches differ in number.
    """
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    model = tmp_path / "model"
    data = make_folder(model)
    common = [*OPTIONS.split(), "--model", str(model), "--data", str(data), "--eval_data", str(data)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    launchers = {
        "one": [sys.executable, "-m", "adaptive_reasoning.adaptthink"],
        "two": [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file",
                "experiments/launch/zero3_cpu.yaml", "-m", "adaptive_reasoning.adaptthink"],
    }  # fmt: skip

    def go(name, *more):
        own = ["--output_dir", str(tmp_path / name), "--ref_cache", str(tmp_path / f"ref-{name}")]
        env = environment | ({"ACCELERATE_USE_CPU": "true"} if name == "one" else {})
        command = [*launchers[name], *common, *own, *more]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    for name in launchers:
        go(name)
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in launchers)
    assert [row["step"] for row in two] == [0, 1, 2]
    exact = ("rollout/tokens", "reward/mean", "adapt_think/thinking_tokens", "adapt_think/ref_accuracy_mean")
    for a, b in zip(one[1:], two[1:]):
        assert {k: a[k] for k in exact} == {k: b[k] for k in exact}
        for key in ("loss/policy", "loss/grad_norm", "adapt_think/first_eot_logprob", "adapt_think/advantage_mean"):
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), key
        assert b["check/logprob_gap_max"] < 1e-4  # the replica was gathered whole
    results = [read_jsonl(tmp_path / name / "evaluations.jsonl") for name in launchers]
    assert [r["result"]["mean_tokens"] for r in results[0]] == [r["result"]["mean_tokens"] for r in results[1]]

    from transformers import AutoModelForCausalLM

    pair = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoints/step_000002/model").state_dict()
        for name in launchers
    ]
    assert pair[0].keys() == pair[1].keys()
    assert all(pair[0][k].allclose(pair[1][k], atol=1e-4) for k in pair[0])
    assert "after step 2" in go("two")
