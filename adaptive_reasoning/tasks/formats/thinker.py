"""Thinker's dialogue on chains: a quick answer, a check of it, and where it was wrong a slow one and its summary.

Every stage can be done hastily or with care, as by a model that was never trained on this dialogue:

    fast      the bare answer, or terse work in strides of two operations
    verify    a verdict at once, which is a guess, or after working the chain through
    slow      one operation a line
    summary   the slow work condensed to strides: what a good fast answer would have been
    qa        the baseline's only turn: one operation a line

Half of the dialogues hold a wrong fast answer. It carries no loss, and what a good model says next does.
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
QA_ROWS = 0.15  # share of the rows for the baseline's prompt
NOT_SUPERVISED = 1_000_000  # beyond the end of any response


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def worked(question: Question) -> str:
    """Return the chain worked through, one operation a line."""
    return "\n".join(text for text, _ in chain.steps(question.problem))


def strides(question: Question, wrong: np.random.Generator | None = None) -> list[int]:
    """Return every second intermediate value; with `wrong` one of them is missed, and what follows builds on that."""
    values = [value for _, value in chain.steps(question.problem)]
    ends = list(range(1, len(values), 2)) or [len(values) - 1]
    if ends[-1] != len(values) - 1:
        ends.append(len(values) - 1)
    if wrong is None:
        return [values[i] for i in ends]
    while True:
        missed, value, out = wrong.integers(len(ends)), int(question.problem[0]), []
        for k, end in enumerate(ends):
            start = ends[k - 1] + 1 if k else 0
            value = chain.steps(str(value) + question.problem[2 * start + 1 : 2 * end + 3])[-1][1]
            if k == missed:
                value = (value + int(wrong.integers(1, 10))) % 10
            out.append(value)
        if out[-1] != values[-1]:
            return out


def terse(values: list[int]) -> str:
    return " ".join(map(str, values)) + "\n" + boxed(values[-1])


def fast(question: Question, rng: np.random.Generator, right: bool = True) -> tuple[str, str]:
    """Return (a fast response, its answer)."""
    values = strides(question, None if right else rng)
    return (terse(values) if rng.random() < CAREFUL else boxed(values[-1])), str(values[-1])


def verify(question: Question, answer: str, rng: np.random.Generator) -> str:
    """Return the right verdict on an answer."""
    verdict = boxed("Yes" if answer == question.answer else "No")
    if rng.random() >= CAREFUL:
        return verdict
    return f"{worked(question)}\nso {question.answer}, was {answer}.\n{verdict}"


def response(question: Question, mode: str, rng: np.random.Generator) -> str:
    """Return a correct response in a stage, without the end token."""
    assert mode in MODES, f"Thinker knows no stage {mode!r}"
    if mode == "fast":
        return fast(question, rng)[0]
    if mode == "verify":
        return verify(question, question.answer, rng)
    if mode == "summary":
        return terse(strides(question))
    return f"{worked(question)}\n{boxed(question.answer)}"


def turn(stage: str) -> str:
    """Return what stands between two responses: the user's turn and the header of the next response."""
    return f"{USER}{PROMPTS[stage]}{ASSISTANT}"


def rows(args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
    """Return dialogues, half of them with a wrong fast answer, and some one-turn rows for the baseline."""
    shares = chain.parse_mix(args.chain_mix)
    out = []
    for i in range(n):
        operations = int(rng.choice(len(shares), p=shares)) + 1
        question = chain.make_question(rng, operations, f"chain/sft/{step}/{i}")
        if rng.random() < QA_ROWS:
            asked = PROMPTS["qa"].format(q=question.problem)
            out.append(Row(question, response(question, "qa", rng), prompt=asked))
            continue
        right = rng.random() < 0.5
        first, answer = fast(question, rng, right)
        turns = [(turn("verify"), verify(question, answer, rng))]
        if not right:
            turns += [(turn(stage), response(question, stage, rng)) for stage in ("slow", "summary")]
        asked = PROMPTS["fast"].format(q=question.problem)
        out.append(Row(question, first, 0 if right else NOT_SUPERVISED, tuple(turns), asked))
    return out
