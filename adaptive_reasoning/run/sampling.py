"""Sampling: responses of the policy, graded while others still decode."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.rollout import Completion, Request, Sampling
from adaptive_reasoning.tasks import prompts
from adaptive_reasoning.tasks.grader import Grade
from adaptive_reasoning.tasks.sandbox import executed


@dataclass
class Graded:
    """One response. Without an answer nothing was graded."""

    completion: Completion
    text: str
    answer: str | None
    grade: Grade | None

    @property
    def correct(self) -> bool:
        return self.grade is not None and self.grade.correct

    @property
    def score(self) -> float:
        return self.grade.score if self.grade else 0.0

    @property
    def trouble(self) -> str:
        """What the grader said where it could not decide."""
        return f"{self.grade.status}: {self.grade.detail}" if self.grade and self.grade.status != "ok" else ""

    def episode(self, mode: str) -> Episode:
        e = Episode.of(self.completion, text=self.text, answer=self.answer, mode=mode, correct=self.correct)
        e.given, e.grader = self.score, self.trouble
        return e


def sample_and_grade(
    engine,
    grader,
    tokenizer,
    stop_ids: tuple[int, ...],
    extract_answer: Callable[[str], str | None],
    requests: list[Request],
    sampling: Sampling,
    progress: str,
    execute_code: bool = False,
    sampled: Callable[[], None] = lambda: None,
) -> tuple[list[Graded], float]:
    """Return the responses in order, and the seconds spent waiting for grades after the last one was sampled.

    Args:
        requests: tagged (question, ...).
        execute_code: the answer of a program in the text takes the place of the written one.
        sampled: called once all responses are there.
    """
    texts: dict[int, str] = {}
    answers: dict[int, str] = {}
    programs = {}  # those that run in the sandbox while decoding goes on
    sandboxes = ThreadPoolExecutor(os.cpu_count()) if execute_code else None

    def grade(i: int) -> None:
        answer = extract_answer(texts[i])
        if answer is not None:
            answers[i] = answer
            grader.submit(answer, requests[i].tag[0], i)

    def on_finish(i: int, completion: Completion) -> None:
        texts[i] = prompts.decode(tokenizer, completion.response_ids.tolist(), stop_ids)
        if sandboxes is None:
            grade(i)
        else:
            programs[i] = sandboxes.submit(executed, texts[i])

    completions = engine.run(requests, sampling, on_finish, progress)
    for i, program in programs.items():
        texts[i] = program.result()
        grade(i)
    if sandboxes:
        sandboxes.shutdown()
    sampled()
    asked = time.perf_counter()
    grades = grader.drain()
    waited = time.perf_counter() - asked
    return [Graded(c, texts[i], answers.get(i), grades.get(i)) for i, c in enumerate(completions)], waited
