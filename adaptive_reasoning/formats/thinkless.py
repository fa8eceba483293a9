"""Thinkless' two modes: the first token the model writes says whether it thinks or answers at once.

The prompt ends right at the assistant's mark. `<think>` opens a thinking that goes step by step, and `</think>` closes
it before the answer; `<short>` goes straight to the answer and has no closing token. `<short>` is one of the
tokenizer's reserved tokens, renamed as for the real model.
"""

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import Row, control_slot
from adaptive_reasoning.tasks import chain

TEMPLATE = (
    "<|begin|>{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% else %}<|Assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
SLOT = "<|quad_start|>"
SPECIAL = ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>", SLOT)
TOKENS = ("<think>", "</think>")
MODES = ("think", "short")


def finish(tokenizer):
    """Return the tokenizer with the reserved token renamed to `<short>`."""
    return control_slot.rename_token(tokenizer, SLOT, "<short>")


def response(question: Question, mode: str, rng: np.random.Generator) -> str:
    """Return a correct response in a mode, without the end token."""
    assert mode in MODES, f"Thinkless knows no mode {mode!r}"
    if mode == "short":
        return f"<short>\n\\boxed{{{question.answer}}}"
    work = "\n".join(text for text, _ in chain.steps(question.problem))
    return f"<think>\nOkay, let me see.\n{work}\nSo it is {question.answer}.\n</think>\n\\boxed{{{question.answer}}}"


def rows(args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
    """Return pairs: every chain once in each mode, both in the same batch, the control token supervised like any other.

    So the model starts at half and half on every question, and the style of the text follows the token.
    """
    shares = chain.parse_mix(args.chain_mix)
    out = []
    for i in range(n):
        if i % len(MODES) == 0:
            operations = int(rng.choice(len(shares), p=shares)) + 1
            question = chain.make_question(rng, operations, f"chain/sft/{step}/{i}")
        out.append(Row(question, response(question, MODES[i % len(MODES)], rng)))
    return out
