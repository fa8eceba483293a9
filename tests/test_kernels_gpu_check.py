"""`experiments/gpu_check.py` without a GPU: what it says, and that one bad part does not stop the others."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu_check():
    spec = spec_from_file_location("gpu_check", ROOT / "experiments" / "gpu_check.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "There is no GPU here" in capsys.readouterr().out


def test_a_part_that_fails_or_hangs_is_reported_and_the_others_go_on(gpu_check, monkeypatch, capsys):
    parts = {
        "hangs": (1, ["-c", "import time; print('started'); time.sleep(60)"]),
        "breaks": (20, ["-c", "print('before'); raise SystemExit('the reason')"]),
        "works": (20, ["-c", "import json; print(json.dumps({'results': {'a': {'speedup': 7.0}}}))"]),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--smoke"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert gpu_check.main() == 1
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])["parts"]
    assert {name: part["status"] for name, part in result.items()} == {
        "hangs": "out of time", "breaks": "FAILED", "works": "passed"
    }  # fmt: skip
    assert result["breaks"]["detail"] == "the reason" and result["works"]["results"] == [{"a": {"speedup": 7.0}}]
    assert "a 7.0" in lines[-2] and len(lines[-4:-1]) == 3


def lines_of(*command: str, **environment: str) -> list[dict]:
    """Run a benchmark from a plain checkout and return the JSON lines that it prints."""
    given = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
        env=given | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_kernel_benchmarks_run_in_the_interpreter():
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    parts = ("token_logprobs", "group_advantage", "sample", "rms_norm")
    found = lines_of("experiments/bench/gpu_kernels.py", "--smoke", *parts)
    assert [line["benchmark"] for line in found] == [f"gpu_kernels/{x}" for x in parts]
    cases = [case for line in found for case in line["results"].values() if isinstance(case, dict)]
    assert len(cases) > 10 and not [case for case in cases if "error" in case["triton"]]


@pytest.mark.slow
def test_rollout_benchmark_runs():
    decode, mix = lines_of("experiments/bench/gpu_rollout.py", "--smoke", "--short")
    assert all(decode["results"][f"1.5B/{B}x40"]["tokens_per_s"] > 0 for B in (1, 3))
    results = mix["results"]
    assert results["engine"]["times_as_long"] == 1.0 and results["generate"]["tokens_per_s"] > 0
    assert results["tokens"] > results["requests"] == 4


@pytest.mark.slow
def test_step_benchmark_runs_without_what_the_gpu_machine_lacks(tmp_path):
    """The machine with the GPU has torch, triton, transformers, accelerate: no DeepSpeed, math-verify, jsonargparse."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = f".{os.pathsep}{tmp_path}"
    (line,) = lines_of("experiments/bench/gpu_step.py", "--smoke", PYTHONPATH=path)
    found = line["results"]
    assert found["responses"] == 8
    assert found["logprob_gap"] < 1e-4, "the engine's log-probs are the learner's"
    assert found["step"] == pytest.approx(
        sum(found[x] for x in ("rollout", "grade_wait", "update", "refresh")), abs=0.01
    )


HIDE = """
import importlib.util, sys
HIDDEN = ("deepspeed", "datasets", "math_verify", "latex2sympy2_extended", "pytest", "flash_attn", "trl",
          "jsonargparse", "docstring_parser", "pebble")
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in HIDDEN else real(name, *a)
"""


@pytest.mark.parametrize("part", ["tests", "tests marked gpu"])
def test_tests_are_found_without_what_the_gpu_machine_lacks(gpu_check, tmp_path, part):
    (tmp_path / "sitecustomize.py").write_text(HIDE.replace('"pytest", ', ""))
    command = [sys.executable, *gpu_check.test_command(part, smoke=False), "--collect-only"]
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}{tmp_path}", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_tests_for_a_gpu_are_those_marked_so(gpu_check):
    assert gpu_check.test_command("tests", smoke=False)[:3] == ["-m", "pytest", "tests/test_kernels.py"]
    command = gpu_check.test_command("tests marked gpu", smoke=False)
    assert command[-4:-2] == ["-m", "gpu"] and sum(part.endswith("_gpu.py") for part in command) >= 2


def test_an_error_of_our_own_fails_a_benchmark_and_that_of_others_does_not(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "bench"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    import gpu_harness

    broken, full, fine = {"error": "ValueError: x"}, {"error": "out of memory"}, {"ms": 1.0}
    ours = {"8": {"triton": fine, "triton, entropy": broken, "torch": full}, "1.5B/3x40": {"error": "KeyError: 1"}}
    assert gpu_harness.failures({**ours, "engine": broken}) == ["ValueError: x", "KeyError: 1", "ValueError: x"]
    others = {"4096": {"triton": full, "liger (cross entropy)": broken}, "generate": broken, "copy_gb_per_s": 1.0}
    assert gpu_harness.failures({**others, "7B/256x8192": {"error": "MemoryError: does not fit"}}) == []
