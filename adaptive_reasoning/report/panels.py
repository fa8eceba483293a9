"""Panels: the charts of a run as data, which curves.py draws with matplotlib.

Colours are safe for colour-blind readers: modes have those of Okabe and Ito, difficulties a ramp of growing darkness
(viridis).
"""

from dataclasses import dataclass, replace
from itertools import accumulate, cycle

from adaptive_reasoning.core.metric import SHARED
from adaptive_reasoning.report.run_folder import ADAPTIVE, Run, shown_modes

INK, MUTED = "#1b2430", "#6b7683"
MODE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8558f", "#b98a00", "#3b8fc4")
RAMP = ("#4ec36b", "#26ad81", "#1f958b", "#287d8e", "#32648e", "#3e4989", "#472a7a", "#46085c")
MARKS = {ADAPTIVE: "o", "always_think": "^", "never_think": "v"}  # other settings: squares
NAMES = {ADAPTIVE: "free choice", "always_think": "always think", "never_think": "never think"}


@dataclass(frozen=True)
class Line:
    """One line of a panel. `points`: [(step, value)] in order of the steps; `band`: [(step, low, high)] around it."""

    label: str  # "": not in the legend
    points: list[tuple[float, float]]
    colour: str
    style: str = "-"  # of matplotlib: "-", "--" or "" for marks alone
    mark: str = ""  # of matplotlib, on every point: evaluations are few and far between
    faint: bool = False
    hollow: bool = False
    band: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One chart. `unit` is that of the metric; `bounds` fixes the y axis."""

    title: str
    note: str
    lines: list[Line]
    unit: str = ""
    bounds: tuple[float, float] | None = None
    over_tokens: bool = False  # x: mean response tokens instead of training steps


def ramp(count: int) -> list[str]:
    """Return `count` colours of the difficulty ramp, spread over all of it."""
    if count == 1:
        return [RAMP[3]]
    return [RAMP[round(i * (len(RAMP) - 1) / (count - 1))] for i in range(count)]


def mode_colours(modes: list[str]) -> dict[str, str]:
    return dict(zip(modes, cycle(MODE_COLOURS)))


def smooth(points: list[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Return the centred moving mean over `width` points (fewer at the ends)."""
    sums, half, last = [0.0, *accumulate(y for _, y in points)], width // 2, len(points)
    ranges = ((max(0, i - half), min(last, i + half + 1)) for i in range(last))
    return [(x, (sums[high] - sums[low]) / (high - low)) for (x, _), (low, high) in zip(points, ranges)]


