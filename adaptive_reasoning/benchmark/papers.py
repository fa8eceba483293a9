"""The papers' published rows beside ours. A paper is a YAML file in published/, or one of the user's own:

title: accuracy % / tokens / Long CoT %             what a cell holds
mode: long_cot                                      whose share stands in our cells (none: accuracy alone)
decimals: 1                                         of an accuracy
mean: mean of 8                                     title of a column for the means over all benchmarks (none: left out)
benchmarks: [gsm8k, math500]
rows:
  "GRPO": {gsm8k: [92.8, 739], math500: [79.4, 1410], mean: [86.1]}         a cell's numbers, the accuracy first
"""

from pathlib import Path

import yaml

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.report.console import aligned

FOLDER = Path(__file__).parent / "published"


def load_paper(name: str) -> dict:
    """Return a paper by the name of its file in published/, or by a path.

    Raises:
        UserError: there is no such file, or it lacks a key.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UserError(f"--paper {name}: takes {known}, or the path of a YAML file.")
    paper = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(paper, dict) or not {"title", "benchmarks", "rows"} <= set(paper):
        raise UserError(f"{path}: a paper needs title, benchmarks and rows.")
    return {"name": path.stem, "mode": "", "decimals": 1, "mean": "", **paper}


def paper_table(rows: list[dict], paper: dict) -> str:
    """Return our rows and the paper's for the benchmarks that both have.

    Args:
        rows: of evaluation.json; a result with "maj_accuracy" has a row of its own for the vote.
        paper: from `load_paper`.
    """
    names = [b for b in paper["benchmarks"] if b in {row["benchmark"] for row in rows}]
    columns = [*names, *(["mean"] if paper["mean"] else [])]
    if not names:
        return "no benchmark here is in the paper's table"
    lines: dict[str, dict[str, tuple]] = {}
    for row in rows:
        for title, key in ((row["setting"], "accuracy"), (f"{row['setting']}, vote", "maj_accuracy")):
            if key in row["result"]:
                lines.setdefault(f"here, {title}", {})[row["benchmark"]] = our_cell(row["result"], key, paper["mode"])
    lines |= {f"paper, {name}": cells for name, cells in paper["rows"].items()}
    lines = {name: with_mean(cells, paper["benchmarks"]) for name, cells in lines.items()}
    table = [["", *names, *filter(None, [paper["mean"]])]]
    table += [[name, *(cell_text(cells.get(b), paper["decimals"]) for b in columns)] for name, cells in lines.items()]
    return f"{paper['title']}, paper {paper['name']}\n" + aligned(table)


def with_mean(cells: dict[str, tuple], benchmarks: list[str]) -> dict[str, tuple]:
    """Return the cells with their macro average beside them, where all benchmarks are there and it is not yet."""
    if "mean" in cells or not set(benchmarks) <= cells.keys():
        return cells
    columns = zip(*(cells[b] for b in benchmarks))
    accuracy, *others = (sum(map(float, column)) / len(benchmarks) for column in columns)
    return cells | {"mean": (accuracy, *(text.format(x) for text, x in zip(("{:.0f}", "{:.1f}"), others)))}


def our_cell(result: dict, key: str, mode: str) -> tuple:
    """Return (accuracy in %, tokens, share of the mode in %) of a result; (accuracy,) without a mode."""
    accuracy = 100 * result[key]
    if not mode:
        return (accuracy,)
    tokens = result.get("mean_tokens_paper", result["mean_tokens"])
    return accuracy, f"{tokens:.0f}", f"{100 * result['modes'][mode]['share']:.1f}"


def cell_text(cell: tuple | list | None, decimals: int) -> str:
    """Return a cell as text: the accuracy rounded, the others as they stand; "-" where there is none."""
    return " / ".join([f"{cell[0]:.{decimals}f}", *map(str, cell[1:])]) if cell else "-"
