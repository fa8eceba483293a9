"""Answers: find the boxed answer of a response, and decide whether it equals the reference.

What the model wrote is first freed of presentation (money, percent and degree signs, units, thousands commas, text
wrappers, labels like "x ="), the same on both sides. Then

- two numbers that are written out are compared exactly, as fractions (math-verify rounds to six decimals, which makes
  every number below 5e-7 equal to 0);
- words are compared as text (math-verify reads "east" as the product of four variables, so equal to "seat");
- everything else is math-verify's job.

An unfinished calculation is not an answer, as in the grader AdaptThink was trained with: where the reference is an
integer the answer has to be that number in digits ("2^9" is not 512), and a fraction has to be in lowest terms.

Nothing here has a time limit: math-verify's own uses signal.alarm, which works in the main thread only. Some answers
take sympy forever, so grade through `grader.GraderPool`, which owns the deadline.
"""

import ast
import logging
import re
from fractions import Fraction
from math import gcd
from typing import NamedTuple

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

# It warns that its time limit is off. It is, on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ANSWER = 2000
"""Characters. A longer box is a derivation or a loop of the model, not an answer: it is wrong and never parsed."""

MATH = LatexExtractionConfig(
    boxed_match_priority=-1,
    # units=False: it takes the "c" of "a + b + c" and the "t" of "2t" for units. `presentation_free` is stricter.
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    ),
)


def boxed_answer(text: str) -> str | None:
    r"""Return what the last \boxed{...} of `text` holds, braces balanced.

    None where there is no \boxed, where the last one is not closed, or where it is not followed directly by a brace:
    an earlier box is not searched for then, as in the official grader.
    """
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    start += len("\\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def same_answer(answer: str, gold: str | int | float) -> bool:
    r"""Return whether `answer` (the content of the box) equals the reference `gold`.

    `gold` may be a number, may hold its value in a \boxed{...}, and may be the text of a Python list of strings
    (Minerva): then any one of them will do. An empty answer or reference equals nothing.

    Raises:
        Exception: whatever math-verify or sympy raise on input they cannot compare. May also never return.
    """
    if len(answer) > MAX_ANSWER:
        return False
    answer, gold = answer.strip(), str(gold).strip()
    if answer == gold != "":
        return True
    return any(_same(presentation_free(answer), presentation_free(option)) for option in _options(gold))


LATEX = LatexExtractionConfig()


def warm_up() -> None:
    """Compare a few pairs, so that what parser and sympy set up on first use is there before anybody's time counts.

    It takes about a second. The grader's server does it once, and every worker it forks has it: without, each worker
    that replaces a killed one pays it again.
    """
    for answer, gold in (("\\frac{x}{2}+1", "0.5x+1"), ("6\\sqrt{2}", "\\sqrt{50}"), ("(1,2)", "(1,3)")):
        same_answer(answer, gold)


def verified_answer(answer: str, gold: str) -> bool:
    """Return whether `answer` is right by ARM's three rules: plain math-verify, which accepts unfinished calculations.

    The form of the reference says which rule is meant: a letter (CommonsenseQA) has to be that letter; a number (GSM8K)
    is compared after every comma and dollar sign of the answer is deleted; anything else is LaTeX (MATH).

    Raises:
        Exception: whatever math-verify or sympy raise on input they cannot compare. May also never return.
    """
    if len(answer) > MAX_ANSWER:
        return False
    answer, gold = answer.strip(), str(gold).strip()
    options = {"parsing_timeout": None, "raise_on_error": True}
    if re.fullmatch("[A-J]", gold):
        return answer == gold
    if re.fullmatch(r"-?[\d,]+(\.\d+)?", gold):
        target, answer = parse(gold.replace(",", ""), **options), re.sub("[,$]", "", answer)
    else:
        target = parse(gold if "\\boxed" in gold else f"$\\boxed{{{gold}}}$", [LATEX], **options)
    return verify(target, parse(answer, **options), timeout_seconds=None, raise_on_error=True)


def _options(gold: str) -> list[str]:
    if gold.startswith(("['", '["')):
        try:
            options = ast.literal_eval(gold)
        except (ValueError, SyntaxError):
            options = None
        if isinstance(options, list) and all(isinstance(option, str) for option in options):
            return options
    return [(boxed_answer(gold) or "") if "\\boxed" in gold else gold]


def _same(answer: str, gold: str) -> bool:
    """Compare two texts that are `presentation_free`."""
    if not answer or not gold:
        return False
    if _key(answer) == _key(gold):
        return True
    if BASE.fullmatch(answer) or BASE.fullmatch(gold):
        return False  # a number asked for in base 8 is not given in base 10, which is what math-verify compares
    answer, gold = _without_label(answer, gold)
    number, gold_number = written_number(answer), written_number(gold)
    if number and gold_number:
        return _same_number(number, gold_number)
    if (gold_number and gold_number.is_integer) or _is_text(gold) or _is_text(answer):
        return False
    return verify(
        parse(f"${gold}$", [MATH], parsing_timeout=None, raise_on_error=True),
        parse(f"${answer}$", [MATH], parsing_timeout=None, raise_on_error=True),
        timeout_seconds=None,
        raise_on_error=True,
    )


# --- presentation

SPACE = re.compile(r"(?<!\\)\\[!,;:]|\\q?quad\b|\\displaystyle\b|\\(?:left|right)(?![a-zA-Z])|\\?\$|\*\*")
SIGNS = re.compile(
    r"\\?%|\s*\^\s*(?:\\circ\b|\{\s*\\circ\s*\})(?: ?[CF]\b)?|\\degree\b|\u00b0(?: ?[CF]\b)?|^\\approx\b"
)
TEXT = r"\\(?:text(?:normal|rm|bf|it)?|mbox|mathrm|mathbf|mathit)\s*\{([^{}]*)\}"
POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
TEXT_UNIT = re.compile(rf"(?<![\s_^\\])\s?{TEXT}{POWER}\Z")
PLAIN_UNIT = re.compile(rf"(?<=[\d}}])( ?)([A-Za-z][A-Za-z. ]*){POWER}\Z")
NO_UNIT = set("hundred thousand million billion trillion dozen am pm and or not pi sqrt sin cos tan log ln".split())
SHORT_UNITS = set("mm cm km kg lb lbs oz ft in hr hrs sq cu".split())  # "mg" and "m" may be variables
LABEL = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+)(?:_\w|_\{\w+\})?'*(?:\([A-Za-z](?:, ?[A-Za-z])*\))? ?(?:=|\\in(?![a-z]))(.*)"
)
BASE = re.compile(r"[\dA-Z]+_(?:\d+|\{\w+\})")


