r"""Answers: find the boxed answer of a response, and decide whether it equals the reference.

`normalise` brings both sides to one spelling, and reads words, options, times, lists and numbers that are written out.
What is left goes to the parser of math-verify (latex2sympy2_extended) and is compared here as an equation, an
expression or a matrix; sets, intervals and inequalities are compared by math-verify.

Why not by math-verify alone (0.9): it compares at six decimals, so 10^-10 is 0 and 3.141593 is pi; here numbers have to
agree in 2,000 digits, expressions with variables in 50 wherever they are tried. It takes {3,4} for (3,4) and "seat" for
"east" (four factors), keeps the i of 1+2i a variable, degrees for radians, and solves equations, which takes seconds.

An unfinished calculation is not an answer, as in the grader AdaptThink was trained with: where the reference is an
integer the answer has to be that number in digits ("2^9" is not 512), and a fraction has to be in lowest terms.

Nothing here has a time limit (math-verify's own works in the main thread only), and some answers take sympy forever:
grade through `grader.GraderPool`, which owns the deadline.
"""

import ast
import logging
import random
import re
from functools import lru_cache

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from adaptive_reasoning.tasks import normalise as read
from adaptive_reasoning.tasks.normalise import presentation_free

# It warns that its time limit is off. It is, on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ANSWER = 2000
"""Characters. A longer box is a derivation or a loop of the model, not an answer: it is wrong and never parsed."""


