"""Run: what a run folder holds, read once, finished or still going on."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from adaptive_reasoning.core.files import read_jsonl
from adaptive_reasoning.core.metric import Metric, from_json
from adaptive_reasoning.errors import UserError

ADAPTIVE = "adaptive"  # the setting in which nothing is forced
DEAR = ("thinking", "think", "long_cot", "slow")  # modes that think, whatever the algorithm calls them


@dataclass
class Run:
    """One run folder. Every list is in the order of its file; a file that is not there yet gives an empty one.

    E stands for the result of one evaluation: {"accuracy", "interval", "mean_tokens", "modes": {mode: {"share",
    "accuracy", "mean_tokens"}}, "by_difficulty": {level: {"accuracy", "interval", "mean_tokens", "modes": {mode:
    share}}}}; older runs have no intervals. What else is in it: `run.evaluation`.
    """

    folder: Path
    options: dict
    metrics: list[dict]  # one row per training step
    samples: list[dict]
    evaluations: list[dict]  # {"step", "setting", "benchmark", "result": E}
    summary: dict | None  # None while the run goes on
    declared: dict[str, Metric] = field(default_factory=dict)  # what its metrics mean, as metrics.json has it

    @property
    def last_step(self) -> int:
        return max([row["step"] for row in self.metrics + self.evaluations], default=0)

    @property
    def algorithm(self) -> str:
        return str((self.summary or {}).get("algorithm") or self.options.get("algorithm") or "")

    @property
    def finished(self) -> bool:
        """True once there is a summary and no step after it: a finished run may be continued with more steps."""
        return self.summary is not None and self.last_step <= self.summary["steps"]

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(row["benchmark"] for row in self.evaluations))

    @cached_property
    def modes(self) -> list[str]:
        """Ways of answering, in order of appearance."""
        evaluated = [mode for row in self.evaluations for mode in row["result"]["modes"]]
        return list(dict.fromkeys(evaluated + [row["mode"] for row in self.samples if row.get("mode")]))

    @property
    def thinking_mode(self) -> str:
        """The mode that thinks, else the last one; "" where there is none."""
        return next((mode for mode in DEAR if mode in self.modes), (self.modes or [""])[-1])

    def forced(self, benchmark: str) -> dict[str, str]:
        """Return {setting: mode} of every setting but the adaptive one, with the mode that most responses have in it.

        A setting that mixes modes as the adaptive one does (a router, a consensus) has no mode of its own: "".
        """
        out = {}
        for row in self.evaluations:
            if row["benchmark"] == benchmark and row["setting"] != ADAPTIVE:
                shares = {mode: values["share"] for mode, values in row["result"]["modes"].items()}
                mode = max(shares, key=shares.get, default="")
                out[row["setting"]] = mode if shares.get(mode, 0) > 0.9 else ""
        return out

    def results(self, benchmark: str, setting: str = ADAPTIVE) -> list[tuple[int, dict]]:
        """Return [(step, E)] in order of the steps; of two evaluations of one step the later one counts."""
        rows = (row for row in self.evaluations if row["benchmark"] == benchmark and row["setting"] == setting)
        return sorted({row["step"]: row["result"] for row in rows}.items())

    def before_after(self, benchmark: str, setting: str = ADAPTIVE) -> tuple[dict | None, dict | None]:
        """Return E before training (step 0) and the newest E after some training; None for what is not there."""
        results = self.results(benchmark, setting)
        before = results[0][1] if results and results[0][0] == 0 else None
        after = results[-1][1] if results and results[-1][0] > 0 else None
        return before, after

    def difficulties(self, benchmark: str) -> list[str]:
        levels = {level for _, result in self.results(benchmark) for level in result["by_difficulty"]}
        return sorted(levels, key=difficulty_order)

    def points(self, key: str) -> list[tuple[int, float]]:
        """Return [(step, value)] of a training metric, nulls left out."""
        return [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]

    def metric_keys(self) -> list[str]:
        """Return every key logged, in order of appearance, without "step"."""
        return [key for key in dict.fromkeys(key for row in self.metrics for key in row) if key != "step"]


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: no such folder, a folder without any file of a run, or a damaged file (names it, and the line).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give the folder of a run (its --output_dir).")
    names = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "summary.json")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder}: not the folder of a run: none of {', '.join(names)} is in it.")
    summary = _mapping(folder / "summary.json", json.loads)
    return Run(
        folder=folder,
        options=_mapping(folder / "config.yaml", yaml.safe_load) or {},
        metrics=read_jsonl(folder / "metrics.jsonl"),
        samples=read_jsonl(folder / "samples.jsonl"),
        evaluations=_evaluations(folder, summary),
        summary=summary,
        declared=from_json(_mapping(folder / "metrics.json", json.loads) or {}),
    )


def _mapping(path: Path, read) -> dict | None:
    """Return what `read` finds in a file that holds a mapping; None without the file."""
    if not path.is_file():
        return None
    try:
        content = read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "YAML" if path.suffix == ".yaml" else "JSON"
        raise UserError(f"{path} is not valid {kind}: {error}. Restore it, or run the same command again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, found {type(content).__name__}.")
    return content


def _evaluations(folder: Path, summary: dict | None) -> list[dict]:
    """Return the rows of evaluations.jsonl; without that file, before and after as the summary has them."""
    rows = read_jsonl(folder / "evaluations.jsonl")
    if rows or not summary:
        return rows
    name = str(summary.get("task") or "evaluation")
    steps = {"before": 0, "after": summary.get("steps") or 0}
    return [
        {"step": step, "setting": ADAPTIVE, "benchmark": name, "result": summary[when]}
        for when, step in steps.items()
        if summary.get(when)
    ]


def breakdown(E: dict | None) -> dict[str, dict]:
    """Return {difficulty, then "all": {"accuracy", "mean_tokens", "modes": {mode: share}, ...}} of E; {} for None."""
    if E is None:
        return {}
    shares = {mode: values["share"] for mode, values in E["modes"].items()}
    levels = {level: E["by_difficulty"][level] for level in sorted(E["by_difficulty"], key=difficulty_order)}
    return levels | {"all": E | {"modes": shares}}


def difficulty_order(level: str) -> tuple:
    """Sort key that puts "2" before "10" and numbers before words: numbers inside a label count as numbers."""
    parts = re.split(r"(\d+)", level)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part)


def shown_modes(modes: list[str], prefer: str) -> list[str]:
    """Return the modes worth a curve of their share: of two, `prefer` alone, because the other one is the rest."""
    return [prefer] if len(modes) == 2 and prefer in modes else list(modes)
