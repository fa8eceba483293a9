r"""Lenient scoring: how Thinkless' evaluation scripts read and compare answers, to put our numbers beside the paper's.

Strict scoring is that of training: a well-formed response, the last box of the body, `answers.same_answer`. Lenient
scoring takes the last box anywhere, inside an unfinished thinking too, then other places an answer may stand in, and
calls two answers equal whose first numbers are ("3/4" and "3/5" pass, and so do "-3" and "3", "1,000" and "1,200").
AIME has a script of its own: the last box, else what follows "final answer", else the last number, as a float.

Where the numbers are not equal the scripts ask PRM800K's grader; here that is `same_answer`.
"""

import math
import re

from adaptive_reasoning.tasks.answers import boxed_answer, same_answer, warm_up

__all__ = ["aime_answer", "lenient_answer", "lenient_same", "warm_up"]  # the grader's server calls the last first

NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")  # the authors' pattern: a sign counts in front of decimals alone
PLACES = (r"<answer>(.*?)</answer>", r"\*\*(?:Final )?Answer:?\*\*:?\s*([^\n]+)")
AIME_BOX = re.compile(r"\\boxed\{([^}]*)\}")
AIME_PLACE = re.compile(r"final answer\W+?(?:is\W+?)?([-+]?\d+(?:\.\d+)?)", re.IGNORECASE)


def lenient_answer(response: str) -> str | None:
    """Return the last box, else what <answer> holds, else what follows **Answer:**, else the last number."""
    boxed = boxed_answer(response)
    if boxed is not None:
        return boxed
    for place in PLACES:
        if found := re.findall(place, response, re.DOTALL | re.IGNORECASE):
            return found[-1].strip()
    numbers = NUMBER.findall(response)
    return numbers[-1] if numbers else None


def aime_answer(response: str) -> str | None:
    """Return the answer as a decimal number, None where what stands there is no float ("\\frac{1}{2}").

    Written out with nine decimals, so that `lenient_same` compares it as the authors compare floats, sign included.
    """
    found = next((f for place in (AIME_BOX, AIME_PLACE, NUMBER) if (f := place.findall(response))), [""])
    try:
        value = float(found[-1])
    except ValueError:
        return None
    return f"{value:.9f}" if math.isfinite(value) else None


def lenient_same(answer: str, gold: str) -> bool:
    """Return whether the answers are equal, or at least the first numbers in them."""
    first = [NUMBER.search(str(text)) for text in (answer, gold)]
    if all(first) and abs(float(first[0][0]) - float(first[1][0])) < 1e-6:
        return True
    return same_answer(answer, gold)
