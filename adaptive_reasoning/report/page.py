"""report.html: one self-contained page about one run, finished or still going on.

No network, no other files: style, script, charts and samples are inside. Whatever a model or a data set wrote is
untrusted text: Jinja2 escapes it, samples travel as JSON and reach the page through textContent alone.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from adaptive_reasoning.core.files import write_text_atomic
from adaptive_reasoning.core.metric import SHARED
from adaptive_reasoning.report.alarms import Alarms
from adaptive_reasoning.report.console import duration
from adaptive_reasoning.report.curves import write_curves
from adaptive_reasoning.report.panels import (
    PALETTE,
    Panel,
    evaluation_panels,
    mode_colours,
    share_panels,
    sign_panels,
    smoothing_width,
    training_panels,
)
from adaptive_reasoning.report.run_folder import ADAPTIVE, Run, load_run
from adaptive_reasoning.report.sample_table import sample_table
from adaptive_reasoning.report.svg import Dot, marker, panel_svg, show, sparkline, tradeoff_svg

SHAPES = {ADAPTIVE: "circle", "always_think": "up", "never_think": "down"}  # other settings: by turns
NAMES = {ADAPTIVE: "free choice", "always_think": "always think", "never_think": "never think"}
NONE = "\u2013"  # shown where there is no value


def write_report(run_dir: Path) -> None:
    """Write curves.png and report.html into a run folder, atomically; prints a line if not all samples fit.

    Raises:
        UserError: not the folder of a run, or a damaged file in it (names the file and the line).
    """
    write_curves(load_run(run_dir))
    write_page(run_dir)


def write_page(run_dir: Path) -> None:
    """Write report.html alone: a tenth of the time of the curves, for the evaluations of a run that goes on."""
    run = load_run(run_dir)
    samples = sample_table(run)
    write_text_atomic(run.folder / "report.html", render(run, samples))
    if len(samples["rows"]) < samples["total"]:
        print(
            f"report.html shows {len(samples['rows']):,} of {samples['total']:,} samples; all are in samples.jsonl",
            flush=True,
        )


def render(run: Run, samples: dict) -> str:
    """Return the page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, amount=amount, points=points, relative=relative)
    mode = run.thinking_mode
    return environment.get_template("page.html.j2").render(
        name=run.folder.resolve().name,
        facts=facts(run),
        finished=run.finished,
        last_step=run.last_step,
        max_steps=run.options.get("max_steps"),
        sentence=sentence(run),
        options=sorted(run.options.items()),
        mode=mode,
        mode_colour=mode_colours(run.modes).get(mode, "m0"),
        benchmarks=[benchmark(run, name, mode) for name in run.benchmarks],
        signs=signs(run),
        share_charts=figures(share_panels(run) + sign_panels(run)),
        evaluation_charts=figures(evaluation_panels(run)),
        training_charts=figures(training_panels(run)),
        smoothing=smoothing_width(run),
        alarms=Alarms(run.declared, run.metrics).raised,
        samples=samples,
        mode_colours=mode_colours(run.modes),
        metrics=glossary_rows(run),
        palette=PALETTE,
    )


def figures(panels: list[Panel]) -> list[dict]:
    return [{"title": panel.title, "note": panel.note, "svg": panel_svg(panel)} for panel in panels]


def facts(run: Run) -> list[str]:
    """Return the short facts below the title: algorithm, task, model, seed, wall time."""
    summary, options = run.summary or {}, run.options
    out = [run.algorithm] if run.algorithm else []
    for key in ("task", "model", "seed"):
        value = summary.get(key, options.get(key))
        if value is not None:
            out.append(f"{key} {value}")
    seconds = summary.get("wall_s") or sum(
        (row.get("time/step_s") or 0) + (row.get("time/eval_s") or 0) for row in run.metrics
    )
    return out + ([duration(seconds)] if seconds else [])


