"""Panels: the charts of a run as data, drawn by curves.py with matplotlib and by svg.py for the page.

Colours are safe for colour-blind readers: modes have those of Okabe and Ito, difficulties a ramp of growing darkness
(viridis), and every line carries its label at its end.
"""

from dataclasses import dataclass
from itertools import cycle

from adaptive_reasoning.core.metric import SHARED
from adaptive_reasoning.report.run_folder import Run, shown_modes

# name -> (on a light page, on a dark page). m: modes, d: difficulties from easy to hard.
PALETTE = {
    "ink": ("#1b2430", "#e8ecf1"),
    "muted": ("#6b7683", "#939eab"),
    "m0": ("#0072b2", "#5ab4f0"),
    "m1": ("#d55e00", "#f59152"),
    "m2": ("#009e73", "#3fcfa3"),
    "m3": ("#b8558f", "#e79ccb"),
    "m4": ("#b98a00", "#f0c04a"),
    "m5": ("#3b8fc4", "#9adbff"),
    "d0": ("#4ec36b", "#f1e51d"),
    "d1": ("#26ad81", "#b8de29"),
    "d2": ("#1f958b", "#7cd250"),
    "d3": ("#287d8e", "#4ac16d"),
    "d4": ("#32648e", "#28ae80"),
    "d5": ("#3e4989", "#1f998a"),
    "d6": ("#472a7a", "#3290a6"),
    "d7": ("#46085c", "#4a8fbf"),
}
MODE_COLOURS = [f"m{i}" for i in range(6)]
RAMP = [f"d{i}" for i in range(8)]


@dataclass(frozen=True)
class Line:
    """One line of a panel. `points`: [(step, value)] in order of the steps. Style "faint" carries no label."""

    label: str
    points: list[tuple[float, float]]
    colour: str  # a name of PALETTE
    style: str = "solid"  # solid, dashed or faint
    marks: bool = False  # a dot on every point: evaluations are few and far between


@dataclass(frozen=True)
class Panel:
    """One chart over the training steps. `unit` is that of the metric; `bounds` fixes the y axis."""

    title: str
    note: str
    lines: list[Line]
    unit: str = ""
    bounds: tuple[float, float] | None = None


def ramp(count: int) -> list[str]:
    """Return `count` colours of the difficulty ramp, spread over all of it."""
    if count == 1:
        return [RAMP[3]]
    return [RAMP[round(i * (len(RAMP) - 1) / (count - 1))] for i in range(count)]


def mode_colours(modes: list[str]) -> dict[str, str]:
    return {mode: MODE_COLOURS[i % len(MODE_COLOURS)] for i, mode in enumerate(modes)}


