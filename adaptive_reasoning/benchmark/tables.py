"""Tables of an evaluation for other programs and for texts: evaluation.csv and evaluation.md beside evaluation.json."""

import csv
import io
from pathlib import Path

from adaptive_reasoning.core.files import write_text_atomic
from adaptive_reasoning.report.console import between, comparisons, number
from adaptive_reasoning.report.run_folder import breakdown

HEAD = ("setting", "difficulty", "accuracy", "95%", "tokens")


def write_tables(folder: Path, rows: list[dict]) -> None:
    """Write both tables of the rows of evaluation.json."""
    write_text_atomic(folder / "evaluation.csv", as_csv(rows))
    write_text_atomic(folder / "evaluation.md", as_markdown(rows))


def records(rows: list[dict]) -> list[dict]:
    """Return a flat record for every benchmark, setting and difficulty ("all" of them has more columns)."""
    out = []
    for row in rows:
        for level, part in breakdown(row["result"]).items():
            low, high = part.get("interval") or (None, None)
            record = {"benchmark": row["benchmark"], "setting": row["setting"], "difficulty": level}
            record |= {"accuracy": part["accuracy"], "low": low, "high": high, "tokens": part["mean_tokens"]}
            record |= {f"share_{mode}": share for mode, share in part["modes"].items()}
            if level == "all":
                paired, hybrid = part.get("paired") or {}, part.get("hybrid") or {}
                record |= {name: part.get(name) for name in ("questions", "samples")}
                record |= {f"pass@{k}": value for k, value in part.get("pass_at", {}).items()}
                record["maj"] = part.get("maj_accuracy")
                record |= dict(zip(("maj_low", "maj_high"), part.get("maj_interval") or (None, None)))
                record |= {"adaptive_minus_this": paired.get("difference")}
                record |= {f"difference_{name}": paired.get(name) for name in ("low", "high", "p")}
                record["hybrid_accuracy"] = hybrid.get("accuracy")
                record |= dict(zip(("hybrid_low", "hybrid_high"), hybrid.get("interval") or (None, None)))
            out.append(record)
    return out


def as_csv(rows: list[dict]) -> str:
    """Return the records as CSV, numbers in full; a cell without a value is empty."""
    lines, text = records(rows), io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_markdown(rows: list[dict]) -> str:
    """Return a table for every benchmark, with the comparisons of its settings below."""
    blocks = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        results = {row["setting"]: row["result"] for row in rows if row["benchmark"] == name}
        any_result = next(iter(results.values()))
        modes = list(dict.fromkeys(mode for result in results.values() for mode in result["modes"]))
        lines = [[*HEAD, *modes], ["---", "---"] + ["---:"] * (3 + len(modes))]
        for setting, result in results.items():
            for level, part in breakdown(result).items():
                numbers = [number(part["accuracy"], "share"), between(part.get("interval"))]
                shares = [number(part["modes"].get(mode, 0.0), "share") for mode in modes]
                lines.append([setting, level, *numbers, number(part["mean_tokens"], "tokens"), *shares])
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        size = f"{any_result.get('questions', '?')} questions, {any_result.get('samples', '?')} responses to each"
        said = "\n".join(f"- {line}" for line in comparisons(results))
        blocks.append(f"## {name}\n\n{size}; intervals are of 95 %, clustered by question.\n\n{table}\n\n{said}")
    return "\n\n".join(block.rstrip() for block in blocks) + "\n"
