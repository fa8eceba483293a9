"""Stages: what the turns of dialogues were like, as plain numbers per stage, in training and in evaluation.

Rows are made where the dialogues are and can travel between processes; tables are made of the rows of all of them.
"""

import torch

from adaptive_reasoning.core.metric import Alarm, Metric

REFLECTION = ("wait,", "recheck", "retry", "alternatively,", "however,")  # as Open-Reasoner-Zero counts them


def stage_rows(dialogues: list, episodes: list | None = None) -> list[dict]:
    """Return one row per dialogue: {"stages": {stage: numbers}}, with `episodes` also how well the critic did."""
    rows = []
    for i, d in enumerate(dialogues):
        stages = {}
        for stage, turn in d.turns.items():
            text = turn.text.lower()
            stages[stage] = {
                "tokens": len(turn.ids),
                "correct": float(turn.correct),
                "cut": float(turn.cut),
                "boxed": float(turn.answer is not None),
                "reflection": sum(text.count(word) for word in REFLECTION),
                "answer": turn.answer if stage == "verify" else None,
            }
            if episodes:
                columns, here = episodes[i].columns, slice(turn.start, turn.start + len(turn.ids))
                returns = columns["returns"][here].double()
                missed = (columns["returns"] - columns["values"])[here].double()
                moments = torch.stack([x for v in (returns, missed) for x in (v.sum(), v.square().sum())]).tolist()
                stages[stage] |= {"reward": turn.reward, "logprob": turn.logprob, "moments": moments}
        rows.append({"stages": stages})
    return rows


def stage_table(rows: list[dict]) -> dict:
    """Return {"stages": {stage: means}, "verification": how good verdicts are}; a stage nobody reached is absent."""
    table = {"stages": {}}
    for stage in dict.fromkeys(stage for row in rows for stage in row["stages"]):
        mine = [row["stages"][stage] for row in rows if stage in row["stages"]]
        n, tokens = len(mine), sum(m["tokens"] for m in mine)

        def mean(key, mine=mine, n=n):
            return sum(m[key] for m in mine) / n

        numbers = {"share": n / len(rows), "accuracy": mean("correct"), "tokens": mean("tokens")}
        numbers |= {
            "truncated_share": mean("cut"),
            "boxed_share": mean("boxed"),
            "reflection_words": mean("reflection"),
        }
        if "reward" in mine[0]:
            numbers["reward"] = mean("reward")
            G, G2, miss, miss2 = (sum(x) / tokens for x in zip(*(m["moments"] for m in mine)))
            spread = G2 - G**2  # over tokens
            numbers["explained_variance"] = 1 - (miss2 - miss**2) / spread if spread > 1e-12 else None
            if stage == "summary":
                numbers["logprob_per_token"] = sum(m["logprob"] for m in mine) / tokens
        table["stages"][stage] = numbers
    verified = [row["stages"] for row in rows if "verify" in row["stages"]]
    if verified:
        table["verification"] = verification([(bool(s["fast"]["correct"]), s["verify"]["answer"]) for s in verified])
    return table


def verification(pairs: list[tuple[bool, str | None]]) -> dict[str, float | None]:
    """Return how good verdicts are, from (was the answer right, verdict "yes", "no" or None for an unparsable one).

    The balanced accuracy is the mean of the shares of right verdicts on right and on wrong answers; null where one of
    the two does not occur.
    """

    def share(right, verdict):
        among = [v for r, v in pairs if r == right]
        return sum(v == verdict for v in among) / len(among) if among else None

    yes, no = share(True, "yes"), share(False, "no")
    return {
        "balanced_accuracy": None if None in (yes, no) else (yes + no) / 2,
        "yes_when_right": yes,
        "no_when_right": share(True, "no"),
        "yes_when_wrong": share(False, "yes"),
        "no_when_wrong": no,
        "unparsable_share": sum(v is None for _, v in pairs) / len(pairs),
    }


NAMES = {"fast": "Fast", "verify": "Verify", "slow": "Slow", "summary": "Summary", "qa": "the only"}
BY_STAGE = "Responses of this step, by their stage."
RIGHT = {
    "verify": "Share of the verdicts that are right about the Fast answer.",
    "summary": "Share of the summaries with the answer of the Slow stage.",
}
UNPARSABLE = Alarm("one verdict in five is neither Yes nor No: look at the Verify turns in the samples; raise "
                   "--verify_budget if they are cut", above=0.2, steps=5)  # fmt: skip


def stage_metrics(stages, prefix: str) -> dict[str, Metric]:
    """Return what the numbers of `stage_table` mean as metrics of training."""
    out = {}
    slow = (
        Alarm("Verify sends no question to Slow for twenty steps, which learns nothing then: look at "
              f"{prefix}/verify_yes_when_wrong", below=0.001, steps=20),
        Alarm(f"Verify sends every question to Slow for twenty steps: look at {prefix}/verify_no_when_right and the "
              "accuracy of Fast", above=0.999, steps=20),
    )  # fmt: skip
    for stage in stages:
        name = NAMES.get(stage, stage)

        def chart(title, stage=stage):
            return {"panel": f"{title} | {BY_STAGE}", "line": stage}

        own = {
            "share": Metric(f"Share of the dialogues that reach the {name} stage.", "share",
                            alarms=slow if stage == "slow" else (), **chart("Share of the modes in training")),
            "reward": Metric(f"Mean reward of the {name} stage.", "", "higher"),
            "accuracy": Metric(RIGHT.get(stage, f"Share of the answers of the {name} stage that are right."), "share",
                               "higher", **chart("Accuracy per mode in training")),
            "tokens": Metric(f"Mean length of the responses of the {name} stage.", "tokens",
                             **chart("Tokens per mode in training")),
            "truncated_share": Metric(
                f"Share of the responses of the {name} stage cut at its budget.", "share", "near 0"),
            "boxed_share": Metric(
                f"Share of the responses of the {name} stage with an answer (a verdict) in a box.", "share", "near 1"),
            "reflection_words": Metric(
                "Self-reflection words (wait, recheck, retry, alternatively, however) per response of the "
                f"{name} stage."),
            "explained_variance": Metric(
                f"Share of the variance of the {name} stage's returns that the critic foresaw, over tokens. Below 0 "
                "it is worse than a constant.", "", "towards 1"),
        }  # fmt: skip
        out |= {f"{prefix}/{stage}_{key}": metric for key, metric in own.items()}
    for verdict in ("yes", "no"):
        for truth, good in (("right", "1" if verdict == "yes" else "0"), ("wrong", "0" if verdict == "yes" else "1")):
            text = f"Share of {verdict.capitalize()} among the verdicts on {truth} Fast answers."
            out[f"{prefix}/verify_{verdict}_when_{truth}"] = Metric(text, "share", good)
    return out | {
        f"{prefix}/verify_balanced_accuracy": Metric(
            "Mean of the shares of right verdicts on right and on wrong Fast answers; 0.5 for a guess.", "share",
            "towards 1"),
        f"{prefix}/verify_unparsable_share": Metric(
            "Share of the verdicts that are neither Yes nor No.", "share", "0", alarms=(UNPARSABLE,)),
        f"{prefix}/summary_logprob_per_token": Metric(
            "L per token: mean log-prob of the summary's tokens as an answer to the Fast prompt.", "nats", "rises"),
    }  # fmt: skip
