"""Statistics of modes and groups: what shows a collapse, an empty diversity, or questions that teach nothing."""

from collections.abc import Iterable

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Alarm, Metric, mean
from adaptive_reasoning.formats import ResponseFormat

BY_MODE = "Responses of this step, by the mode they were sampled in."
SHARES = f"Share of the modes in training | {BY_MODE}"
ACCURACIES = f"Accuracy per mode in training | {BY_MODE}"
TOKENS = f"Tokens per mode in training | {BY_MODE}"
SOLVED = f"Questions all right in one mode | {BY_MODE}"


def mode_rows(episodes: list[Episode]) -> list[dict]:
    """Return what `mode_statistics` needs of each episode, as plain numbers that can travel between processes."""
    return [
        {"group": e.group, "mode": e.mode, "accuracy": float(e.correct), "tokens": e.num_tokens,
         "advantage": e.advantage}
        for e in episodes
    ]  # fmt: skip


def mode_statistics(rows: list[dict], modes: Iterable[str]) -> dict[str, float | None]:
    """Return share, accuracy, length and advantage of each mode, and how many questions are all right or all wrong.

    Args:
        rows: of `mode_rows`, of all processes.
    """
    out, groups = {}, {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    solved = [{row["mode"] for row in g} for g in groups.values() if all(row["accuracy"] for row in g)]
    for mode in modes:
        mine = [row for row in rows if row["mode"] == mode]
        out[f"mode/{mode}_share"] = len(mine) / len(rows)
        for key in ("accuracy", "tokens", "advantage"):
            out[f"mode/{mode}_{key}"] = mean(row[key] for row in mine)
        out[f"mode/{mode}_all_correct_groups"] = sum(found == {mode} for found in solved)
    out["group/all_wrong_share"] = mean(not any(row["accuracy"] for row in g) for g in groups.values())
    out["group/all_correct_share"] = len(solved) / len(groups)
    out["group/all_correct_mixed_share"] = sum(len(found) > 1 for found in solved) / len(groups)
    out["reward/correct_negative_share"] = mean(row["advantage"] < 0 for row in rows if row["accuracy"])
    return out


GROUPS = {
    "group/all_wrong_share": Metric(
        "Share of the questions that no response gets right.", "share", "falls",
        alarms=(Alarm("nine of ten questions are never answered right: take easier ones, or raise --max_new_tokens if "
                      "the responses are cut", above=0.9, steps=10),),
    ),
    "group/all_correct_share": Metric(
        "Share of the questions that every response gets right.", "share", "rises"),
    "group/all_correct_mixed_share": Metric(
        "Share of the questions that every response gets right, in more than one mode.", "share", "above 0"),
    "reward/correct_negative_share": Metric("Share of the right responses whose advantage is negative.", "share"),
}  # fmt: skip


def mode_metrics(form: ResponseFormat) -> dict[str, Metric]:
    """Return what the metrics of `mode_statistics` mean for the modes of a response format."""
    out = dict(GROUPS)
    for mode, name in form.modes.items():
        out |= {
            f"mode/{mode}_share": Metric(
                f"Share of the responses of this step in mode {name}.", "share", "no mode at 1: that is a collapse",
                alarms=share_alarms(mode, name, form.malformed, alone=len(form.modes) == 1),
                panel=SHARES, line=mode),
            f"mode/{mode}_accuracy": Metric(
                f"Share of the responses in mode {name} that are right.", "share", "higher",
                panel=ACCURACIES, line=mode),
            f"mode/{mode}_tokens": Metric(
                f"Mean length of the responses in mode {name}.", "tokens", panel=TOKENS, line=mode),
            f"mode/{mode}_advantage": Metric(
                f"Mean advantage of the responses in mode {name}: above 0 it will grow."),
            f"mode/{mode}_all_correct_groups": Metric(
                f"Questions of this step whose every response is right and in mode {name}.", "count",
                panel=SOLVED, line=mode),
        }  # fmt: skip
    return out


def share_alarms(mode: str, name: str, malformed: str, alone: bool) -> tuple[Alarm, ...]:
    """Return the alarms of a mode's share: a collapse into it, its death, or responses without any form."""
    if alone:  # all there is, so always 1
        return ()
    if mode == malformed:
        advice = "look at their first words in the samples; the cold start was too short"
        return (Alarm(f"one response in five is {name}: {advice}", above=0.2, steps=5),)
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
