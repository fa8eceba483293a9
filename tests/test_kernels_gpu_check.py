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


@pytest.mark.slow
def test_benchmarks_run_in_the_interpreter():
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "experiments/bench/gpu_kernels.py", "--smoke", "policy_loss", "sample", "rms_norm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["benchmark"] for line in found] == [f"gpu_kernels/{x}" for x in ("policy_loss", "sample", "rms_norm")]
    assert not [case for line in found for case in line["results"].values() if "error" in case["triton"]]
