"""Leak: thinking that hides in answers whose mode says that they skip it.

Of every response `ResponseFormat.traces` keeps what a table needs; here the tables are made of the rows of all
processes. Over the responses of a mode that skips, in what follows the opening of the mode:

    words             share with a reasoning word: wait, hmm, okay, alternatively, let me think
    words_per_answer  how many there are on average
    long              share with more than twice the tokens that follow the thinking where the same question was thought
                      about, on average; where it was not, an answer is not counted
    tags              share with a tag of the thinking
    share             share with any of these: the leak

The words and how they are counted are those of "Demystifying Hybrid Thinking" (arXiv 2510.12680;
SR-A-W/demystifying-hybrid-thinking @ 03ad075, count_reflective_tokens). `long` is TNT's cap with its omega of 2
(arXiv 2601.04805). The rest is defined here.
"""

import re
from collections.abc import Iterable

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.metric import Alarm, Metric, mean

WORDS = ("wait", "hmm", "okay", "alternatively", "let me think")
FOUND = re.compile(rf"\b(?:{'|'.join(WORDS)})\b")
LONG = 2  # times the answers behind a thinking


def reasoning_words(text: str) -> list[str]:
    """Return the reasoning words of a text in order: whole words, in lower case, white space collapsed."""
    return FOUND.findall(" ".join(text.lower().split()))


def yardsticks(rows: Iterable[dict]) -> dict[int, float]:
    """Return {question: mean tokens of the answers behind a thinking} of the rows that thought."""
    lengths: dict[int, list[int]] = {}
    for row in rows:
        if "words" not in row["traces"] and row["traces"]["answer_tokens"] is not None:
            lengths.setdefault(row["question"], []).append(row["traces"]["answer_tokens"])
    return {question: sum(found) / len(found) for question, found in lengths.items()}


def leaks(rows: list[dict], skips: Iterable[str], yardstick: dict[int, float]) -> dict[str, dict]:
    """Return {mode: {"answers", "share", "words", "words_per_answer", "long", "tags"}} of the modes that skip.

    Args:
        rows: {"question", "mode", "traces"} of every response.
        yardstick: of `yardsticks`. None of "long" says that no question of these answers has one.
    """
    out = {}
    for mode in skips:
        mine = [(row["question"], row["traces"]) for row in rows if row["mode"] == mode]
        found = {
            "words": [t["words"] > 0 for _, t in mine],
            "long": [
                t["answer_tokens"] > LONG * yardstick[q] if q in yardstick and t["answer_tokens"] is not None else None
                for q, t in mine
            ],
            "tags": [t["tags"] for _, t in mine],
        }
        out[mode] = {
            "answers": len(mine),
            "share": mean(map(any, zip(*found.values()))),
            "words_per_answer": mean(t["words"] for _, t in mine),
            **{key: mean(values) for key, values in found.items()},
        }
    return out


def add_leaks(
    results: dict[str, dict], rows: dict[str, list[dict]], skips: Iterable[str], known: dict[int, float]
) -> dict[int, float]:
    """Put "leak" into the results of the settings of one benchmark, and the shares into their difficulties.

    Args:
        results, rows: by setting, as `evaluate` returns them.
        known: yardsticks of an evaluation before, for one that has a single setting and so may think of nothing twice.

    Returns:
        the yardsticks that were taken.
    """
    yardstick = known if known and len(rows) == 1 else yardsticks(row for part in rows.values() for row in part)
    for setting, part in rows.items():
        result = results[setting]
        result["leak"] = leaks(part, skips, yardstick)
        for level, cell in result["by_difficulty"].items():
            own = leaks([row for row in part if row["difficulty"] == level], skips, yardstick)
            cell["leak"] = {mode: table["share"] for mode, table in own.items()}
    return yardstick


def traces_of(episodes: list[Episode], form) -> list[dict]:
    """Return the rows of the episodes of one process, plain values that can travel. `form`: their response format."""
    return [
        {"question": e.group, "mode": e.mode,
         "traces": form.traces(e.text, e.mode, e.num_tokens, e.finish_reason == "stop")}
        for e in episodes if form.skips
    ]  # fmt: skip


def leak_row(rows: list[dict], skips: Iterable[str]) -> dict[str, float | None]:
    """Return the metrics of one step, whose own responses are the yardstick."""
    tables = leaks(rows, skips, yardsticks(rows))
    return {f"leak/{mode}_{key}": tables[mode][key] for mode in tables for key in tables[mode] if key != "answers"}


def leak_metrics(modes: dict[str, str], skips: Iterable[str]) -> dict[str, Metric]:
    """Return what the metrics of leaks mean, in training and in the newest evaluation. `modes`: their names."""
    out = {}
    for mode in skips:
        name = modes[mode]
        answers = f"responses of this step in mode {name}"
        out |= {
            f"leak/{mode}_share": Metric(
                f"Share of the {answers} that think after all: by a reasoning word, their length, or a tag.", "share",
                "near 0",
                alarms=(Alarm(
                    f"one answer in ten in mode {name} hides its thinking, and the mode is chosen more often "
                    "than at first: look at them in the samples, then lower what they may be long "
                    "(--nothinking_max_new_tokens) or what skipping is paid (--delta, --gamma)",
                    above=0.1, steps=5, rising=f"eval/{mode}_share"),)),
            f"leak/{mode}_words": Metric(
                f"Share of the {answers} with a reasoning word: {', '.join(WORDS)}.", "share"),
            f"leak/{mode}_words_per_answer": Metric(f"Mean number of reasoning words in the {answers}."),
            f"leak/{mode}_long": Metric(
                f"Share of the {answers} with more than twice the tokens that follow the thinking in the responses "
                "to the same question that think; null where no such response is there.", "share"),
            f"leak/{mode}_tags": Metric(f"Share of the {answers} with a tag of the thinking in them.", "share"),
            f"eval/{mode}_leak_share": Metric(
                f"Share of the answers in mode {name} that think after all, in the newest evaluation, nothing forced.",
                "share", "near 0"),
        }  # fmt: skip
    return out
