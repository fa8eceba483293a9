"""Several finished runs side by side: mean and spread over their seeds, as a table and as one picture.

python experiments/compare_seeds.py runs/delta_* --by delta --plot delta.png
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.report.console import aligned
from adaptive_reasoning.report.panels import MODE_COLOURS, MUTED, ramp, smooth
from adaptive_reasoning.report.run_folder import Run, difficulty_order, load_run, shown_modes


@dataclass(frozen=True)
class Spread:
    """Mean, range and sample standard deviation of one number over the runs of a group."""

    mean: float
    low: float
    high: float
    std: float | None  # None for a single run
    count: int

    def text(self, decimals: int) -> str:
        numbers = (self.mean, self.low, self.high, self.std or 0.0)
        mean, low, high, std = (f"{round(x, decimals) + 0.0:,.{decimals}f}" for x in numbers)  # + 0.0: no "-0.0"
        return mean if self.count == 1 else f"{mean} ({low}..{high}, sd {std})"


def spread(values: list[float | None]) -> Spread | None:
    """Return the spread of the values that are not None; None if there are none."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    low, high = min(values), max(values)
    # The mean of equal numbers can miss them by a rounding error, and a bar of negative length cannot be drawn.
    return Spread(min(max(statistics.fmean(values), low), high), low, high, std, len(values))


SMOOTH = 5  # steps of the moving mean


def over_steps(runs: list[Run], key: str) -> list[tuple[int, Spread]]:
    """Return [(step, spread over the runs that have it)] of a training metric, each run smoothed by a moving mean."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for step, value in smooth([point for point in run.points(key) if point[0] > 0], SMOOTH):
            found.setdefault(step, []).append(value)
    return [(step, spread(values)) for step, values in sorted(found.items())]


def groups(runs: list[Run], by: str = "") -> dict[str, list[Run]]:
    """Return {label: runs} by the value of the option `by` ("" puts all runs into one group), in natural order.

    Raises:
        UserError: a run without a summary (not finished) or without the option `by`; runs of different tasks, or, in
            one group, of different algorithms or with the same seed twice.
    """
    for run in runs:
        if not run.finished:
            raise UserError(
                f"{run.folder}: no summary.json of its last step, so the run is not finished. Finish it with the "
                "command that started it, or leave this folder out."
            )
        if not (run.summary["before"] and run.summary["after"]):
            raise UserError(f"{run.folder}: was not evaluated before and after training. Leave this folder out.")
    _same(runs, "task", "their numbers cannot be averaged. Give runs of one task.")
    out: dict[str, list[Run]] = {}
    for run in runs:
        out.setdefault(f"{by} {_value(run, by)}" if by else "", []).append(run)
    for members in out.values():
        _same(members, "algorithm", "group them with --by algorithm.")
        seeds = {}
        for run in members:
            seed = run.summary.get("seed")
            if seed in seeds:
                raise UserError(
                    f"{seeds[seed]} and {run.folder} both have seed {seed}: the spread over seeds would count one "
                    "twice. Leave one out, or tell them apart with --by OPTION."
                )
            seeds[seed] = run.folder
    return dict(sorted(out.items(), key=lambda item: _natural(item[0].removeprefix(f"{by} "))))


def _value(run: Run, key: str):
    known = {**run.options, "algorithm": run.algorithm}
    if key not in known:
        raise UserError(f"{run.folder}: no option '{key}' in config.yaml. It has: {', '.join(sorted(known))}.")
    return known[key]


def _same(runs: list[Run], key: str, mend: str) -> None:
    values = {str(run.summary.get(key)) for run in runs}
    if len(values) > 1:
        raise UserError(f"these runs differ in {key} ({', '.join(sorted(values))}): {mend}")


def _natural(text: str) -> tuple:
    try:
        return (0, float(text), ())
    except ValueError:
        return (1, 0.0, difficulty_order(text))


def result_of(run: Run, when: str, level: str | None = None) -> dict | None:
    """Return {"accuracy", "mean_tokens", "modes": {mode: share}} of "before" or "after".

    Of all questions, or of one difficulty: None where the run has no question of it.
    """
    result = run.summary[when]
    if level is not None:
        return result["by_difficulty"].get(level)
    shares = {mode: values["share"] for mode, values in result["modes"].items()}
    return {"accuracy": result["accuracy"], "mean_tokens": result["mean_tokens"], "modes": shares}


def levels_of(runs: list[Run]) -> list[str]:
    found = {level for run in runs for when in ("before", "after") for level in run.summary[when]["by_difficulty"]}
    return sorted(found, key=difficulty_order)


def modes_of(runs: list[Run]) -> list[str]:
    modes = [mode for run in runs for when in ("before", "after") for mode in run.summary[when]["modes"]]
    return shown_modes(list(dict.fromkeys(modes)), "nothinking")


def table(runs: list[Run], by: str = "") -> str:
    """Return one table as plain text: accuracy, tokens and share of each mode, by difficulty, before and after."""
    header = ["quantity", "difficulty", "before", "after", "change"]
    blocks = []
    for label, members in groups(runs, by).items():
        seeds = ", ".join(str(run.summary.get("seed")) for run in members)
        rows = [header]
        for name, pick, decimals in quantities(modes_of(members)):
            for level in [*levels_of(members), None]:
                pairs = [(result_of(run, "before", level), result_of(run, "after", level)) for run in members]
                old, new = ([result and pick(result) for result in side] for side in zip(*pairs))
                changes = [b - a for a, b in zip(old, new) if None not in (a, b)]
                cells = [s.text(decimals) if s else "-" for s in (spread(old), spread(new), spread(changes))]
                rows.append([name, "all" if level is None else level, *cells])
        title = f"{label + ': ' if label else ''}{len(members)} run{'s' * (len(members) > 1)}, seed {seeds}"
        blocks.append(f"{title}\nmean (min..max, sd) over the runs\n" + aligned(rows, indent=""))
    return "\n\n".join(blocks)


def quantities(modes: list[str]) -> list[tuple]:
    """Return (name, how to pick it out of a result, decimals) of everything compared."""
    out = [("accuracy", lambda result: result["accuracy"], 3), ("tokens", lambda result: result["mean_tokens"], 1)]
    for mode in modes:
        out.append((f"share of {mode}", lambda result, mode=mode: result["modes"].get(mode, 0.0), 3))
    return out


def plot(runs: list[Run], out: Path, by: str = "") -> None:
    """Draw the share of each mode by difficulty, and accuracy against tokens, one colour per group, into `out`.

    Lines and large marks are means over the seeds, bands and bars reach from the smallest to the largest run, small
    marks are single runs. The file type follows the name (.png, .svg, .pdf).

    Raises:
        UserError: as `groups`; a file type matplotlib cannot write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from adaptive_reasoning.report.curves import STYLE, plain

    members = groups(runs, by)
    numeric = all(_natural(label.removeprefix(f"{by} "))[0] == 0 for label in members)
    colours = dict(zip(members, ramp(len(members)) if numeric else MODE_COLOURS * len(members)))
    modes, levels = modes_of(runs), levels_of(runs)
    grey = MUTED
    with plt.rc_context(STYLE):
        panels = (len(modes) if levels else 0) + 1
        figure, axes = plt.subplots(1, panels, figsize=(4.9 * panels, 3.7), squeeze=False, layout="constrained")
        for axis, mode in zip(axes.flat, modes if levels else ()):
            before = [_share(runs, "before", level, mode) for level in levels]
            _band(axis, levels, before, grey, "before training", "--")
            for label, group in members.items():
                after = [_share(group, "after", level, mode) for level in levels]
                _band(axis, levels, after, colours[label], plain(label or "after training"), "-")
            axis.set_title(plain(f"Share of {mode} by difficulty"))
            axis.set_xlabel("difficulty")
            axis.set_ylim(-0.03, 1.03)
            axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            axis.legend()
        axis = axes.flat[-1]
        _cross(axis, runs, "before", grey, "before training", hollow=True)
        for label, group in members.items():
            _cross(axis, group, "after", colours[label], plain(label or "after training"))
        axis.set_title("Accuracy against tokens")
        axis.set_xlabel("mean response tokens")
        axis.set_xlim(0, axis.get_xlim()[1] * 1.04)
        low, high = axis.get_ylim()
        spare = max(0.05 - (high - low), 0.0) / 2  # five points at least: noise must not look like an effect
        axis.set_ylim(low - spare, high + spare)
        axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=1))
        axis.legend()
        counts = sorted({len(group) for group in members.values()})
        runs_each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        if counts[-1] > 1:
            note = f"mean over {runs_each} seeds; bands and bars: smallest to largest"
            figure.supxlabel(note, fontsize=8, color=grey, x=0.99, ha="right")
        try:
            figure.savefig(out, dpi=150)
        except ValueError as error:
            raise UserError(f"--plot {out}: {error}. Name the file .png, .svg or .pdf.") from error
        finally:
            plt.close(figure)


