"""Thinkless' modes: the first token the model writes says whether it thinks or answers at once.

The prompt ends right at the assistant's mark. `<think>` opens a thinking that goes step by step, and `</think>` closes
it before the answer; `<short>` goes straight to the answer and has no closing token. `<short>` is one of the
tokenizer's reserved tokens, renamed as for the real model.
"""

from typing import ClassVar

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import ResponseFormat, Row, control_slot
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.answers import boxed_answer

MALFORMED = "malformed"


class Thinkless(ResponseFormat):
    """A control token for every mode. A subclass with one more tag has one more mode.

    Args:
        mode_rule: what decides where the answer is read: "first_token" (paper), or "substring" (official code).
    """

    tags = {"think": "think", "short": "short"}  # one token each, and </think>
    labels = {"think": "Think", "short": "Short", MALFORMED: "without a control token"}
    no_mode = MALFORMED

    def __init__(self, tokenizer, mode_rule: str = "first_token"):
        super().__init__(tokenizer)
        prompts.check_ends_at_assistant(tokenizer)
        self.mode_rule = mode_rule
        self.tokens = {mode: prompts.control_token(tokenizer, f"<{tag}>") for mode, tag in self.tags.items()}
        prompts.control_token(tokenizer, "</think>")

    def mode_of(self, response_ids) -> str:
        return next((mode for mode, token in self.tokens.items() if token == response_ids[0]), MALFORMED)

    def extract_answer(self, response: str) -> str | None:
        return self.read(response, self.mode_rule)

    @classmethod
    def read(cls, response: str, mode_rule: str = "first_token") -> str | None:
        """Return the last box after the thinking; None if it or the format is missing.

        "substring" (official code): after the first </think>, else after the first <short>, up to a second one.
        """
        if mode_rule == "substring":
            mark = "</think>" if "<think>" in response and "</think>" in response else "<short>"
            return boxed_answer(response.split(mark)[1]) if mark in response else None
        mode = cls.format_of(response)
        found = {other: response.count(f"<{tag}>") for other, tag in cls.tags.items()}
        right = {other: int(other == mode) for other in cls.tags}
        if mode == MALFORMED or found != right or response.count("</think>") != (mode == "think"):
            return None
        return boxed_answer(response.split("</think>")[-1])

    def opening(self, mode: str) -> tuple[int, ...]:
        return (self.tokens[mode],)

    def settings(self) -> dict[str, tuple[tuple[int, float], ...]]:
        names = {"think": "always_think", "short": "never_think"}
        return {"adaptive": (), **{names.get(mode, f"always_{mode}"): self.surely(mode) for mode in self.tags}}

    def extra_tokens(self) -> int:
        return prompts.template_tokens(self.tokenizer)  # the paper counts prompt and template too

    def findings(self) -> dict[str, str]:
        return {"formats": ", ".join(f"<{self.tags[mode]}> token {token}" for mode, token in self.tokens.items())}

    # ------------------------------------------------------------------------------- the cold start on chains

    TEMPLATE = (
        "<|begin|>{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
        "{% else %}<|Assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    )
    SLOTS: ClassVar[dict[str, str]] = {"short": "<|quad_start|>"}  # mode -> the reserved token that is renamed
    SPECIAL = ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>", "<|quad_start|>")
    TOKENS = ("<think>", "</think>")

    @classmethod
    def finish(cls, tokenizer):
        """Return the tokenizer with the reserved tokens renamed to the control tokens."""
        for mode, slot in cls.SLOTS.items():
            tokenizer = control_slot.rename_token(tokenizer, slot, f"<{cls.tags[mode]}>")
        return tokenizer

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        answer = f"\\boxed{{{question.answer}}}"
        if mode != "think":
            return f"<{cls.tags[mode]}>\n{answer}"
        work = "\n".join(text for text, _ in chain.steps(question.problem))
        return f"<think>\nOkay, let me see.\n{work}\nSo it is {question.answer}.\n</think>\n{answer}"

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return every chain once in each mode, in the same batch, the control token supervised like any other.

        So the model starts with equal shares on every question, and the style of the text follows the token.
        """
        return cls.in_every_mode(args, rng, n, step)
