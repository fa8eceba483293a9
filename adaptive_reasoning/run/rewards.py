"""Rewards: what a response is worth by `--reward`, the user's own, and what could not be scored.

A reward runs in a pool of grader processes, behind the grading of all responses: it knows who was right. What it
returns takes the place of 1 and 0 in the formula of the method (`Episode.score`).
"""

import time
from collections.abc import Callable
from types import ModuleType

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.named import module_of, named
from adaptive_reasoning.core.response import REWARD, Response
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout.dialogue import Dialogue, Turn
from adaptive_reasoning.tasks.grader import GraderPool

MOST_SAID = 3  # new reasons a step


def reward_module(name: str, algorithm: str, offline: bool) -> list[ModuleType]:
    """Return the module of --reward, if there is one.

    Raises:
        UserError: it cannot be found, is no function, or the method chooses among stored answers.
    """
    if not name:
        return []
    if offline:
        raise UserError(f"--reward {name}: {algorithm} chooses by right and wrong among stored answers, it pays none.")
    if not callable(named(name, {}, "reward")):
        raise UserError(f"--reward {name}: it is no function. See docs/add_a_task_or_reward.md.")
    return [module_of(name, {}, "reward")[0]]


def paid_responses(episodes: list[Episode]) -> list[tuple]:
    """Return what `pay` takes of responses."""
    out = []
    for e in episodes:
        more = {"mode": e.mode, "tokens": e.num_tokens, "cut": e.finish_reason == "length"}
        out.append((e, e, Response.to(e.question, e.text, answer=e.answer, score=e.score, **more)))
    return out


def paid_turns(dialogues: list[Dialogue], target: Callable) -> list[tuple]:
    """Return what `pay` takes of dialogues: the turns that answer the question, each by itself."""
    out = []
    for d in dialogues:
        for stage, turn in d.turns.items():
            if target(stage, d) is d.question:
                more = {"mode": stage, "tokens": len(turn.ids), "cut": turn.cut}
                out.append((turn, d, Response.to(d.question, turn.text, answer=turn.answer, score=turn.score, **more)))
    return out


def pay(pool: GraderPool, paid: list[tuple[Episode | Turn, Episode | Dialogue, Response]]) -> float:
    """Give each its score by `--reward`, and return the seconds it took.

    Where the reward fails the score is 0, and `grader` of the second says why: `failures` counts it.
    """
    start = time.perf_counter()
    pool.count_anew()
    for i, (_, _, response) in enumerate(paid):
        pool.submit("", response, i)
    for i, grade in pool.drain().items():
        each, whole, _ = paid[i]
        each.given = grade.score
        if grade.status != "ok":
            whole.grader = f"{REWARD}{grade.status}: {grade.detail}"
    return time.perf_counter() - start


def failures(run, episodes: list[Episode]) -> list[str]:
    """Return why responses of all processes could not be graded or paid, and print every new reason.

    Every process must call this.
    """
    failed = run.gather([e.grader for e in episodes if e.grader])
    for text in [text for text in dict.fromkeys(failed) if text not in run.told][:MOST_SAID]:
        run.journal.say(f"warning: step {run.step}: {failed.count(text)} could not be scored: {text}")
        run.told.add(text)
    return failed


def score_metrics(scored: bool, paid: bool, failed: list[str], parts: list[dict]) -> dict[str, float]:
    """Return the metrics of scores over all processes.

    Args:
        scored: whether the task has a score of its own; paid: whether there is a --reward.
        parts: `counts_of` each process.
    """
    score, n = (sum(part[key] for part in parts) for key in ("score", "episodes"))
    row = {"reward/score_mean": score / n} if scored or paid else {}
    return row | ({"reward/failed_share": failed_rewards(failed) / n} if paid else {})


def failed_rewards(failed: list[str]) -> int:
    return sum(text.startswith(REWARD) for text in failed)


def check_failures(run, row: dict, failed: list[str]) -> None:
    """Raise UserError where more than --max_ungraded of what the metrics in `row` count could not be scored."""
    most, unpaid = run.args.max_ungraded, row.get("reward/failed_share", 0.0)
    slow, broken = (row.get(f"grader/{kind}_rate") or 0.0 for kind in ("timeout", "error"))
    first = next((text for text in failed if text.startswith(REWARD) == (unpaid > most)), "")
    where = (
        f"The first: {first}. Look at 'grader' in {run.journal.folder / 'samples.jsonl'}; raise --grader_timeout or "
        "--grader_workers if the machine is too slow. The same command continues the run from its newest checkpoint."
    )
    if unpaid > most:
        raise UserError(
            f"step {run.step}: --reward {run.args.reward} failed on {unpaid:.0%} of the responses, more than "
            f"--max_ungraded {most}. {where}"
        )
    if slow + broken > most:
        raise UserError(
            f"step {run.step}: {slow + broken:.0%} of the answers could not be graded (timeouts {slow:.0%}, errors "
            f"{broken:.0%}), more than --max_ungraded {most}. {where}"
        )
