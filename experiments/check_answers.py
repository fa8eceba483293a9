"""Try the grader on known cases and on the references of real data sets, and print one table.

    python experiments/check_answers.py --data FOLDER    1,500 references; without --data (or ADAPTIVE_REASONING_DATA)
                                                         the cases alone

Cases: tests/golden/answer_cases.jsonl, beside plain math-verify. References of GSM8K, MATH-500, AIME, AMC, Minerva and
MATH: against themselves, against those of other questions, written in other ways, and with one digit, sign or root
changed. Everything goes through a GraderPool. Ends with 1 if a verdict is wrong or an answer passed its deadline.
"""

import argparse
import json
import os
import random
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the workers import this file by its name

from math_verify import parse, verify

from adaptive_reasoning.errors import UserError, run_cli
from adaptive_reasoning.report.console import aligned
from adaptive_reasoning.tasks.answers import _options, same_answer, verified_answer, warm_up
from adaptive_reasoning.tasks.grader import GraderPool

__all__ = ["plain", "warm_up"]  # what a worker looks for in this module

CASES = Path(__file__).parent.parent / "tests" / "golden" / "answer_cases.jsonl"
SETS = ("gsm8k_test", "math500_test", "aime24_test", "aime25_test", "amc_test", "minerva_test", "math_train")
WHOSE = ("ours right", "theirs right", "taste")
NUMBER = r"-?\d+(\.\d+)?"


def plain(answer: str, gold: str) -> bool:
    """Grade as a user of math-verify does who calls parse and verify."""
    options = {"parsing_timeout": None, "raise_on_error": True}
    return verify(parse(f"${gold}$", **options), parse(f"${answer}$", **options), timeout_seconds=None)


def number(text: str, new: str) -> str:
    return new.format(text) if re.fullmatch(NUMBER, text) else text


WAYS = {  # of writing an answer; where one changes nothing the answer is not counted
    "spaces inside the box": lambda a: f" {a} ",
    "dollars": lambda a: f"${a}$",
    "two dollars": lambda a: f"$${a}$$",
    "\\( \\)": lambda a: f"\\({a}\\)",
    "\\[ \\]": lambda a: f"\\[ {a} \\]",
    "\\displaystyle": lambda a: f"\\displaystyle {a}",
    "\\dfrac": lambda a: a.replace("\\frac", "\\dfrac"),
    "\\tfrac": lambda a: a.replace("\\frac", "\\tfrac"),
    "\\frac12": lambda a: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", a),
    "1/2": lambda a: re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", a),
    "\\left( \\right)": lambda a: re.sub(r"^\((.*)\)$", r"\\left(\1\\right)", a) if "\\left" not in a else a,
    "period": lambda a: f"{a}.",
    "thin space": lambda a: f"{a}\\,",
    "no spaces": lambda a: re.sub(r"(?<=[,+=\d}-]) +(?=[-\d\\(+=])", "", a) if "\\ " not in a else a,
    "\\text": lambda a: re.sub(r"^[A-Za-z]+( [A-Za-z]+)*$", r"\\text{\g<0>}", number(a, "\\text{{{}}}")),
    "\\mathbf": lambda a: number(a, "\\mathbf{{{}}}"),
    "\\color": lambda a: number(a, "\\color{{red}}{{{}}}"),
    "bold markdown": lambda a: f"**{a}**",
    "braces": lambda a: number(a, "{{{}}}"),
    "thousands": lambda a: f"{int(a):,}" if re.fullmatch(r"-?\d{4,}", a) else a,
    "{,}": lambda a: f"{int(a):,}".replace(",", "{,}") if re.fullmatch(r"-?\d{4,}", a) else a,
    "unicode minus": lambda a: a.replace("-", "\u2212"),
    "unicode \u03c0 \u221a \u221e": lambda a: re.sub(r"\\sqrt\{(\d+)\}", "\u221a\\1", re.sub(
        r"\\(pi|infty)(?![A-Za-z])", lambda m: {"pi": "\u03c0", "infty": "\u221e"}[m[1]], a)),
    "label": lambda a: number(a, "x = {}"),
    "unit": lambda a: number(a, "{} \\text{{ cm}}^2"),
    "dollar sign": lambda a: number(a, "\\${}"),
    "decimal zeros": lambda a: re.sub(r"^-?\d+$", r"\g<0>.0", a),
}  # fmt: skip


def really_different(a: str, b: str) -> bool:
    """Whether two references are neither the same text nor the same number, seen without the grader's own functions."""
    a, b = (
        re.sub(r"(?<=.)\\(?:text|mbox)\{[^{}]*\}|\\text(?=\{)|\\[%$]|\^\{?\\circ\}?|\\left|\\right|\\!|\s", "", text)
        for text in (a, b)
    )
    values = []
    for text in (a, b):
        text = re.sub(r"\\d?frac\{?(\d+?)\}?\{?(\d+)\}?$", r"\1/\2", text).replace(",", "")
        found = re.fullmatch(r"(-?[\d.]+)(?:/(\d+))?", text)
        values.append(float(found[1]) / float(found[2] or 1) if found else None)
    if None not in values:
        return abs(values[0] - values[1]) > 1e-9 * max(map(abs, values))
    a, b = (text if len(text) > 1 else text.lower() for text in (a, b))  # B and b are one choice
    return re.sub(r"[{}]|^[a-z]=", "", a) != re.sub(r"[{}]|^[a-z]=", "", b)


