"""Drill: kill -9 a run again and again, start it by the same command, and compare with a run that nobody touched.

    python experiments/drills/kill.py                              # AdaptThink, one process, 60 steps, 30 kills
    python experiments/drills/kill.py --processes 2                # under ZeRO-3 on two CPU processes
    python experiments/drills/kill.py --algorithm grpo --config experiments/toy_grpo.yaml \\
        --model runs/cold-start-arm/model
    python experiments/drills/kill.py --algorithm sft --config experiments/cold_start_adaptthink.yaml
    python experiments/drills/kill.py --algorithm o1_pruner --config experiments/toy_o1_pruner.yaml \\
        --model runs/cold-start-checks/model --steps 40                        # a third of the kills while it samples
    python experiments/drills/kill.py --algorithm benchmark --steps 3          # three settings, each finished once

Kills fall at random moments, while a process still loads, trains, or writes a checkpoint. The final weights,
metrics, samples, evaluations and summary have to be equal (times apart), and no checkpoint may ever be half-written.
Ends with 1 if anything differs; the last line is JSON.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent.parent
BANKED = ("o1_pruner", "dpo", "rft")  # sample answers before their first step
TIMES = ("time/", "rollout/tokens_per_s", "grader/seconds")


def bank_of(folder: Path) -> Path:
    return folder.parent / f"bank-{folder.name}"


def bank_files(folder: Path) -> int:
    return sum(1 for _ in bank_of(folder).glob("*/*.safetensors"))


def command_of(args, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts or continues the run in `folder`, and its environment."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if args.processes == 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        start = [sys.executable, "-m"]
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.pop("ACCELERATE_USE_CPU", None)  # it would silently turn DeepSpeed off
        start = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        start += ["--config_file", "experiments/launch/zero3_cpu.yaml", "--num_processes", str(args.processes), "-m"]
    options = [f"adaptive_reasoning.{args.algorithm}", "--output_dir", str(folder)]
    if args.algorithm == "benchmark":  # of what the training of the laboratory evaluates
        options += ["--model", args.model, "--task", "chain", "--max_new_tokens", "128", "--dtype", "fp32"]
    else:
        options += ["--config", args.config, "--max_steps", str(args.steps), "--save_every", "1"]
    if args.algorithm not in ("benchmark", "sft"):
        options += ["--model", args.model, "--eval_every", "20"]
    if args.algorithm == "adaptthink":
        options += ["--ref_cache", str(folder.parent / f"reference-{folder.name}")]
    if args.algorithm in BANKED:
        options += ["--bank", str(bank_of(folder))]
    return [*start, *options, *args.more], environment


def finish(args, folder: Path) -> tuple[float, float]:
    """Run to the end; return the seconds until the first step was written, and those from there to the end."""
    command, environment = command_of(args, folder)
    start, first = time.monotonic(), None
    with open(folder.parent / f"{folder.name}.log", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.1)
            if first is None and steps_done(folder):
                first = time.monotonic()
    if process.returncode:
        raise SystemExit(f"{folder.name} ended with {process.returncode}; see {folder.parent / folder.name}.log")
    end = time.monotonic()
    return (first or end) - start, end - (first or end)


def steps_done(folder: Path) -> int:
    """Return how many steps (settings of an evaluation) are written down."""
    last = max((row["step"] for row in rows(folder / "metrics.jsonl")), default=0)
    return last + len(rows(folder / "finished.jsonl"))


def kill_once(args, folder: Path, step: int, after: float, banked: int = 0) -> bool:
    """Start the run and kill all its processes so many seconds after it has written a step (0: after its start).

    By the step and not by the clock alone: how fast the machine is changes while the drill goes on. With `banked` it
    is after so many files of its bank. Returns False if the run had ended before.
    """
    command, environment = command_of(args, folder)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and (steps_done(folder) < step or bank_files(folder) < banked):
            time.sleep(0.05)
        code = process.wait(after)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        return True
    if code:
        raise SystemExit(
            f"{folder.name}: ended by itself with {code} when it was continued; start it by hand to see why"
        )
    return False


def kill_tree(root: subprocess.Popen) -> None:
    """Send SIGKILL to a process and all that it has started, and wait until none of them runs.

    Not by its process group: torch's launcher starts every rank in a session of its own, so that killing the group of
    the launcher would leave the ranks writing for seconds. All are stopped first, so that none starts another unseen.
    """
    found: set[int] = set()
    while new := ({root.pid} | below(root.pid)) - found:
        found |= new
        for pid in new:
            send(pid, signal.SIGSTOP)
    for pid in found:
        send(pid, signal.SIGKILL)
    root.wait()
    while any(runs(pid) for pid in found):
        time.sleep(0.02)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended in this moment
        os.kill(pid, number)


def stat_of(pid: int) -> tuple[str, int]:
    """Return (state, parent) of a process as Linux tells them; ("", 0) if there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return state, int(parent)


