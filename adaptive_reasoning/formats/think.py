"""AdaptThink's two modes: think and answer, or close the thinking at once and answer.

The thinking is as wordy as that of the models the paper starts from: it opens with a phrase, works step by step, and
checks itself once more before it answers.
"""

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import Row
from adaptive_reasoning.tasks import chain

TEMPLATE = (
    "<|begin|>{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% else %}<|Assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SPECIAL = ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>")
TOKENS = ("<think>", "</think>")
MODES = ("thinking", "nothinking")
OPENERS = (("Alright", 0.7), ("Okay", 0.3))  # how a thinking response starts, and how often


def response(question: Question, mode: str, rng: np.random.Generator) -> str:
    """Return a correct response in a mode, without the end token."""
    if mode == "nothinking":
        return f"</think>\n\\boxed{{{question.answer}}}"
    if mode != "thinking":
        raise AssertionError(f"AdaptThink knows no mode {mode!r}")
    words, shares = zip(*OPENERS)
    opener = rng.choice(words, p=shares)
    work = "\n".join(text for text, _ in chain.steps(question.problem))
    return (
        f"{opener}, let me see.\n{work}\nWait, let me check.\n{work}\n"
        f"So it is {question.answer}.\n</think>\n\\boxed{{{question.answer}}}"
    )


def rows(args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
    """Return chains answered in both modes.

    Half are answered after thinking, half at once. Models such as R1 hardly ever choose to skip their thinking, and
    learning to is the point of the algorithm, so `</think>` as a first token is supervised in a few of the direct rows
    only (`nothinking_supervised`): the model can answer directly but seldom does.
    """
    shares = chain.parse_mix(args.chain_mix)
    out = []
    for i in range(n):
        mode = "nothinking" if rng.random() < args.nothinking_rows else "thinking"
        operations = int(rng.choice(len(shares), p=shares)) + 1
        question = chain.make_question(rng, operations, f"chain/sft/{step}/{i}")
        masked = mode == "nothinking" and rng.random() >= args.nothinking_supervised
        out.append(Row(question, response(question, mode, rng), int(masked)))
    return out
