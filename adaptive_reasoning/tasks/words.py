"""Stories: the laboratory that speaks. Word problems made by code, for a small pretrained model.

    Mia has 7 apples. She buys 5 more. She gives 4 to Omar. How many apples does Mia have now?

The difficulty is the number of operations, 1 to 5. Numbers are small, so that one operation can be answered at once and
four need to be written down. A story belongs to training or to evaluation by its own text (`held_out`), whatever seed
made it, so no story of the evaluation is ever trained on.
"""

import zlib

import numpy as np

from adaptive_reasoning.core.question import Benchmark, Question, Source
from adaptive_reasoning.tasks import chain

HELD_OUT = 8  # one story in so many is for evaluation
LARGEST = 40  # what anybody has at any time
PEOPLE = {
    "She": ("Mia", "Anna", "Ruth", "Lena", "Sara", "Nora", "Emma", "Kate", "Amy", "Zoe", "Lily", "Rosa"),
    "He": ("Tom", "Ben", "Omar", "Max", "Leo", "Sam", "Jack", "Paul", "Noah", "Adam", "Luis", "Finn"),
}
THINGS = (
    "apples", "books", "stamps", "coins", "pens", "cards", "shells", "eggs", "cups", "stones", "balls", "toys", "keys",
    "nuts", "plums", "cakes", "boxes", "hats", "leaves", "marbles",
)  # fmt: skip
SENTENCES = {
    "+": ("{who} buys {n} more.", "{who} finds {n} more.", "{other} gives {n} to {name}.", "Then {n} more arrive."),
    "-": ("{who} gives {n} to {other}.", "{who} loses {n}.", "{who} sells {n}.", "{n} of them break."),
    "*": ("Then {name} doubles the number of {things}.", "{other} brings as many again."),
    "/": ("{who} shares them equally with {other}.", "{who} gives half of them to {other}."),
}


def operation(rng: np.random.Generator, value: int) -> tuple[str, int, int]:
    """Return (operation, operand, new value) that keep a positive value of at most LARGEST."""
    fits = {
        "+": min(9, LARGEST - value),
        "-": min(9, value - 1),
        "*": 2 if 2 * value <= LARGEST else 0,
        "/": 2 if value % 2 == 0 else 0,
    }
    op = rng.choice([op for op, most in fits.items() if most > 1])
    n = 2 if op in "*/" else int(rng.integers(2, fits[op] + 1))
    return str(op), n, {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]


def story(rng: np.random.Generator, operations: int) -> tuple[str, tuple[str, ...], str]:
    """Return (problem, the operations worked out, answer) of a random story."""
    who = str(rng.choice(list(PEOPLE)))
    name = str(rng.choice(PEOPLE[who]))
    other = str(rng.choice([p for people in PEOPLE.values() for p in people if p != name]))
    things = str(rng.choice(THINGS))
    value = int(rng.integers(2, 13))
    told, work = [f"{name} has {value} {things}."], []
    for _ in range(operations):
        op, n, new = operation(rng, value)
        sentence = str(rng.choice(SENTENCES[op]))
        told.append(sentence.format(who=who, name=name, other=other, things=things, n=n))
        work.append(f"{value}{op}{n}={new}")
        value = new
    return " ".join([*told, f"How many {things} does {name} have now?"]), tuple(work), str(value)


def held_out(problem: str) -> bool:
    """Return whether a story is for evaluation."""
    return zlib.crc32(problem.encode()) % HELD_OUT == 0


def make_question(rng: np.random.Generator, operations: int, name: str, test: bool = False) -> Question:
    """Return a random story for training or, with `test`, for evaluation."""
    while held_out((made := story(rng, operations))[0]) != test:
        pass
    problem, work, answer = made
    return Question(name, problem, answer, str(operations), "words", work)


def source(args, train: bool) -> Source:
    """Return training stories, if they are wanted, and the benchmark "words", the same for every seed."""

    def questions(n, seed, name, test):
        return chain.questions(n, args.chain_mix, seed, name, lambda *made: make_question(*made, test=test))

    asked = questions(args.chain_questions, args.seed, "words/train", False) if train else []
    evaluation = questions(args.chain_eval_questions, 1_000_003, "words/eval", True)
    return Source(asked, [Benchmark("words", evaluation, args.eval_samples)], exact=True)
