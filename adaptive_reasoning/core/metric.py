"""Metric: what one number of a run means, and when it calls for attention."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass


def mean(values: Iterable) -> float | None:
    """Return the mean of the values that are there, None where there is none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


@dataclass(frozen=True)
class Alarm:
    """Raise `advice` once a metric is below / above a bound for `steps` steps in a row, or null if `null` is set.

    `of_start`: below this share of the first value that the run logged, for what has no scale of its own.
    `rising`: only while this metric, where it is logged, is above the first value that the run logged of it.
    """

    advice: str
    below: float | None = None
    above: float | None = None
    null: bool = False
    steps: int = 1
    of_start: float | None = None
    rising: str = ""


@dataclass(frozen=True)
class Metric:
    """What one metric means.

    `unit`: "share" (0 to 1), "tokens", "tokens/s", "seconds", "count", "nats" (log-probs) or "" for a bare number.
    `good`: which way is good, or what to look at. `short`: its label in the console line; only the metrics that have
    one appear there. `panel`: "title | note" of the chart it appears in on the page, with `line` as its label there (a
    mode's name gives it the mode's colour).
    """

    meaning: str
    unit: str = ""
    good: str = ""
    short: str = ""
    alarms: tuple[Alarm, ...] = ()
    panel: str = ""
    line: str = ""


def to_json(metrics: dict[str, Metric]) -> dict:
    """Return the content of metrics.json: what the metrics of a run mean."""
    return {key: asdict(metric) for key, metric in metrics.items()}


def from_json(content: dict) -> dict[str, Metric]:
    """Return what `to_json` was given."""
    return {key: Metric(**{**m, "alarms": tuple(Alarm(**a) for a in m["alarms"])}) for key, m in content.items()}


OPENING_METRICS = {  # where the opening of NoThinking has more than one token
    "eval/opening_rest_prob": Metric(
        "Probability that the rest of the NoThinking opening follows its first token, in the newest evaluation.",
        "share", "1: whoever skips the thinking also closes the block",
        alarms=(Alarm("the model begins to skip its thinking and does not close the block: warm it up on supervised "
                      "rows with `thinking`, --supervise_opening true", below=0.99),)),
    "eval/unclosed_share": Metric(
        "Share of the free responses that begin as NoThinking and go on otherwise, in the newest evaluation.", "share",
        "0"),
}  # fmt: skip


def eval_metrics(modes: dict[str, str]) -> dict[str, Metric]:
    """Return the metrics of the newest evaluation that are logged with every step."""
    text = "Share of mode {} in the newest evaluation, nothing forced."
    return {f"eval/{mode}_share": Metric(text.format(name), "share") for mode, name in modes.items()}


SECONDS = "Seconds per step | Where the time goes; evaluation not included."

# Mean distance of the sampler's and the learner's log-probs (nats) above which their weights are not the same.
GAP_LIMIT = {"bf16": 0.02, "fp32": 1e-3}

