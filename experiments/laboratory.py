"""The laboratory's page: the four papers' effects side by side, every algorithm beside its baseline, over the seeds.

    python experiments/laboratory.py runs/laboratory

reads the run folders <name>-seed<k> found there and writes laboratory.html (one file, no network) and laboratory.png.
What is missing or unfinished is named and left out; nothing is judged here but by the numbers printed.
"""

import argparse
import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compare_seeds import band, levels_of, over_steps, result_of, spread
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adaptive_reasoning.core.files import write_bytes_atomic, write_text_atomic
from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.report.console import aligned
from adaptive_reasoning.report.curves import STYLE, plain
from adaptive_reasoning.report.panels import INK, MODE_COLOURS
from adaptive_reasoning.report.run_folder import Run, load_run

Runs = dict[str, list[Run]]  # name of a run without its seed -> its runs, in order of the seeds


@dataclass(frozen=True)
class OverSteps:
    """Training metrics of one run name over the steps: one line a metric, mean over the seeds, band to the extremes."""

    run: str
    title: str
    metrics: tuple[tuple[str, str], ...]  # (key in metrics.jsonl, label)
    share: bool = True


@dataclass(frozen=True)
class ByDifficulty:
    """Share of a mode by difficulty in the evaluation after training, one line a run name; dashed: before training."""

    runs: tuple[tuple[str, str], ...]  # (name, label)
    mode: str
    title: str


@dataclass(frozen=True)
class Section:
    """One paper: what it claims, which runs show it, what is drawn, and which numbers are compared."""

    title: str
    expected: str
    runs: tuple[str, ...]
    panels: tuple[OverSteps | ByDifficulty, ...]
    facts: tuple[tuple[str, Callable[[Runs, int], float | None], int], ...]  # (name, f(runs, index of seed), decimals)


# --------------------------------------------------------------------------------------------------------- the numbers


def after(name: str, key: str, setting: str = "adaptive", when: int = -1) -> Callable[[Runs, int], float | None]:
    """Return f that reads `key` of an evaluation of run `name`: the last one, or with when=0 the one before training.

    `key` is a path in its result, such as "accuracy", "modes/think/share" or "by_difficulty/1/modes/think".
    """

    def read(runs: Runs, seed: int) -> float | None:
        run = runs[name][seed]
        results = run.results(run.benchmarks[0], setting)
        value = results[when][1] if results else None
        for part in key.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    return read


def change(a, b, how: Callable[[float, float], float] = lambda x, y: x - y):
    """Return f that puts two numbers of the same seed together; None where one is missing."""

    def both(runs: Runs, seed: int) -> float | None:
        x, y = a(runs, seed), b(runs, seed)
        return None if x is None or y is None else how(x, y)

    return both


def ratio(a, b):
    return change(a, b, lambda x, y: x / y if y else None)


def largest_share(name: str, when: str = "after") -> Callable[[Runs, int], float | None]:
    """Return f: the share of the most frequent mode "before" or "after" training."""

    def read(runs: Runs, seed: int) -> float | None:
        return max(result_of(runs[name][seed], when)["modes"].values())

    return read


def modes_above(name: str, share: float) -> Callable[[Runs, int], float | None]:
    """Return f: how many modes have at least this share after training."""

    def read(runs: Runs, seed: int) -> float | None:
        return float(sum(value >= share for value in result_of(runs[name][seed], "after")["modes"].values()))

    return read


def hardest_minus_easiest(name: str, mode: str, when: str = "after") -> Callable[[Runs, int], float | None]:
    """Return f: share of a mode on the hardest questions minus that on the easiest, "before" or "after" training."""

    def read(runs: Runs, seed: int) -> float | None:
        levels = levels_of([runs[name][seed]])
        easy, hard = (result_of(runs[name][seed], when, level) for level in (levels[0], levels[-1]))
        return hard["modes"].get(mode, 0.0) - easy["modes"].get(mode, 0.0)

    return read


