"""What a run writes down: the folder it owns, and one row of metrics a step from what every process saw."""

import dataclasses
from pathlib import Path

import yaml

from adaptive_reasoning.episode import pick
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.learner.checkpoint import newest_checkpoint
from adaptive_reasoning.report.files import write_text_atomic

MAY_CHANGE = {  # options that a continued run may have other values of
    "max_steps", "save_every", "keep_checkpoints", "grader_workers", "grader_timeout", "samples_per_step", "report_to",
    "max_ungraded", "tokens_per_micro_batch", "rollout_rows", "gradient_checkpointing", "output_dir", "patience",
}  # fmt: skip


def open_folder(folder: Path, algorithm: str, args) -> None:
    """Create the folder of a run with its config.yaml, or check that what is in it is this run.

    Raises:
        UserError: it holds a run of another algorithm or with other options, or cannot be written to.
    """
    path, config = folder / "config.yaml", dataclasses.asdict(args)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file() and newest_checkpoint(folder / "checkpoints") is not None:
            check_same(folder, yaml.safe_load(path.read_text()) or {}, algorithm, config)
        write_text_atomic(path, yaml.safe_dump({"algorithm": algorithm, **config}, sort_keys=False))
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot write there: {error}") from error


def check_same(folder: Path, old: dict, algorithm: str, new: dict) -> None:
    """Raise UserError if the folder holds a run with other options; how long it runs may change."""
    if old.pop("algorithm", algorithm) != algorithm:
        raise UserError(f"{folder} holds a run of another algorithm. Choose another --output_dir.")
    differ = [k for k in new if k in old and old[k] != new[k] and k not in MAY_CHANGE]
    if differ:
        k = differ[0]
        raise UserError(
            f"{folder} holds a run with {k} = {old[k]!r}, now it is {new[k]!r}. Choose another --output_dir, "
            "or give the old value to continue that run."
        )


def picked(groups: list[list[int]], batch: list[int], n: int, step: int) -> list[tuple[int, int]]:
    """Return (process, place among its episodes) of the n episodes of a step that are written down.

    Args:
        groups: of each process the question of every episode.
        batch: the questions of the step in order; which process has which makes no difference to the choice.
    """
    place = {question: i for i, question in enumerate(batch)}
    every = [(place[q], j, rank) for rank, part in enumerate(groups) for j, q in enumerate(part)]
    return [(rank, j) for _, j, rank in pick(sorted(every), n, step)]


def sums_of(shares: list[dict]) -> dict[str, float]:
    """Return the sum of each key over the additive shares of the micro-batches."""
    sums: dict[str, float] = {}
    for share in shares:
        for key, value in share.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return sums


def over_processes(parts: list[dict], updates: int) -> dict[str, float | None]:
    """Return the metrics of a step that every algorithm has.

    Args:
        parts: of each process: numbers of "tokens", "episodes", "cut" and "correct" episodes, the sum of "reward",
            "gap" as (sum, number, maximum) of |learner - sampler log-prob|, "grader" rates and "losses" (`sums_of`).
        updates: optimiser steps the losses are a mean over.
    """

    def over(key):
        return sum(part[key] for part in parts)

    n = over("episodes")
    row = {
        "reward/accuracy": over("correct") / n,
        "reward/mean": over("reward") / n,
        "rollout/response_tokens_mean": over("tokens") / n,
        "rollout/truncated_share": over("cut") / n,
        "rollout/tokens": over("tokens"),
    }
    for key in sorted(set().union(*(part["losses"] for part in parts))):
        row[key] = sum(part["losses"].get(key, 0.0) for part in parts) / updates
    gaps = [part["gap"] for part in parts]
    if compared := sum(number for _, number, _ in gaps):
        row["check/logprob_gap_mean"] = sum(total for total, _, _ in gaps) / compared
        row["check/logprob_gap_max"] = max(largest for _, _, largest in gaps)
    for key in parts[0]["grader"]:
        values = [part["grader"][key] for part in parts if part["grader"][key] is not None]
        row[key] = sum(values) / len(values) if values else None
    return row