# What every method logs.
SHARED = {
    "step": Metric("Training step: one rollout batch and the updates on it.", "count"),
    "time/step_s": Metric(
        "Wall time of the step: rollout, grading, update. Evaluation is counted apart.",
        "seconds", "lower", panel=SECONDS, line="step"),
    "time/rollout_s": Metric("Wall time of sampling the responses.", "seconds", "lower", panel=SECONDS, line="rollout"),
    "time/grade_wait_s": Metric(
        "Time spent waiting for grades after the last response was sampled: what overlapping could not hide.",
        "seconds", "near 0"),
    "time/update_s": Metric(
        "Wall time of the optimiser steps, log-probs included.", "seconds", "lower", panel=SECONDS, line="update"),
    "time/eval_s": Metric("Wall time of the evaluation before this step, where there was one.", "seconds", "lower"),
    "rollout/tokens": Metric("Response tokens sampled in this step.", "tokens"),
    "rollout/tokens_per_s": Metric("Response tokens sampled per second of rollout.", "tokens/s", "higher", "tok/s"),
    "rollout/response_tokens_mean": Metric(
        "Mean response length, first token and EOS included. Where a method forces modes, read the length that the "
        "model chooses from the evaluations.", "tokens", "lower at equal accuracy", "tokens"),
    "rollout/truncated_share": Metric(
        "Share of responses cut at their token budget.", "share", "near 0: a cut response is mostly a wrong one",
        alarms=(Alarm("more than half of the responses are cut at their token budget: raise --max_new_tokens, or "
                      "look for endless repetition in the samples", above=0.5, steps=5),)),
    "reward/mean": Metric("Mean reward of the responses of this step.", "", "higher"),
    "reward/accuracy": Metric(
        "Share of the responses of this step that are right (and well formed, where the paper asks for it).",
        "share", "higher", "acc",
        alarms=(Alarm("no response is right for five steps: compare the answer format in the samples with what the "
                      "grader accepts", below=0.001, steps=5),)),
    "reward/score_mean": Metric(
        "Mean of what takes the place of 1 for right and 0 for wrong: the task's own score, or what --reward returned.",
        "", "higher", panel="Score | The task's own, or that of --reward."),
    "reward/failed_share": Metric(
        "Share of the responses on which --reward raised, hung or returned no finite number; their score is 0.",
        "share", "0",
        alarms=(Alarm("--reward fails: the console and 'grader' in the samples say why; mend the function and start "
                      "anew", above=0.0),)),
    "loss/policy": Metric(
        "Policy loss, mean over the optimiser steps of this step. Its size means little; watch for jumps.",
        "", "no jumps", "loss", panel="Policy loss | Its size means little; jumps do.",
        alarms=(Alarm("the policy loss is not finite: stop and look at the samples of this step", null=True),)),
    "loss/grad_norm": Metric(
        "Norm of the gradient over all parameters before clipping.",
        "", "steady; spikes come before damage", "grad", panel="Gradient norm | Before clipping.",
        alarms=(Alarm("the gradient is not finite: stop and look at the samples of this step", null=True),)),
    "loss/learning_rate": Metric("Learning rate of the last optimiser step.", "", "as scheduled"),
    "loss/skipped_updates": Metric("Updates skipped because they were not finite (--on_nonfinite skip).", "", "0"),
    "loss/entropy": Metric(
        "Mean entropy of the next-token distribution over the response tokens, at the sampling temperature.",
        "nats", "falls slowly; a sudden fall is a collapse",
        panel="Entropy | Over the response tokens, at the sampling temperature.",
        alarms=(Alarm("the entropy has fallen to a twentieth of what it was: the responses are becoming one "
                      "response; look for identical ones in the samples, then raise --entropy_coef or lower "
                      "--learning_rate", steps=10, of_start=0.05),)),
    "loss/clip_fraction": Metric(
        "Share of the responses (or tokens, as the algorithm clips) whose ratio was outside the clip range.",
        "share", "low; 0 in the first update except for forced first tokens",
        alarms=(Alarm("more than half of what is learnt from is clipped: lower --learning_rate or "
                      "--minibatches_per_step", above=0.5, steps=5),)),
    "loss/approx_kl": Metric(
        "Mean of -log ratio as the loss saw it, weighted as there, forced tokens included.",
        "nats", "small; with a forced first token log(0.5 / p) over the length until p has reached 0.5"),
    "check/logprob_gap_mean": Metric(
        "Mean distance between the sampler's and the learner's log-prob of the same tokens, forced ones left out.",
        "nats", "near 0: about 1e-6 in fp32, below 0.02 in bf16",
        panel="Sampler against learner | Mean distance of their log-probs.",
        alarms=(Alarm("sampler and learner disagree about the same tokens by more than bf16 rounds (0.02): the "
                      "training data is off-policy; look at the temperature, the precision and the weight refresh",
                      above=GAP_LIMIT["bf16"]),)),
    "check/logprob_gap_max": Metric(
        "Largest such distance in this step.", "nats", "small; single outliers in bf16",
        alarms=(Alarm("in every step some token is e times more probable to the sampler than to the learner, or "
                      "less: compare with --dtype fp32; if it stays, sampler and learner hold different weights or "
                      "temperatures", above=1.0, steps=3),)),
    "check/ratio_mean": Metric(
        "Mean ratio of the tokens as the update saw them, policy over pi_old, forced ones left out.",
        "", "near 1; exactly 1 with one update per batch where the learner recomputes pi_old",
        alarms=(Alarm("the mean ratio is far from 1: the data is off-policy; look at check/logprob_gap_mean, then "
                      "lower --learning_rate or --minibatches_per_step", below=0.9, above=1.1, steps=3),)),
    "check/ratio_max": Metric(
        "Largest such ratio in this step.", "", "below 2; single outliers in bf16",
        alarms=(Alarm("in every step some token has become ten times as probable between sampling and update: look "
                      "at check/logprob_gap_max, then lower --learning_rate or --minibatches_per_step",
                      above=10.0, steps=3),)),
    "check/approx_kl": Metric(
        "Estimate of the divergence of the policy from pi_old as the update saw them: mean of ratio - 1 - log "
        "ratio, forced tokens left out.",
        "nats", "near 0; exactly 0 with one update per batch where the learner recomputes pi_old",
        alarms=(Alarm("one step moves the policy far from the one that sampled: lower --learning_rate or "
                      "--minibatches_per_step, or tighten the clip range", above=0.1, steps=3),)),
    "data/epoch": Metric("Passes over the training questions so far, as a fraction."),
    "data/skipped_prompts": Metric("Questions left out so far because their prompt is too long.", "count", "near 0"),
    "learner/zero_advantage_share": Metric(
        "Share of the responses with advantage 0: they teach nothing and are not computed.", "share", "low",
        alarms=(Alarm("nine of ten responses teach nothing: the questions are too easy or too hard for this model",
                      above=0.9, steps=10),)),
    "learner/micro_batches": Metric("Forward and backward passes in this step, over all optimiser steps.", "count"),
    "grader/timeout_rate": Metric(
        "Share of the answers whose check was killed at the deadline; they count as not verified.", "share", "near 0",
        alarms=(Alarm("one answer in twenty runs into the grader's deadline: look for runaway expressions under "
                      "'grader' in the samples; raise --grader_timeout if they are plain answers on a busy machine",
                      above=0.05),)),
    "grader/error_rate": Metric(
        "Share of the answers whose check failed with an error; they count as not verified.", "share", "near 0",
        alarms=(Alarm("one answer in a hundred makes the grader fail: look at 'grader' in the samples for which "
                      "answers", above=0.01),)),
    "grader/seconds_mean": Metric("Mean time of checking one answer.", "seconds", "lower"),
}  # fmt: skip
