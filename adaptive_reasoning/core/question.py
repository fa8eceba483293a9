"""Question: the one thing every task hands out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question with its reference answer.

    `id` is unique within its data set and stable between runs (reference accuracies and samples are keyed by it).
    `difficulty` is a short label used for tables ("1" ... "6", a MATH level) or None where the data has none.
    """

    id: str
    problem: str
    answer: str
    difficulty: str | None = None
    source: str = ""
