"""ARM's four formats on chains, from cheap to dear: at once, in two-operation strides, as a program, step by step.

The layout is that of the paper's responses: a tag opens the rationale, and the answer stands in <ANSWER>. The cheaper
formats have more to do in one go, so they are right less often on long chains:

    direct      no rationale
    cot         terse: every second intermediate value is skipped
    code        a program with one line an operation, and the output the model believes it has
    long_cot    one operation a line, then the same once more as a check
"""

import numpy as np

from adaptive_reasoning.tasks import chain
from adaptive_reasoning.tasks.formats import Row
from adaptive_reasoning.tasks.question import Question

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Human: {{ message['content'] }}\n"
    "{% else %}Assistant:{{ message['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIAL = ("<|begin|>", "<|end|>")
TOKENS = ()  # the tags are ordinary text
MODES = ("direct", "cot", "code", "long_cot")


def rationale(question: Question, mode: str) -> str:
    """Return what stands between the tags of a format."""
    steps = chain.steps(question.problem)
    if mode == "cot":
        values = [value for _, value in steps]
        return " ".join(str(value) for value in values[1::2]) or str(values[-1])
    if mode == "code":
        lines = "\n".join(f" x=x{question.problem[i : i + 2]}" for i in range(1, len(question.problem), 2))
        values = ",".join(str(value) for _, value in steps)
        return (
            f"def f():\n x={question.problem[0]}\n{lines}\n return {{'answer':x%10}}\n\n>>> f()\n\n"
            f"output = {{'steps':[{values}],'answer':{question.answer}}}"
        )
    work = "\n".join(text for text, _ in steps)
    return f"Okay, let me see.\n{work}\nWait, let me check.\n{work}\nSo it is {question.answer}."


def response(question: Question, mode: str, rng: np.random.Generator) -> str:
    """Return a correct response in a format, without the end token."""
    assert mode in MODES, f"ARM knows no format {mode!r}"
    answer = f"<ANSWER>\n{question.answer}\n</ANSWER>"
    if mode == "direct":
        return answer
    return f"<{mode.upper()}>\n{rationale(question, mode)}\n</{mode.upper()}>\n{answer}"


def rows(args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
    """Return chains, each in all four formats, as in the paper: nothing in the prompt says which to use."""
    shares = chain.parse_mix(args.chain_mix)
    out = []
    for i in range(n):
        if i % len(MODES) == 0:
            operations = int(rng.choice(len(shares), p=shares)) + 1
            question = chain.make_question(rng, operations, f"chain/sft/{step}/{i}")
        out.append(Row(question, response(question, MODES[i % len(MODES)], rng)))
    return out
