"""Routers: the baselines that choose the mode of every question from outside, by a coin or by a judge.

Thinkless compares with a coin ("Router Random") and with a 7B model as judge ("Router Q-7B"), whose prompt, threshold
and end points are published nowhere. Here the end points are the two forced modes of the evaluated model, measured
anyway, so a router samples nothing new: its row of a question and sample is the row of the mode it picked.

    router_random     a coin for every question, seeded
    router_judge      `--judge_model` reads JUDGE_PROMPT and answers greedily; without a clear word the question is HARD
"""

import re

import numpy as np

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout import Engine, Request, Sampling
from adaptive_reasoning.tasks import prompts

ROUTERS = ("router_random", "router_judge")
ENDS = {"think": "always_think", "short": "never_think"}  # what a router picks -> the forced setting it takes rows from
ROUTER_STREAM = 15_485_863

JUDGE_PROMPT = (
    "Judge how difficult this problem is. Do not solve it.\n\n{problem}\n\n"
    "Is it EASY (a few direct steps lead to the answer) or HARD (it needs long, careful reasoning)? "
    "Reply with one word, EASY or HARD."
)


def coin_picks(questions: int, seed: int) -> list[str]:
    """Return "think" or "short" for every question, each with probability 1/2, the same for all its samples."""
    coins = np.random.default_rng([seed, ROUTER_STREAM]).random(questions) < 0.5
    return ["think" if coin else "short" for coin in coins]


def verdict(reply: str) -> str | None:
    """Return "think" or "short" by the last EASY or HARD after the judge's own thinking; None where it says neither.

    A judge that never stops thinking has not decided, whatever words its thinking holds.
    """
    if "<think>" in reply and "</think>" not in reply:
        return None
    words = re.findall(r"\b(easy|hard)\b", reply.rpartition("</think>")[2], re.IGNORECASE)
    return {"easy": "short", "hard": "think"}[words[-1].lower()] if words else None


def judge_picks(
    engine: Engine, tokenizer, stop_ids, problems: list[str], max_new_tokens: int, forced=()
) -> tuple[list[str], dict]:
    """Return what the judge picks for every problem, and {"judge_tokens", "judge_unclear_share"}.

    Args:
        engine: holds the judge's weights.
        forced: first tokens of its reply, e.g. `<short>` where the judge is a Thinkless model itself.
    """
    requests = [
        Request(prompts.render(tokenizer, JUDGE_PROMPT.format(problem=p)), max_new_tokens, stop_ids, i, forced=forced)
        for i, p in enumerate(problems)
    ]
    done = engine.run(requests, Sampling(temperature=0.0), progress="router judge")
    verdicts = [verdict(prompts.decode(tokenizer, c.response_ids.tolist(), stop_ids)) for c in done]
    stats = {
        "judge_tokens": sum(len(c.response_ids) for c in done) / len(done),
        "judge_unclear_share": sum(v is None for v in verdicts) / len(verdicts),
    }
    return [v or "think" for v in verdicts], stats


def routed_rows(rows: dict[str, list[dict]], picks: list[str]) -> list[dict]:
    """Return the router's rows: of every question and sample that of the forced setting picked for the question.

    Args:
        rows: setting -> rows with "question" and "sample", of both forced settings.
        picks: of every question.
    """
    chosen = [row for pick, setting in ENDS.items() for row in rows[setting] if picks[row["question"]] == pick]
    assert len(chosen) == len(rows["always_think"]) == len(rows["never_think"]), "both settings have the same samples"
    return sorted(chosen, key=lambda row: (row["question"], row["sample"]))


def check_routers(wanted: list[str]) -> None:
    """Raise UserError where a router is asked for without the settings whose rows it takes."""
    for name in wanted:
        missing = [setting for setting in ENDS.values() if setting not in wanted]
        if name in ROUTERS and missing:
            raise UserError(f"--settings: {name} takes its rows from {' and '.join(missing)}: add it to the settings.")