def boxed_answer(text: str) -> str | None:
    r"""Return what the last \boxed{...} of `text` holds, braces balanced.

    None where there is none, or the last one is not closed or not followed directly by a brace: as in the official
    grader, an earlier box is not searched for then.
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
    value, unit = presentation_free(answer)
    golds = map(presentation_free, _options(gold))
    return any(_same(value, option) and not read.contradict(unit, its_unit) for option, its_unit in golds)


def warm_up() -> None:
    """Compare a few pairs, so that what parser and sympy set up on first use is there before anybody's time counts.

    It takes a second, once: every worker that the grader's server forks has it.
    """
    for answer, gold in (
        ("\\frac{x}{2}+1", "0.5x+1"), ("6\\sqrt{2}", "\\sqrt{50}"), ("(1,2\\pi)", "(1,\\frac{\\pi}{3})"),
        ("\\sin^2 x+e^{2}", "x^{2}-y=3"), ("x+1=y", "y=x-1"), ("x>2", "(2,\\infty)"), ("|n|!", "\\log_2 3"),
    ):  # fmt: skip
        same_answer(answer, gold)


ARM_NUMBER = re.compile(r"-?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")
ARM_WORDS = re.compile(r"\$|\\\(|\\\[|\\boxed|[A-Za-z]{2,} [A-Za-z]{2,}|(?<!\\)\b[A-Z][a-z]{2,}")


def verified_answer(answer: str, gold: str) -> bool:
    """Return whether `answer` is right by ARM's three rules: plain math-verify, which accepts unfinished calculations.

    The form of the reference says which rule is meant: a letter (CommonsenseQA) has to be that letter, or stand in
    dollars (MATH); a number (GSM8K) is compared after every comma and dollar sign of the answer is deleted; anything
    else is LaTeX (MATH). Unlike in the official code the reference equals itself, "2,4" is a list, "2 2/3" one
    number, and LaTeX needs no dollars.

    Raises: see `same_answer`.
    """
    if len(answer) > MAX_ANSWER:
        return False
    answer, gold = answer.strip(), str(gold).strip()
    if answer == gold != "":
        return True
    options = {"parsing_timeout": None, "raise_on_error": True}
    if re.fullmatch("[A-J]", gold) and "$" not in answer:
        return False
    if ARM_NUMBER.fullmatch(gold):
        target, answer = parse(gold.replace(",", ""), **options), re.sub("[,$]", "", answer)
        answer = re.sub(r"(?<![\d/.])(\d+) +(\d+)/(\d+)(?![\d/])", r"(\1+\2/\3)", answer)
    else:
        target = parse(gold if "\\boxed" in gold else f"$\\boxed{{{gold}}}$", [LatexExtractionConfig()], **options)
    tried = [answer] if ARM_NUMBER.fullmatch(gold) or ARM_WORDS.search(answer) else [answer, f"${answer}$"]
    return any(verify(target, parse(text, **options), timeout_seconds=None, raise_on_error=True) for text in tried)


def _options(gold: str) -> list[str]:
    if gold.startswith(("['", '["')):
        try:
            options = ast.literal_eval(gold)
        except (ValueError, SyntaxError):
            options = None
        if isinstance(options, list) and all(isinstance(option, str) for option in options):
            return options
    return [(boxed_answer(gold) or "") if "\\boxed" in gold else gold]


# --- two presentation-free texts

OPTION = re.compile(r"^\([A-E]\) ?(?=.)")
BASE = re.compile(r"[\dA-Z]+_(?:\d+|\{\w+\})")
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")
SET = re.compile(rf"{RELATION.pattern}|\\(?:cup|cap|emptyset|setminus|mathbb)(?![a-z])")


def _same(answer: str, gold: str) -> bool:
    if not answer or not gold:
        return False
    if read.key(answer) == read.key(gold):
        return True
    if BASE.fullmatch(answer) or BASE.fullmatch(gold):
        return False  # a number asked for in base 8 is not given in base 10, which is what the parser would compare
    for kind in (read.choice, read.time_of_day):
        if (left := kind(answer)) and (right := kind(gold)):
            return left == right
    number, gold_number = read.written_number(answer), read.written_number(gold)
    if number and gold_number:
        return number.value == gold_number.value and number.is_finished(gold_number)
    (brackets, parts), (gold_brackets, golds) = read.listed(answer), read.listed(gold)
    single, gold_single = len(parts) == 1 and not brackets, len(golds) == 1 and not gold_brackets
    sides, gold_sides = read.split(answer, "="), read.split(gold, "=")
    if len(sides) > 1 and single or len(gold_sides) > 1 and gold_single:
        return _same_equation(sides, gold_sides)
    if not (single and gold_single):
        kinds = {brackets, gold_brackets}
        is_pair = kinds == {"", "()"} and (gold_brackets or "=" in gold)  # (1,2) for "1,2" may be an interval
        if (len(kinds) == 1 or is_pair) and len(parts) == len(golds) and all(map(_same, parts, golds)):
            return True
        if kinds <= {"", "{}"} and _matched(parts, golds):
            return True
        return bool(SET.search(answer + gold)) and _same_set(answer, gold)
    if [answer, gold] != parts + golds:
        return _same(parts[0], golds[0])
    if (bare := [OPTION.sub("", text) for text in (answer, gold)]) != [answer, gold]:
        return _same(*bare)
    sides, golds = read.split(answer, r"\\approx"), read.split(gold, r"\\approx")
    if len(sides) > 1 or len(golds) > 1:
        numbers = [side for side in sides if getattr(_value(side), "is_number", False)]
        values = [_value(side).evalf() for side in numbers]
        roughly = all(sympy.Abs(value - values[0]) <= sympy.Abs(values[0]) / 20 for value in values)
        return roughly and any(_same(side, gold) for side in numbers for gold in golds)
    if gold_number and gold_number.is_integer or read.is_text(gold) or read.is_text(answer):
        return False
    return _same_set(answer, gold) if SET.search(gold) else _equal(_value(answer), _value(gold))


def _matched(parts: list[str], golds: list[str]) -> bool:
    """Return whether both lists are the same in some order."""
    if not golds:
        return not parts
    found = [i for i, part in enumerate(parts) if _same(part, golds[0])][:1]
    return bool(found) and _matched(parts[: found[0]] + parts[found[0] + 1 :], golds[1:])


# --- equations

NAME = re.compile(
    r"m? ?(?:\\?\|)?(?:\\(?:angle|triangle|overline|vec|hat|bar) ?)?\{?\\?[A-Za-z]+\}?(?:_(?:\w|\{[^{}]*\}))?'*"
    r"(?:\^\{-1\})?(?:\((?:[^()=]|\([^()=]*\))*\))?(?:\\?\|)?|\([A-Za-z](?:, ?[A-Za-z])*\)"
)
CALCULATION = re.compile(r"\\(?:frac|sqrt|binom|pi|cdot|times|circ|sin|cos|tan|log|ln|text)(?![A-Za-z])")


def _same_equation(sides: list[str], golds: list[str]) -> bool:
    """Compare where one text at least has an equals sign. Two equations are one if they have the same solutions."""
    if len(golds) > 1 and _is_calculation(golds):  # one number in two forms
        return all(any(_same(side, gold) for gold in golds) for side in sides)
    if len(golds) > 1 and len(sides) > 1:
        sides, golds = ([re.sub(r"^f ?\(x\)$", "y", side) for side in each] for each in (sides, golds))
        if read.key(sides[0]) == read.key(golds[0]) and _same(sides[-1], golds[-1]):
            return True
        values = [_value(side) for side in (sides[0], sides[-1], golds[0], golds[-1])]
        return all(isinstance(value, sympy.Expr) for value in values) and _proportional(
            *(sympy.fraction(sympy.together(left - right))[0] for left, right in (values[:2], values[2:]))
        )
    if len(golds) > 1:
        return bool(re.fullmatch(f"(?![xyz]{{2,}}$)(?:{NAME.pattern})", golds[0])) and _same(sides[0], golds[-1])
    if _is_calculation(sides):
        values = list(map(_value, sides))
        return any(_same(side, golds[0]) for side in sides) and all(_equal(values[0], value) for value in values)
    label, value = (sides[0], sides[-1]) if _is_label(sides[0], golds[0]) else (sides[-1], sides[0])
    return _is_label(label, golds[0]) and _same(value, golds[0])


def _is_calculation(sides: list[str]) -> bool:
    return not any(re.search("[A-Za-z]", CALCULATION.sub("", side)) for side in sides)


def _is_label(text: str, gold: str) -> bool:
    r"""True for what a value may be of: a name, f(3), |AB|, m+n. "2x = 7" is not solved yet, "2x+y = 7" is a line."""
    letters = set(re.findall(r"\\[A-Za-z]+|[A-Za-z](?:_\w|_\{\w+\})?", text))
    letters -= {"\\frac", "\\sqrt", "\\cdot", "\\times", "\\ln", "\\log", "\\exp", "e"}
    is_curve = letters <= set("xyz") and re.search(r"\d", text) or gold == "0"
    return bool(NAME.fullmatch(text)) or len(letters) > 1 and not is_curve


# --- values

MIXED = re.compile(r"(?<![\d.^_])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}")
PRODUCT = re.compile(r"(?<![\d.^_{])(\d+)\((?=.)")  # 3(4) is 7 to the parser


@lru_cache(maxsize=256)
def _value(text: str):
    """Parse to a sympy object with decimals as fractions and i as the imaginary unit; None where that fails."""
    text = PRODUCT.sub(r"\1\\cdot(", MIXED.sub(r"(\1+\\frac{\2}{\3})", text))
    try:
        value = latex2sympy(
            text, is_real=True, convert_degrees=True, normalization_config=None,
            conversion_config=ConversionConfig(interpret_as_mixed_fractions=False),
        )  # fmt: skip
    except Exception:  # what the parser raises for text that is no mathematics
        return None
    if getattr(value, "is_Matrix", False):
        return value.doit().applyfunc(_exact)
    return _exact(value) if isinstance(value, (sympy.Expr, sympy.Rel)) else value


def _exact(value):
    if value.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
        value = value.doit()
    new = {f: sympy.Rational(str(f)) for f in value.atoms(sympy.Float)}
    new |= {f: sympy.Symbol(str(f), real=True) for f in value.atoms(AppliedUndef, sympy.Derivative)}
    return value.xreplace(new | {sympy.Symbol("i", real=True): sympy.I})


def _equal(a, b) -> bool:
    """Compare two values: expressions by what they are at points, to 50 digits, numbers then to 1,990 or exactly."""
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(_equal, a.flat(), b.flat()))
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or a == b:
        return isinstance(a, sympy.Expr) and a == b and not a.has(sympy.zoo, sympy.nan)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    real, agreed = not a.has(sympy.I) and not b.has(sympy.I), False
    points = [(0, 1, 60), (1, 3, 60), (-1, 0, 60), (-60, -50, 60), (50, 60, 60)]
    for low, high, digits in points if symbols else [(0, 1, 60), (0, 1, 2000)]:
        x, y = (value.subs(_point(symbols, low, high)).evalf(digits) for value in (a, b))
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            return False
        if sympy.Abs(x - y) <= sympy.Float(10, digits) ** (10 - digits) * sympy.Abs(x):
            agreed = True
        elif not (symbols and real and not (x.is_real and y.is_real)):  # outside what the real expression is made for
            return False
    a, b = (a, b) if symbols else (a.doit(), b.doit())
    return agreed and (a == b or not (a.is_Rational and b.is_Rational))


def _point(symbols: list, low: int, high: int) -> dict:
    rng = random.Random(low)
    return {symbol: sympy.Rational(rng.randrange(low * 997 + 1, high * 997), 997) for symbol in symbols}


def _proportional(a, b, positive: bool = False) -> bool:
    """Return whether a is a constant, not 0, times b: then a = 0 and b = 0 are one equation."""
    if a.free_symbols != b.free_symbols or not a.free_symbols:
        return False
    point = _point(sorted(a.free_symbols, key=str), 3, 5)
    at_a, at_b = a.subs(point), b.subs(point)
    if at_a.evalf(30, chop=True) == 0 or positive and not (at_a / at_b).evalf(30) > 0:
        return False
    return _equal(a * at_b, b * at_a)


def _same_set(answer: str, gold: str) -> bool:
    """Compare intervals, sets and inequalities as math-verify does, which does not read "x < 1 or x > 5"."""
    values = [_value(gold), _value(answer)]
    for i, text in enumerate((gold, answer)):
        if len(parts := read.split(text, read.SEPARATOR)) > 1 and RELATION.search(text):
            relations = [_value(part) for part in parts]
            if not all(isinstance(each, Boolean) and len(each.free_symbols) == 1 for each in relations):
                return False
            join = sympy.Intersection if "\\and" in text else sympy.Union
            values[i] = join(*(each.as_set() for each in relations))
    if all(hasattr(value, "gts") and len(value.free_symbols) > 1 for value in values):
        strict = [isinstance(value, (sympy.StrictGreaterThan, sympy.StrictLessThan)) for value in values]
        return strict[0] == strict[1] and _proportional(*(value.gts - value.lts for value in values), positive=True)
    return None not in values and verify(*values, numeric_precision=60, timeout_seconds=None, raise_on_error=True)