def sentence(run: Run) -> str:
    """Return what training changed in one sentence, about the first benchmark; "" before there is an `after`."""
    if not run.benchmarks:
        return ""
    name = run.benchmarks[0]
    before, after = run.before_after(name)
    if before is None or after is None or None in (before["accuracy"], after["accuracy"], before["mean_tokens"]):
        return ""
    step = run.results(name)[-1][0]
    where = f"on {name} " if len(run.benchmarks) > 1 else ""
    words = (
        f"After {step:,} steps the model answers {where}{percent(after['accuracy'])} right "
        f"(before: {percent(before['accuracy'])})"
    )
    if before["mean_tokens"] and after["mean_tokens"] is not None:
        change = after["mean_tokens"] / before["mean_tokens"] - 1
        same = f"{abs(change):.0%}" == "0%"
        words += (
            " with as many tokens" if same else f" with {abs(change):.0%} {'fewer' if change < 0 else 'more'} tokens"
        )
    levels = [level for level in run.difficulties(name) if level in after["by_difficulty"]]
    if run.thinking_mode and len(run.modes) > 1 and len(levels) > 1:
        mode = run.thinking_mode
        shares = [after["by_difficulty"][level]["modes"].get(mode, 0.0) for level in (levels[0], levels[-1])]
        does = "thinks" if mode.startswith("think") else f"chooses {mode}"
        words += (
            f". It {does} on {shares[0]:.0%} of the questions of difficulty {levels[0]} "
            f"and on {shares[1]:.0%} of those of difficulty {levels[-1]}"
        )
    return words + "."


def benchmark(run: Run, name: str, mode: str) -> dict:
    """Return what the page shows of one benchmark: headline, table by difficulty, accuracy against tokens."""
    before, after = run.before_after(name)
    levels = [
        (level, *[(E or {}).get("by_difficulty", {}).get(level) for E in (before, after)])
        for level in run.difficulties(name)
    ]
    step = run.results(name)[-1][0] if run.results(name) else 0
    when = f", step 0 to step {step}" if before and after else f", step {step}"
    table = [_table_row(level, old, new, mode) for level, old, new in levels]
    if before or after:
        table.append(_table_row("all", _overall(before), _overall(after), mode))
    return {
        "name": name,
        "when": when,
        "cards": cards(_overall(before), _overall(after), mode),
        "table": table,
        **tradeoff(run, name),
    }


def cards(before: dict | None, after: dict | None, mode: str) -> list[dict]:
    """Return the headline numbers, first and last; of only one evaluation there is no last."""
    wanted = [("Accuracy", "accuracy", percent, 1), ("Mean response tokens", "mean_tokens", amount, -1)]
    results = [{**result, "share": result["modes"].get(mode, 0.0)} for result in (before, after) if result is not None]
    if mode:
        wanted.append((f"Share of {mode}", "share", percent, 0))
    out = []
    for label, name, show_value, better in wanted if results else ():
        first, last = results[0][name], results[-1][name]
        card = {"label": label, "first": show_value(first), "last": None, "change": "", "good": None, "note": ""}
        if len(results) == 2:
            change = relative(first, last) if name == "mean_tokens" else points(first, last)
            card |= {"last": show_value(last), "change": change if name == "mean_tokens" else f"{change} points"}
            if better and None not in (first, last) and first != last:
                card["good"] = (last - first) * better > 0
        out.append(card)
    return out


def _overall(result: dict | None) -> dict | None:
    """Return E in the shape of one of its difficulties: {"accuracy", "mean_tokens", "modes": {mode: share}}."""
    if result is None:
        return None
    shares = {mode: values["share"] for mode, values in result["modes"].items()}
    return {"accuracy": result["accuracy"], "mean_tokens": result["mean_tokens"], "modes": shares}


def _table_row(label: str, before: dict | None, after: dict | None, mode: str) -> dict:
    row = {"label": label}
    for when, result in (("before", before), ("after", after)):
        row[f"accuracy_{when}"] = result["accuracy"] if result else None
        row[f"tokens_{when}"] = result["mean_tokens"] if result else None
        row[f"share_{when}"] = result["modes"].get(mode, 0.0) if result else None
    return row