def _share(runs: list[Run], when: str, level: str, mode: str) -> Spread | None:
    results = [result_of(run, when, level) for run in runs]
    return spread([result and result["modes"].get(mode, 0.0) for result in results])


def _band(axis, levels: list[str], spreads: list[Spread | None], colour: str, label: str, style: str) -> None:
    """Draw a band over the difficulties; a level without a value is left out."""
    kept = [(i, s) for i, s in enumerate(spreads) if s]
    band(axis, [i for i, _ in kept], [s for _, s in kept], colour, label, style, marker="o", markersize=4)
    axis.set_xticks(range(len(levels)), levels)


def band(axis, xs, spreads: list[Spread], colour: str, label: str, style: str = "-", **marks) -> None:
    """Draw means as a line with a band from the smallest to the largest run."""
    axis.plot(xs, [s.mean for s in spreads], style, color=colour, linewidth=1.8, label=label, **marks)
    if any(s.count > 1 for s in spreads):
        axis.fill_between(xs, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.16, lw=0)


def _cross(axis, runs: list[Run], when: str, colour: str, label: str, hollow: bool = False) -> None:
    """Draw the mean of a group as a mark with bars from the smallest to the largest run, and each run as a dot."""
    results = [result_of(run, when) for run in runs]
    xs, ys = [r["mean_tokens"] for r in results], [r["accuracy"] for r in results]
    x, y = spread(xs), spread(ys)
    if x is None or y is None:
        return
    bars = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
    axis.errorbar(
        x.mean,
        y.mean,
        **bars,
        color=colour,
        marker="o",
        markersize=8,
        markerfacecolor="white" if hollow else colour,
        elinewidth=1,
        linestyle="none",
        label=label,
        zorder=3,
    )
    if len(runs) > 1:
        pairs = [(a, b) for a, b in zip(xs, ys) if None not in (a, b)]
        axis.scatter(*zip(*pairs), s=9, color=colour, alpha=0.45, linewidths=0, zorder=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run (its --output_dir)")
    parser.add_argument("--by", default="", help="option the runs are grouped by in table and picture, e.g. delta")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of the groups (.png, .svg or .pdf)")
    args = parser.parse_args(argv)
    runs = [load_run(folder) for folder in args.runs]
    print(table(runs, args.by), flush=True)
    if args.plot:
        plot(runs, args.plot, args.by)
        print(f"\n{args.plot} written", flush=True)


if __name__ == "__main__":
    run_cli(main)
