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

HELD_OUT = 104_729  # keeps the draw of the rows held out apart from the order of the epochs


def load_rows(path: str) -> list[Row]:
    """Return the rows of a file (JSONL, CSV, Parquet) with `problem` and `response`.

    Raises:
        UserError: the file is missing or empty, or a row lacks a field; the message names file and row.
    """
    rows = []
    for where, row in read_rows(path):
        for key in ("problem", "response"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"{where}: a supervised row needs '{key}' as a non-empty text, found {row.get(key)!r}.")
        rows.append(Row(Question(where, row["problem"], ""), row["response"]))
    return rows


def check_pairs(rows: list[Row], batch_size: int) -> None:
    """Raise UserError unless rows 1 and 2, 3 and 4, ... hold one problem each, with the two control tokens in front."""
    if batch_size % 2 or len(rows) % 2:
        raise UserError(f"--pairs: --batch_size ({batch_size}) and the number of rows ({len(rows)}) have to be even.")
    for one, other in zip(rows[::2], rows[1::2]):
        openings = {row.response.partition(">")[0] + ">" for row in (one, other)}
        if one.question.problem != other.question.problem or openings != {"<think>", "<short>"}:
            raise UserError(
                f"{other.question.id}: this row and the one before it have to be a pair: the same 'problem', and one "
                f"'response' that starts with <think> and one that starts with <short>; found {sorted(openings)}."
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


def episodes_of(rows: list[Row], tokenizer, limit: int) -> list[Episode]:
    """Return rows as episodes with advantage 1, which the learner packs and scores; cut at `limit` tokens."""

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    asked = encode([prompts.prompt_text(tokenizer, r.prompt or r.question.problem) for r in rows])
    answered = encode([r.response for r in rows])
    turns = iter(encode([text for r in rows for turn in r.turns for text in turn]))
    end = tokenizer.eos_token_id
    episodes = []
    for i, (row, prompt_ids, first) in enumerate(zip(rows, asked, answered)):
        ids, mask = [*first, end], [t >= row.start for t in range(len(first) + 1)]
        for _ in row.turns:
            between, response = next(turns), next(turns)
            ids += [*between, *response, end]
            mask += [False] * len(between) + [True] * (len(response) + 1)
        ids, mask = torch.tensor(ids[:limit]), torch.tensor(mask[:limit])
        zeros = torch.zeros(len(ids))
        episodes.append(Episode(row.question, i, torch.tensor(prompt_ids), ids, zeros, mask, "stop", advantage=1.0))
    return episodes
