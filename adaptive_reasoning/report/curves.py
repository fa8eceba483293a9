"""The panels of a run drawn with matplotlib: curves.png for a person without the page at hand, and SVG for the page."""

import io

from adaptive_reasoning.core.files import write_bytes_atomic
from adaptive_reasoning.report import panels as charts
from adaptive_reasoning.report.panels import INK, Panel
from adaptive_reasoning.report.run_folder import Run

STYLE = {
    "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa4af",
    "xtick.color": "#4a5561", "ytick.color": "#4a5561", "axes.labelcolor": "#4a5561", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#d3d9df", "legend.frameon": False, "legend.fontsize": 8,
    "xtick.major.size": 0, "ytick.major.size": 0,
    "path.simplify_threshold": 0.3, "svg.fonttype": "none", "svg.hashsalt": "",
}  # fmt: skip


def write_curves(run: Run) -> None:
    """Draw results, the modes by difficulty and the training metrics into curves.png of the run folder."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [*charts.result_panels(run), *charts.mode_panels(run), *charts.training_panels(run)]
    columns = min(4, max(len(panels), 1))
    rows = -(-max(len(panels), 1) // columns)
    with rc_context(STYLE):
        width, height = 4.3 * columns, 2.9 * rows + 0.35  # inches
        figure = Figure(figsize=(width, height))
        # Fixed margins: the layout engines of matplotlib would draw everything a second time to measure it.
        figure.subplots_adjust(0.55 / width, 0.3 / height, 1 - 0.2 / width, 1 - 0.75 / height, wspace=0.2, hspace=0.3)
        for i, panel in enumerate(panels):
            axis = figure.add_subplot(rows, columns, i + 1)
            draw(axis, panel)
            axis.set_title(plain(panel.title), color=INK)
            if len(axis.get_legend_handles_labels()[0]) > 1:
                axis.legend(loc="best", ncols=2 if len(panel.lines) > 4 else 1, handlelength=1.6)
        if not panels:
            figure.text(0.5, 0.5, "nothing logged yet", ha="center", va="center", color=charts.MUTED)
        smoothing = charts.smoothing_width(run)
        title = f"{run.folder.resolve().name}   step {run.last_step}"
        title += f"   (strong lines: mean of {smoothing} steps)" if smoothing > 1 else ""
        figure.text(0.15 / width, 1 - 0.15 / height, plain(title), va="top", fontsize=11.5, color=INK)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
    write_bytes_atomic(run.folder / "curves.png", picture.getvalue())


def svgs(panels: list[Panel]) -> list[str]:
    """Return each panel as SVG to put inside HTML; title and legend are left to the page, so no outside text is in it.

    One axis draws them all: its ticks, the slow part of matplotlib, are made once.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = []
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.4))  # inches
        axis = figure.add_axes((0.14, 0.1, 0.84, 0.87))
        for side in (axis.xaxis, axis.yaxis):  # without a label: do not measure where it would go
            side.set_label_coords(0, 0)
        for panel in panels:
            for drawn in [*axis.lines, *axis.collections]:
                drawn.remove()
            axis.relim()
            axis.autoscale()
            draw(axis, panel)
            picture = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(picture, format="svg", transparent=True, metadata=nothing)
            text = picture.getvalue()
            out.append(text[text.index("<svg") :])
    return out


def draw(axis, panel: Panel) -> None:
    """Draw one panel on a matplotlib axis, which may have drawn another one before."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for line in panel.lines:
        axis.plot(
            *zip(*line.points), line.style, color=line.colour, label=plain(line.label),
            linewidth=0.8 if line.faint else 1.7, alpha=0.28 if line.faint else 1.0,
            marker=line.mark or (None if len(line.points) > 1 else "o"), markersize=3.2 if line.style else 6,
            markerfacecolor="none" if line.hollow else None,
        )  # fmt: skip
        if line.band:
            axis.fill_between(*zip(*line.band), color=line.colour, alpha=0.15, linewidth=0)
    round_steps = [1, 2, 2.5, 5, 10]
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=round_steps))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=round_steps))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0) if panel.unit == "share" else "{x:g}")
    xs = [x for line in panel.lines for x, _ in line.points]
    if panel.over_tokens:
        axis.set_xlim(0, max(xs) * 1.08 or 1)
    elif min(xs) == max(xs):  # the locator has no whole number beside a single step otherwise
        axis.set_xlim(xs[0] - 1, xs[0] + 1)
    low, high = panel.bounds or axis.get_ylim()
    if panel.bounds:
        axis.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    elif panel.unit == "share" and high - low < 0.1:  # noise must not look like an effect
        axis.set_ylim((low + high) / 2 - 0.05, (low + high) / 2 + 0.05)
    elif panel.unit in ("tokens", "seconds", "tokens/s"):
        axis.set_ylim(bottom=0)


def plain(text: str) -> str:
    """Return `text` for matplotlib, which would read two dollar signs as the start of a formula."""
    return text.replace("$", r"\$")
