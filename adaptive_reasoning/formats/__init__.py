"""Formats: how a response says its mode and its answer, and how a cold start teaches it; one class a file.

    form = load("arm").of(tokenizer, args)          or load("my_module.MyFormat"), a subclass of your own
    form.mode_of(response_ids), form.extract_answer(text), form.opening("cot")

A mode more is a subclass with a tag more; see docs/add_a_method.md.
"""

import importlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.run.evaluation import EvalSpec
from adaptive_reasoning.tasks import chain
from adaptive_reasoning.tasks.answers import same_answer

KNOWN = {
    "arm": "adaptive_reasoning.formats.arm.Arm",
    "boxed": "adaptive_reasoning.formats.boxed.Boxed",
    "dialogue": "adaptive_reasoning.formats.dialogue.DialogueFormat",
    "think": "adaptive_reasoning.formats.think.Think",
    "thinkless": "adaptive_reasoning.formats.thinkless.Thinkless",
}


@dataclass
class Row:
    """One supervised example.

    The loss falls on the tokens of `response` from `start` on and on its end token. In a dialogue, `turns` go on from
    there: (text between, response) each, the text as it stands in the token stream (end of turn excluded, next prompt
    and header included); loss falls on the responses and their end tokens alone.
    """

    question: Question
    response: str
    start: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    prompt: str = ""  # the user's first message, where it is not the problem itself


class ResponseFormat:
    """How a response says which mode it is in, and what its answer is.

    tags: mode -> the tag that opens it; labels: mode -> its name in tables, where it has another one.
    no_mode: what a response is that opens with no tag; empty: there is no such response.
    check: check(answer, target) -> bool, used by training and evaluation alike; a function that a grader process can
        import from its module.
    consensus, fallback: as in `EvalSpec`.
    """

    tags: ClassVar[dict[str, str]] = {}
    labels: ClassVar[dict[str, str]] = {}
    no_mode: ClassVar[str] = ""
    consensus: ClassVar[tuple[str, ...]] = ()
    fallback: ClassVar[str] = ""
    check = staticmethod(same_answer)

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer, args) -> "ResponseFormat":
        """Return the format for a tokenizer; `args` are the options of a run.

        Raises:
            UserError: the tokenizer or its chat template does not fit.
        """
        return cls(tokenizer)

    @property
    def modes(self) -> dict[str, str]:
        """Return {mode: label} in the order of the tables, that of responses without a mode last."""
        names = (*self.tags, *([self.no_mode] if self.no_mode else []))
        return {mode: self.labels.get(mode, mode) for mode in names}

    @classmethod
    def format_of(cls, response: str) -> str:
        """Return the mode whose tag a response opens with."""
        return next((mode for mode, tag in cls.tags.items() if response.startswith(f"<{tag}>")), cls.no_mode)

    def mode_of(self, response_ids) -> str:
        """Return the mode of a response from its own first tokens."""
        raise NotImplementedError

    def extract_answer(self, response: str) -> str | None:
        """Return the answer to grade; None where the response breaks the format."""
        raise NotImplementedError

    def empty_rationale(self, response: str) -> bool | None:
        """Return whether a rationale is a shell, so that its mode is a label alone; None where there is none."""
        return None

    def opening(self, mode: str) -> tuple[int, ...]:
        """Return the tokens that force a mode."""
        raise NotImplementedError

    def settings(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Return the settings of an evaluation: free, and each mode forced."""
        return {"adaptive": (), **{mode: self.surely(mode) for mode in self.tags}}

    def surely(self, mode: str) -> tuple[tuple[int, float], ...]:
        """Return the opening of a mode, each token with the probability 1."""
        return tuple((token, 1.0) for token in self.opening(mode))

    def extra_tokens(self) -> int | None:
        """Return what the paper's tables add to a response's tokens; None: they count responses."""
        return None

    def findings(self) -> dict[str, str]:
        """Return the lines of the preflight table about the format."""
        return {}

    def eval_spec(self) -> EvalSpec:
        """Return how evaluation forces and tells modes apart."""
        return EvalSpec(
            self.settings(), self.mode_of, self.extract_answer, tuple(self.modes), self.check,
            self.consensus, self.fallback,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- the cold start on chains

    TEMPLATE: ClassVar[str] = ""  # chat template of the laboratory's tokenizer
    SPECIAL: ClassVar[tuple[str, ...]] = ()  # its added tokens that mark turns
    TOKENS: ClassVar[tuple[str, ...]] = ()  # and those inside a response, which are ordinary ones

    @classmethod
    def finish(cls, tokenizer):
        """Return the laboratory's tokenizer as the format wants it."""
        return tokenizer

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        """Return a correct response in a mode, without the end token."""
        raise NotImplementedError

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return n rows of the cold start for a step."""
        raise NotImplementedError

    @classmethod
    def in_every_mode(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return chains, each answered in every mode: nothing in the prompt says which to use."""
        shares, modes, out = chain.parse_mix(args.chain_mix), tuple(cls.tags), []
        for i in range(n):
            if i % len(modes) == 0:
                operations = int(rng.choice(len(shares), p=shares)) + 1
                question = chain.make_question(rng, operations, f"chain/cold/{step}/{i}")
            out.append(Row(question, cls.response(question, modes[i % len(modes)], rng)))
        return out


def load(name: str, kind: type[ResponseFormat] = ResponseFormat) -> type[ResponseFormat]:
    """Return a format's class: by its short name, or of the user's own by "module.Class".

    Args:
        kind: what it has to be a subclass of.

    Raises:
        UserError: there is no such format, or one of another kind.
    """
    module, _, attribute = KNOWN.get(name, name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"format {name!r}: {error or 'no such format'}. Take one of {', '.join(KNOWN)}, or name a class of your "
            "own as module.Class, importable from the working directory."
        ) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(f"format {name!r}: {kind.__name__} or a subclass of it is needed here.")
    return found


def tokenizer(name: str):
    """Return the laboratory's tokenizer of a format."""
    return chain.tokenizer(load(name))
