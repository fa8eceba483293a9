"""Thinkless' two modes: the first token the model writes says whether it thinks or answers at once.

The prompt ends right at the assistant's mark. `<think>` opens a thinking that goes step by step, and `</think>` closes
it before the answer; `<short>` goes straight to the answer and has no closing token. A subclass may have more modes,
each with a control token of its own and no closing one. On chains a mode that is not known here works every operation
out, one a line, and answers.

`<short>` is one of the tokenizer's reserved tokens, renamed as for the real model.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import ResponseFormat
from adaptive_reasoning.tasks import chat_template, control_tokens, prompts
from adaptive_reasoning.tasks.answers import boxed_answer

SLOT = "<|quad_start|>"


@dataclass
class ThinklessArgs:
    """Options of the format."""

    mode_rule: Literal["first_token", "substring"] = "first_token"
    """Mode of the reward: "first_token" (paper; default, a printed tag is not paid), or "substring" (code): `<short>`
    anywhere."""


class Thinkless(ResponseFormat):
    """Two modes by the first token, a control token each."""

    tags = {"think": "think", "short": "short"}
    modes = {"think": "Think", "short": "Short", "malformed": "without a control token"}
    malformed, skips = "malformed", ("short",)
    Options, bias_mode = ThinklessArgs, "short"

    SPECIAL = (*ResponseFormat.SPECIAL, SLOT)
    TOKENS = ("<think>", "</think>")

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        more = (f"<{tag}>" for mode, tag in cls.tags.items() if mode not in Thinkless.tags)
        cls.TOKENS = (*Thinkless.TOKENS, *more)

    def __init__(self, tokenizer, args):
        super().__init__(tokenizer, args)
        if self.options.mode_rule == "substring" and len(self.tags) > 2:
            raise UserError(
                "--mode_rule substring: the official code's rule tells <think> and <short> apart and no other mode. "
                "Take first_token."
            )
        prompts.check_ends_at_assistant(tokenizer, chat_template.template_mend)
        self.tokens = {mode: prompts.control_token(tokenizer, f"<{tag}>") for mode, tag in self.tags.items()}
        prompts.control_token(tokenizer, "</think>")

    @classmethod
    def needed_tokens(cls) -> tuple[str, ...]:
        return ("</think>", *(f"<{tag}>" for tag in cls.tags.values()))

    @classmethod
    def format_of(cls, response: str) -> str:
        """Return the mode a response opens with, else "malformed"."""
        return next((mode for mode, tag in cls.tags.items() if response.startswith(f"<{tag}>")), "malformed")

    def mode_of(self, response_ids) -> str:
        return next((mode for mode, token in self.tokens.items() if token == response_ids[0]), "malformed")

    def extract_answer(self, response: str) -> str | None:
        """Return the last box after the thinking; None if it or the format is missing (`mode_rule`)."""
        by_rule = self.answer_by_substring if self.options.mode_rule == "substring" else self.answer_by_first_token
        return by_rule(response)

    @classmethod
    def answer_by_first_token(cls, response: str) -> str | None:
        """Return the last box of a response with one control token, in front, and one </think> if it thinks."""
        mode = cls.format_of(response)
        counts = [response.count(f"<{tag}>") for tag in cls.tags.values()]
        if counts != [int(other == mode) for other in cls.tags] or mode == "malformed":
            return None
        if response.count("</think>") != int(mode == "think"):
            return None
        return boxed_answer(response.split("</think>")[-1])

    @classmethod
    def answer_by_substring(cls, response: str) -> str | None:
        """Return the last box after the first </think>, else after the first <short>, up to a second one (code)."""
        mark = "</think>" if "<think>" in response and "</think>" in response else "<short>"
        return boxed_answer(response.split(mark)[1]) if mark in response else None

    def opening(self, mode: str) -> tuple[int, ...]:
        return (self.tokens[mode],)

    def answer_part(self, response: str, mode: str) -> str | None:
        """Return what stands behind the thinking, or behind the control token of another mode."""
        if mode == self.malformed:
            return None
        _, found, answer = response.partition("</think>" if mode == "think" else f"<{self.tags[mode]}>")
        return answer if found else None

    def hidden_in(self, response: str, mode: str) -> tuple[str, tuple[str, ...]]:
        return self.answer_part(response, mode), ("<think>", "</think>")

    def closing(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        return self.opening("think"), (prompts.control_token(self.tokenizer, "</think>"),), "\n</think>"

    def forced_settings(self) -> dict[str, str]:
        return {"never_think" if mode == "short" else f"always_{mode}": mode for mode in self.tags}

    def findings(self) -> dict[str, str]:
        return {"formats": ", ".join(f"<{self.tags[mode]}> token {token}" for mode, token in self.tokens.items())}

    def template_tokens(self) -> int:
        """Return the tokens of the template: the paper's tables count prompt and template too."""
        return prompts.template_tokens(self.tokenizer)

    # ------------------------------------------------------------------------------------------------- cold start

    @classmethod
    def finish(cls, tokenizer):
        """Return the tokenizer with the reserved token renamed to `<short>`."""
        return control_tokens.rename_token(tokenizer, SLOT, "<short>")

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        answer = f"\\boxed{{{question.answer}}}"
        if mode == "short":
            return f"<short>\n{answer}"
        work = "\n".join(question.work)
        if mode == "think":
            return f"<think>\nOkay, let me see.\n{work}\nSo it is {question.answer}.\n</think>\n{answer}"
        return f"<{cls.tags[mode]}>\n{work}\n{answer}"