def smooth(points: list[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Return the centred moving mean over `width` points (fewer at the ends)."""
    half = width // 2
    out = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        out.append((x, sum(y for _, y in near) / len(near)))
    return out


def thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most `most` points: means of equally many neighbours. Few points come back as they are."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothing_width(run: Run) -> int:
    """Steps one smoothed point is the mean of: a twentieth of the run, at least one, at most 25, odd."""
    return min(25, len(run.metrics) // 20) // 2 * 2 + 1


def share_panels(run: Run) -> list[Panel]:
    """Share of each mode by difficulty over training, from the evaluations with nothing forced."""
    panels = []
    for benchmark in run.benchmarks:
        levels = run.difficulties(benchmark)
        if not levels:
            continue
        for mode in shown_modes(run.modes, run.thinking_mode):
            lines = []
            for level, colour in zip(levels, ramp(len(levels))):
                points = [
                    (step, result["by_difficulty"][level]["modes"].get(mode, 0.0))
                    for step, result in run.results(benchmark)
                    if level in result["by_difficulty"]
                ]
                lines.append(Line(level, points, colour, marks=True))
            title = f"Share of {mode} by difficulty" + _of(run, benchmark)
            panels.append(Panel(title, "Evaluations, nothing forced.", lines, "share", (0.0, 1.0)))
    return panels


def evaluation_panels(run: Run) -> list[Panel]:
    """Accuracy and mean tokens over training: evaluations, the forced modes as bounds, training in the background."""
    colours = mode_colours(run.modes)
    panels = []
    for name, unit, train_key in (
        ("accuracy", "share", "reward/accuracy"),
        ("mean_tokens", "tokens", "rollout/response_tokens_mean"),
    ):
        lines = []
        one = len(run.benchmarks) == 1
        for benchmark, colour in zip(run.benchmarks, ["ink"] if one else MODE_COLOURS * len(run.benchmarks)):
            points = [(step, E[name]) for step, E in run.results(benchmark) if E[name] is not None]
            lines.append(Line("evaluation" if one else benchmark, points, colour, marks=True))
            for setting, mode in run.forced(benchmark).items() if one else ():
                points = [(step, E[name]) for step, E in run.results(benchmark, setting) if E[name] is not None]
                lines.append(Line(setting, points, colours.get(mode, "muted"), "dashed", marks=True))
        train = run.points(train_key)
        lines.append(Line("training", smooth(train, smoothing_width(run)), "muted"))
        title, note = {
            "accuracy": ("Accuracy", "Dashed: every response forced into one mode. Training samples both modes."),
            "mean_tokens": ("Mean response tokens", "Training length depends on how the modes are forced."),
        }[name]
        panels.append(Panel(title, note, lines, unit))
    return _filled(panels)


def sign_panels(run: Run) -> list[Panel]:
    """The early sign of progress a method logs, such as p(</think>), beside the share the evaluations sample."""
    signs = [key for key in run.metric_keys() if _is_sign(run, key)]
    lines = [line for key, c in zip(signs, MODE_COLOURS[1:]) for line in _noisy(run, key, run.declared[key].short, c)]
    if not lines:
        return []
    modes = shown_modes(run.modes, "nothinking")
    for mode in modes:
        colour = "ink" if len(modes) == 1 else mode_colours(run.modes)[mode]
        for benchmark in run.benchmarks:
            points = [(s, E["modes"].get(mode, {}).get("share", 0.0)) for s, E in run.results(benchmark)]
            lines.append(Line(f"{mode} share" + _of(run, benchmark), points, colour, "dashed", marks=True))
    note = "Mean over the training questions; dashed: what the evaluations sample."
    return _filled([Panel("How the mode is chosen", note, lines, "share", (0.0, 1.0))])


def training_panels(run: Run) -> list[Panel]:
    """The training metrics worth a chart, as the method declares them: its own first, then those of every method."""
    titles: dict[str, list[str]] = {}
    logged = {key for key in run.metric_keys()}
    for key in sorted((key for key in run.declared if key in logged), key=lambda key: key in SHARED):
        if run.declared[key].panel:
            titles.setdefault(run.declared[key].panel, []).append(key)
    panels, colours = [], mode_colours(run.modes)
    for title, keys in titles.items():
        title, _, note = title.partition(" | ")
        lines, labels = [], {key: run.declared[key].line or title.lower() for key in keys}
        taken = {colours.get(label) for label in labels.values()}
        free = cycle([colour for colour in MODE_COLOURS if colour not in taken] or MODE_COLOURS)  # for what is no mode
        for key, label in labels.items():
            lines += _noisy(run, key, label, "ink" if label == "step" else colours.get(label) or next(free))
        unit = run.declared[keys[0]].unit
        panels.append(Panel(title, note, lines, unit, (0.0, 1.0) if title.startswith("Share") else None))
    return _filled(panels)


def _is_sign(run: Run, key: str) -> bool:
    """Metrics a method wants on the console as shares: its early signs of progress."""
    metric = run.declared.get(key)
    return metric is not None and bool(metric.short) and metric.unit == "share" and key not in SHARED


def _noisy(run: Run, key: str, label: str, colour: str) -> list[Line]:
    """Return a training metric as a faint line and, once there are enough steps, its moving mean on top."""
    points, width = run.points(key), smoothing_width(run)
    if width == 1:
        return [Line(label, points, colour)]
    return [Line(label, points, colour, "faint"), Line(label, smooth(points, width), colour)]


def _of(run: Run, benchmark: str) -> str:
    return "" if len(run.benchmarks) == 1 else f" ({benchmark})"


def _filled(panels: list[Panel]) -> list[Panel]:
    """Return the panels with lines that have points; leave out panels without any."""
    out = []
    for p in panels:
        lines = [line for line in p.lines if line.points]
        if lines:
            out.append(Panel(p.title, p.note, lines, p.unit, p.bounds))
    return out
