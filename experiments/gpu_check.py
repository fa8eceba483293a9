"""All GPU tests and short benchmarks in one call: under 10 minutes, from a plain checkout, without network or install.

    PYTHONPATH=. python experiments/gpu_check.py               # make gpu-check
    PYTHONPATH=. python experiments/gpu_check.py --smoke       # tiny sizes on the CPU, in Triton's interpreter
    PYTHONPATH=. python experiments/gpu_check.py tests sample  # only these parts

Every part is a process of its own with a time limit. One that fails, hangs or is out of time is reported, and the
others go on. Ends in one table and one line of JSON. Exit status: 0 all parts passed, 1 some did not, 2 there is no
GPU. Needs torch, triton, transformers, accelerate and pytest.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = "experiments/bench"
TOTAL_S = 570
# Part: (limit in seconds, command after python; {smoke} is --smoke or nothing). What one wants to know first stands
# first: parts that the time does not suffice for are left out from the end.
PARTS = {
    "tests": (180, None),  # decided by `test_command`
    "tests marked gpu": (120, None),
    "decode": (120, [f"{BENCH}/gpu_rollout.py", "decode", "--short", "{smoke}"]),
    "token_logprobs": (90, [f"{BENCH}/gpu_kernels.py", "token_logprobs", "{smoke}"]),
    "step": (100, [f"{BENCH}/gpu_step.py", "--short", "{smoke}"]),
    "mix": (120, [f"{BENCH}/gpu_rollout.py", "mix", "--short", "{smoke}"]),
    "small kernels": (60, [f"{BENCH}/gpu_kernels.py", "group_advantage", "sample", "{smoke}"]),
    "decode_attention": (60, [f"{BENCH}/gpu_kernels.py", "decode_attention", "{smoke}"]),
    "rms_norm": (40, [f"{BENCH}/gpu_kernels.py", "rms_norm", "{smoke}"]),
}


def test_command(part: str, smoke: bool) -> list[str]:
    """Return the arguments of python that run a part of the tests."""
    some = ["-k", "rms_norm or token_logprobs_in_several"] if smoke else []
    gpu = part == "tests marked gpu"
    if gpu:
        return ["-m", "pytest", *map(str, gpu_test_files()), "-m", "gpu", "-q", "-rfE"]
    return ["-m", "pytest", "tests/test_kernels.py", "-q", "-rfE", *some]


def gpu_test_files() -> list[Path]:
    return sorted((ROOT / "tests").glob("test_*_gpu.py"))


def environment() -> dict:
    """Return versions and the GPU."""
    import torch

    found = {"date": date.today().isoformat(), "python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers", "accelerate", "flash-attn", "liger-kernel", "vllm", "pytest"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        found["commit"] = commit.stdout.strip() or None
    except OSError:  # a machine without git
        found["commit"] = None
    return found


def run_part(name: str, smoke: bool, limit: float) -> dict:
    """Run a part in a process of its own; return its status, seconds and the JSON lines it printed."""
    command = PARTS[name][1] or test_command(name, smoke)
    command = [sys.executable, *(x.replace("{smoke}", "--smoke" * smoke) for x in command)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    if smoke:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    print(f"\n=== {name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    # Everything that the part writes goes to the screen at once, and is kept for its JSON lines and its last words.
    process = subprocess.Popen(
        [x for x in command if x], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines, late = [], False

    def read():
        for line in process.stdout:
            lines.append(line)
            print(line if len(line) < 2000 else line[:300] + " ...\n", end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        process.wait(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, 9)  # the process group that was started here, and nothing else
        process.wait()
    reader.join(timeout=5)
    found = []
    for line in lines:
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:  # cut off by the time limit
                pass
    said = [line.strip() for line in lines if line.strip() and not line.startswith("{")]
    nothing = name == "tests marked gpu" and process.returncode == 5  # pytest: no test was selected
    status = "out of time" if late else "passed" if process.returncode == 0 or nothing else "FAILED"
    detail = "there is no such test" if nothing else said[-1][:160] if said else ""
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "detail": detail, "json": found}


def headline(name: str, part: dict) -> str:
    """Return the number of a part that one looks at first."""
    results = {}
    for line in part["json"]:
        results |= line.get("results") or {}
    cases = {key: x for key, x in results.items() if isinstance(x, dict)}
    if name == "decode" and cases:
        of = {key: x["of_nominal"] or x["of_copy"] for key, x in cases.items() if "of_copy" in x}
        wanted = [key for key in ("1.5B/1x2048", "1.5B/128x2048", "1.5B/256x2048", "7B/128x2048") if key in of]
        return "share of the memory's rate: " + ", ".join(f"{key} {of[key]}" for key in wanted or of)
    if name == "mix" and "engine" in cases:
        said = {side: cases.get(side, {}) for side in ("engine", "generate", "continuous batching", "vllm")}
        rates = [f"{side} {x['tokens_per_s']}" for side, x in said.items() if "tokens_per_s" in x]
        return f"tokens/s: {', '.join(rates)}; generate takes {said['generate'].get('times_as_long')} times as long"
    if name == "step" and "rollout" in results:
        phases = ", ".join(f"{key} {results[key]}" for key in ("rollout", "grade_wait", "update", "refresh"))
        return f"seconds: {phases}; log-prob gap {results['logprob_gap']:.1e}, peak {results.get('peak_gib')} GiB"
    if name == "token_logprobs" and cases:
        pairs = []
        for tokens, found in cases.items():
            ours, liger = found.get("triton", {}), found.get("liger (cross entropy)", {}).get("ms")
            beside = f", Liger {liger}" if liger else ""
            pairs.append(f"{tokens} tokens {ours.get('ms', ours.get('error'))} ms, {ours.get('gib')} GiB{beside}")
        return "; ".join(pairs)
    if name == "decode_attention" and cases:
        of = {key: x["triton"]["of_copy"] for key, x in cases.items() if "of_copy" in x.get("triton", {})}
        wanted = [key for key in ("1.5B/128x2048", "1.5B/256x2048") if key in of] or list(of)[:2]
        return "share of the copy rate: " + ", ".join(f"{key} {of[key]:.2f}" for key in wanted)
    times = {key: x["speedup"] for key, x in cases.items() if "speedup" in x}
    if times:
        return "times torch: " + ", ".join(f"{key} {x}" for key, x in list(times.items())[:4])
    return part["detail"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    args = parser.parse_args()
    unknown = [name for name in args.part if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]}: takes {', '.join(PARTS)}")
    if args.smoke:  # before triton is imported
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    start, about = time.monotonic(), environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if about["gpu"] is None and not args.smoke:
        print("There is no GPU here: nothing was tested or measured. --smoke tries the same parts on the CPU.")
        return 2
    parts = {}
    for name in args.part or PARTS:
        left = TOTAL_S - (time.monotonic() - start)
        if left < 5:
            parts[name] = {"status": "out of time", "seconds": 0.0, "detail": "not started", "json": []}
            continue
        parts[name] = run_part(name, args.smoke, min(PARTS[name][0], left))
    print()
    widths = max(len(name) for name in parts), max(len(p["status"]) for p in parts.values())
    for name, part in parts.items():
        print(f"{name:{widths[0]}}  {part['status']:{widths[1]}}  {part['seconds']:6.1f} s  {headline(name, part)}")
    result = {name: {key: part[key] for key in ("status", "seconds", "detail")} for name, part in parts.items()}
    for name, part in parts.items():
        result[name]["results"] = [line.get("results") for line in part["json"]]
    line = {"benchmark": "gpu_check", "smoke": args.smoke, **about, "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps({**line, "parts": result}))
    return 0 if all(p["status"] == "passed" for p in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