FORMATS = (("direct", "Direct"), ("cot", "Short CoT"), ("code", "Code"), ("long_cot", "Long CoT"))
SECTIONS = (
    Section(
        "AdaptThink",
        "The model learns to skip its thinking on easy questions and keeps it on hard ones: fewer tokens at the "
        "accuracy of always thinking (Table 1: half the tokens, accuracy not lower).",
        ("adaptthink",),
        (
            ByDifficulty((("adaptthink", "AdaptThink"),), "nothinking", "Share of NoThinking by difficulty"),
            OverSteps("adaptthink", "p(</think>) as the first token", (("adapt_think/first_eot_prob", "p(</think>)"),)),
        ),
        (
            ("accuracy", after("adaptthink", "accuracy"), 3),
            ("accuracy, cold start, always thinking", after("adaptthink", "accuracy", "always_think", 0), 3),
            ("tokens", after("adaptthink", "mean_tokens"), 1),
            ("tokens, cold start, always thinking", after("adaptthink", "mean_tokens", "always_think", 0), 1),
            (
                "tokens as a share of always thinking",
                ratio(after("adaptthink", "mean_tokens"), after("adaptthink", "mean_tokens", "always_think", 0)),
                3,
            ),
        ),
    ),
    Section(
        "Ada-GRPO (ARM) against GRPO",
        "GRPO collapses to one format within some steps, Long CoT in the paper; Ada-GRPO keeps several formats alive "
        "and spends about a third fewer tokens at nearly the same accuracy (Table 1, 8.3).",
        ("ada-grpo", "grpo"),
        (
            OverSteps("grpo", "GRPO: share of the formats", tuple((f"mode/{m}_share", n) for m, n in FORMATS)),
            OverSteps("ada-grpo", "Ada-GRPO: share of the formats", tuple((f"mode/{m}_share", n) for m, n in FORMATS)),
        ),
        (
            ("cold start: share of the largest format", largest_share("grpo", "before"), 3),
            ("GRPO: share of its largest format", largest_share("grpo"), 3),
            ("GRPO: share of Long CoT", after("grpo", "modes/long_cot/share"), 3),
            ("GRPO: formats with at least 5 %", modes_above("grpo", 0.05), 0),
            ("Ada-GRPO: share of its largest format", largest_share("ada-grpo"), 3),
            ("Ada-GRPO: formats with at least 5 %", modes_above("ada-grpo", 0.05), 0),
            ("GRPO: accuracy", after("grpo", "accuracy"), 3),
            ("Ada-GRPO: accuracy", after("ada-grpo", "accuracy"), 3),
            ("GRPO: tokens", after("grpo", "mean_tokens"), 1),
            ("Ada-GRPO: tokens", after("ada-grpo", "mean_tokens"), 1),
            ("tokens, Ada-GRPO to GRPO", ratio(after("ada-grpo", "mean_tokens"), after("grpo", "mean_tokens")), 3),
        ),
    ),
    Section(
        "DeGRPO (Thinkless) against vanilla GRPO",
        "The share of short answers first falls, then rises again on the questions that no longer need thinking (the "
        "U-curve of Fig. 3b); vanilla GRPO collapses to one mode (Fig. 3a).",
        ("degrpo", "degrpo-vanilla"),
        (
            OverSteps(
                "degrpo", "DeGRPO: share of the modes", (("mode/think_share", "think"), ("mode/short_share", "short"))
            ),
            OverSteps(
                "degrpo-vanilla",
                "vanilla GRPO: share of the modes",
                (("mode/think_share", "think"), ("mode/short_share", "short")),
            ),
            ByDifficulty(
                (("degrpo", "DeGRPO"), ("degrpo-vanilla", "vanilla")), "think", "Share of thinking by difficulty"
            ),
        ),
        (
            ("cold start: think share, hardest minus easiest", hardest_minus_easiest("degrpo", "think", "before"), 3),
            ("DeGRPO: think share, hardest minus easiest", hardest_minus_easiest("degrpo", "think"), 3),
            ("vanilla: think share, hardest minus easiest", hardest_minus_easiest("degrpo-vanilla", "think"), 3),
            ("DeGRPO: accuracy", after("degrpo", "accuracy"), 3),
            ("vanilla: accuracy", after("degrpo-vanilla", "accuracy"), 3),
            ("DeGRPO forced to think: accuracy", after("degrpo", "accuracy", "always_think"), 3),
            ("DeGRPO: tokens", after("degrpo", "mean_tokens"), 1),
            ("vanilla: tokens", after("degrpo-vanilla", "mean_tokens"), 1),
            ("DeGRPO forced to think: tokens", after("degrpo", "mean_tokens", "always_think"), 1),
        ),
    ),
    Section(
        "Thinker against PPO on question and answer",
        "Verification and a second, slow answer lift the final accuracy above the fast one; the fast answer alone "
        "stays near the one-turn baseline (Table of v2; v1 has it above).",
        ("thinker", "thinker-qa"),
        (
            OverSteps(
                "thinker",
                "Thinker: accuracy of the stages",
                (
                    ("thinker/fast_accuracy", "Fast"),
                    ("thinker/slow_accuracy", "Slow, where Fast was wrong"),
                    ("reward/accuracy", "final answer"),
                ),
            ),
            OverSteps(
                "thinker",
                "Thinker: verification",
                (
                    ("thinker/verify_balanced_accuracy", "balanced accuracy"),
                    ("thinker/verify_yes_when_right", "Yes when right"),
                    ("thinker/verify_no_when_wrong", "No when wrong"),
                ),
            ),
            OverSteps("thinker-qa", "PPO on question and answer", (("reward/accuracy", "accuracy"),)),
        ),
        (
            ("Thinker: final accuracy", after("thinker", "accuracy"), 3),
            ("Thinker: fast accuracy", after("thinker", "stages/fast/accuracy"), 3),
            (
                "final minus fast accuracy",
                change(after("thinker", "accuracy"), after("thinker", "stages/fast/accuracy")),
                3,
            ),
            (
                "fast accuracy minus the cold start's",
                change(after("thinker", "stages/fast/accuracy"), after("thinker", "stages/fast/accuracy", when=0)),
                3,
            ),
            ("cold start: fast accuracy", after("thinker", "stages/fast/accuracy", when=0), 3),
            ("share of the fast answers in a box", after("thinker", "stages/fast/boxed_share"), 3),
            ("verification: balanced accuracy", after("thinker", "verification/balanced_accuracy"), 3),
            ("cold start: balanced accuracy", after("thinker", "verification/balanced_accuracy", when=0), 3),
            ("Thinker: tokens of all stages", after("thinker", "mean_tokens"), 1),
            ("baseline: accuracy", after("thinker-qa", "accuracy"), 3),
            ("baseline: tokens", after("thinker-qa", "mean_tokens"), 1),
        ),
    ),
)


