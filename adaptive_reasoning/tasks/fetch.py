"""Fetch benchmarks from the hub into files, for machines without a network.

    python -m adaptive_reasoning.tasks.fetch gpqa bbh      # writes gpqa_test.jsonl and bbh_test.jsonl

A file has a row per question as the loader reads it: problem (options and all), answer, level.
"""

import argparse
import json
from pathlib import Path

from adaptive_reasoning.errors import run_cli, say
from adaptive_reasoning.tasks.math import BENCHMARKS, load_questions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m adaptive_reasoning.tasks.fetch", description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    for name in parser.parse_args(argv).names:
        questions = load_questions(name)
        rows = [{"problem": q.problem, "answer": q.answer, "level": q.difficulty} for q in questions]
        path = Path(f"{name}_test.jsonl")
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        say(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    run_cli(main)