def harmed(gold: str, rng: random.Random) -> str | None:
    """Return `gold` with one digit, the first sign or a root changed; None where there is nothing to change."""
    found = list(re.finditer(r"\d", gold))
    kinds = ["digit"] * bool(found) + ["root"] * ("\\sqrt{" in gold) + ["sign"] * bool(re.match(r"-?[\d\\(\[]", gold))
    if not kinds or gold in ("0", "\\pm"):
        return None
    kind = rng.choice(kinds)
    if kind == "root":
        return gold.replace("\\sqrt{", rng.choice(("\\sqrt[3]{", "{")), 1)
    if kind == "sign" and "\\pm" not in gold and not gold.startswith(("\\text", "\\begin", "\\{", "(", "[")):
        return gold[1:] if gold[0] == "-" else "-" + gold
    if not found:
        return None
    at = rng.choice(found).start()
    return gold[:at] + rng.choice([d for d in "123456789" if d != gold[at]]) + gold[at + 1 :]


def references(folder: Path, n: int) -> list[str]:
    """Return n references: all of the test sets up to their share, the rest from MATH's training set."""
    golds: list[str] = []
    for name in SETS:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is missing. Name the folder of the data sets with --data.")
        rows = [str(json.loads(line)["answer"]) for line in path.read_text(encoding="utf-8").splitlines()]
        share = max(0, n - len(golds)) if name == "math_train" else n // 5
        golds += random.Random(0).sample(rows, min(len(rows), share))
    return golds


def trials(golds: list[str]) -> list[tuple[str, str, str, bool]]:
    """Return (what, answer, gold, right?) of everything that is tried on references."""
    rng = random.Random(1)
    tried = [("themselves", gold, gold, True) for gold in golds]
    for other, gold in zip(rng.sample(golds, len(golds)), golds):
        if all(really_different(_options(other)[0], option) for option in _options(gold)):
            tried.append(("those of other questions", _options(other)[0], gold, False))
    for gold in golds:
        option = _options(gold)[0].strip()
        tried += [
            (f"written: {way}", new, gold, True) for way, write in WAYS.items() if (new := write(option)) != option
        ]
        if len(_options(gold)) == 1 and (new := harmed(option, rng)):
            tried.append(("one digit, sign or root changed", new, gold, False))
    return tried


def graded(jobs: list[tuple[str, str, str, bool]], check, args) -> list:
    with GraderPool(args.workers, args.timeout, check) as pool:
        for i, (_, answer, gold, _) in enumerate(jobs):
            pool.submit(answer, gold, i)
        return list(pool.drain().values())


def report(jobs: list, grades: list, show: bool = True) -> bool:
    """Print a row for each `what`, then the wrong verdicts; return whether there are any."""
    rows: dict[str, list[int]] = {}
    for (what, *_, right), grade in zip(jobs, grades):
        row = rows.setdefault(what, [0, 0, 0])
        row[0] += 1
        row[1] += grade.correct == right
        row[2] += grade.status == "timeout"
    print(aligned([["answers", "n", "right", "late"], *([what, *map(str, row)] for what, row in rows.items())]))
    wrong = [(job, grade) for job, grade in zip(jobs, grades) if grade.correct != job[3] or grade.status == "timeout"]
    for (what, answer, gold, right), grade in wrong if show else []:
        print(f"  {what}: gold {gold}   answer {answer}   should be {'right' if right else 'wrong'} [{grade.status}]")
    return bool(wrong)


def official(args) -> bool:
    """Print how often the grader AdaptThink was trained with agrees, and who is right where it does not."""
    named = json.loads((CASES.parent / "answer_differences.json").read_text())
    cases = json.loads((CASES.parent / "adaptthink_reward.json").read_text())["cases"]
    found = [case for case in cases if case["expected"]["extracted"] is not None]
    jobs = [("", case["expected"]["extracted"], case["inputs"]["gold"], True) for case in found]
    grades = dict(zip((case["name"] for case in found), graded(jobs, same_answer, args)))
    verdicts = {c["name"]: c["name"] in grades and grades[c["name"]].correct for c in cases}
    different = {case["name"] for case in cases if verdicts[case["name"]] != bool(case["expected"]["reward"])}
    counts = {whose: sum(named[name][0] == whose for name in different & set(named)) for whose in WHOSE}
    print(
        f"official grader of AdaptThink: {len(cases) - len(different)} agree, {counts}, new: {different - set(named)}"
    )
    return different != set(named) or counts["theirs right"] > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=os.environ.get("ADAPTIVE_REASONING_DATA", ""), help="folder with the data sets"
    )
    parser.add_argument("--golds", type=int, default=1500, help="references tried")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds an answer may take")
    parser.add_argument("--cases", default=str(CASES), help="JSONL file of cases")
    args = parser.parse_args()
    from check_answers import plain as importable  # by the module's name: a worker cannot import __main__

    cases = [json.loads(line) for line in Path(args.cases).read_text(encoding="utf-8").splitlines()]
    own, arm = (
        [("cases", c["answer"], c["gold"], c["right"]) for c in cases if c["area"] == area]
        for area in ("grader", "arm")
    )
    failed = report(own, graded(own, same_answer, args))
    failed |= report([("ARM's rule", *job[1:]) for job in arm], graded(arm, verified_answer, args))
    report([("plain math-verify", *job[1:]) for job in own], graded(own, importable, args), show=False)
    failed |= official(args)
    if args.data:
        jobs = trials(references(Path(args.data), args.golds))
        grades = graded(jobs, same_answer, args)
        failed |= report(jobs, grades)
        seconds = sorted(grade.seconds for grade in grades)
        print(
            f"{len(jobs):,} answers: median {1e3 * statistics.median(seconds):.2f} ms, "
            f"95 of 100 within {1e3 * seconds[len(seconds) * 95 // 100]:.1f} ms, longest {seconds[-1]:.2f} s"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_cli(main))