# --------------------------------------------------------------------------------------------------------- reading


def load_laboratory(folder: Path) -> tuple[Runs, list[str]]:
    """Return the finished runs by name, and a line for every folder that was left out.

    Raises:
        UserError: no finished run there.
    """
    found: dict[str, list[tuple[int, Run]]] = {}
    left_out = []
    for path in sorted(Path(folder).glob("*-seed*")):
        match = re.fullmatch(r"(.+)-seed(\d+)", path.name)
        if not match or not path.is_dir():
            continue
        run = load_run(path)
        if not run.finished or not (run.summary["before"] and run.summary["after"]):
            left_out.append(f"{path}: not finished")
            continue
        found.setdefault(match[1], []).append((int(match[2]), run))
    if not found:
        raise UserError(f"{folder}: no finished run named <name>-seed<k> is there. Start them with: make laboratory")
    return {name: [run for _, run in sorted(runs, key=lambda r: r[0])] for name, runs in found.items()}, left_out


def seeds_of(section: Section, runs: Runs) -> Runs | None:
    """Return the section's runs cut to the seeds that all of them have, so that numbers pair up; None without any."""
    if not all(name in runs for name in section.runs):
        return None
    common = set.intersection(*({run.summary["seed"] for run in runs[name]} for name in section.runs))
    cut = {name: [run for run in runs[name] if run.summary["seed"] in common] for name in section.runs}
    return cut if common else None


