"""Responses of our benchmark beside those of lm-evaluation-harness to the same questions, one by one.

    python experiments/lm_eval/compare.py runs/gsm8k-ours runs/gsm8k-harness

reads samples.jsonl of an evaluation (with --kept_samples of as many as there are questions) and the harness's newest
samples_*.jsonl (--log_samples). Prints both accuracies with Wilson's 95 % interval and how many texts are equal; of the
others where they part.
"""

import argparse
import math
from os.path import commonprefix
from pathlib import Path

from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.errors import UserError, run_cli

FILTER = "boxed"  # of gsm8k_boxed.yaml: the rule that is ours


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    p, half = right / n, z * math.sqrt(right * (n - right) / n**3 + z**2 / (4 * n**2))
    return (p + z**2 / (2 * n) - half) / (1 + z**2 / n), (p + z**2 / (2 * n) + half) / (1 + z**2 / n)


def load(ours: Path, harness: Path) -> list[tuple[dict, dict]]:
    """Return (our sample, the harness's) of every question.

    Raises:
        UserError: no samples, or not of the same questions.
    """
    found = sorted(harness.rglob("samples_*.jsonl"))
    if not found or not (ours / "samples.jsonl").is_file():
        raise UserError(
            f"no samples.jsonl in {ours}, or no samples_*.jsonl in {harness}: run both, with --log_samples."
        )
    mine = {sample["problem"]: sample for sample in read_jsonl(ours / "samples.jsonl")}
    theirs = [row for row in read_jsonl(found[-1]) if row["filter"] == FILTER]
    asked = [row["doc"].get("problem") or row["doc"]["question"] for row in theirs]
    if mine.keys() != set(asked):
        raise UserError(f"{ours} has {len(mine)} questions and {found[-1]} has {len(asked)}, or others: give both 200.")
    return [(mine[problem], row) for problem, row in zip(asked, theirs)]


def compare(pairs: list[tuple[dict, dict]]) -> str:
    """Return the comparison as text."""
    n, lines = len(pairs), []
    right = {"ours": sum(a["reward"] for a, _ in pairs), "lm-eval": sum(b["exact_match"] for _, b in pairs)}
    for name, count in right.items():
        low, high = wilson(int(count), n)
        lines.append(f"{name:<8} {count / n:.3f} ({low:.3f}..{high:.3f}), {int(count)} of {n}")
    # The harness takes nothing off, but a response that we end with a special token has that in its text.
    texts = [(a["response"].strip(), b["resps"][0][0].strip()) for a, b in pairs]
    differ = [i for i, (a, b) in enumerate(texts) if a != b]
    verdicts = [i for i, (a, b) in enumerate(pairs) if a["reward"] != b["exact_match"]]
    lines.append(f"equal texts {n - len(differ)} of {n}; other verdicts on {len(verdicts)}: {verdicts}")
    for i in differ:
        at = len(commonprefix(texts[i]))
        lines.append(f"  {i}: from character {at}: {texts[i][0][at : at + 30]!r} and {texts[i][1][at : at + 30]!r}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ours", type=Path, help="folder of python -m adaptive_reasoning.benchmark")
    parser.add_argument("harness", type=Path, help="--output_path of lm_eval")
    args = parser.parse_args(argv)
    print(compare(load(args.ours, args.harness)))


if __name__ == "__main__":
    run_cli(main)
