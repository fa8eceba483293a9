"""Panels as inline SVG: sharp at any size, coloured by the page's CSS variables so that dark pages stay readable.

Lengths are SVG units; a chart is WIDTH x HEIGHT of them and scales with its box. Every text is escaped here.
"""

import json
import math
from dataclasses import dataclass
from html import escape

from adaptive_reasoning.report.panels import Line, Panel, thin

WIDTH, HEIGHT = 460, 250
TOP, BOTTOM, LEFT = 12, 28, 48
MOST_POINTS = 400  # per line; longer ones are thinned to means of neighbours
LABEL_GAP = 14  # between the labels at the ends of the lines


@dataclass(frozen=True)
class Dot:
    """One result in the picture of accuracy against tokens."""

    label: str
    tokens: float
    accuracy: float
    shape: str  # circle: free choice, up: always think, down: never think
    filled: bool  # after training; hollow: before
    colour: str


class Axes:
    """Maps values to SVG units. `log` is for the x axis only."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], right: float, log: bool = False):
        self.x, self.y, self.right, self.log = x, y, right, log

    def px(self, x: float) -> float:
        low, high = (math.log(v) for v in self.x) if self.log else self.x
        part = ((math.log(x) if self.log else x) - low) / (high - low)
        return round(LEFT + part * (WIDTH - self.right - LEFT), 1)

    def py(self, y: float) -> float:
        low, high = self.y
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    def frame(self, x_ticks: list[float], y_ticks: list[float], x_unit: str, y_unit: str) -> list[str]:
        """Return grid lines and tick labels."""
        out = []
        end = WIDTH - self.right
        for y in y_ticks:
            out.append(f'<path class="grid" d="M{LEFT} {self.py(y)}H{end}"/>')
            out.append(text(LEFT - 7, self.py(y) + 4, show(y, y_unit), "tick", "end"))
        for x in x_ticks:
            out.append(text(self.px(x), HEIGHT - BOTTOM + 18, show(x, x_unit), "tick", "middle"))
        return out


def panel_svg(panel: Panel) -> str:
    """Return one chart over the training steps, with its data for the pointer in a data attribute."""
    lines = [(line, thin(line.points, MOST_POINTS)) for line in panel.lines]
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    y_range = widened(*panel.bounds, 1.0, 0.02) if panel.bounds else value_range(ys, panel.unit)
    labels = [line.label for line, _ in lines if line.style != "faint"]
    right = 24 + min(18, max(len(label) for label in labels)) * 6.3 if len(labels) > 1 else 16
    axes = Axes(widened(min(xs), max(xs), 0.5), y_range, right)

    x_ticks = [x for x in ticks(min(xs), max(xs), 5) if x == int(x)]
    out = axes.frame(x_ticks, ticks(*(panel.bounds or y_range), 5), "count", panel.unit)
    ends = []
    for line, points in lines:
        d = "M" + "L".join(f"{axes.px(x)} {axes.py(y)}" for x, y in points)
        out.append(f'<g style="--c:var(--{line.colour})"><path class="line {line.style}" d="{d}"/>')
        if line.style != "faint" and (line.marks or len(points) == 1) and len(points) <= 60:
            out += [f'<circle class="dot" cx="{axes.px(x)}" cy="{axes.py(y)}" r="2.4"/>' for x, y in points]
        out.append("</g>")
        if line.style != "faint":
            ends.append((points[-1][1], axes.py(points[-1][1]), line))
    if len(labels) > 1:
        out += end_labels(ends, WIDTH - right + 6)
    data = {
        "left": LEFT,
        "right": right,
        "x": axes.x,
        "unit": panel.unit,
        "lines": [
            {
                "label": line.label,
                "colour": line.colour,
                "points": [[round(x, 1), float(f"{y:.5g}")] for x, y in points],
            }
            for line, points in lines
            if line.style != "faint"
        ],
    }
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}" '
        f'data-chart="{escape(json.dumps(data))}">' + "".join(out) + "</svg>"
    )


def end_labels(ends: list[tuple[float, float, Line]], x: float) -> list[str]:
    """Return the labels at the ends of the lines (value, y, line), moved apart where they end close together."""
    ends = sorted(reversed(ends), key=lambda end: -end[0])
    places, lowest = [], TOP
    for _, y, _ in ends:
        lowest = max(y, lowest)
        places.append(lowest)
        lowest += LABEL_GAP
    highest = HEIGHT - BOTTOM + 4
    for i in reversed(range(len(places))):  # push back up what ran out of the picture
        places[i] = min(places[i], highest)
        highest = places[i] - LABEL_GAP
    out = []
    for (_, _, line), y in zip(ends, places):
        swatch = f'<path class="line {line.style} swatch" style="--c:var(--{line.colour})" d="M{x:.1f} {y:.1f}h9"/>'
        out.append(swatch + text(x + 14, y + 4, line.label, "label", most=18))
    return out


def tradeoff_svg(dots: list[Dot], chord: tuple[Dot, Dot] | None, path: list[tuple[float, float]]) -> str:
    """Return accuracy against mean tokens.

    `chord`: never_think and always_think after training; the dashed line between them is what choosing the mode by a
    coin would give. `path`: [(tokens, accuracy)] of the evaluations between before and after. An arrow leads from each
    hollow dot to the filled one of the same shape.
    """
    xs = [dot.tokens for dot in dots] + [x for x, _ in path]
    ys = [dot.accuracy for dot in dots] + [y for _, y in path]
    log = min(xs) > 0 and max(xs) / min(xs) > 12
    if log:
        x_range = (min(xs) / 1.3, max(xs) * 1.3)
        x_ticks = [m * 10**k for k in range(7) for m in (1, 2, 5) if x_range[0] <= m * 10**k <= x_range[1]]
    else:
        x_range = widened(min(0, *xs), max(xs) * 1.08, 1.0)
        x_ticks = ticks(*x_range, 6)
    y_range = value_range(ys, "share")
    axes = Axes(x_range, y_range, 24, log)
    out = axes.frame(x_ticks, ticks(*y_range, 5), "tokens", "share")
    out.append(text((LEFT + WIDTH - 24) / 2, HEIGHT + 9, "mean response tokens", "axis", "middle"))
    if chord:
        a, b = chord
        parts = [i / 20 for i in range(21)]
        points = [(a.tokens + (b.tokens - a.tokens) * p, a.accuracy + (b.accuracy - a.accuracy) * p) for p in parts]
        d = "M" + "L".join(f"{axes.px(x)} {axes.py(y)}" for x, y in points)
        out.append(f'<path class="line dashed" style="--c:var(--muted)" d="{d}"/>')
    if len(path) > 1:
        d = "M" + "L".join(f"{axes.px(x)} {axes.py(y)}" for x, y in path)
        out.append(f'<path class="line trace" style="--c:var(--ink)" d="{d}"/>')
    for shape in dict.fromkeys(dot.shape for dot in dots):
        pair = [dot for dot in dots if dot.shape == shape]
        if len(pair) == 2 and (shape != "circle" or len(path) < 3):
            out.append(arrow(axes, *sorted(pair, key=lambda dot: dot.filled)))
    for dot in sorted(dots, key=lambda dot: dot.shape == "circle"):
        name = f"{dot.label}: {show(dot.accuracy, 'share')}, {show(dot.tokens, 'tokens')} tokens"
        style = f"--c:var(--{dot.colour})"
        mark = marker(dot.shape, axes.px(dot.tokens), axes.py(dot.accuracy), dot.filled)
        out.append(f'<g style="{style}">{mark}<title>{escape(name)}</title></g>')
    free = [dot for dot in dots if dot.shape == "circle"]
    if len(free) == 2 and abs(axes.px(free[0].tokens) - axes.px(free[1].tokens)) > 50:  # else the words would overlap
        for dot in free:
            words = "after" if dot.filled else "before"
            out.append(text(axes.px(dot.tokens), axes.py(dot.accuracy) - 11, words, "label", "middle"))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT + 16}" role="img" '
        'aria-label="Accuracy against mean response tokens">' + "".join(out) + "</svg>"
    )


def arrow(axes: Axes, start: Dot, end: Dot) -> str:
    """Return a thin arrow between two dots that stops short of both; nothing where they (almost) coincide."""
    x0, y0, x1, y1 = axes.px(start.tokens), axes.py(start.accuracy), axes.px(end.tokens), axes.py(end.accuracy)
    length = math.hypot(x1 - x0, y1 - y0)
    if length < 26:
        return ""
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    x0, y0, x1, y1 = x0 + 8 * ux, y0 + 8 * uy, x1 - 9 * ux, y1 - 9 * uy
    head = "".join(f"M{x1:.1f} {y1:.1f}l{-6 * ux + s * 3 * uy:.1f} {-6 * uy - s * 3 * ux:.1f}" for s in (1, -1))
    return f'<path class="arrow" style="--c:var(--{end.colour})" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}{head}"/>'


def marker(shape: str, x: float, y: float, filled: bool) -> str:
    """Return a mark centred on (x, y): circle, triangle up or triangle down."""
    name = "mark filled" if filled else "mark"
    if shape == "circle":
        return f'<circle class="{name}" cx="{x}" cy="{y}" r="5.5"/>'
    s = 1 if shape == "up" else -1
    return f'<path class="{name}" d="M{x} {y - 6.5 * s}L{x + 6} {y + 4.5 * s}H{x - 6}Z"/>'


def sparkline(points: list[tuple[float, float]]) -> str:
    """Return a small picture of one metric over the run; "" for fewer than two points."""
    points = thin(points, 60)
    if len(points) < 2:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    span = (y_high - y_low) or 1.0
    flat = 10 if y_high == y_low else 0
    at = [(2 + (x - x_low) / (x_high - x_low) * 116, 22 - flat - (y - y_low) / span * 20) for x, y in points]
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    return (
        f'<svg class="spark" viewBox="0 0 124 24" aria-hidden="true"><path d="{d}"/>'
        f'<circle cx="{at[-1][0]:.1f}" cy="{at[-1][1]:.1f}" r="2.2"/></svg>'
    )


def text(x: float, y: float, words: str, name: str, anchor: str = "start", most: int = 40) -> str:
    short = words if len(words) <= most else words[: most - 1] + "\u2026"
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(short)}</text>'


def show(value: float, unit: str) -> str:
    """Return a value for an axis or the pointer."""
    if unit == "share":
        return f"{100 * value:.4g}%"
    if value and abs(value) < 0.001 or abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def value_range(values: list[float], unit: str) -> tuple[float, float]:
    """Return the y range: shares stay within 0 and 1 and span a tenth at least, lengths and times start at 0."""
    low, high = min(values), max(values)
    if unit == "share":
        extra = max(0.1 - (high - low), 0) / 2 + 0.06 * (high - low)
        low, high = max(low - extra, -0.02), min(high + extra, 1.02)
        return low, high
    if unit in ("tokens", "tokens/s", "seconds"):
        return 0.0, high * 1.06 or 1.0
    return widened(low, high, abs(high) * 0.1 or 1.0, 0.06)


def widened(low: float, high: float, if_equal: float, part: float = 0.0) -> tuple[float, float]:
    """Return a range that is not empty: `part` of its span wider on both sides, `if_equal` where it has no span."""
    extra = if_equal if high == low else part * (high - low)
    return low - extra, high + extra


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers within [low, high]."""
    if high == low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]