def fact_rows(section: Section, runs: Runs) -> list[tuple[str, str]]:
    """Return (name, mean with its spread over the seeds) of every number compared."""
    count = len(runs[section.runs[0]])
    rows = []
    for name, read, decimals in section.facts:
        found = spread([read(runs, seed) for seed in range(count)])
        rows.append((name, found.text(decimals) if found else "-"))
    return rows


# --------------------------------------------------------------------------------------------------------- drawing


def draw(axis, panel: OverSteps | ByDifficulty, runs: Runs) -> None:
    """Draw one panel."""
    from matplotlib.ticker import PercentFormatter

    if isinstance(panel, OverSteps):
        for colour, (key, label) in zip(MODE_COLOURS, panel.metrics):
            points = over_steps(runs[panel.run], key)
            if points:
                band(axis, *zip(*points), colour, plain(label))
        axis.set_xlabel("step")
        share = panel.share
    else:
        for colour, (name, label) in zip(MODE_COLOURS, panel.runs):
            levels = levels_of(runs[name])
            for when, style in (("before", "--"), ("after", "-")):
                shares = [[result_of(run, when, level) for run in runs[name]] for level in levels]
                spreads = [spread([r and r["modes"].get(panel.mode, 0.0) for r in rs]) for rs in shares]
                title = plain(f"{label}, {when} training")
                band(axis, range(len(levels)), spreads, colour, title, style)
            axis.set_xticks(range(len(levels)), levels)
        axis.set_xlabel("difficulty: number of operations")
        share = True
    if share:
        axis.set_ylim(-0.03, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_title(plain(panel.title), color=INK)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def picture(sections: list[tuple[Section, Runs]]) -> bytes:
    """Return one PNG with a row of panels for every section."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(section.panels) for section, _ in sections)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(4.6 * columns, 3.3 * len(sections)), layout="constrained")
        rows = figure.subfigures(len(sections), 1, squeeze=False)[:, 0]
        for row, (section, runs) in zip(rows, sections):
            row.suptitle(plain(section.title), fontsize=11.5, fontweight="bold", x=0.01, ha="left")
            axes = row.subplots(1, columns, squeeze=False)[0]
            for axis, panel in zip(axes, section.panels):
                draw(axis, panel, runs)
            for axis in axes[len(section.panels) :]:
                axis.axis("off")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
        plt.close(figure)
    return out.getvalue()


def write_laboratory(folder: Path) -> str:
    """Write laboratory.png and laboratory.html into the folder and return the tables as text.

    Raises:
        UserError: nothing finished there, or a damaged run.
    """
    runs, left_out = load_laboratory(folder)
    sections, missing = [], list(left_out)
    for section in SECTIONS:
        cut = seeds_of(section, runs)
        if cut is None:
            missing.append(f"{section.title}: needs finished runs of one seed of {', '.join(section.runs)}")
        else:
            sections.append((section, cut))
    if not sections:
        raise UserError(f"{folder}: " + "; ".join(missing))
    image = picture(sections)
    write_bytes_atomic(Path(folder) / "laboratory.png", image)
    blocks = []
    for section, cut in sections:
        one = picture([(section, cut)])
        blocks.append(
            {
                "title": section.title,
                "expected": section.expected,
                "seeds": ", ".join(str(run.summary["seed"]) for run in cut[section.runs[0]]),
                "facts": fact_rows(section, cut),
                "image": base64.b64encode(one).decode(),
                "runs": [(run.folder.name, run.options) for name in section.runs for run in cut[name]],
            }
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("laboratory.html.j2").render(sections=blocks, missing=missing)
    write_text_atomic(Path(folder) / "laboratory.html", page)
    text = [
        aligned([[f"{b['title']}, after training", f"seeds {b['seeds']}: mean (min..max, sd)"], *map(list, b["facts"])])
        for b in blocks
    ]
    return "\n\n".join(text + missing)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder that holds the run folders <name>-seed<k>")
    args = parser.parse_args(argv)
    print(write_laboratory(args.folder))
    print(f"\nwrote {args.folder / 'laboratory.html'} and {args.folder / 'laboratory.png'}")


if __name__ == "__main__":
    run_cli(main)
