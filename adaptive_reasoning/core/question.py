"""Question: the one thing every task hands out; benchmarks are made of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question with its reference answer.

    `id` is unique within its data set and stable between runs (reference accuracies and samples are keyed by it).
    `difficulty` is a short label used for tables ("1" ... "6", a MATH level, a task of BBH), None if there is none.
    `work` is the operations worked out, one by one, where the question is made by code.
    """

    id: str
    problem: str
    answer: str
    difficulty: str | None = None
    source: str = ""
    work: tuple[str, ...] = ()


@dataclass
class Benchmark:
    """A named set of evaluation questions, with `samples` responses to each."""

    name: str
    questions: list[Question]
    samples: int = 1


@dataclass
class Source:
    """What a task gives: training questions, benchmarks, and whether answers are compared as text, in this process."""

    questions: list[Question]
    benchmarks: list[Benchmark]
    exact: bool = False
