"""The modes over training, step by step: share, accuracy and all-right questions, one column for every group of runs.

python experiments/plot_modes.py DeGRPO=runs/degrpo-s0,runs/degrpo-s1 vanilla=runs/vanilla-s0 --plot modes.png

The layout of Fig. 3 of the Thinkless paper; it draws any algorithm that logs `mode/<mode>_*`. Lines are means over the
runs of a group, smoothed over a few steps; bands reach from the smallest run to the largest.
"""

import argparse
from pathlib import Path

from compare_seeds import band, over_steps

from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.report.panels import mode_colours
from adaptive_reasoning.report.run_folder import Run, load_run

ROWS = {
    "share": "Share of the responses",
    "accuracy": "Accuracy",
    "all_correct_groups": "Questions all right in one mode",
}


def modes_of(runs: list[Run]) -> list[str]:
    """Return the modes that the runs log, in order of appearance."""
    keys = [key for run in runs for key in run.metric_keys()]
    return list(dict.fromkeys(key[len("mode/") : -len("_share")] for key in keys
                              if key.startswith("mode/") and key.endswith("_share")))  # fmt: skip


def plot(groups: dict[str, list[Run]], out: Path) -> None:
    """Draw the groups beside each other into `out`; the file type follows the name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from adaptive_reasoning.report.curves import STYLE, plain

    colours = mode_colours(modes_of([run for runs in groups.values() for run in runs]))
    with plt.rc_context(STYLE):
        size = (4.6 * len(groups), 2.7 * len(ROWS))
        figure, axes = plt.subplots(len(ROWS), len(groups), figsize=size, squeeze=False, sharex=True, sharey="row",
                                    layout="constrained")  # fmt: skip
        for column, (name, runs) in enumerate(groups.items()):
            for row, (ending, title) in enumerate(ROWS.items()):
                axis = axes[row][column]
                for mode, colour in colours.items():
                    drawn = over_steps(runs, f"mode/{mode}_{ending}")
                    if drawn:
                        band(axis, *zip(*drawn), colour, plain(mode))
                axis.set_title(plain(f"{name}: {title.lower()}"))
                if ending != "all_correct_groups":
                    axis.set_ylim(-0.03, 1.03)
                    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            axes[0][column].legend()
            axes[-1][column].set_xlabel(f"training step ({len(runs)} run{'s' * (len(runs) > 1)})")
        try:
            figure.savefig(out, dpi=130)
        except ValueError as error:
            raise UserError(f"--plot {out}: {error}. Name the file .png, .svg or .pdf.") from error
        finally:
            plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN_DIR,RUN_DIR", help="a group of runs and its name")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE", help="picture (.png, .svg or .pdf)")
    args = parser.parse_args(argv)
    groups = {}
    for text in args.groups:
        name, _, folders = text.partition("=")
        runs = [load_run(Path(folder)) for folder in folders.split(",") if folder]
        if not runs:
            raise UserError(f"{text!r}: give a group as NAME=RUN_DIR,RUN_DIR.")
        if not modes_of(runs):
            raise UserError(f"{text!r}: these runs log no mode/<mode>_share. Leave them out.")
        groups[name] = runs
    plot(groups, args.plot)
    print(f"{args.plot} written", flush=True)


if __name__ == "__main__":
    run_cli(main)
