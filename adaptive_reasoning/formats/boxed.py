"""One way of answering: the answer stands in the last \\boxed{}."""

from adaptive_reasoning.formats import ResponseFormat
from adaptive_reasoning.tasks.answers import boxed_answer, verified_answer


class Boxed(ResponseFormat):
    """Every response is in the mode "response"."""

    no_mode = "response"
    labels = {"response": "all"}
    check = staticmethod(verified_answer)

    def mode_of(self, response_ids) -> str:
        return "response"

    def extract_answer(self, response: str) -> str | None:
        return boxed_answer(response)

    def findings(self) -> dict[str, str]:
        return {"formats": "boxed"}
