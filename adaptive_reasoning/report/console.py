"""What a person following a run sees: one line per step, a table per evaluation, alarms that stand out.

    step  12/150 | acc 0.712 | tokens 34.1 | p(</think>) 0.213 | loss -0.0123 | grad 0.52 | 1,690 tok/s | ETA 0:01:57

Everything goes through tqdm.write, so a progress bar stays at the bottom of the screen. Plain text; colour only for
alarms, and only on a terminal (NO_COLOR switches it off).
"""

import os
import sys
import time
from collections import deque
from datetime import timedelta

from adaptive_reasoning.core.metric import Metric
from adaptive_reasoning.errors import say
from adaptive_reasoning.report.alarms import Alarms, Raised
from adaptive_reasoning.report.run_folder import ADAPTIVE, breakdown

FIRST = ("reward/accuracy", "rollout/response_tokens_mean")
LAST = ("loss/policy", "loss/grad_norm", "rollout/tokens_per_s")


class Console:
    """Follows one run.

    Args:
        declared: what its metrics mean.
        rows: metrics of the part before a resume: old alarms are not raised again.
    """

    def __init__(self, max_steps: int, declared: dict[str, Metric], rows: list[dict] = ()):
        self.max_steps, self.declared = max_steps, declared
        self.alarms = Alarms(declared, rows)
        self.seconds = deque(maxlen=20)  # of the newest steps, evaluation included: what the ETA is made from
        self.then: float | None = None  # when the step before ended

    def step(self, row: dict, show: bool = True) -> None:
        """Print the line of one metric row (the dict that goes into metrics.jsonl) and the alarms it raises."""
        now = time.monotonic()
        # The first one without what came before it: an evaluation that has more settings than those to come.
        spent = row.get("time/step_s") if self.then is None else now - self.then
        self.then = now
        if spent is not None:
            self.seconds.append(spent)
        if show:
            left = max(self.max_steps - row["step"], 0)
            eta_s = left * sum(self.seconds) / len(self.seconds) if self.seconds else None
            say(step_line(row, self.max_steps, self.declared, eta_s))
        for alarm in self.alarms.see(row):
            say(alarm_line(alarm))

    def evaluation(self, rows: list[dict]) -> None:
        """Print the table of one evaluation: the rows of evaluations.jsonl that share a step."""
        say(evaluation_table(rows))


def step_line(row: dict, max_steps: int, declared: dict[str, Metric], eta_s: float | None = None) -> str:
    """Return the one line of a metric row. Metrics that declare a `short` label appear, in their order."""
    middle = [key for key, metric in declared.items() if metric.short and key not in FIRST + LAST]
    cells = [f"step {row['step']:>{len(str(max_steps))}}/{max_steps}"]
    for key in (*FIRST, *middle, *LAST):
        if key in row and (metric := declared.get(key)):
            text = number(row[key], metric.unit).rjust(5 if metric.unit == "share" else 6)
            cells.append(f"{text} tok/s" if metric.unit == "tokens/s" else f"{metric.short} {text}")
    if row.get("time/step_s") is not None:
        cells.append(f"{row['time/step_s']:5.2f} s")
    if eta_s is not None:
        cells.append(f"ETA {timedelta(seconds=round(eta_s))}")
    return " | ".join(cells)


def evaluation_table(rows: list[dict]) -> str:
    """Return the evaluations of one step as aligned plain text, one block per benchmark.

    A block has a row per difficulty and a row "all" for the setting "adaptive" (accuracy and its 95 % interval, mean
    tokens, share of each mode), then one row for every setting with a forced first token: the bounds. Below it stand
    the comparisons.
    """
    assert rows and len({row["step"] for row in rows}) == 1, "the table shows the evaluations of one step"
    blocks = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        results = {row["setting"]: row["result"] for row in rows if row["benchmark"] == benchmark}
        modes = list(dict.fromkeys(mode for result in results.values() for mode in result["modes"]))
        known = any("interval" in result for result in results.values())
        lines = [["difficulty", "accuracy", *["95%"] * known, "tokens", *modes]]
        for setting, result in sorted(results.items(), key=lambda item: item[0] != ADAPTIVE):
            parts = breakdown(result) if setting == ADAPTIVE else {setting: breakdown(result)["all"]}
            for name, part in parts.items():
                numbers = [number(part["accuracy"], "share"), *[between(part.get("interval"))] * known]
                numbers.append(number(part["mean_tokens"], "tokens"))
                lines.append([name, *numbers, *(number(part["modes"].get(mode, 0.0), "share") for mode in modes)])
        blocks.append(f"evaluation at step {rows[0]['step']}: {benchmark}\n" + aligned(lines))
        blocks += [f"  {line}" for line in comparisons(results)]
    return "\n".join(blocks)


def between(interval: list[float] | None, form: str = ".3f") -> str:
    """Return an interval as text, "-" where there is none."""
    return "..".join(f"{x:{form}}" for x in interval) if interval else "-"


def comparisons(results: dict[str, dict]) -> list[str]:
    """Return what the results of one benchmark say beside their accuracies, a line each.

    Args:
        results: setting -> result.
    """
    lines = []
    for setting, result in results.items():
        if difference := result.get("paired"):
            low_high = between([difference["low"], difference["high"]], "+.3f")
            p = f"p = {difference['p']:.2g}" if difference["p"] >= 1e-3 else "p < 0.001"
            lines.append(f"{ADAPTIVE} minus {setting}: accuracy {difference['difference']:+.3f} ({low_high}), {p}")
        if hybrid := result.get("hybrid"):
            better = ", ".join(f"{mode} for {share:.3f}" for mode, share in hybrid["better"].items())
            text = f"{hybrid['accuracy']:.3f} ({between(hybrid['interval'])})"
            lines.append(f"Hybrid Accuracy {text}: took the better mode of the question, which is {better}")
    for setting, result in results.items():
        votes = [f"pass@{k} {value:.3f}" for k, value in result.get("pass_at", {}).items()]
        if "maj_k" in result:
            votes.append(f"maj@{result['maj_k']} {result['maj_accuracy']:.3f} ({between(result['maj_interval'])})")
        if votes:
            lines.append(f"{setting}: {', '.join(votes)}")
    return lines


def aligned(rows: list[list[str]], indent: str = "  ") -> str:
    """Return rows of cells as text: first column to the left, the others to the right, header underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        lines.append((indent + "  ".join([first, *others])).rstrip())
    lines.insert(1, indent + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def alarm_line(alarm: Raised) -> str:
    """Return an alarm as a line nobody overlooks, with or without colour."""
    text = f"!!! ALARM {alarm.text}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[1;97;41m{text}\033[0m"
    return text


def number(value: float | None, unit: str = "") -> str:
    """Return a metric as short text for the console; "-" for null."""
    if value is None:
        return "-"
    if unit == "share":
        return f"{value:.3f}"
    if unit == "tokens":
        return f"{value:,.1f}"
    if unit in ("tokens/s", "count"):
        return f"{value:,.0f}"
    return f"{value:.3g}"
