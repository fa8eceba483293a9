"""Thinkless' two modes on a hybrid template (Qwen3): its own first tokens are the control tokens, none is added.

The prompt ends where the template's two openings part (`tasks/think_template.py`). The first token of the Thinking
opening stands for `<think>`, that of NoThinking for `<short>`; a response that begins with neither opening, whole, is
malformed. A warm-up on pairs (`sft` with rows of `problem`, `thinking` and `answer`) comes before: a model that hardly
ever skips its thinking has no short answer to learn from.
"""

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import ResponseFormat
from adaptive_reasoning.formats.thinkless import Thinkless


class Native(Thinkless):
    """Two modes by the opening of a hybrid template."""

    chooses = True
    response = ResponseFormat.response  # no cold start on chains, whose template has no switch
    template_tokens, closing = ResponseFormat.template_tokens, ResponseFormat.closing

    def __init__(self, tokenizer, args):
        ResponseFormat.__init__(self, tokenizer, args)
        if self.options.mode_rule == "substring":
            raise UserError("--mode_rule substring: looks for <short>, which no template writes. Take first_token.")
        if not self.template.thinking:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} has no token that chooses to think: behind the "
                "prompt anything but the closing of the block is thinking. AdaptThink takes it; or give --control slot."
            )
        self.openings = {"think": self.template.thinking, "short": self.template.nothinking}
        self.tokens = {mode: ids[0] for mode, ids in self.openings.items()}

    def mode_of(self, response_ids) -> str:
        begun = (mode for mode, ids in self.openings.items() if tuple(map(int, response_ids[: len(ids)])) == ids)
        return next(begun, self.malformed)

    def extract_answer(self, response: str) -> str | None:
        return self.template.answer(response)

    def opening(self, mode: str) -> tuple[int, ...]:
        return self.openings[mode]

    def answer_part(self, response: str, mode: str) -> str | None:
        return None if mode == self.malformed else self.template.answer_part(response, mode in self.skips)

    def hidden_in(self, response: str, mode: str) -> tuple[str, tuple[str, ...]]:
        return self.answer_part(response, mode), self.template.tags

    def findings(self) -> dict[str, str]:
        return {}
