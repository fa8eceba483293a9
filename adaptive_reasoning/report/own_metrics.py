"""The lines of the glossary that belong to single algorithms: their modes, stages and losses."""

from adaptive_reasoning.core.metric import Alarm, Metric

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
        alarms=(
            Alarm(
                "the forced share is not the one asked for: check --forcing, and the first tokens in the samples",
                above=0.1,
            ),
        ),
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
    "group/all_wrong_share": Metric(
        "Share of the questions that no response gets right.",
        "share",
        "falls",
        alarms=(
            Alarm(
                "nine of ten questions are never answered right: take easier ones, or raise --max_new_tokens if the "
                "responses are cut",
                above=0.9,
                steps=10,
            ),
        ),
    ),
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


NO_FORM = ("unknown", "malformed")  # a response in one of them has no form that the method knows


def mode_alarms(mode: str, name: str) -> tuple[Alarm, ...]:
    """Return the alarms of a mode's share: a collapse into it, its death, or responses without any form."""
    if mode == "response":  # all there is, so always 1
        return ()
    if mode in NO_FORM:
        advice = (
            f"one response in five is {name}: look at their first words in the samples; the cold start was too short"
        )
        return (Alarm(advice, above=0.2, steps=5),)
    return (
        Alarm(
            f"nearly every response is in mode {name} for twenty steps: a collapse; compare the advantages of the "
            f"modes, and what keeps them apart (the scaling of Ada-GRPO, --alpha of DeGRPO)",
            above=0.99,
            steps=20,
        ),
        Alarm(
            f"mode {name} has been gone for fifty steps and will not come back by itself: start from an earlier "
            f"checkpoint with a smaller --learning_rate, or from a longer cold start",
            below=0.001,
            steps=50,
        ),
    )


def of_mode(mode: str, name: str) -> dict[str, Metric]:
    """Return the metrics that every mode has."""
    return {
        f"mode/{mode}_share": Metric(
            f"Share of the responses of this step in mode {name}.",
            "share",
            "no mode at 1: that is a collapse",
            alarms=mode_alarms(mode, name),
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


STAGE_ALARMS = {
    "slow": (
        Alarm(
            "Verify sends no question to Slow for twenty steps, which learns nothing then: look at "
            "thinker/verify_yes_when_wrong",
            below=0.001,
            steps=20,
        ),
        Alarm(
            "Verify sends every question to Slow for twenty steps: look at thinker/verify_no_when_right and the "
            "accuracy of Fast",
            above=0.999,
            steps=20,
        ),
    )
}


def of_stage(stage: str, name: str) -> dict[str, Metric]:
    """Return the metrics that every stage of a dialogue has."""
    accuracy = {
        "verify": "Share of the verdicts that are right about the Fast answer.",
        "summary": "Share of the summaries with the answer of the Slow stage.",
    }
    return {
        f"thinker/{stage}_share": Metric(
            f"Share of the dialogues that reach the {name} stage.", "share", alarms=STAGE_ALARMS.get(stage, ())
        ),
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
    "thinker/verify_unparsable_share": Metric(
        "Share of the verdicts that are neither Yes nor No.",
        "share",
        "0",
        alarms=(
            Alarm(
                "one verdict in five is neither Yes nor No: look at the Verify turns in the samples; raise "
                "--verify_budget if they are cut",
                above=0.2,
                steps=5,
            ),
        ),
    ),
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

OWN: dict[str, Metric] = {**ADAPTTHINK, **GROUPED, **DEGRPO}
for mode, name in MODES.items():
    OWN |= of_mode(mode, name)
OWN |= THINKER
for stage, name in STAGES.items():
    OWN |= of_stage(stage, name)
