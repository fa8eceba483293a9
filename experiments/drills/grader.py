"""Drill: thousands of answers, some of which hang or crash; every healthy one gets the right score, in time.

    python experiments/drills/grader.py                 # 10,000 answers, 1 % hanging, 0.1 % crashing, 2 workers, 1 s

Ends with 1 if a score is wrong, if the pool is not alive afterwards, or if it took more than 1.3 times what the
deadlines over the workers and the healthy work alone take. The last line is JSON.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the workers import this file by its name

from adaptive_reasoning.tasks.answers import same_answer, warm_up
from adaptive_reasoning.tasks.grader import GraderPool

__all__ = ["check", "warm_up"]  # what a worker looks for in this module


def check(answer: str, gold: str) -> bool:
    """Grade as a run does; "hang" and "crash" do what they say."""
    while answer.startswith("hang"):
        pass
    if answer.startswith("crash"):
        os.abort()
    return same_answer(answer, gold)


def mixed(n: int, hanging: float, crashing: float, seed: int) -> list[tuple[str, str, bool | None]]:
    """Return (answer, gold, right?) of n answers, all different; None for those that hang or crash."""
    rng = random.Random(seed)
    jobs: list[tuple[str, str, bool | None]] = []
    for i in range(round(n * hanging)):
        jobs.append((f"hang {i}", "1", None))
    for i in range(round(n * crashing)):
        jobs.append((f"crash {i}", "1", None))
    while len(jobs) < n:
        i, right = len(jobs), rng.random() < 0.6
        jobs.append(
            rng.choice(
                [
                    (f"{i:,}" if right else f"{i + 1}", str(i), right),
                    (f"\\frac{{{2 * i + 1}}}{{2}}", f"{i}.5" if right else f"{i}.25", right),
                    (f"{i}x + 1", f"1 + {i}x" if right else f"{i}x - 1", right),
                    (f"{i}\\sqrt{{2}}", f"\\sqrt{{{2 * i * i}}}" if right else f"{i}\\sqrt{{3}}", right),
                ]
            )
        )
    rng.shuffle(jobs)
    return jobs


def grade(jobs, workers: int, timeout: float) -> tuple[float, dict, bool]:
    """Return the seconds, the grades by index, and whether the pool still answers afterwards."""
    from grader import check as importable  # by the module's name: a worker cannot import __main__

    with GraderPool(workers, timeout, importable) as pool:
        pool.submit("1", "1", "warm-up")
        pool.drain()
        start = time.perf_counter()
        for i, (answer, gold, _) in enumerate(jobs):
            pool.submit(answer, gold, i)
        grades = pool.drain()
        seconds = time.perf_counter() - start
        pool.submit("7", "7", "after")
        alive = pool.drain()["after"].correct
    return seconds, grades, alive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--hanging", type=float, default=0.01, help="share of the answers that never end")
    parser.add_argument("--crashing", type=float, default=0.001, help="share of the answers that kill their worker")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1.0, help="deadline of one answer in seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    jobs = mixed(args.answers, args.hanging, args.crashing, args.seed)
    healthy = [job for job in jobs if job[2] is not None]
    alone, _, _ = grade(healthy, args.workers, args.timeout)
    seconds, grades, alive = grade(jobs, args.workers, args.timeout)
    wrong = [
        i for i, (_, _, right) in enumerate(jobs)
        if right is not None and (grades[i].correct != right or grades[i].status != "ok")
    ]  # fmt: skip
    latencies = sorted(grade.seconds for grade, (_, _, right) in zip(grades.values(), jobs) if right is not None)
    p50, p99 = (1e3 * latencies[int(share * (len(latencies) - 1))] for share in (0.5, 0.99))
    load = os.getloadavg()[0]
    hung = sum(grade.status == "timeout" for grade in grades.values())
    died = sum(grade.status == "error" for grade in grades.values())
    floor = hung * args.timeout / args.workers + alone
    result = {
        "drill": "grader", "answers": len(jobs), "timeouts": hung, "errors": died, "wrong": len(wrong), "alive": alive,
        "healthy_alone_s": round(alone, 2), "seconds": round(seconds, 2), "times_floor": round(seconds / floor, 3),
        "answers_per_s": round(len(healthy) / alone, 1), "p50_ms": round(p50, 2), "p99_ms": round(p99, 2),
        "load": round(load, 2),
    }  # fmt: skip
    print(f"{len(jobs):,} answers: {hung} ran into their deadline, {died} died, {len(wrong)} healthy ones wrong")
    print(f"{seconds:.1f} s; deadlines over {args.workers} workers and the healthy work alone: {floor:.1f} s")
    print(
        f"healthy ones alone: {len(healthy) / alone:.0f} a second; the check of one takes {p50:.1f} ms in the "
        f"middle, {p99:.1f} ms at the 99th percentile; load of the machine at the end: {load:.1f}"
    )
    for i in wrong[:5]:
        print("wrong:", jobs[i], grades[i])
    print(json.dumps(result))
    return int(bool(wrong) or not alive or seconds > 1.3 * floor)


if __name__ == "__main__":
    sys.exit(main())
