"""report.html: one self-contained page about one run, finished or still going on.

No network, no other files: style, script, charts and samples are inside. Whatever a model or a data set wrote is
untrusted text: it reaches the page through Jinja2's escaping alone.
"""

from datetime import timedelta
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adaptive_reasoning.core.files import write_text_atomic
from adaptive_reasoning.report import console, panels
from adaptive_reasoning.report.alarms import Alarms
from adaptive_reasoning.report.curves import svgs, write_curves
from adaptive_reasoning.report.run_folder import ADAPTIVE, Run, breakdown, load_run
from adaptive_reasoning.report.sample_table import sample_table


def write_report(run_dir: Path) -> None:
    """Write curves.png and report.html into a run folder, atomically; prints a line if not all samples fit.

    Raises:
        UserError: not the folder of a run, or a damaged file in it (names the file and the line).
    """
    write_curves(load_run(run_dir))
    write_page(run_dir)


def write_page(run_dir: Path) -> None:
    """Write report.html alone, in a third of the time of curves.png: for the evaluations of a run that goes on."""
    run = load_run(run_dir)
    samples = sample_table(run)
    write_text_atomic(run.folder / "report.html", render(run, samples))
    shown, total = len(samples["rows"]), samples["total"]
    if shown < total:
        print(f"report.html shows {shown:,} of {total:,} samples; all are in samples.jsonl", flush=True)


def number(value: float | None, unit: str = "") -> str:
    """Return a value for the page."""
    if value is None:
        return "\u2013"
    if unit == "share":
        return f"{100 * value:.1f}%" if value == 0 or abs(value) >= 0.01 else f"{100 * value:.2g}%"
    return console.number(value, unit)


def percent(interval: list[float]) -> str:
    """Return an interval of shares for the page, in percent."""
    return " to ".join(f"{100 * x:.1f}" for x in interval) + "%"


def change(before: float | None, after: float | None, unit: str) -> str:
    """Return the change of a share in points, that of an amount in percent; "" where a value is missing."""
    if before is None or after is None or not before and unit != "share":
        return ""
    difference = 100 * (after - before if unit == "share" else after / before - 1)
    return f"{round(difference, 1) + 0:+.1f} points" if unit == "share" else f"{round(difference) + 0:+d}%"


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"number": number, "percent": percent}


def render(run: Run, samples: dict) -> str:
    """Return the page as text."""
    charts = [panels.result_panels(run), panels.mode_panels(run), panels.training_panels(run)]
    drawn = iter(svgs([panel for part in charts for panel in part]))
    steps = [row["step"] for row in run.evaluations]
    results, modes, training = [list(zip(part, drawn)) for part in charts]
    return ENVIRONMENT.get_template("page.html.j2").render(
        run=run,
        name=run.folder.resolve().name,
        facts=facts(run),
        evaluated=" to ".join(f"step {step}" for step in sorted({steps[0], steps[-1]})) if steps else "",
        columns=columns(run),
        benchmarks={name: benchmark(run, name) for name in run.benchmarks},
        comparisons={name: compared(run, name) for name in run.benchmarks},
        results=results,
        modes=modes,
        training=training,
        smoothing=panels.smoothing_width(run),
        alarms=Alarms(run.declared, run.metrics).raised,
        samples=samples,
        metrics=glossary(run),
    )


def facts(run: Run) -> list[str]:
    """Return the short facts below the title: algorithm, task, model, seed, wall time."""
    known = run.options | (run.summary or {})
    seconds = known.get("wall_s") or sum(
        (row.get("time/step_s") or 0) + (row.get("time/eval_s") or 0) for row in run.metrics
    )
    named = [f"{key} {known[key]}" for key in ("task", "model", "seed") if known.get(key) is not None]
    return [*filter(None, [run.algorithm]), *named, *([str(timedelta(seconds=round(seconds)))] if seconds else [])]


def columns(run: Run) -> dict[str, str]:
    """Return {what the page compares before and after: its unit}."""
    mode = run.thinking_mode
    return {"accuracy": "share", "response tokens": "tokens"} | ({f"share of {mode}": "share"} if mode else {})


def benchmark(run: Run, name: str) -> dict[str, list[dict]]:
    """Return {row: a cell per column}: every difficulty, "all", and the settings with a forced mode as bounds."""
    before, after = map(breakdown, run.before_after(name))
    parts = {level: (before.get(level), after.get(level)) for level in [*run.difficulties(name), "all"]}
    for setting in run.forced(name):
        parts[setting] = tuple(breakdown(E).get("all") for E in run.before_after(name, setting))
    mode, rows = run.thinking_mode, {}
    for label, pair in parts.items():
        values = [(E["accuracy"], E["mean_tokens"], E["modes"].get(mode, 0.0)) if E else (None,) * 3 for E in pair]
        rows[label] = [
            {"name": name, "before": old, "after": new, "unit": unit, "change": change(old, new, unit),
             "intervals": [None, None]}
            for old, new, (name, unit) in zip(*values, columns(run).items())
        ]  # fmt: skip
        rows[label][0]["intervals"] = [E and E.get("interval") for E in pair]
    return rows


def compared(run: Run, name: str) -> list[str]:
    """Return what the newest evaluation of a benchmark in all its settings says about them, a line each."""
    found = {setting: dict(run.results(name, setting)) for setting in (ADAPTIVE, *run.forced(name))}
    *_, steps = found.values()  # of a forced setting, where there is one: those are measured less often
    last = max(steps, default=0)
    return console.comparisons({setting: results[last] for setting, results in found.items() if last in results})


def glossary(run: Run) -> list[dict]:
    """Return every metric logged, as {"key", "metric" (None: declared nowhere), "points", "spark"}."""
    place = {key: i for i, key in enumerate(run.declared)}
    keys = sorted(run.metric_keys(), key=lambda key: place.get(key, len(place)))
    rows = [{"key": key, "metric": run.declared.get(key), "points": run.points(key)} for key in keys]
    return [row | {"spark": spark([value for _, value in row["points"]])} for row in rows]


def spark(values: list[float]) -> str:
    """Return the points of a small picture of one metric, in a box of 100 x 20; "" for fewer than two values."""
    values = values[:: -(-len(values) // 100) or 1]
    low, high, last = min(values, default=0), max(values, default=0), len(values) - 1
    scale = 20 / ((high - low) or 1)
    return (
        " ".join(f"{100 * i / last:.1f},{20 - scale * (y - low):.1f}" for i, y in enumerate(values)) if last > 0 else ""
    )