def smoothing_width(run: Run) -> int:
    """Steps one smoothed point is the mean of: a twentieth of the run, at least one, at most 25, odd."""
    return min(25, len(run.metrics) // 20) // 2 * 2 + 1


def mode_panels(run: Run) -> list[Panel]:
    """When a mode is chosen: its share by difficulty, and the early sign of progress that a method logs."""
    return _filled([*_shares(run), *_signs(run)])


def result_panels(run: Run) -> list[Panel]:
    """Accuracy against tokens, per benchmark: the settings before and after, and what choosing by a coin would give."""
    colours, panels = mode_colours(run.modes), []
    for benchmark in run.benchmarks:
        lines, ends = [], {}
        for setting, mode in {ADAPTIVE: "", **run.forced(benchmark)}.items():
            results = [
                (s, E) for s, E in run.results(benchmark, setting) if None not in (E["mean_tokens"], E["accuracy"])
            ]
            found = [(step, (E["mean_tokens"], E["accuracy"])) for step, E in results]
            colour = INK if setting == ADAPTIVE else colours.get(mode, MUTED)
            lines.append(Line("", [point for _, point in found], colour, faint=True))
            before = [point for step, point in found[:1] if step == 0]
            after = [point for step, point in found[-1:] if step > 0]
            if after and (interval := results[-1][1].get("interval")):
                lines.append(Line("", [(after[0][0], y) for y in interval], colour, faint=True))
            label, mark = NAMES.get(setting, setting), MARKS.get(setting, "s")
            lines.append(Line("" if after else label, before, colour, "", mark, hollow=True))
            lines.append(Line(label, after, colour, "", mark))
            ends.update((setting, point) for point in after)
        note = (
            "Up and to the left is better. Hollow marks: before training. Filled marks: after, with their 95% interval."
        )
        if "never_think" in ends and "always_think" in ends:
            coin = [ends["never_think"], ends["always_think"]]
            lines.append(Line("", coin, MUTED, "--"))
            note += " Dashed: what a coin that picks the mode would give; above it, the model knows when to think."
        title = "Accuracy against mean response tokens" + _of(run, benchmark)
        panels.append(Panel(title, note, lines, "share", over_tokens=True))
    return _filled(panels)


def training_panels(run: Run) -> list[Panel]:
    """Accuracy and tokens over training, then the metrics with a panel: those of the method, those of every method."""
    titles: dict[str, list[str]] = {}
    for key in sorted(run.declared.keys() & set(run.metric_keys()), key=list(run.declared).index):
        titles.setdefault(run.declared[key].panel, []).append(key)
    titles.pop("", None)
    panels, colours = [*_evaluations(run), _leaks(run)], mode_colours(run.modes)
    for title, keys in sorted(titles.items(), key=lambda item: item[1][0] in SHARED):
        title, _, note = title.partition(" | ")
        labels = {key: run.declared[key].line or title.lower() for key in keys}
        taken = {colours.get(label) for label in labels.values()}
        free = cycle([colour for colour in MODE_COLOURS if colour not in taken] or MODE_COLOURS)  # for what is no mode
        lines = []
        for key, label in labels.items():
            lines += _noisy(run, key, label, INK if label == "step" else colours.get(label) or next(free))
        bounds = (0.0, 1.0) if title.startswith("Share") else None
        panels.append(Panel(title, note, lines, run.declared[keys[0]].unit, bounds))
    return _filled(panels)


def _shares(run: Run) -> list[Panel]:
    """Share of each mode by difficulty over training, from the evaluations with nothing forced."""
    panels = []
    for benchmark in run.benchmarks:
        levels, results = run.difficulties(benchmark), run.results(benchmark)
        for mode in shown_modes(run.modes, run.thinking_mode) if levels else ():
            lines = []
            for level, colour in zip(levels, ramp(len(levels))):
                found = [(step, E["by_difficulty"][level]) for step, E in results if level in E["by_difficulty"]]
                points = [(step, part["modes"].get(mode, 0.0)) for step, part in found]
                lines.append(Line(level, points, colour, mark="o"))
            title = f"Share of {mode} by difficulty" + _of(run, benchmark)
            panels.append(Panel(title, "Evaluations, nothing forced.", lines, "share", (0.0, 1.0)))
    return panels


def _signs(run: Run) -> list[Panel]:
    """The shares a method wants on the console, such as p(</think>), beside the share the evaluations sample."""
    found = ((key, run.declared.get(key)) for key in run.metric_keys() if key not in SHARED)
    signs = [(key, metric.short) for key, metric in found if metric and metric.short and metric.unit == "share"]
    if not signs:
        return []
    lines = [line for (key, label), c in zip(signs, MODE_COLOURS[1:]) for line in _noisy(run, key, label, c)]
    modes = shown_modes(run.modes, "nothinking")
    for mode in modes:
        colour = INK if len(modes) == 1 else mode_colours(run.modes)[mode]
        for benchmark in run.benchmarks:
            points = [(s, E["modes"].get(mode, {}).get("share", 0.0)) for s, E in run.results(benchmark)]
            lines.append(Line(f"{mode} share" + _of(run, benchmark), points, colour, "--", "o"))
    note = "Mean over the training questions; dashed: what the evaluations sample."
    return [Panel("How the mode is chosen", note, lines, "share", (0.0, 1.0))]


def _evaluations(run: Run) -> list[Panel]:
    """Accuracy and mean tokens over training: evaluations, the forced modes as bounds, training in the background."""
    colours, one = mode_colours(run.modes), len(run.benchmarks) == 1
    panels = []
    for name, unit, key, title, note in (
        ("accuracy", "share", "reward/accuracy", "Accuracy",
         "Dashed: every response forced into one mode. Training samples both modes. Shaded: 95% interval."),
        ("mean_tokens", "tokens", "rollout/response_tokens_mean", "Mean response tokens",
         "Training length depends on how the modes are forced."),
    ):  # fmt: skip
        lines = []
        for benchmark, own in zip(run.benchmarks, [INK] if one else cycle(MODE_COLOURS)):
            for setting, mode in {ADAPTIVE: "", **(run.forced(benchmark) if one else {})}.items():
                found = [(step, E) for step, E in run.results(benchmark, setting) if E[name] is not None]
                points = [(step, E[name]) for step, E in found]
                if setting == ADAPTIVE:
                    sure = name == "accuracy" and all(E.get("interval") for _, E in found)
                    band = tuple((step, *E["interval"]) for step, E in found) if sure else ()
                    lines.append(Line("evaluation" if one else benchmark, points, own, mark="o", band=band))
                else:
                    lines.append(Line(setting, points, colours.get(mode, MUTED), "--", "o"))
        lines.append(Line("training", smooth(run.points(key), smoothing_width(run)), MUTED))
        panels.append(Panel(title, note, lines, unit))
    return panels


def _leaks(run: Run) -> Panel:
    """The answers that think although their mode skips it: in training, and in the evaluations of each setting."""
    colours, lines = mode_colours(run.modes), []
    for mode in run.modes:
        lines += _noisy(run, f"leak/{mode}_share", mode, colours[mode])
        for benchmark in run.benchmarks:
            for setting in (ADAPTIVE, *run.forced(benchmark)):
                found = [(step, E.get("leak", {}).get(mode, {})) for step, E in run.results(benchmark, setting)]
                points = [(step, table["share"]) for step, table in found if table.get("share") is not None]
                label = f"{mode}, {NAMES.get(setting, setting)}" + _of(run, benchmark)
                style = "--" if setting == ADAPTIVE else ""
                lines.append(Line(label, points, colours[mode], style, MARKS.get(setting, "s")))
    note = "Leak: share of the answers with a reasoning word, a tag, or more than twice an answer's length."
    return Panel("Thinking hidden in answers that skip it", note, lines, "share", (0.0, 1.0))


def _noisy(run: Run, key: str, label: str, colour: str) -> list[Line]:
    """Return a training metric as a faint line and, once there are enough steps, its moving mean on top."""
    points, width = run.points(key), smoothing_width(run)
    if width == 1:
        return [Line(label, points, colour)]
    return [Line("", points, colour, faint=True), Line(label, smooth(points, width), colour)]


def _of(run: Run, benchmark: str) -> str:
    return "" if len(run.benchmarks) == 1 else f" ({benchmark})"


def _filled(panels: list[Panel]) -> list[Panel]:
    """Return the panels with the lines that have points; without the panels that have none."""
    kept = [replace(panel, lines=[line for line in panel.lines if line.points]) for panel in panels]
    return [panel for panel in kept if panel.lines]
