"""curves.png: the panels of a run in one picture, for a person without the page at hand."""

import io

from adaptive_reasoning.core.files import write_bytes_atomic
from adaptive_reasoning.report import panels as charts
from adaptive_reasoning.report.panels import PALETTE, Panel
from adaptive_reasoning.report.run_folder import Run

STYLE = {
    "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa4af",
    "xtick.color": "#4a5561", "ytick.color": "#4a5561", "axes.labelcolor": "#4a5561", "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e6e9ed", "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


def write_curves(run: Run) -> None:
    """Draw accuracy, tokens, the modes by difficulty and the training metrics into curves.png of the run folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = (charts.evaluation_panels, charts.share_panels, charts.sign_panels, charts.training_panels)
    panels = [panel for kind in kinds for panel in kind(run)]
    columns = min(4, max(len(panels), 1))
    rows = -(-max(len(panels), 1) // columns)
    with plt.rc_context(STYLE):
        width, height = 4.3 * columns, 2.9 * rows + 0.35  # inches
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
        # Fixed margins: the layout engines of matplotlib would draw everything a second time to measure it.
        figure.subplots_adjust(0.55 / width, 0.3 / height, 1 - 0.2 / width, 1 - 0.75 / height, wspace=0.2, hspace=0.3)
        flat = list(axes.flat)
        for panel, axis in zip(panels, flat):
            draw(axis, panel)
        for axis in flat[len(panels) :]:
            axis.axis("off")
        if not panels:
            flat[0].text(0.5, 0.5, "nothing logged yet", ha="center", va="center", color=PALETTE["muted"][0])
        smoothing = charts.smoothing_width(run)
        title = f"{run.folder.resolve().name}   step {run.last_step}"
        title += f"   (strong lines: mean of {smoothing} steps)" if smoothing > 1 else ""
        figure.text(0.15 / width, 1 - 0.15 / height, plain(title), va="top", fontsize=11.5, color=PALETTE["ink"][0])
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        plt.close(figure)
    write_bytes_atomic(run.folder / "curves.png", picture.getvalue())


def draw(axis, panel: Panel) -> None:
    """Draw one panel on a matplotlib axis."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for line in panel.lines:
        xs, ys = zip(*line.points)
        faint = line.style == "faint"
        axis.plot(
            xs, ys, "--" if line.style == "dashed" else "-", color=PALETTE[line.colour][0],
            linewidth=0.8 if faint else 1.7, alpha=0.28 if faint else 1.0, markersize=3.2,
            marker="o" if line.marks or len(xs) == 1 else None, label=None if faint else plain(line.label),
        )  # fmt: skip
    axis.set_title(plain(panel.title), color=PALETTE["ink"][0])
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    steps = {x for line in panel.lines for x, _ in line.points}
    if len(steps) == 1:  # the locator has no whole number beside a single step otherwise
        axis.set_xlim(min(steps) - 1, min(steps) + 1)
    if panel.bounds:
        low, high = panel.bounds
        axis.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    elif panel.unit in ("tokens", "seconds", "tokens/s"):
        axis.set_ylim(bottom=0)
    if panel.unit == "share":
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len({line.label for line in panel.lines}) > 1:
        axis.legend(loc="best", ncols=2 if len(panel.lines) > 4 else 1, handlelength=1.6)


def plain(text: str) -> str:
    """Return `text` for matplotlib, which would read two dollar signs as the start of a formula."""
    return text.replace("$", r"\$")
