"""Run laboratories: all their runs over the seeds, several at a time. Says first how long that takes.

    python experiments/run_laboratory.py first second --seeds 0,1,2 --jobs 2

The runs are those of laboratories.yaml. Finished ones are left alone and a killed one goes on from its checkpoint: the
same command continues. What a run prints goes into <folder>/<name>-seed<k>.log; what stands behind `--` is added to the
options of every run of a method.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import yaml

from adaptive_reasoning.core.files import load_json
from adaptive_reasoning.errors import UserError, run_cli

LIST = Path(__file__).with_name("laboratories.yaml")
ENDS = ("summary.json", "evaluation.json", "*/merge.json")  # one of them is written last


@dataclass(frozen=True)
class Step:
    """One command. `minutes` is what it takes on one core."""

    folder: Path
    command: list[str]
    minutes: float

    @property
    def finished(self) -> bool:
        return any(found for name in ENDS for found in self.folder.glob(name))

    def run(self) -> None:
        """Run it; UserError with the end of its log where it fails."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        log = self.folder.with_name(self.folder.name + ".log")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", *self.command, "--output_dir", str(self.folder)]
        with log.open("w") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            end = "".join(log.read_text().splitlines(keepends=True)[-5:])
            raise UserError(f"{self.folder} ended with code {done.returncode}; the end of {log}:\n{end}")


def jobs_of(laboratory: dict, seeds: list[str], more: list[str]) -> list[list[Step]]:
    """Return the steps of a laboratory: one list for each run and seed, and one of what is done once, in order."""
    folder, common = laboratory["folder"], laboratory.get("common", "").split()

    def step(name: str, minutes: float, command: str, options: list[str]) -> Step:
        words = command.format(folder=folder).split()
        return Step(folder / name, [f"adaptive_reasoning.{words[0]}", *words[1:], *options], minutes)

    runs = [
        [step(f"{name}-seed{seed}", *entry, [*common, "--seed", seed, *more])]
        for seed in seeds
        for name, entry in laboratory["runs"].items()
    ]
    once = [step(name, *entry, []) for name, entry in laboratory.get("once", {}).items()]
    return runs + ([once] if once else [])


def measured(step: Step) -> float:
    """Return the minutes that finished runs of a name took here, else those of the list."""
    name = step.folder.name.rpartition("-seed")[0]
    seconds = (
        [load_json(path)["wall_s"] for path in step.folder.parent.glob(f"{name}-seed*/summary.json")] if name else []
    )
    return sum(seconds) / len(seconds) / 60 if seconds else step.minutes


def left(jobs: list[list[Step]], at_once: int) -> tuple[int, int, float]:
    """Return (steps, steps that are not finished, minutes for those)."""
    steps = [step for job in jobs for step in job]
    minutes = [sum(measured(step) for step in job if not step.finished) for job in jobs]
    return len(steps), sum(not s.finished for s in steps), max(sum(minutes) / at_once, max(minutes, default=0.0))


def run_all(jobs: list[list[Step]], at_once: int) -> None:
    """Run the steps that are not finished; the first failure stops what has not begun."""

    def run(job: list[Step]) -> None:
        for step in (s for s in job if not s.finished):
            start = time.perf_counter()
            step.run()
            _, steps, minutes = left(jobs, at_once)
            took = (time.perf_counter() - start) / 60
            print(f"{step.folder}: {took:.1f} min; {steps} left, about {minutes:.0f} min", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
    for future in done:
        future.result()


def main(argv: list[str] | None = None) -> None:
    listed = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=list(listed), help="which laboratories")
    parser.add_argument("--seeds", default="0,1,2", help="comma separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time; each has one thread")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where the laboratories' folders are")
    parser.add_argument("--plan", action="store_true", help="say how long it takes, and run nothing")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args, more = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    laboratories = [listed[name] | {"folder": args.root / listed[name]["folder"]} for name in args.names]
    jobs = [job for one in laboratories for job in jobs_of(one, args.seeds.replace(",", " ").split(), more)]
    every, steps, minutes = left(jobs, args.jobs)
    print(
        f"{every - steps} of {every} runs are finished; the others take about {minutes:.0f} min, {args.jobs} at a time"
    )
    if args.plan:
        return
    os.environ |= {"OMP_NUM_THREADS": "1"}
    run_all(jobs, args.jobs)
    for one in laboratories:
        page = Path(__file__).with_name(one["page"])
        subprocess.run([sys.executable, str(page), str(one["folder"])], check=True)


if __name__ == "__main__":
    run_cli(main)
