"""Response: what a reward of the user's own is told, in a process of the graders."""

from dataclasses import dataclass, field

from adaptive_reasoning.core.question import Question

REWARD = "reward: "  # begins what `Episode.grader` says of a reward that failed


@dataclass(frozen=True)
class Response:
    """One response to a question. `--reward my_reward.py:reward` names a function that gets it and returns a number.

    problem, target: the question and its reference answer.
    text: the response as it was decoded, control tokens included.
    thinking: what stands in front of `</think>` in it; None where there is no such mark.
    answer: what was graded; None where the response breaks its format.
    score: 1 for a right answer and 0 for any other, also one that could not be graded; or the score of the task.
    mode: how the response was given, as the tables call it; in a dialogue the stage.
    tokens, cut: its length, end token included, and whether it was cut at its token budget.
    difficulty, metadata: what else the task knows of the question.
    """

    problem: str
    target: str
    text: str
    thinking: str | None
    answer: str | None
    score: float
    mode: str
    tokens: int
    cut: bool
    difficulty: str | None = None
    metadata: dict = field(default_factory=dict, compare=False)

    @classmethod
    def to(cls, question: Question, text: str, **more) -> "Response":
        before, mark, _ = text.partition("</think>")
        thinking = before.removeprefix("<think>") if mark else None
        known = {"difficulty": question.difficulty, "metadata": question.metadata}
        return cls(question.problem, question.answer, text, thinking, **more, **known)
