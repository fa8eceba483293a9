"""Attempts: the parts of a thinking that each state an answer, told apart without a model.

The authors of OverThink (arXiv 2412.21187) ask a model of 70B where solutions begin and end, SkyThought a smaller one.
Here an attempt begins at a line that opens with a word of reflection ("Wait", "Alternatively", "Let me check").
"""

import re
from bisect import bisect_left

import torch

from adaptive_reasoning.tasks.answers import boxed_answer
from adaptive_reasoning.tasks.prompts import control_token, decode

REFLECTION = re.compile(
    r"^(?=[ \t]*(?:but |oh,? |so )?(?:wait|hmm+|alternatively|let me (?:re-?|double[- ])?(?:check|verify))\b)",
    re.IGNORECASE | re.MULTILINE,
)
VALUE = re.compile(  # "= value" and "answer is value": up to a word, the end of the line or of the formula
    r"(?:=|\banswer is:?)[\s$*]*(?:\\[(\[])?\s*([^\s=][^=\n]*?)"
    r"(?=[.,;:!?*]*(?:\s+[A-Za-z(]{2}|\s*$)|\s*\$|\s*\\[)\]]|\s*=)",
    re.IGNORECASE | re.MULTILINE,
)


def split_attempts(thinking: str) -> list[tuple[str, str]]:
    """Return the attempts (text, the answer it states), whose texts add up to the thinking.

    An attempt states its last box, else its last "= value" or "answer is value". One that states nothing joins the
    next; what is left at the end states "".
    """
    attempts, text = [], ""
    for part in REFLECTION.split(thinking):
        text += part
        if answer := boxed_answer(part) or (VALUE.findall(part) or [""])[-1]:
            attempts.append((text, answer))
            text = ""
    return attempts + [(text, "")] * bool(text)


def thinking_of(tokenizer, response_ids: torch.Tensor) -> list[int]:
    """Return the token ids in front of `</think>`; all of them [T], where there is none."""
    ids, eot = response_ids.tolist(), control_token(tokenizer, "</think>")
    return ids[: ids.index(eot)] if eot in ids else ids


def cut(tokenizer, thinking: list[int], text: str) -> tuple[int, list[int]] | None:
    r"""Return (tokens to keep, ids that close the block) for a thinking that shall end with `text`, a prefix of it.

    Found by decoding prefixes, so that no token is made anew. White space behind `text` in its last token stays, and
    where it holds a newline `</think>` follows at once, else "\n</think>". None where that token goes on with anything
    else: the boundary is inside a token, and there is no cut.
    """
    text = text.rstrip()
    n = bisect_left(range(len(thinking)), True, key=lambda n: decode(tokenizer, thinking[:n], ()).startswith(text))
    behind = decode(tokenizer, thinking[:n], ())[len(text) :]
    if behind.strip():
        return None
    return n, tokenizer.encode("</think>" if "\n" in behind else "\n</think>", add_special_tokens=False)


def outcome_efficiency(lengths: list[int], correct: list[bool]) -> float:
    """Return the share of the tokens up to and with the first right attempt; 0 where none is (OverThink, Eq. 1)."""
    return sum(lengths[: correct.index(True) + 1]) / sum(lengths) if True in correct else 0.0
