"""Metrics of a step that every method with a rollout has, made of what each process saw."""

from dataclasses import dataclass, fields

import torch

from adaptive_reasoning.core.episode import Episode, pick
from adaptive_reasoning.learner.packing import MicroBatch


@dataclass
class Drift:
    """Distances that only the forward passes of the update know, over the action tokens that were not forced.

    `gap`: |learner - sampler log-prob|. Both saw the same tokens under the same weights, so anything but rounding is a
    bug; minibatches behind the first optimiser step do not count. `ratio`: exp(learner - old log-prob) of the update,
    and `kl` the sum of ratio - 1 - log ratio over the same tokens, whose mean is an estimate of KL(pi_old || pi) that
    is never negative (k3 of Schulman's note on approximating KL divergence).
    """

    gap_sum: float = 0.0
    gap_tokens: int = 0
    gap_max: float = 0.0
    ratio_sum: float = 0.0
    ratio_tokens: int = 0
    ratio_max: float = 0.0
    kl: float = 0.0

    def see(self, mb: MicroBatch, logprobs: torch.Tensor, first_update: bool) -> None:
        """Add a micro-batch, whose new log-probs are [N]."""
        free = ~mb.forced
        if not free.any():
            return
        if first_update:
            gap = (logprobs.detach() - mb.behaviour_logprobs).abs()[free]
            self.gap_sum, self.gap_tokens = self.gap_sum + float(gap.sum()), self.gap_tokens + len(gap)
            self.gap_max = max(self.gap_max, float(gap.max()))
        log_ratio = (logprobs.detach() - mb.old_logprobs)[free]
        ratio = log_ratio.exp()
        self.ratio_sum, self.ratio_tokens = self.ratio_sum + float(ratio.sum()), self.ratio_tokens + len(ratio)
        self.ratio_max = max(self.ratio_max, float(ratio.max()))
        self.kl += float((log_ratio.expm1() - log_ratio).sum())

    @classmethod
    def over(cls, parts: list["Drift"]) -> "Drift":
        """Return the drift over all processes."""
        return cls(*((max if f.name.endswith("max") else sum)(getattr(p, f.name) for p in parts) for f in fields(cls)))

    def metrics(self) -> dict[str, float]:
        row = {}
        if self.gap_tokens:
            row |= {"check/logprob_gap_mean": self.gap_sum / self.gap_tokens, "check/logprob_gap_max": self.gap_max}
        if self.ratio_tokens:
            row |= {"check/ratio_mean": self.ratio_sum / self.ratio_tokens, "check/ratio_max": self.ratio_max}
            row["check/approx_kl"] = self.kl / self.ratio_tokens
        return row


def counts_of(episodes: list[Episode], grader: dict[str, float]) -> dict:
    """Return what `over_processes` needs of the episodes of one process, plain numbers that can travel.

    Args:
        grader: `rates` of the grader: shares, with the number of answers they are over, "grader/graded".
    """
    lengths: dict[int, list[int]] = {}
    for e in episodes:
        lengths.setdefault(e.group, []).append(e.num_tokens)
    return {
        "tokens": sum(e.num_actions for e in episodes),
        "episodes": len(episodes),
        "cut": sum(e.finish_reason == "length" for e in episodes),
        "correct": sum(e.correct for e in episodes),
        "reward": sum(e.reward for e in episodes),
        "score": sum(e.score for e in episodes),
        "failed": [j for j, e in enumerate(episodes) if e.grader],
        "grader": grader,
        "groups": [e.group for e in episodes],
        "lengths": lengths,
    }


def over_processes(parts: list[dict]) -> dict[str, float | None]:
    """Return the metrics of a step that every method with a rollout has, from `counts_of` each process."""

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
    rates = [part["grader"] for part in parts if part["grader"].get("grader/graded")]
    graded = sum(part["grader/graded"] for part in rates)
    for key in (key for key in parts[0]["grader"] if key != "grader/graded"):  # some processes grade more than others
        row[key] = sum(part[key] * part["grader/graded"] for part in rates) / graded if graded else None
    return row


def sums_of(shares: list[dict]) -> dict[str, float]:
    """Return the sum of each key over the additive shares of the micro-batches of one process."""
    sums: dict[str, float] = {}
    for share in shares:
        for key, value in share.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return sums


def mean_losses(parts: list[dict], updates: int) -> dict[str, float]:
    """Return the losses of a step from `sums_of` each process: means over its optimiser steps."""
    keys = sorted(set().union(*parts))
    return {key: sum(part.get(key, 0.0) for part in parts) / updates for key in keys}


def picked(groups: list[list[int]], batch: list[int], n: int, step: int) -> list[tuple[int, int]]:
    """Return (process, place among its episodes) of the n episodes of a step that are written down.

    Args:
        groups: of each process the question of every episode.
        batch: the questions of the step in order; which process has which makes no difference to the choice.
    """
    place = {question: i for i, question in enumerate(batch)}
    every = [(place[q], j, rank) for rank, part in enumerate(groups) for j, q in enumerate(part)]
    return [(rank, j) for _, j, rank in pick(sorted(every), n, step)]
