"""What the benchmarks share: options, interleaved timing, tables, the machine, and the committed baselines.

Every benchmark prints a table and ends with one line of JSON. Both sides of a comparison run in turns in the same
minutes, so that a busy machine hits them alike, and every ratio comes with its spread over the repeats.

    make bench                              # all of them
    make bench ARGS=--check                 # and say what differs from baselines.json
    make bench ARGS=--write-baseline        # replace baselines.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Everything here is measured on the CPU. OpenMP threads that wait spin, by default for milliseconds: on a machine that
# others use as well, both sides then run ten times slower at two threads than at one. Some microseconds are enough.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

BASELINES = Path(__file__).parent / "baselines.json"
TOLERANCE = {"ratio": 0.15, "memory": 0.01}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


def arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options, the same for all benchmarks; sets the threads."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, taken in turns")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run; the numbers say nothing")
    parser.add_argument("--check", action="store_true", help="compare with baselines.json")
    parser.add_argument("--write-baseline", action="store_true", help="write the result into baselines.json")
    args = parser.parse_args(argv)
    if args.smoke and (args.check or args.write_baseline):
        parser.error("the tiny sizes of --smoke have no baseline.")
    torch.set_num_threads(args.threads)
    return args


# --------------------------------------------------------------------------------------------------------- the machine


def environment(threads: int) -> dict:
    """Return what the numbers depend on: versions, processor, threads."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"versions": versions, "processor": processor(), "threads": threads, "cores": os.cpu_count()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores_of_others() -> float | None:
    """Return how many cores other programs keep busy, looking for half a second while this one sleeps (Linux)."""

    def ticks():  # of all cores: (busy and idle, idle)
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    if not Path("/proc/stat").is_file():
        return None
    total, idle = ticks()
    time.sleep(0.5)
    total_now, idle_now = ticks()
    return round((os.cpu_count() or 1) * (1 - (idle_now - idle) / max(1, total_now - total)), 2)


def print_head(title: str, env: dict) -> None:
    """Print what is measured, with which versions, on which machine, and how much of it others use."""
    env["cores_of_others"] = [cores_of_others()]
    versions = ", ".join(f"{name} {v}" for name, v in env["versions"].items() if v)
    busy = env["cores_of_others"][0]
    print(f"\n{title}\n{versions}; {env['processor']}, {env['threads']} of {env['cores']} cores", end="")
    print("" if busy is None else f", other programs use {busy} cores", flush=True)
    if busy is not None and busy > env["cores"] - env["threads"] + 0.2:
        print("The machine is busy with other work: these ratios are worth less than their spread suggests.")


def matmul_rate() -> float:
    """Return the FLOP per second of a square fp32 matrix product, the best of several."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / best(lambda: a @ a, 20)


def read_rate(nbytes: int) -> float:
    """Return the bytes per second at which `nbytes` (at most, of a tensor) are read again and again."""
    a = torch.randn(nbytes // 4)
    return nbytes / best(a.sum, 40)


def best(call: Callable, times: int) -> float:
    """Return the shortest of several runs in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# ---------------------------------------------------------------------------------------------------------- the model


def small_model(smoke: bool):
    """Return the Qwen2 of 6.8M random parameters (fp32) that all benchmarks of the loop use; quietens transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # here: bench_memory's processes need torch alone
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    size = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 768, "vocab_size": 8192}
    if smoke:
        size = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 101}
    config = Qwen2Config(
        **size,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# ------------------------------------------------------------------------------------------------------------- numbers


def in_turns(sides: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Return {name: seconds of each repeat}; every repeat runs all sides, starting with another one each time."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(repeats):
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> list[float]:
    """Return [median, smallest, largest], rounded to four digits."""
    return [float(f"{v:.4g}") for v in (statistics.median(values), min(values), max(values))]


def ratio(slower: list[float], faster: list[float]) -> list[float]:
    """Return [median, smallest, largest] of the ratio of two lists of seconds, repeat by repeat."""
    return spread([s / f for s, f in zip(slower, faster)])


def shown(values: list[float], digits: int = 2) -> str:
    """Return a spread for people: `5.21 (5.02..5.40)`."""
    return "{:.{n}f} ({:.{n}f}..{:.{n}f})".format(*values, n=digits)


def print_table(head: list[str], rows: list[list]) -> None:
    """Print rows under a head, the first column to the left, the others to the right."""
    cells = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for n, row in enumerate(cells):
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip())
        if n == 0:
            print("  ".join("-" * w for w in widths))
    sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------- baselines


def finish(name: str, env: dict, compared: dict, result: dict, args) -> None:
    """Check against or write the baseline if asked for, and print the JSON line.

    Args:
        compared: {"ratio/...": number, "memory/...": number}, what a baseline keeps and a check compares.
        result: everything else that the JSON line shall hold.
    """
    env["cores_of_others"].append(cores_of_others())
    if args.check:
        check(name, env, compared)
    if args.write_baseline:
        saved = json.loads(BASELINES.read_text()) if BASELINES.is_file() else {}
        saved[name] = {"date": date.today().isoformat(), **env, "compared": compared}
        BASELINES.write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
        print(f"wrote {name} to {BASELINES.name}")
    print(json.dumps({"benchmark": name, "smoke": args.smoke, **env, **compared, **result}))


def check(name: str, env: dict, compared: dict) -> list[str]:
    """Print what differs from the baseline by more than its tolerance: 15 % for ratios, 1 % for memory."""
    saved = json.loads(BASELINES.read_text()).get(name) if BASELINES.is_file() else None
    if saved is None:
        print(f"check: {BASELINES.name} has no baseline for {name}; --write-baseline makes one")
        return []
    found = []
    for key, old in saved["compared"].items():
        new, allowed = compared.get(key), TOLERANCE[key.split("/")[0]]
        if new is None or abs(new - old) > allowed * abs(old):
            change = "not measured now" if new is None else f"now {new:.4g} ({new / old - 1:+.1%})"
            found.append(f"check: {key} was {old:.4g} on {saved['date']}, {change}")
    others = {k: v for k, v in saved["versions"].items() if env["versions"].get(k) != v}
    if others or saved["processor"] != env["processor"] or saved["threads"] != env["threads"]:
        print(
            f"check: the baseline is of {saved['processor']}, {saved['threads']} threads, {others or 'same versions'}"
        )
    print("\n".join(found) or f"check: {len(saved['compared'])} numbers are those of {saved['date']}, within tolerance")
    return found