def presentation_free(text: str) -> str:
    """Return `text` without what only dresses the value: see the patterns above."""
    text = re.sub(r",\s*\\!\s*|(?<=\d)\{,\}", "", text)
    text = re.sub(r"\s+", " ", re.sub(r"(?<!\\)\\ |~", " ", SPACE.sub("", text))).strip()
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text)
    if wrapped := re.fullmatch(r"\\[(\[](.*)\\[)\]]", text):
        text = wrapped[1].strip()
    text = SIGNS.sub("", text).strip().rstrip(" .,")
    while (unit := TEXT_UNIT.search(text)) and _is_unit(unit[1]) and re.search(r"\d", text[: unit.start()]):
        text = text[: unit.start()].strip().rstrip(" .,")
    text = re.sub(TEXT, r"\1", text).strip().rstrip(" .,")
    if (unit := PLAIN_UNIT.search(text)) and _is_unit(unit[2]) and written_number(text[: unit.start()]):
        words = unit[2].lower().replace(".", "").split()
        if max(map(len, words)) >= (3 if unit[1] else 4) or set(words) <= SHORT_UNITS:
            text = text[: unit.start()]
    if choice := re.fullmatch(r"\(([A-Z])\)", text):
        text = choice[1]
    return text


def _is_unit(words: str) -> bool:
    """True unless the words change the value ("3 million", "8:34 p.m.") or belong to the mathematics."""
    return not re.search(r"[\d=]", words) and not NO_UNIT & set(words.lower().replace(".", "").split())


def _without_label(answer: str, gold: str) -> tuple[str, str]:
    """Drop "x =", "f(x) =", "x \\in" where one side alone has it. "ab = 4" is an equation about a product and stays."""
    in_answer, in_gold = LABEL.fullmatch(answer), LABEL.fullmatch(gold)
    if bool(in_answer) == bool(in_gold):
        return answer, gold
    return (in_answer[1] if in_answer else answer).strip(), (in_gold[1] if in_gold else gold).strip()


def _key(text: str) -> str:
    """Return what is identical where two texts are the same answer at first sight."""
    if _is_text(text):
        return re.sub(r"[ ,.'-]+", " ", text).casefold()
    return re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"_\{(\w+)\}", r"_\1", text))


def _is_text(text: str) -> bool:
    """True for words and point names ("ABC"). Single letters and two small letters ("xy") are variables."""
    words = re.sub(r"(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})", " ", text)
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z ,.']+", words)) and not re.fullmatch(r"[a-z] ?[a-z]", words)


# --- numbers

FRACTION = re.compile(r"\\frac ?(?:\{ ?([+-]?\d+) ?\}|(\d)) ?(?:\{ ?([+-]?\d+) ?\}|(\d))")


class Number(NamedTuple):
    value: Fraction
    form: str  # "digits" (12, -0.5), "exponent" (1e3), "product" (6 \times 10^3), "fraction" (-1/2, 3 1/2)
    parts: tuple[int, int] = (0, 1)  # numerator and denominator as written

    @property
    def is_integer(self) -> bool:
        return self.form == "digits" and self.value.denominator == 1


def written_number(text: str) -> Number | None:
    """Return the number `text` spells out, or None if it is anything else (an expression, a root, a list, a word)."""
    if "\\frac" in text:
        text = FRACTION.sub(r" \1\2/\3\4", text)
    text = re.sub(r"([+-]) ", r"\1", re.sub(r" +", " ", text.strip()))
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):  # not "12,50", not "(1,250)"
        text = text.replace(",", "")
    if m := re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d{1,3}))?", text):
        return Number(Fraction(m[1]) * Fraction(10) ** int(m[2] or 0), "exponent" if m[2] else "digits")
    if m := re.fullmatch(r"(?:([+-]?\d+\.?\d*) ?(?:\\times|\\cdot|\*) ?)?10 ?\^ ?\{? ?([+-]?\d{1,3}) ?\}?", text):
        return Number(Fraction(m[1] or 1) * Fraction(10) ** int(m[2]), "product")
    if m := re.fullmatch(r"([+-]?)(?:(\d+) )?([+-]?\d+) ?/ ?([+-]?\d+)", text):
        numerator, denominator = int(m[3]), int(m[4])
        if denominator:
            value = int(m[2] or 0) + Fraction(numerator, denominator)
            return Number(-value if m[1] == "-" else value, "fraction", (numerator, denominator))
    return None


def _same_number(number: Number, gold: Number) -> bool:
    if number.value != gold.value:
        return False
    if gold.is_integer:
        return number.form in ("digits", "exponent")  # a product is left to be worked out
    return number.form != "fraction" or gcd(*number.parts) == 1 or number.parts == gold.parts
