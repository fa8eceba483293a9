"""One mode: the answer stands in the last box of the response. On chains, every operation is worked out first."""

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import ResponseFormat
from adaptive_reasoning.tasks.answers import boxed_answer, verified_answer


class Boxed(ResponseFormat):
    """One mode, "response"."""

    modes = {"response": "all"}
    check = staticmethod(verified_answer)

    def mode_of(self, response_ids) -> str:
        return "response"

    @classmethod
    def extract_answer(cls, response: str) -> str | None:
        return boxed_answer(response)

    def findings(self) -> dict[str, str]:
        return {"formats": "boxed"}

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        return "\n".join([*question.work, f"\\boxed{{{question.answer}}}"])
