r"""ARM's own scoring: how its evaluation script (TEAM-ARM/ARM @ cee2053, main_eval_list.py) reads and compares answers.

Beside the scoring of training, `strict`: no format gate; MATH and AIME fall back to the last five lines of a response
without an answer block; a response without a known tag counts as a direct answer, and a tag anywhere as its mode;
commas and dollar signs of an answer stay. Which rule compares follows from the benchmark:

    csqa, obqa   the same text, parentheses left out
    bbh          the same text; without \boxed, \text, braces and parentheses where the reference is a letter, a number
                 or a word of yes and no, whose case does not count then; 0 and 1 are False and True
    any other    math-verify

The script draws one of a question's samples; here all of them count. BBH tasks are told apart by their references.
"""

import re
from dataclasses import replace

from math_verify import LatexExtractionConfig, parse, verify

from adaptive_reasoning.run.evaluation import EvalSpec
from adaptive_reasoning.tasks.answers import MAX_ANSWER, warm_up

__all__ = ["official", "warm_up"]  # the grader's server calls the last first

LAST_LINES = ("math", "aime")  # benchmarks, by the beginning of their names
TAGS = {"COT": "cot", "CODE": "code", "LONG_COT": "long_cot"}  # in the script's order
WORDS = {"true", "false", "yes", "no", "valid", "invalid"}
OPTIONS = {"parsing_timeout": None, "raise_on_error": True}


def official_mode(text: str) -> str:
    """Return the mode whose tag stands anywhere in a response; without one it is a direct answer."""
    return next((mode for tag, mode in TAGS.items() if f"<{tag}>" in text), "direct")


def official_answer(text: str) -> str | None:
    """Return what stands from the first <ANSWER> to the last </ANSWER>; None without such a block."""
    found = re.search("<ANSWER>(.*)</ANSWER>", text, re.DOTALL)
    return found[1].strip() if found else None


def answer_or_last_lines(text: str) -> str:
    """Return the answer block, else the last five lines."""
    found = official_answer(text)
    return "\n".join(text.strip().split("\n")[-5:]) if found is None else found


def same_choice(answer: str, gold: str) -> bool:
    """Return whether the texts are equal but for parentheses."""
    return re.sub("[()]", "", answer) == re.sub("[()]", "", gold)


def same_text(answer: str, gold: str) -> bool:
    """Return whether an answer is that of a BBH task."""
    bare, target = (re.sub(r"\\boxed\{|\\text\{|[}()\\]", "", text) for text in (answer, gold))
    if target.lower() in WORDS:
        return bare.replace("0", "False").replace("1", "True").lower() == target.lower()
    if re.fullmatch(r"[A-Z]|-?\d+", target):
        return bare == target
    return answer == gold  # brackets to close, words to sort


def same_number(answer: str, gold: str) -> bool:
    """Return what math-verify says: a number is read as it stands, any other reference as LaTeX.

    Raises:
        Exception: whatever math-verify or sympy raise on input they cannot compare. May also never return.
    """
    if len(answer) > MAX_ANSWER:
        return False
    if re.fullmatch(r"-?\d+(\.\d+)?", plain := gold.replace(",", "")):
        target = parse(plain, **OPTIONS)
    else:
        boxed = gold if "\\boxed" in gold else f"$\\boxed{{{gold}}}$"
        target = parse(boxed, [LatexExtractionConfig()], **OPTIONS)
    return verify(target, parse(answer, **OPTIONS), timeout_seconds=None, raise_on_error=True)


def official(spec: EvalSpec, benchmark: str, decode) -> EvalSpec:
    """Return how ARM's script evaluates a benchmark; `decode`: response ids -> text."""
    checks = {"csqa": same_choice, "obqa": same_choice, "bbh": same_text}
    return replace(
        spec,
        mode_of=lambda ids: official_mode(decode(ids)),
        extract_answer=answer_or_last_lines if benchmark.startswith(LAST_LINES) else official_answer,
        check=next((check for name, check in checks.items() if benchmark.startswith(name)), same_number),
    )