def tradeoff(run: Run, name: str) -> dict:
    """Return accuracy against mean tokens: the picture, its legend, and the same numbers as table rows."""
    colours = mode_colours(run.modes)
    dots, rows = {}, []
    forced = run.forced(name)
    for i, setting in enumerate([ADAPTIVE, *forced]):
        shape = SHAPES.get(setting, ("up", "down")[i % 2])
        label = NAMES.get(setting, setting.replace("_", " "))
        row = {"label": label, "key": marker(shape, 8, 8, True)}
        row["colour"] = "ink" if setting == ADAPTIVE else colours.get(forced[setting], "muted")
        for when, result in zip(("before", "after"), run.before_after(name, setting)):
            row[f"accuracy_{when}"] = result and result["accuracy"]
            row[f"tokens_{when}"] = result and result["mean_tokens"]
            if result and None not in (result["accuracy"], result["mean_tokens"]):
                dots[setting, when] = Dot(
                    f"{label}, {when}", result["mean_tokens"], result["accuracy"], shape, when == "after", row["colour"]
                )
        if run.results(name, setting):
            rows.append(row)
    ends = [dots.get((setting, "after")) for setting in ("never_think", "always_think")]
    path = [(E["mean_tokens"], E["accuracy"]) for _, E in run.results(name)]
    path = [point for point in path if None not in point]
    svg = tradeoff_svg(list(dots.values()), None if None in ends else tuple(ends), path) if dots else ""
    return {"tradeoff": svg, "tradeoff_rows": rows, "has_chord": None not in ends}


def signs(run: Run) -> list[dict]:
    """Return the early signs of progress an algorithm logs: mean of the first and of the last smoothed steps."""
    out, width = [], smoothing_width(run)
    for key in run.metric_keys():
        metric = run.declared.get(key)
        if metric and metric.short and key not in SHARED and run.points(key):
            values = [value for _, value in run.points(key)]
            first, last = values[:width], values[-width:]
            out.append(
                {
                    "label": metric.short,
                    "first": show(float(f"{sum(first) / len(first):.3g}"), metric.unit),
                    "last": show(float(f"{sum(last) / len(last):.3g}"), metric.unit) if len(values) > 1 else None,
                    "change": "",
                    "good": None,
                    "note": f"training, first and last {f'{width} steps' if width > 1 else 'step'}",
                }
            )
    return out


def glossary_rows(run: Run) -> list[dict]:
    """Return key, meaning, unit, what is good, first and last value and a small picture of every metric logged."""
    rows = []
    place = {key: i for i, key in enumerate(run.declared)}
    for key in sorted(run.metric_keys(), key=lambda key: place.get(key, len(place))):
        metric = run.declared.get(key)
        values = run.points(key)
        unit = metric.unit if metric else ""
        rows.append(
            {
                "key": key,
                "meaning": metric.meaning if metric else "Declared nowhere: add it to METRICS of the method.",
                "good": advice(metric.good) if metric else "",
                "unit": unit,
                "first": show(values[0][1], unit) if values else NONE,
                "last": show(values[-1][1], unit) if values else NONE,
                "spark": sparkline(values),
            }
        )
    return rows


def advice(good: str) -> str:
    """Return what a metric's `good` says as a sentence."""
    if good in ("higher", "lower"):
        return f"{good.capitalize()} is better."
    return f"{good[0].upper()}{good[1:]}." if good else ""


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}%"


def amount(value: float | None) -> str:
    """Return a number of tokens."""
    return NONE if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}"


def points(before: float | None, after: float | None) -> str:
    """Return the change of a share in points."""
    return NONE if before is None or after is None else signed(100 * (after - before), 1)


def relative(before: float | None, after: float | None) -> str:
    """Return the relative change of an amount."""
    return NONE if not before or after is None else signed(100 * (after / before - 1), 0) + "%"


def signed(value: float, decimals: int) -> str:
    """Return a change with its sign; what rounds to nothing has none."""
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}" if rounded else f"{0:.{decimals}f}"
