"""The samples shown on the page: all of them, or a fair choice where there are too many for a browser."""

from adaptive_reasoning.report.run_folder import Run, difficulty_order

MOST_SAMPLES = 2000
MOST_CHARS = 12_000_000  # of all texts together: what a browser searches without a pause
MOST_CHARS_EACH = 20_000  # longer texts lose their middle: both ends matter, the repetition in between does not

FILTERS = ("split", "setting", "benchmark", "mode", "difficulty", "right")
COLUMNS = ("step", *FILTERS, "tokens", "reward", "advantage", "finish_reason", "grader", "answer")
TEXTS = ("problem", "answer", "response", "grader")  # grader: of checks that timed out or failed


def sample_table(run: Run, most: int = MOST_SAMPLES) -> dict:
    """Return {"columns", "rows", "total", "choices"} for the page, newest samples first.

    `rows`: (values of the columns but the last one, problem, response), "" where there is none; "right" is yes where
    the reward is positive. `choices`: {column: values the page can filter by}. Where there are more than `most`
    samples, every kind (split, mode, right or wrong) keeps its fair part, spread evenly over training.
    """
    rows = [_row(sample) for sample in run.samples]
    size = sum(len(row[name]) for row in rows for name in TEXTS)
    room = int(MOST_CHARS / (size / len(rows))) if size else most
    columns = [name for name in COLUMNS if any(row[name] != "" for row in rows)]
    shown = sorted(choose(rows, max(1, min(most, room))), key=lambda row: -row["step"])
    return {
        "columns": [*columns, "problem"],
        "rows": [([row[name] for name in columns], row["problem"], row["response"]) for row in shown],
        "total": len(rows),
        "choices": {name: sorted({row[name] for row in rows} - {""}, key=difficulty_order) for name in FILTERS},
    }


def choose(rows: list[dict], most: int) -> list[dict]:
    """Return at most `most` rows in their order: equally many of every kind, what a small kind leaves goes on."""
    if len(rows) <= most:
        return rows
    kinds: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault((row["split"], row["mode"], row["right"]), []).append(i)
    kept, room = [], most
    for left, members in enumerate(sorted(kinds.values(), key=len)):
        count = min(len(members), room // (len(kinds) - left))
        kept += [members[k * len(members) // count] for k in range(count)]
        room -= count
    return [rows[i] for i in sorted(kept)]


def _row(sample: dict) -> dict:
    row = {name: "" if sample.get(name) is None else sample[name] for name in (*COLUMNS, *TEXTS)}
    row |= {name: str(row[name]) for name in FILTERS} | {name: shortened(str(row[name])) for name in TEXTS}
    return row | {"step": sample.get("step", 0), "right": "yes" if (sample.get("reward") or 0) > 0 else "no"}


def shortened(text: str) -> str:
    """Return `text`, or its two ends with a line that says how much was left out between them."""
    if len(text) <= MOST_CHARS_EACH:
        return text
    half = MOST_CHARS_EACH // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n\n[... {left_out:,} characters left out, whole in samples.jsonl ...]\n\n{text[-half:]}"
