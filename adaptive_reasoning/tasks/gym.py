"""reasoning-gym: its hundred procedural data sets by name, with the scorers that belong to them.

    --task "reasoning-gym:chain_sum(min_terms=2,max_terms=6),leg_counting"

What stands in brackets are options of the data set's own config, its difficulty among them. Training questions are
drawn in equal parts from all that are named, each is a benchmark, and no question of a benchmark is ever trained on. An
answer is scored by the data set's `score_answer` in the graders, from 0 to 1: it is right where the score is 1, and the
score takes the place of the 1 of a right answer in the reward.

Source: github.com/open-thought/reasoning-gym, arXiv 2505.24760.
"""

import ast
import dataclasses
import difflib
import functools

from adaptive_reasoning.core.question import Benchmark, Question, Source
from adaptive_reasoning.errors import UserError

SEEDS = 1_000_003  # between the random numbers of two runs; a data set takes one seed for each question
DRAWS = 10  # for one training question, where some are among those of the evaluation
LEVELS = 8  # most levels of difficulty of a data set
OURS = ("seed", "size")


def registered() -> dict:
    """Return {name: (class, config)} of the library's data sets."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UserError(
            f"--task reasoning-gym: {error.name!r} is not installed. Install the extra: "
            'pip install -e ".[gym]" -c constraints.txt'
        ) from error
    return {name: pair for name, pair in DATASETS.items() if name != "composite"}


warm_up = registered  # in the server of the graders: the import takes seconds


def parse(text: str) -> list[str]:
    """Return the data sets of "name, name(key=value, ...)", each as written, apart from spaces.

    Raises:
        UserError: it is no such list, or names one twice.
    """
    try:
        found = [ast.unparse(element) for element in ast.parse(f"[{text}]", mode="eval").body.elts]
    except (SyntaxError, AttributeError, ValueError):
        found = []
    if not found or len(set(found)) < len(found):
        raise UserError(
            f"--task reasoning-gym:{text}: needs names of data sets, each once, with options of their config in "
            "brackets, such as reasoning-gym:chain_sum(min_terms=2,max_terms=6),leg_counting."
        )
    return found


@functools.cache
def data_set(written: str, seed: int = 0, size: int = 1):
    """Return a data set of the library from "name(key=value, ...)".

    Raises:
        UserError: there is no such data set or option, or its config does not take the value.
    """
    call, known = ast.parse(written, mode="eval").body, registered()
    name = ast.unparse(call.func if isinstance(call, ast.Call) else call)
    where = f"--task reasoning-gym:{written}"
    if name not in known:
        raise UserError(f"{where}: there is no data set {name!r}.{nearest(name, known)}")
    cls, config = known[name]
    keys = [f.name for f in dataclasses.fields(config) if f.name not in OURS]
    options = {}
    for keyword in call.keywords if isinstance(call, ast.Call) else []:
        if keyword.arg not in keys:
            ours = " (--seed and --chain_questions decide it)" if keyword.arg in OURS else ""
            raise UserError(f"{where}: {name} has no option {keyword.arg!r}{ours}.{nearest(keyword.arg, keys)}")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise UserError(f"{where}: {keyword.arg} is no plain value.") from error
    if isinstance(call, ast.Call) and call.args:
        raise UserError(f"{where}: name every value: {', '.join(keys)}.")
    try:
        return cls(config=config(**options, seed=seed, size=size))
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}. Its options: {', '.join(keys)}.") from error


def nearest(name: str, known) -> str:
    """Return a sentence with what comes nearest to a misspelt name, or with all there is."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f" It takes {', '.join(near or sorted(known))}."


def draw(written: str, n: int, seed: int, split: str, without: frozenset = frozenset()) -> list[Question]:
    """Return n questions of a data set, whose texts are none of `without`.

    Raises:
        UserError: there are too few such questions.
    """
    most = n * DRAWS if without else n
    entries, found = data_set(written, seed % 2**31, most), []
    for i in range(most):
        entry = entries[i]
        text, name = entry["question"], f"reasoning-gym/{written}/{split}/{i}"
        if text not in without:
            answer = "" if entry["answer"] is None else str(entry["answer"])
            found.append(Question(name, text, answer, level(entry["metadata"]), written, metadata=entry))
        if len(found) == n:
            return found
    raise UserError(
        f"--task reasoning-gym:{written}: of {most} questions {most - len(found)} are among those of the evaluation, "
        f"and {n} for training are wanted. Lower --chain_eval_questions, or give it options with more questions."
    )


def level(metadata: dict) -> str | None:
    """Return the difficulty of a question: its own value of the first measure that its data set gives a range for."""
    asked = metadata.get("difficulty")
    for name, limits in asked.items() if isinstance(asked, dict) else ():
        own = metadata.get(name)
        if isinstance(limits, tuple) and len(limits) == 2 and {type(x) for x in (own, *limits)} == {int}:
            low, high = limits
            width = (high - low) // LEVELS + 1
            first = low + (own - low) // width * width
            return f"{name} {first}" if width == 1 else f"{name} {first} to {min(first + width - 1, high)}"
    return None


def score(answer: str, question: Question) -> float:
    """Return what the library says an answer is worth, 0 to 1."""
    return data_set(question.source).score_answer(answer, question.metadata)


def source(args, train: bool) -> Source:
    """Return training questions, if they are wanted, and a benchmark for each data set, the same for every seed."""
    names = parse(args.task.partition(":")[2])
    benchmarks, questions = [], []
    for i, written in enumerate(names):

        def part(n, i=i):
            return max(1, n // len(names) + (i < n % len(names)))

        asked = draw(written, part(args.chain_eval_questions), 0, "eval")
        benchmarks.append(Benchmark(written, asked, args.eval_samples))
        if train:
            texts = frozenset(q.problem for q in asked)
            questions += draw(written, part(args.chain_questions), SEEDS * (args.seed + 1), "train", texts)
    return Source(questions, benchmarks, score=score)
