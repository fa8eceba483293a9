"""Stages: what the turns of dialogues were like, as plain numbers per stage, in training and in evaluation.

Rows are made where the dialogues are and can travel between processes; tables are made of the rows of all of them.
"""

import torch

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
