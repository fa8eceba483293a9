"""The benchmarks run and end in one JSON line; tiny sizes, so their numbers say nothing here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rollout", "step", "memory"])
def test_benchmarks_run(name):
    if name == "step" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: bench_step.py has nothing to compare with")
    command = [sys.executable, f"experiments/bench/bench_{name}.py", "--smoke", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["benchmark"] == name and result["smoke"]
