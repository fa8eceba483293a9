"""Metric: what one number of a run means, and when it calls for attention."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """Raise `advice` once a metric is below / above a bound for `steps` steps in a row, or null if `null` is set.

    `of_start`: below this share of the first value that the run logged, for what has no scale of its own.
    """

    advice: str
    below: float | None = None
    above: float | None = None
    null: bool = False
    steps: int = 1
    of_start: float | None = None


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
