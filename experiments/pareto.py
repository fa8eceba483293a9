"""Accuracy against tokens: every method of the second laboratory from one starting model, on one picture.

    python experiments/pareto.py runs/second-laboratory

reads the finished runs <name>-seed<k> found there, and evaluations of merged models, merge-w<weight>; prints two
tables, the second one by difficulty, and writes pareto.png and pareto.md. The starting model and its forced modes are
the bounds. AES is O1-Pruner's accuracy-efficiency score (arXiv 2501.12570) against the starting model: the share of
tokens saved, plus 3 times the relative gain in accuracy, or minus 5 times the loss.
"""

import argparse
from pathlib import Path

from compare_seeds import Spread, levels_of, result_of, spread
from laboratory import Runs, load_laboratory

from adaptive_reasoning.core.files import load_json, write_bytes_atomic, write_text_atomic
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.report.console import aligned
from adaptive_reasoning.report.curves import STYLE, plain
from adaptive_reasoning.report.panels import INK, MUTED
from adaptive_reasoning.report.run_folder import ADAPTIVE, Run

START = "starting model"
MARKS = "osDPX*<>hpdH8"


def aes(result: dict, start: dict) -> float:
    """Return the accuracy-efficiency score of an evaluation against that of the starting model."""
    saved = (start["mean_tokens"] - result["mean_tokens"]) / start["mean_tokens"]
    gain = (result["accuracy"] - start["accuracy"]) / start["accuracy"]
    return saved + (3 if gain >= 0 else 5) * gain


def bounds(run: Run) -> dict[str, dict]:
    """Return {setting: E before training} of the starting model: free first, then each forced mode."""
    benchmark = run.benchmarks[0]
    settings = [ADAPTIVE, *run.forced(benchmark)]
    found = {setting: run.before_after(benchmark, setting)[0] for setting in settings}
    return {START if setting == ADAPTIVE else f"{START}, {setting}": e for setting, e in found.items() if e}


def starts(runs: Runs) -> dict[str, list[dict]]:
    """Return {setting: one E of the starting model for every seed}; the random numbers of an evaluation are its seed's.

    Raises:
        UserError: two runs of one seed did not begin from the same evaluation.
    """
    by_seed: dict[int, Run] = {}
    for run in (run for members in runs.values() for run in members):
        first = by_seed.setdefault(run.summary["seed"], run)
        mine, its = result_of(first, "before"), result_of(run, "before")
        if any(mine[key] != its[key] for key in ("accuracy", "mean_tokens")):
            raise UserError(
                f"{first.folder} and {run.folder} do not start from the same numbers: accuracy and tokens before "
                f"training are {mine['accuracy']}, {mine['mean_tokens']} and {its['accuracy']}, {its['mean_tokens']}. "
                "Give runs of one starting model, sampler and number of questions."
            )
        if len(bounds(run)) > len(bounds(first)):
            by_seed[run.summary["seed"]] = run
    found: dict[str, list[dict]] = {}
    for run in by_seed.values():
        for name, e in bounds(run).items():
            found.setdefault(name, []).append(e)
    return found


def mean_of(results: list[dict]) -> dict:
    """Return accuracy and tokens of an evaluation, whole and by difficulty, as means over several."""

    def mean(parts: list[dict]) -> dict:
        return {key: sum(part[key] for part in parts) / len(parts) for key in ("accuracy", "mean_tokens")}

    levels = results[0]["by_difficulty"]
    return {**mean(results), "by_difficulty": {x: mean([e["by_difficulty"][x] for e in results]) for x in levels}}


def merged(folder: Path) -> dict[str, dict]:
    """Return {name: E} of the evaluations of merged models, which have no seed; the reasoner's share rises."""
    paths = sorted(Path(folder).glob("merge-w*/evaluation.json"))
    rows = {path.parent.name: row for path in paths for row in load_json(path) if row["setting"] == ADAPTIVE}
    return {name: row["result"] for name, row in rows.items()}


def numbers(results: list[dict], start: dict, hard: str, easy: str) -> list[Spread | None]:
    """Return accuracy, tokens, AES, tokens of the easiest and hardest level, their accuracy and the share skipped."""
    by_level = [e["by_difficulty"] for e in results]
    return [
        spread([r["accuracy"] for r in results]),
        spread([r["mean_tokens"] for r in results]),
        spread([aes(r, start) for r in results]),
        *(spread([levels[level]["mean_tokens"] for levels in by_level]) for level in (easy, hard)),
        *(spread([levels[level]["accuracy"] for levels in by_level]) for level in (easy, hard)),
        spread([r["modes"].get("nothinking", {}).get("share", 0.0) for r in results]),
    ]