def runs(pid: int) -> bool:
    return stat_of(pid)[0] not in ("", "Z", "X")


def below(root: int) -> set[int]:
    """Return the pids of all descendants of a process."""
    parents = {int(p.name): stat_of(int(p.name))[1] for p in Path("/proc").iterdir() if p.name.isdigit()}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def half_written(folder: Path) -> list[str]:
    """Return the checkpoints that do not open: a folder of the final name must be whole at any moment."""
    bad = []
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if checkpoint.name.endswith(".partial"):
            continue
        try:
            json.loads((checkpoint / "state.json").read_text())
            with safe_open(checkpoint / "model" / "model.safetensors", "pt") as file:
                assert file.keys()
            assert any((checkpoint / "optimizer").iterdir())
        except Exception as error:
            bad.append(f"{checkpoint.name}: {type(error).__name__}: {error}")
    return bad


def rows(path: Path) -> list[dict]:
    """Return the rows of a JSONL file without times."""
    lines = path.read_text().split("\n") if path.is_file() else []
    found = [json.loads(line) for line in lines[:-1]]  # what follows the last newline is being written
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in found]


def state_of(folder: Path, steps: int) -> dict[str, str]:
    """Return a digest of everything that has to be equal."""
    names = ("metrics", "samples", "evaluations", "finished")
    parts = {name: json.dumps(rows(folder / f"{name}.jsonl")) for name in names}
    for name in ("summary", "evaluation", "reference"):
        if (folder / f"{name}.json").is_file():
            content = json.loads((folder / f"{name}.json").read_text())
            if name == "summary":
                content.pop("wall_s")
            parts[name] = json.dumps(content)
    for model in (folder / "model", folder / "checkpoints" / f"step_{steps:06d}" / "model"):
        if model.is_dir():
            parts["weights"] = (model / "model.safetensors").read_bytes()
    for file in sorted(bank_of(folder).glob("*/*.safetensors")):
        parts[f"bank {file.name}"] = file.read_bytes()
    assert "weights" in parts or "evaluation" in parts, f"{folder} is not finished"
    return {k: hashlib.sha256(v if isinstance(v, bytes) else v.encode()).hexdigest() for k, v in parts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--algorithm", default="adaptthink")
    parser.add_argument("--config", default="experiments/toy_adaptthink.yaml")
    parser.add_argument("--model", default="runs/cold-start-adaptthink/model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1, help="more than one: ZeRO-3 on that many CPU processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, default=Path("runs/drill-kill"))
    args, args.more = parser.parse_known_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    whole, killed = args.folder.resolve() / "whole", args.folder.resolve() / "killed"
    loading, training = finish(args, whole)
    print(f"untouched: {loading:.0f} s to the first step, {training:.0f} s for the rest of {args.steps}", flush=True)
    starting = loading / (1 + bank_files(whole))  # without the bank, or until its next file
    rng, kills, broken = random.Random(args.seed), 0, []
    started = time.monotonic()
    while kills < args.kills:
        # Every fourth kill, and each that finds no step left, hits a process that loads; the others are spread over the
        # steps that are left, and over a step.
        done = max((int(p.name[5:]) for p in (killed / "checkpoints").glob("step_??????")), default=0)
        done = done or len(rows(killed / "finished.jsonl"))
        left, a_step = args.steps - done, training / args.steps
        samples = args.algorithm in BANKED and kills < args.kills // 3  # a third hits it while it fills its bank
        loads = kills % 4 == 3 or left < 2
        step = 0 if loads or samples else done + rng.randint(1, min(left - 1, max(1, 2 * left // (args.kills - kills))))
        after = rng.uniform(0.1, 0.7) * starting if loads or samples else rng.uniform(0, 1) * a_step
        if not kill_once(args, killed, step, after, min(kills, bank_files(whole) - 1) if samples else 0):
            print("the run ended before it could be killed again", flush=True)
            break
        kills += 1
        broken += half_written(killed)
        when = f"step {step}" if step else "its start"
        print(f"kill {kills:2d} {after:5.2f} s after {when}; it was started at step {done}", flush=True)
    finish(args, killed)
    a, b = state_of(whole, args.steps), state_of(killed, args.steps)
    differ = sorted(k for k in {**a, **b} if a.get(k) != b.get(k))
    leftovers = [p.name for p in (killed / "checkpoints").glob("*.partial")]
    print(f"{kills} kills; " + (f"DIFFERENT: {', '.join(differ)}" if differ else "everything equals the untouched run"))
    for line in broken + leftovers:
        print("half-written:", line)
    print(json.dumps({
        "drill": "kill", "algorithm": args.algorithm, "processes": args.processes, "steps": args.steps, "kills": kills,
        "differ": differ, "half_written": broken, "left_behind": leftovers,
        "seconds": round(time.monotonic() - started),
    }))  # fmt: skip
    return int(bool(differ or broken or leftovers))


if __name__ == "__main__":
    sys.exit(main())
