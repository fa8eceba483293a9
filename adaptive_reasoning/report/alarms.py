"""Alarms: metrics that crossed the bounds written beside their meaning.

The console raises them while the run goes on, the page lists them afterwards; both look through `Alarms`.
"""

from dataclasses import dataclass
from math import inf

from adaptive_reasoning.core.metric import Alarm, Metric


@dataclass
class Raised:
    """One alarm: `key` broke its rule from `first_step` to `last_step`; `value` is the newest one (None: null)."""

    key: str
    rule: Alarm
    first_step: int
    last_step: int
    value: float | None

    @property
    def text(self) -> str:
        if self.first_step == self.last_step:
            when = f"step {self.first_step}"
        else:
            when = f"steps {self.first_step} to {self.last_step}"
        shown = "null" if self.value is None else f"{self.value:.4g}"
        return f"{self.key} = {shown} ({when}): {self.rule.advice}"


class Alarms:
    """Looks at the metric rows in order of their steps and remembers every alarm raised."""

    def __init__(self, declared: dict[str, Metric], rows: list[dict] = ()):
        self.declared = declared
        self.raised: list[Raised] = []
        self._going_on: dict[tuple, Raised] = {}  # broken in the newest row, long enough or not yet
        self._lengths: dict[tuple, int] = {}
        self._start: dict[str, float] = {}  # first value of each metric
        for row in rows:
            self.see(row)

    def see(self, row: dict) -> list[Raised]:
        """Take the next row; return the alarms that begin with it. Raised once, not again while they last."""
        new = []
        for key in [key for key in row if key in self.declared]:
            if row[key] is not None:
                self._start.setdefault(key, row[key])
        for key in [key for key in row if key in self.declared]:
            for number, rule in enumerate(self.declared[key].alarms):
                name = (key, number)
                level = row.get(rule.rising, inf)
                rises = level is not None and level > self._start.get(rule.rising, -inf)
                if not rises or not _broken(rule, row[key], self._start.get(key)):
                    self._going_on.pop(name, None)
                    self._lengths.pop(name, None)
                    continue
                alarm = self._going_on.setdefault(name, Raised(key, rule, row["step"], row["step"], row[key]))
                alarm.last_step, alarm.value = row["step"], row[key]
                self._lengths[name] = self._lengths.get(name, 0) + 1
                if self._lengths[name] == rule.steps:
                    new.append(alarm)
        self.raised += new
        return new


def _broken(rule: Alarm, value: float | None, start: float | None) -> bool:
    if value is None:
        return rule.null
    if rule.of_start is not None and value < rule.of_start * start:
        return True
    return (rule.below is not None and value < rule.below) or (rule.above is not None and value > rule.above)