def levels_table(runs: Runs, merges: dict[str, dict]) -> list[list[str]]:
    """Return accuracy and tokens by difficulty, means over the seeds: a header, the starting model, the methods."""
    starting = starts(runs)[START]
    start, levels = mean_of(starting), levels_of([run for members in runs.values() for run in members])
    after = {name: [run.summary["after"] for run in members] for name, members in runs.items()}
    every = {START: starting, **after, **{name: [e] for name, e in merges.items()}}

    def cell(results: list[dict], level: str) -> str:
        part, its = (e["by_difficulty"][level] for e in (mean_of(results), start))
        return f"{part['accuracy']:.3f} at {part['mean_tokens']:.1f} ({part['mean_tokens'] / its['mean_tokens']:.2f})"

    return [
        ["accuracy at tokens (of the starting model's)", *levels],
        *([name, *(cell(results, level) for level in levels)] for name, results in every.items()),
    ]


DECIMALS = (3, 1, 2, 1, 1, 3, 3, 2)


def rows_of(runs: Runs, merges: dict[str, dict]) -> tuple[list[str], list[tuple[str, list[Spread | None]]]]:
    """Return (header, rows): the starting model and its forced modes, then the methods by their AES."""
    limits = starts(runs)
    levels = levels_of([run for members in runs.values() for run in members])
    easy, hard = levels[0], levels[-1]
    header = ["", "accuracy", "tokens", "AES", f"tokens, {easy}", f"tokens, {hard}", f"accuracy, {easy}",
              f"accuracy, {hard}", "NoThinking"]  # fmt: skip
    start = mean_of(limits[START])
    rows = [(name, numbers(results, start, hard, easy)) for name, results in limits.items()]
    after = {name: [run.summary["after"] for run in members] for name, members in runs.items()}
    after |= {name: [e] for name, e in merges.items()}
    found = [(name, numbers(results, start, hard, easy)) for name, results in after.items()]
    return header, rows + sorted(found, key=lambda row: -row[1][2].mean)


def picture(runs: Runs, merges: dict[str, dict], rows: list[tuple[str, list[Spread | None]]]) -> bytes:
    """Return the PNG: mean over the seeds, bars from the smallest to the largest, every run a dot."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.2, 5.2), layout="constrained")
        path = [(e["mean_tokens"], e["accuracy"]) for e in merges.values()]
        if path:
            axis.plot(*zip(*path), "--", color=MUTED, linewidth=1.2, marker=".", label="merged weights")
        colours, looks = iter(plt.get_cmap("tab20").colors), iter(MARKS)
        open_marks = iter("s^v")  # the starting model: free, and its forced modes
        for name, (accuracy, tokens, *_) in ((name, values) for name, values in rows if name not in merges):
            known = name in runs
            colour = next(colours) if known else INK
            bars = {
                "xerr": [[tokens.mean - tokens.low], [tokens.high - tokens.mean]],
                "yerr": [[accuracy.mean - accuracy.low], [accuracy.high - accuracy.mean]],
            }
            axis.errorbar(
                tokens.mean, accuracy.mean, **bars, color=colour, marker=next(looks if known else open_marks),
                markersize=8, markerfacecolor=colour if known else "white", elinewidth=1, linestyle="none",
                label=plain(name), zorder=3,
            )  # fmt: skip
            if known:
                dots = [(run.summary["after"]["mean_tokens"], run.summary["after"]["accuracy"]) for run in runs[name]]
                axis.scatter(*zip(*dots), s=9, color=colour, alpha=0.45, linewidths=0, zorder=2)
        axis.set_xlabel("mean tokens of a response")
        axis.set_ylabel("accuracy")
        axis.set_title("Accuracy against tokens, all from one starting model", color=INK)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120)
        plt.close(figure)
    return out.getvalue()


def marked(table: list[list[str]]) -> list[list[str]]:
    """Return a table with the rule of Markdown under its header."""
    return [table[0], ["---"] * len(table[0]), *table[1:]]


def write_pareto(folder: Path) -> str:
    """Write pareto.png and pareto.md into the folder and return the table as text.

    Raises:
        UserError: nothing finished there, a damaged run, or runs of different starting models.
    """
    runs, left_out = load_laboratory(folder)
    merges = merged(folder)
    header, rows = rows_of(runs, merges)
    lines = [[name, *(s.text(d) if s else "-" for s, d in zip(values, DECIMALS))] for name, values in rows]
    write_bytes_atomic(Path(folder) / "pareto.png", picture(runs, merges, rows))
    tables = [[header, *lines], levels_table(runs, merges)]
    text = "\n".join("".join("| " + " | ".join(row) + " |\n" for row in marked(table)) for table in tables)
    write_text_atomic(Path(folder) / "pareto.md", text)
    return "\n\n".join([*map(aligned, tables), *left_out])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder that holds the run folders <name>-seed<k>")
    args = parser.parse_args(argv)
    print(write_pareto(args.folder))
    print(f"\nmean (min..max, sd) over the seeds; wrote {args.folder / 'pareto.png'} and {args.folder / 'pareto.md'}")


if __name__ == "__main__":
    run_cli(main)
