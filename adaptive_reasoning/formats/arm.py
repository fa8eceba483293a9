"""ARM's four formats on chains. The cheaper a format, the more of a long chain it has to do in its head.

The layout is that of the paper's responses: a tag opens the rationale, and the answer stands in <ANSWER>.

    direct      no rationale: all operations in the head
    cot         the first two operations worked out, the others in the head
    code        a call, and the output that the model believes it has: the first four operations
    long_cot    every operation in words, and all of it once more as a check; wordy, however easy the question is
"""

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import Row
from adaptive_reasoning.tasks import chain

# LLaMA-Factory's template "default", which ARM is trained with: EOS and a newline follow a finished answer.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Human: {{ message['content'] }}\n"
    "{% else %}Assistant:{{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIAL = ("<|begin|>", "<|end|>")
TOKENS = ("Human:", "Assistant:")  # the tags are ordinary text
MODES = ("direct", "cot", "code", "long_cot")
WRITTEN = {"cot": 2, "code": 4}  # operations that are worked out in writing; the others are done in the head
PLAIN = 0.3  # share of the cold start's steps that comes before the formats


def rationale(question: Question, mode: str) -> str:
    """Return what stands between the tags of a format."""
    problem, steps = question.problem, chain.steps(question.problem)
    if mode == "cot":
        return " ".join(text for text, _ in steps[: WRITTEN["cot"]])
    if mode == "code":
        shown = "\n".join(text for text, _ in steps[: WRITTEN["code"]])
        return f">>> trace('{problem}')\n{shown}"
    first = "\n".join(f"Now {text}." for text, _ in steps)
    check = "\n".join(f"Check: {text}, yes." for text, _ in steps)
    plan, answer = "I go from left to right and keep the last digit.", question.answer
    return (
        f"Okay, let me see. {plan}\n{first}\nWait, let me check. {plan}\n{check}\n"
        f"So it is {answer}. Wait, is it {answer}? Yes, it is {answer}."
    )


def response(question: Question, mode: str, rng: np.random.Generator) -> str:
    """Return a correct response in a format, without the end token."""
    assert mode in MODES, f"ARM knows no format {mode!r}"
    answer = f"<ANSWER>\n{question.answer}\n</ANSWER>"
    if mode == "direct":
        return answer
    return f"<{mode.upper()}>\n{rationale(question, mode)}\n</{mode.upper()}>\n{answer}"


def rows(args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
    """Return chains, each in all four formats, as in the paper: nothing in the prompt says which to use.

    The paper starts from a base model that can calculate. Ours starts from nothing, so it first learns to answer single
    operations and to work chains out.
    """
    if step <= PLAIN * args.max_steps:
        known = [chain.make_question(rng, 1 if i % 4 else 1 + i // 4 % 6, f"chain/sft/{step}/{i}") for i in range(n)]
        worked = ["\n".join(text for text, _ in chain.steps(q.problem)) for q in known]
        return [Row(q, response(q, "direct", rng) if i % 4 else worked[i]) for i, q in enumerate(known)]
    shares = chain.parse_mix(args.chain_mix)
    out = []
    for i in range(n):
        if i % len(MODES) == 0:
            operations = int(rng.choice(len(shares), p=shares)) + 1
            question = chain.make_question(rng, operations, f"chain/sft/{step}/{i}")
        out.append(Row(question, response(question, MODES[i % len(MODES)], rng)))
    return out
