"""Task: the questions of one run, their prompts, and how an answer to them is checked."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

from adaptive_reasoning.core.named import module_of, named, own_code
from adaptive_reasoning.core.question import Benchmark, Question, Source
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.grader import Grade, GraderPool


@dataclass
class Task:
    """Training questions that fit the prompt limit, and the benchmarks."""

    questions: list[Question]
    prompts: list[list[int]]
    skipped: int  # questions left out because their prompt is too long
    benchmarks: list[Benchmark] = field(default_factory=list)
    exact: bool = False  # answers are compared as text, in this process
    score: Callable[[str, Question], float] | None = None  # the task's own, in place of a comparison
    module: ModuleType | None = None  # where the task comes from

    def code(self, *modules: ModuleType) -> dict[str, list[str]]:
        """Return the user's own files in these modules and where the task and its score come from (`own_code`)."""
        scored = [sys.modules[self.score.__module__]] if self.score else []
        return own_code(*modules, *filter(None, [self.module]), *scored)

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """Return the indices of the questions of training step 1, 2, ...: an epoch is a permutation, its rest dropped.

        A function of its arguments alone, so a resumed run sees the same questions on any number of processes.

        Raises:
            UserError: there are fewer questions than one step needs.
        """
        per_epoch = len(self.questions) // size
        if per_epoch == 0:
            raise UserError(
                f"a step needs {size} questions, the training data has {len(self.questions)}: lower --prompts_per_step."
            )
        epoch, i = divmod(step - 1, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(self.questions))
        return order[i * size : (i + 1) * size].tolist()

    def ahead(self, max_steps: int, size: int, seed: int) -> list[int]:
        """Return the indices of all questions that steps 1 to max_steps meet."""
        if max_steps > 4 * (
            len(self.questions) // size
        ):  # what the last epochs leave out differs; all is nearly certain
            return list(range(len(self.questions)))
        return sorted({i for step in range(1, max_steps + 1) for i in self.batch(step, size, seed)})

    def epoch(self, step: int, size: int) -> float:
        """Return the passes over the training questions after `step` steps."""
        return step / (len(self.questions) // size)

    def grader(self, workers: int, timeout: float, check=None) -> "GraderPool | ExactGrader":
        """Return a context manager that checks answers: submit(answer, gold, key), drain() -> {key: Grade}."""
        if self.exact and self.score is None:
            return ExactGrader()
        return GraderPool(workers, timeout, check, score=self.score)


class ExactGrader:
    """Compares answers as text: enough for chains, whose answer is one digit. Same interface as GraderPool."""

    score = None

    def __init__(self):
        self.grades: dict[object, Grade] = {}

    def __enter__(self) -> "ExactGrader":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def submit(self, answer: str, gold: str | Question, key: object) -> None:
        self.grades[key] = Grade(answer == (gold.answer if isinstance(gold, Question) else gold), "ok")

    def drain(self) -> dict[object, Grade]:
        grades, self.grades = self.grades, {}
        return grades

    def count_anew(self) -> None:
        pass

    def rates(self) -> dict[str, float]:
        return {}


TASKS = {  # a task is a function of (options, whether training questions are wanted) that returns a Source
    "math": "adaptive_reasoning.tasks.math.source",
    "chain": "adaptive_reasoning.tasks.chain.source",
    "words": "adaptive_reasoning.tasks.words.source",
    "reasoning-gym": "adaptive_reasoning.tasks.gym.source",
}


def load_task(args, tokenizer, train: bool = True) -> Task:
    """Return the task of a run: `args.task`, `args.data` and `args.eval_data`.

    Args:
        train: False loads the benchmarks alone.

    Raises:
        UserError: data that is missing or malformed (the message names file and line), or a task that does not exist.
    """
    name = args.task.partition(":")[0]  # what follows names the data sets of reasoning-gym
    name = name if name == "reasoning-gym" else args.task
    source = named(name, TASKS, "task")(args, train)
    if not isinstance(source, Source):
        raise UserError(f"task {name!r}: it returned {type(source).__name__}, not a Source of questions.")
    kept, ids = prompts.fitting(source.questions, tokenizer, args.max_prompt_tokens) if train else ([], [])
    skipped, module = len(source.questions) - len(kept), module_of(name, TASKS, "task")[0]
    return Task(kept, ids, skipped, source.benchmarks, source.exact, source.score, module)
