"""One line of meaning for every metric a run logs, with its unit, what is good, and when to raise an alarm.

    check({"step": 3, "reward/mean": 0.7})      # passes
    check({"step": 3, "reward/maen": 0.7})      # AssertionError: no metric is logged that nobody can look up

An algorithm file adds its own with `register({"my_group/name": Metric("...")})` when it is imported.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """Raise `advice` once a metric is below / above a bound for `steps` steps in a row, or null if `null` is set."""

    advice: str
    below: float | None = None
    above: float | None = None
    null: bool = False
    steps: int = 1


@dataclass(frozen=True)
class Metric:
    """What one metric means.

    `unit`: "share" (0 to 1), "tokens", "tokens/s", "seconds", "count", "nats" (log-probs) or "" for a bare number.
    `good`: which way is good, or what to look at. `short`: its label in the console line; only the metrics that have
    one appear there.
    """

    meaning: str
    unit: str = ""
    good: str = ""
    short: str = ""
    alarms: tuple[Alarm, ...] = ()


SHARED = {
    "step": Metric("Training step: one rollout batch and the updates on it.", unit="count"),
    # --- time
    "time/step_s": Metric(
        "Wall time of the step: rollout, grading, update. Evaluation is counted apart.", "seconds", "lower"
    ),
    "time/rollout_s": Metric("Wall time of sampling the responses.", "seconds", "lower"),
    "time/grade_wait_s": Metric(
        "Time spent waiting for grades after the last response was sampled: what overlapping could not hide.",
        "seconds",
        "near 0",
    ),
    "time/update_s": Metric("Wall time of the optimiser steps, log-probs included.", "seconds", "lower"),
    "time/eval_s": Metric("Wall time of the evaluation before this step, where there was one.", "seconds", "lower"),
    # --- rollout
    "rollout/tokens": Metric("Response tokens sampled in this step.", "tokens"),
    "rollout/tokens_per_s": Metric("Response tokens sampled per second of rollout.", "tokens/s", "higher", "tok/s"),
    "rollout/response_tokens_mean": Metric(
        "Mean response length, first token and EOS included. In AdaptThink both modes are forced half and half, so "
        "read the length the model chooses from the evaluations.",
        "tokens",
        "lower at equal accuracy",
        "tokens",
    ),
    "rollout/truncated_share": Metric(
        "Share of responses cut at their token budget.",
        "share",
        "near 0: a cut response is mostly a wrong one",
        alarms=(
            Alarm(
                "more than half of the responses are cut at their token budget: raise --max_new_tokens, or look for "
                "endless repetition in the samples",
                above=0.5,
                steps=5,
            ),
        ),
    ),
    # --- reward
    "reward/mean": Metric("Mean reward of the responses of this step.", "", "higher"),
    "reward/accuracy": Metric(
        "Share of the responses of this step that are right (and well formed, where the paper asks for it).",
        "share",
        "higher",
        "acc",
        alarms=(
            Alarm(
                "no response is right for five steps: compare the answer format in the samples with what the grader "
                "accepts",
                below=0.001,
                steps=5,
            ),
        ),
    ),
    # --- loss
    "loss/policy": Metric(
        "Policy loss, mean over the optimiser steps of this step. Its size means little; watch for jumps.",
        "",
        "no jumps",
        "loss",
        alarms=(Alarm("the policy loss is not finite: stop and look at the samples of this step", null=True),),
    ),
    "loss/grad_norm": Metric(
        "Norm of the gradient over all parameters before clipping.",
        "",
        "steady; spikes come before damage",
        "grad",
        alarms=(Alarm("the gradient is not finite: stop and look at the samples of this step", null=True),),
    ),
    "loss/learning_rate": Metric("Learning rate of the last optimiser step.", "", "as scheduled"),
    "loss/entropy": Metric(
        "Mean entropy of the next-token distribution over the response tokens, at the sampling temperature.",
        "nats",
        "falls slowly; a sudden fall is a collapse",
    ),
    "loss/clip_fraction": Metric(
        "Share of the responses (or tokens, as the algorithm clips) whose ratio was outside the clip range.",
        "share",
        "low; 0 in the first update except for forced first tokens",
    ),
    "loss/approx_kl": Metric(
        "Estimate of the divergence of the updated policy from the one that sampled: mean of ratio - 1 - log ratio.",
        "nats",
        "small",
    ),
    # --- check
    "check/logprob_gap_mean": Metric(
        "Mean distance between the sampler's and the learner's log-prob of the same tokens, forced ones left out.",
        "nats",
        "near 0: about 1e-6 in fp32, below 0.02 in bf16",
        alarms=(
            Alarm(
                "sampler and learner disagree about the same tokens by more than bf16 rounds (0.02): the training data "
                "is off-policy; look at the temperature, the precision and the weight refresh",
                above=0.02,
            ),
        ),
    ),
    "check/logprob_gap_max": Metric("Largest such distance in this step.", "nats", "small; single outliers in bf16"),
    # --- data, learner, grader
    "data/epoch": Metric("Passes over the training questions so far, as a fraction.", ""),
    "data/skipped_prompts": Metric("Questions left out so far because their prompt is too long.", "count", "near 0"),
    "learner/zero_advantage_share": Metric(
        "Share of the responses with advantage 0: they teach nothing and are not computed.",
        "share",
        "low",
        alarms=(
            Alarm(
                "nine of ten responses teach nothing: the questions are too easy or too hard for this model",
                above=0.9,
                steps=10,
            ),
        ),
    ),
    "learner/micro_batches": Metric("Forward and backward passes in this step, over all optimiser steps.", "count"),
    "learner/padding_share": Metric("Share of the learner's token slots that hold padding.", "share", "lower"),
    "grader/timeout_rate": Metric(
        "Share of the answers whose check was killed at the deadline; they count as not verified.",
        "share",
        "near 0",
        alarms=(
            Alarm("one answer in twenty runs into the grader's deadline: look for runaway expressions", above=0.05),
        ),
    ),
    "grader/error_rate": Metric(
        "Share of the answers whose check failed with an error; they count as not verified.",
        "share",
        "near 0",
        alarms=(Alarm("one answer in a hundred makes the grader fail: look at the samples", above=0.01),),
    ),
    "grader/seconds_mean": Metric("Mean time of checking one answer.", "seconds", "lower"),
}

ADAPTTHINK = {
    "adapt_think/forced_nothinking_share": Metric(
        "Share of the responses that start with </think>, forced to or (with forcing off) by choice.",
        "share",
        "exactly what was asked for",
    ),
    "adapt_think/forced_share_gap": Metric(
        "Distance of that share from the one asked for.",
        "share",
        "0; coin flips scatter by a few points",
        alarms=(Alarm("the forced share is not the one asked for: the rollouts are not what they claim", above=0.1),),
    ),
    "adapt_think/nothinking_accuracy": Metric("Share of the forced NoThinking responses that are right.", "share"),
    "adapt_think/thinking_accuracy": Metric("Share of the forced Thinking responses that are right.", "share"),
    "adapt_think/nothinking_reward": Metric("Mean reward of the NoThinking responses, delta not included."),
    "adapt_think/thinking_reward": Metric("Mean reward of the Thinking responses."),
    "adapt_think/reward_gap": Metric(
        "NoThinking reward minus Thinking reward. A question moves to NoThinking where this gap is above -delta.",
        "",
        "rises towards 0",
    ),
    "adapt_think/nothinking_tokens": Metric("Mean length of the NoThinking responses.", "tokens"),
    "adapt_think/thinking_tokens": Metric("Mean length of the Thinking responses.", "tokens"),
    "adapt_think/first_eot_prob": Metric(
        "Mean probability of </think> as the first token, over the NoThinking responses of this step that get gradient "
        "(step 0: over the evaluation questions): the first sign of progress. The share of NoThinking in the "
        "evaluations stays at 0 for long, because the nucleus cuts improbable tokens.",
        "share",
        "rises, then settles between 0 and 1",
        "p(</think>)",
        alarms=(
            Alarm(
                "</think> is almost certain on every question for twenty steps: the model has stopped thinking "
                "altogether; lower --delta",
                above=0.995,
                steps=20,
            ),
            Alarm(
                "</think> is still below 0.0001 after a hundred steps: check that forced first tokens get gradient "
                "and that nothinking_accuracy is above 0",
                below=1e-4,
                steps=100,
            ),
        ),
    ),
    "adapt_think/first_eot_logprob": Metric(
        "Mean log-probability of </think> as the first token: shows movement while the probability still reads 0.",
        "nats",
        "rises",
    ),
    "adapt_think/first_ratio_mean": Metric(
        "Mean ratio of the first token, policy over the probability it was forced with. Not 1 even before the first "
        "update.",
        "",
        "between 0 and 2",
    ),
    "adapt_think/advantage_mean": Metric(
        "Mean advantage, delta * 1(NoThinking) + reward - reference accuracy. Not centred, by design.", "", "rises"
    ),
    "adapt_think/ref_accuracy_mean": Metric(
        "Mean reference accuracy of the questions of this step, measured once before training.", "share"
    ),
    "eval/nothinking_share": Metric(
        "Share of NoThinking responses in the newest evaluation, nothing forced.",
        "share",
        "between 0 and 1, high on easy questions",
    ),
    "eval/thinking_share": Metric("Share of Thinking responses in the newest evaluation, nothing forced.", "share"),
}

GROUPED = {
    "group/all_wrong_share": Metric("Share of the questions that no response gets right.", "share", "falls"),
    "group/all_correct_share": Metric("Share of the questions that every response gets right.", "share", "rises"),
    "group/all_correct_mixed_share": Metric(
        "Share of the questions that every response gets right, in more than one mode.", "share", "above 0"
    ),
    "reward/correct_negative_share": Metric("Share of the right responses whose advantage is negative.", "share"),
    "rollout/empty_rationale_share": Metric(
        'Share of the rationales that hold nothing but "The answer is X".',
        "share",
        "low: else the modes are labels alone",
    ),
    "loss/ref_kl": Metric(
        "Divergence of the policy from the starting model: k3 estimate, clamped to [-10, 10], weighted like the loss.",
        "nats",
        "small",
        alarms=(Alarm("the policy is far from the starting model: raise --kl_coef or lower the rate", above=5.0),),
    ),
}

DEGRPO = {
    "degrpo/num_think": Metric("Responses of this step that start with <think>.", "count"),
    "degrpo/num_short": Metric("Responses of this step that start with <short>.", "count", "not 0 for long"),
    "degrpo/num_malformed": Metric("Responses of this step that start with no control token.", "count", "0"),
    "degrpo/first_think_prob": Metric(
        "Mean probability of <think> as the first token, as the responses of this step show it (a short one: 1 - "
        "P(<short>)); step 0: over the evaluation questions.",
        "share",
        "about 0.5 after the warm-up; rises, then falls as the short answers improve",
        "p(<think>)",
        alarms=(
            Alarm(
                "the model takes <think> on every question for twenty steps: raise --alpha or --gamma, or give it more "
                "easy questions",
                above=0.995,
                steps=20,
            ),
            Alarm(
                "the model takes <short> on every question for twenty steps: lower --gamma (a --gamma_schedule), as "
                "the authors did after 300 steps",
                below=0.005,
                steps=20,
            ),
        ),
    ),
    "degrpo/first_think_logprob": Metric("Mean log-probability of <think> as the first token, at step 0.", "nats"),
}

MODES = {  # of the algorithms with group baselines
    "direct": "Direct Answer",
    "cot": "Short CoT",
    "code": "Code",
    "long_cot": "Long CoT",
    "unknown": "without a known opening",
    "response": "all",
    "think": "Think",
    "short": "Short",
    "malformed": "without a control token",
}


def of_mode(mode: str, name: str) -> dict[str, Metric]:
    """Return the metrics that every mode has."""
    return {
        f"mode/{mode}_share": Metric(
            f"Share of the responses of this step in mode {name}.", "share", "no mode at 1: that is a collapse"
        ),
        f"mode/{mode}_accuracy": Metric(f"Share of the responses in mode {name} that are right.", "share", "higher"),
        f"mode/{mode}_tokens": Metric(f"Mean length of the responses in mode {name}.", "tokens"),
        f"mode/{mode}_advantage": Metric(f"Mean advantage of the responses in mode {name}: above 0 it will grow."),
        f"mode/{mode}_all_correct_groups": Metric(
            f"Questions of this step whose every response is right and in mode {name}.", "count"
        ),
        f"eval/{mode}_share": Metric(f"Share of mode {name} in the newest evaluation, nothing forced.", "share"),
    }


STAGES = {  # of Thinker's dialogue
    "fast": "Fast",
    "verify": "Verify",
    "slow": "Slow",
    "summary": "Summary",
    "qa": "the only",
}


def of_stage(stage: str, name: str) -> dict[str, Metric]:
    """Return the metrics that every stage of a dialogue has."""
    accuracy = {
        "verify": "Share of the verdicts that are right about the Fast answer.",
        "summary": "Share of the summaries with the answer of the Slow stage.",
    }
    return {
        f"thinker/{stage}_share": Metric(f"Share of the dialogues that reach the {name} stage.", "share"),
        f"thinker/{stage}_reward": Metric(f"Mean reward of the {name} stage.", "", "higher"),
        f"thinker/{stage}_accuracy": Metric(
            accuracy.get(stage, f"Share of the answers of the {name} stage that are right."), "share", "higher"
        ),
        f"thinker/{stage}_tokens": Metric(f"Mean length of the responses of the {name} stage.", "tokens"),
        f"thinker/{stage}_truncated_share": Metric(
            f"Share of the responses of the {name} stage cut at its budget.", "share", "near 0"
        ),
        f"thinker/{stage}_boxed_share": Metric(
            f"Share of the responses of the {name} stage with an answer (a verdict) in a box.", "share", "near 1"
        ),
        f"thinker/{stage}_reflection_words": Metric(
            f"Self-reflection words (wait, recheck, retry, alternatively, however) per response of the {name} stage."
        ),
        f"thinker/{stage}_explained_variance": Metric(
            f"Share of the variance of the {name} stage's returns that the critic foresaw, over tokens. Below 0 it is "
            "worse than a constant.",
            "",
            "towards 1",
        ),
        f"eval/{stage}_share": Metric(
            f"Share of the dialogues whose answer is that of the {name} stage, in the newest evaluation.", "share"
        ),
    }


THINKER = {
    "thinker/fast_trailing_accuracy": Metric(
        "p: accuracy of the Fast stage over the last iterations before this one, clamped; weighs the two verdicts.",
        "share",
        "rises",
    ),
    "thinker/verify_balanced_accuracy": Metric(
        "Mean of the shares of right verdicts on right and on wrong Fast answers; 0.5 for a guess.",
        "share",
        "towards 1",
    ),
    "thinker/verify_yes_when_right": Metric("Share of Yes among the verdicts on right Fast answers.", "share", "1"),
    "thinker/verify_no_when_right": Metric("Share of No among the verdicts on right Fast answers.", "share", "0"),
    "thinker/verify_yes_when_wrong": Metric("Share of Yes among the verdicts on wrong Fast answers.", "share", "0"),
    "thinker/verify_no_when_wrong": Metric("Share of No among the verdicts on wrong Fast answers.", "share", "1"),
    "thinker/verify_unparsable_share": Metric("Share of the verdicts that are neither Yes nor No.", "share", "0"),
    "thinker/summary_logprob_per_token": Metric(
        "L per token: mean log-prob of the summary's tokens as an answer to the Fast prompt.", "nats", "rises"
    ),
    "loss/value": Metric("Loss of the critic, mean over its optimiser steps of this step.", "", "falls"),
    "loss/value_clip_fraction": Metric(
        "Share of the action tokens whose value moved beyond the clip range of the value loss.", "share", "low"
    ),
    "loss/value_grad_norm": Metric(
        "Largest norm of the critic's gradient in this step, before clipping.", "", "steady"
    ),
}

METRICS: dict[str, Metric] = {**SHARED, **ADAPTTHINK, **GROUPED, **DEGRPO}
for mode, name in MODES.items():
    METRICS |= of_mode(mode, name)
METRICS |= THINKER
for stage, name in STAGES.items():
    METRICS |= of_stage(stage, name)


def register(metrics: dict[str, Metric]) -> None:
    """Add an algorithm's metrics. The same entry twice is fine; another meaning for a known key is our mistake."""
    for key, metric in metrics.items():
        assert METRICS.get(key, metric) == metric, f"metric {key} already has another meaning in the glossary"
        METRICS[key] = metric


def check(metrics: dict) -> None:
    """Assert that every key has its line here and every value is a plain number or None."""
    for key, value in metrics.items():
        assert key in METRICS, f"metric {key} has no line in the glossary: add it there or register() it"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        assert number or value is None, f"metric {key} is {type(value).__name__}, not a plain number"


def unit_of(key: str) -> str:
    """Return the unit of a metric, "" for a key the glossary does not know."""
    return METRICS[key].unit if key in METRICS else ""
