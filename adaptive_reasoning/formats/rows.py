"""Rows of supervised data: read from files, held out, put in order, dealt to processes and made into episodes."""

import math

import numpy as np
import torch

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import Row
from adaptive_reasoning.learner.packing import draw
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.math import read_rows
from adaptive_reasoning.tasks.think_template import ThinkTemplate

HELD_OUT = 104_729  # keeps the draw of the rows held out apart from the order of the epochs


def load_rows(path: str) -> list[Row]:
    """Return the rows of a file (JSONL, CSV, Parquet): `problem`, and `response` or `thinking` and `answer`.

    Raises:
        UserError: the file is missing or empty, or a row lacks a field; the message names file and row.
    """
    rows = []
    for where, row in read_rows(path):
        answer = "answer" if "thinking" in row and "response" not in row else "response"
        thoughts = row["thinking"] or "" if answer == "answer" else None  # an empty cell of a table is None
        for key in ("problem", answer):
            if not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"{where}: a supervised row needs '{key}' as a non-empty text, found {row.get(key)!r}.")
        if not isinstance(thoughts or "", str):
            raise UserError(f"{where}: 'thinking' is {thoughts!r}, no text. Leave it empty for an answer without.")
        rows.append(Row(Question(where, row["problem"], ""), row[answer], thinking=thoughts))
    return rows


def text_of(row: Row) -> str:
    """Return what tells rows of data apart."""
    return "\0".join([row.question.problem, row.response, *[row.thinking] * (row.thinking is not None)])


def check_thinking(rows: list[Row], template: ThinkTemplate) -> None:
    """Raise UserError where a text holds a tag of the thinking block, which the template opens and closes."""
    for row in rows:
        found = [tag for tag in template.tags if tag and tag in f"{row.thinking or ''}{row.response}"]
        if row.thinking is not None and found:
            raise UserError(
                f"{row.question.id}: 'thinking' or 'answer' holds {found[0]!r}. Leave tags out, templates write them."
            )


def check_pairs(rows: list[Row], batch_size: int) -> None:
    """Raise UserError unless rows 1 and 2, 3 and 4, ... hold one problem each, answered in both modes."""
    if batch_size % 2 or len(rows) % 2:
        raise UserError(f"--pairs: --batch_size ({batch_size}) and the number of rows ({len(rows)}) have to be even.")
    for one, other in zip(rows[::2], rows[1::2]):
        tags = {row.response.partition(">")[0] + ">" for row in (one, other)}
        openings = tags if one.thinking is None else {"<think>" if row.thinking else "<short>" for row in (one, other)}
        if one.question.problem != other.question.problem or openings != {"<think>", "<short>"}:
            raise UserError(
                f"{other.question.id}: this row and the one before it have to be a pair: the same 'problem', and one "
                f"'response' that starts with <think> and one that starts with <short>; found {sorted(openings)}. Or "
                "one 'thinking' that is empty, and one that is not."
            )


def held_out(rows: list[Row], args) -> tuple[list[Row], list[Row]]:
    """Return (rows to train on, in their order, and rows held out, in that of the draw): rounded up, pairs whole."""
    unit = 2 if args.pairs else 1
    number = len(rows) // unit
    order = np.random.default_rng([args.seed, HELD_OUT]).permutation(number)
    taken = order[: math.ceil(args.validation_share * number)]
    kept = np.setdiff1d(order, taken)  # sorted
    return tuple([rows[unit * i + j] for i in part for j in range(unit)] for part in (kept, taken))


def batch_of(rows: list[Row], step: int, args) -> list[Row]:
    """Return the rows of step 1, 2, ...: an epoch is a permutation of the rows, or of the pairs."""
    unit = 2 if args.pairs else 1
    picked = draw(len(rows) // unit, args.batch_size // unit, step, args.seed)
    return [rows[unit * i + j] for i in picked for j in range(unit)]


def share_of(rows: list[Row], args, accelerator) -> list[Row]:
    """Return this process's share of rows: those of one mean stay together."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    return [row for i, row in enumerate(rows) if i // max(1, args.rows_per_mean) % ranks == rank]


def episodes_of(
    rows: list[Row], tokenizer, limit: int, template: ThinkTemplate | None = None, supervise_opening: bool = False
) -> list[Episode]:
    """Return rows as episodes with advantage 1, which the learner packs and scores; cut at `limit` tokens.

    Args:
        template: opens and closes the thinking of rows that have it; the loss falls behind the opening.
        supervise_opening: it falls on the opening too, so the choice is learnt.
    """

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    asked = encode([prompts.prompt_text(tokenizer, r.prompt or r.question.problem) for r in rows])
    answered = encode([r.response for r in rows])
    turns = iter(encode([text for r in rows for turn in r.turns for text in turn]))
    end = tokenizer.eos_token_id
    episodes = []
    for i, (row, prompt_ids, first) in enumerate(zip(rows, asked, answered)):
        ids, start = [*first, end], row.start
        if row.thinking is not None:
            ids, start = template.row(row.thinking, row.response)
            start *= not supervise_opening
        mask = [t >= start for t in range(len(ids))]
        for _ in row.turns:
            between, response = next(turns), next(turns)
            ids += [*between, *response, end]
            mask += [False] * len(between) + [True] * (len(response) + 1)
        ids, mask = torch.tensor(ids[:limit]), torch.tensor(mask[:limit])
        zeros = torch.zeros(len(ids))
        episodes.append(Episode(row.question, i, torch.tensor(prompt_ids), ids, zeros, mask, "stop", advantage=1.0))
    return episodes
