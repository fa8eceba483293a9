"""Thinker's dialogue on chains: a quick answer, a check of it, and where it was wrong a slow one and its summary.

    fast      the bare answer: a single operation is known by heart, a longer chain is mostly a guess
    verify    a verdict at once, which is a guess, or after working the chain through and subtracting the fast answer
    slow      one operation a line, once more from the start
    summary   the same work without a word more
    qa        the baseline's only turn: one operation a line

In half of the dialogues the fast answer is wrong. It carries no loss, and what a good model says next does.

Before the dialogues, in the first part of the cold start, come single operations answered at once and chains in the
baseline's one turn. They stand for what a pretrained model knows: one that meets everything at once learns neither the
arithmetic nor the dialogue. For the same reason the check is a subtraction, which it knows, and not a comparison of two
digits, which it would have to learn (experiments/LOG.md).
"""

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import Row
from adaptive_reasoning.tasks import chain

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
CAREFUL = 0.5  # share of the verdicts after a check
SINGLE = 0.4  # share of the drills that are single operations, answered at once
DRILLS = 0.5  # first part of the cold start: arithmetic alone
FAST_ROWS, QA_ROWS = 0.1, 0.15  # after it: share of the rows that end with a fast answer, or are of the baseline
NOT_SUPERVISED = 1_000_000  # beyond the end of any response


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def worked(question: Question) -> str:
    """Return the chain worked through, one operation a line."""
    return "\n".join(line for line, _ in chain.steps(question.problem))


def fast(question: Question, rng: np.random.Generator, right: bool = True) -> str:
    """Return the answer of a fast response, right or another digit."""
    return question.answer if right else str((int(question.answer) + rng.integers(1, 10)) % 10)


def verify(question: Question, answer: str, rng: np.random.Generator) -> str:
    """Return the right verdict on an answer."""
    verdict = "Yes" if answer == question.answer else "No"
    if rng.random() >= CAREFUL:
        return boxed(verdict)
    check = f"{question.answer}-{answer}={(int(question.answer) - int(answer)) % 10}"
    return f"{worked(question)}\n{check}\n{boxed(verdict)}"


def response(question: Question, mode: str, rng: np.random.Generator) -> str:
    """Return a correct response in a stage, without the end token."""
    assert mode in MODES, f"Thinker knows no stage {mode!r}"
    if mode == "fast":
        return boxed(fast(question, rng))
    if mode == "verify":
        return verify(question, question.answer, rng)
    return f"{worked(question)}\n{boxed(question.answer)}"


def turn(stage: str) -> str:
    """Return what stands between two responses: the user's turn and the header of the next response."""
    return f"{USER}{PROMPTS[stage]}{ASSISTANT}"


def rows(args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
    """Return arithmetic in the first part of the cold start; then dialogues, half of them with a wrong fast answer,
    beside some rows of one turn."""
    shares = chain.parse_mix(args.chain_mix)
    drills = step <= DRILLS * args.max_steps
    out = []
    for i in range(n):
        operations = int(rng.choice(len(shares), p=shares)) + 1
        question = chain.make_question(rng, operations, f"chain/sft/{step}/{i}")
        kind = rng.random()
        if drills and kind < SINGLE:
            question = chain.make_question(rng, 1, question.id)
            asked = PROMPTS["fast"].replace("{q}", question.problem)
            out.append(Row(question, response(question, "fast", rng), prompt=asked))
        elif drills or kind < FAST_ROWS + QA_ROWS:
            stage = "qa" if drills or kind < QA_ROWS else "fast"
            asked = PROMPTS[stage].replace("{q}", question.problem)
            out.append(Row(question, response(question, stage, rng), prompt=asked))
        else:
            right = rng.random() < 0.5
            answer = fast(question, rng, right)
            turns = [(turn("verify"), verify(question, answer, rng))]
            if not right:
                turns += [(turn(stage), response(question, stage, rng)) for stage in ("slow", "summary")]
            asked = PROMPTS["fast"].replace("{q}", question.problem)
            out.append(Row(question, boxed(answer), 0 if right else NOT_SUPERVISED, tuple(turns), asked))
    return out
