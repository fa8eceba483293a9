"""Question: the one thing every task hands out; benchmarks are made of them."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """One question with its reference answer.

    `id` is unique within its data set and stable between runs (reference accuracies and samples are keyed by it).
    `difficulty` is a short label used for tables ("1" ... "6", a MATH level, a task of BBH), None if there is none.
    `work` is the operations worked out, one by one, where the question is made by code.
    `metadata` is whatever else the task knows, for its `score` and for a reward; it travels to other processes.
    """

    id: str
    problem: str
    answer: str
    difficulty: str | None = None
    source: str = ""
    work: tuple[str, ...] = ()
    metadata: dict = field(default_factory=dict, compare=False)


@dataclass
class Benchmark:
    """A named set of evaluation questions, with `samples` responses to each."""

    name: str
    questions: list[Question]
    samples: int = 1


@dataclass
class Source:
    """What a task gives: training questions, benchmarks, and how answers are checked.

    By default the response format's `check` compares with `Question.answer`; `exact`: as text, in this process.
    `score`: (answer, question) -> 0 to 1, a function of a module that is run in the graders; 1 is a right answer.
    """

    questions: list[Question]
    benchmarks: list[Benchmark]
    exact: bool = False
    score: Callable[[str, Question], float] | None = None
