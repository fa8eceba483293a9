"""Thinker's dialogue on chains: a quick answer, a check of it, and where it was wrong a slow one and its summary.

Fast and Verify can be done hastily or with care, as by a model that was never trained on this dialogue:

    fast      the bare answer, or the chain worked through, for which the budget suffices on short chains only
    verify    a verdict at once, which is a guess, or after working the chain through and comparing
    slow      one operation a line, once more from the start
    summary   the same work without a word more
    qa        the baseline's only turn: one operation a line

In half of the dialogues the fast answer is wrong. It carries no loss, and what a good model says next does.

Before the dialogues, in the first part of the cold start, come drills: chains in the baseline's one turn, and comparing
digits. They stand for what a pretrained model knows; without them a fresh one does not learn the arithmetic. Comparing
stays a guess even so: what Verify learns from its reward is mostly that an answer cut at its budget is a wrong one.
"""

import numpy as np

from adaptive_reasoning.tasks import chain
from adaptive_reasoning.tasks.formats import Row
from adaptive_reasoning.tasks.question import Question

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
TEMPLATE = (
    "<|begin|>{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% else %}<|Assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
SPECIAL = ("<|begin|>", "<|end|>", USER, ASSISTANT)
TOKENS = ()
MODES = ("fast", "verify", "slow", "summary", "qa")
PROMPTS = {  # the user's turns, short as everything here
    "fast": "{q} in short",
    "verify": "right?",
    "slow": "no, step by step",
    "summary": "yes, sum up",
    "qa": "{q} step by step",
}
CAREFUL = 0.5  # share of the fast answers with work, and of the verdicts after a check
DRILLS = 0.55  # first part of the cold start: drills alone
FAST_ROWS, QA_ROWS = 0.1, 0.15  # after it: share of the rows that end with a fast answer, or are of the baseline
COMPARING, COMPARISONS = 0.2, 5  # share of the drills that compare digits, and pairs in a row of them
NOT_SUPERVISED = 1_000_000  # beyond the end of any response


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def worked(question: Question, wrong: np.random.Generator | None = None) -> tuple[str, str]:
    """Return (the chain worked through, one operation a line; its answer).

    With `wrong` one operation is missed, what follows builds on that, and the answer is a wrong one.
    """
    answer = question.answer
    text = "\n".join(line for line, _ in chain.steps(question.problem))
    while wrong is not None and answer == question.answer:
        value, lines = question.problem[0], []
        missed = wrong.integers(len(question.problem) // 2)
        for k in range(len(question.problem) // 2):
            operation = value + question.problem[2 * k + 1 : 2 * k + 3]
            slip = int(wrong.integers(1, 10)) if k == missed else 0
            value = str((chain.steps(operation)[0][1] + slip) % 10)
            lines.append(f"{operation}={value}")
        text, answer = "\n".join(lines), value
    return text, answer


def fast(question: Question, rng: np.random.Generator, right: bool = True) -> tuple[str, str]:
    """Return (a fast response, its answer)."""
    work, answer = worked(question, None if right else rng)
    return (f"{work}\n{boxed(answer)}" if rng.random() < CAREFUL else boxed(answer)), answer


def verify(question: Question, answer: str, rng: np.random.Generator) -> str:
    """Return the right verdict on an answer."""
    verdict = "Yes" if answer == question.answer else "No"
    if rng.random() >= CAREFUL:
        return boxed(verdict)
    return f"{worked(question)[0]}\n{question.answer}={answer}? {verdict}\n{boxed(verdict)}"


def response(question: Question, mode: str, rng: np.random.Generator) -> str:
    """Return a correct response in a stage, without the end token."""
    assert mode in MODES, f"Thinker knows no stage {mode!r}"
    if mode == "fast":
        return fast(question, rng)[0]
    if mode == "verify":
        return verify(question, question.answer, rng)
    return f"{worked(question)[0]}\n{boxed(question.answer)}"


def turn(stage: str) -> str:
    """Return what stands between two responses: the user's turn and the header of the next response."""
    return f"{USER}{PROMPTS[stage]}{ASSISTANT}"


def comparing(question: Question, rng: np.random.Generator) -> Row:
    """Return a row that compares digits in the words of a careful verdict, half of them equal."""
    left, other = rng.integers(0, 10, COMPARISONS), rng.integers(1, 10, COMPARISONS)
    pairs = [(a, a if rng.random() < 0.5 else (a + slip) % 10) for a, slip in zip(left, other)]
    return Row(question, "\n".join(f"{a}={b}? {'Yes' if a == b else 'No'}" for a, b in pairs), prompt="compare")


def rows(args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
    """Return drills in the first part of the cold start; then dialogues, half of them with a wrong fast answer, beside
    some rows of one turn."""
    shares = chain.parse_mix(args.chain_mix)
    drills = step <= DRILLS * args.max_steps
    out = []
    for i in range(n):
        operations = int(rng.choice(len(shares), p=shares)) + 1
        question = chain.make_question(rng, operations, f"chain/sft/{step}/{i}")
        kind = rng.random()
        if drills and kind < COMPARING:
            out.append(comparing(question, rng))
        elif drills or kind < FAST_ROWS + QA_ROWS:
            stage = "qa" if drills or kind < QA_ROWS else "fast"
            asked = PROMPTS[stage].replace("{q}", question.problem)
            out.append(Row(question, response(question, stage, rng), prompt=asked))
        else:
            right = rng.random() < 0.5
            first, answer = fast(question, rng, right)
            turns = [(turn("verify"), verify(question, answer, rng))]
            if not right:
                turns += [(turn(stage), response(question, stage, rng)) for stage in ("slow", "summary")]
            asked = PROMPTS["fast"].replace("{q}", question.problem)
            out.append(Row(question, first, 0 if right else NOT_SUPERVISED, tuple(turns), asked))
    return out
