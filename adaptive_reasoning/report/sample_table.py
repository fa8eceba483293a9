"""The samples shown on the page: all of them, or a fair choice where there are too many for a browser."""

from adaptive_reasoning.report.run_folder import Run, difficulty_order

MOST_SAMPLES = 2000
MOST_CHARS = 12_000_000  # of all texts together: what a browser searches without a pause
MOST_CHARS_EACH = 20_000  # longer texts lose their middle: both ends matter, the repetition in between does not

COLUMNS = ("step", "split", "mode", "difficulty", "right", "tokens", "reward", "advantage", "finish_reason")
COLUMNS += ("setting", "benchmark", "grader")  # in some samples only: evaluations, checks that timed out or failed
TEXTS = ("problem", "answer", "response")


def sample_table(run: Run, most: int = MOST_SAMPLES) -> dict:
    """Return {"columns", "rows", "total", "choices"} for the page, newest samples first.

    A row has the values of COLUMNS and TEXTS; right is True where the reward is positive. `choices` are the values
    the page can filter by. Where there are more than `most` samples, every kind (split, mode, right or wrong) keeps
    its fair part, spread evenly over training.
    """
    rows = [_row(sample) for sample in run.samples]
    size = sum(len(row[name]) for row in rows for name in TEXTS)
    room = int(MOST_CHARS / (size / len(rows))) if size else most
    shown = sorted(choose(rows, max(1, min(most, room))), key=lambda row: -row["step"])
    choices = {
        "split": sorted({row["split"] for row in rows}),
        "setting": sorted({row["setting"] for row in rows}),
        "benchmark": run.benchmarks if len(run.benchmarks) > 1 else [],
        "mode": run.modes,
        "difficulty": sorted({row["difficulty"] for row in rows}, key=difficulty_order),
    }
    columns = [*COLUMNS, *TEXTS]
    return {
        "columns": columns,
        "rows": [[row[name] for name in columns] for row in shown],
        "total": len(rows),
        "choices": {name: [value for value in values if value != ""] for name, values in choices.items()},
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
    reward = sample.get("reward")
    row = {name: sample.get(name) for name in COLUMNS}
    row["step"] = sample.get("step", 0)
    row["right"] = reward is not None and reward > 0
    for name in ("split", "mode", "difficulty", "finish_reason", "setting", "benchmark", "grader"):
        row[name] = "" if sample.get(name) is None else str(sample[name])
    for name in TEXTS:
        row[name] = shortened("" if sample.get(name) is None else str(sample[name]))
    return row


def shortened(text: str) -> str:
    """Return `text`, or its two ends with a line that says how much was left out between them."""
    if len(text) <= MOST_CHARS_EACH:
        return text
    half = MOST_CHARS_EACH // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n\n[... {left_out:,} characters left out, whole in samples.jsonl ...]\n\n{text[-half:]}"
