"""Formats: in which words a method's cold start answers an arithmetic chain; one file a method.

A format file has
    TEMPLATE                chat template of the laboratory's tokenizer
    SPECIAL, TOKENS         added tokens: marks of a turn (special), and marks inside a response (ordinary)
    MODES                   ways of answering
    response(question, mode, rng)       a correct response, without the end token
    rows(args, rng, n, step)            n rows of the cold start
and may have
    finish(tokenizer)       what is done to the tokenizer once it is trained
"""

import importlib
from dataclasses import dataclass
from types import ModuleType

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.tasks import chain

NAMES = ("think", "arm", "thinkless", "dialogue")


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


def load(name: str) -> ModuleType:
    """Return the module of a format."""
    assert name in NAMES, f"there is no format {name!r}"
    return importlib.import_module(f"adaptive_reasoning.formats.{name}")


def tokenizer(name: str):
    """Return the laboratory's tokenizer of a format."""
    return chain.tokenizer(load(name))
