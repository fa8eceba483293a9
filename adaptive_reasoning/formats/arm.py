"""ARM's four formats: a tag opens the rationale, and the answer stands in <ANSWER>. The tags are ordinary text.

On chains, the cheaper a format, the more of a long chain it has to do in its head:

    direct      no rationale: all operations in the head
    cot         the first two operations worked out, the others in the head
    code        a call, and the output that the model believes it has: the first four operations
    long_cot    every operation in words, and all of it once more as a check; wordy, however easy the question is
"""

import re

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import ResponseFormat, Row
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.answers import verified_answer

WRITTEN = {"cot": 2, "code": 4}  # operations that are worked out in writing; the others are done in the head
PLAIN = 0.3  # share of the cold start's steps that comes before the formats


class Arm(ResponseFormat):
    """Tags, format gate and answers of ARM (official code); the prompt ends right at the assistant's mark."""

    tags = {"direct": "ANSWER", "cot": "COT", "code": "CODE", "long_cot": "LONG_COT"}
    labels = {"direct": "Direct Answer", "cot": "Short CoT", "code": "Code", "long_cot": "Long CoT",
              "unknown": "without a known opening"}  # fmt: skip
    no_mode = "unknown"
    consensus = ("direct", "cot", "code")
    fallback = "long_cot"
    check = staticmethod(verified_answer)

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.prompt_end = prompts.check_ends_at_assistant(tokenizer)

    def mode_of(self, response_ids) -> str:
        return self.format_of(self.tokenizer.decode(list(response_ids[:16]), clean_up_tokenization_spaces=False))

    @classmethod
    def passes_gate(cls, response: str) -> bool:
        """Return whether a response opens with a tag and holds no rationale tag of another format."""
        mode = cls.format_of(response)
        others = [tag for other, tag in cls.tags.items() if other not in (mode, "direct")]
        return mode != cls.no_mode and not any(f"<{tag}>" in response or f"</{tag}>" in response for tag in others)

    @classmethod
    def extract_answer(cls, response: str) -> str | None:
        """Return the text from the first <ANSWER> to the last </ANSWER>; None without it or outside the gate."""
        start, end = response.find("<ANSWER>"), response.rfind("</ANSWER>")
        if not cls.passes_gate(response) or start < 0 or end < start:
            return None
        return response[start + len("<ANSWER>") : end].strip()

    @classmethod
    def empty_rationale(cls, response: str) -> bool | None:
        """Return whether a rationale holds nothing but "The answer is X"; None without a rationale."""
        mode = cls.format_of(response)
        if mode in ("direct", cls.no_mode):
            return None
        tag = cls.tags[mode]
        text = response[len(tag) + 2 :].split(f"</{tag}>")[0].strip()
        return not re.sub(r"^(so |thus,? |therefore,? )?the (correct |final )?answer is[^\n]*", "", text, flags=re.I)

    def opening(self, mode: str) -> tuple[int, ...]:
        """Return the tag of a format and the newline behind it."""
        return tuple(self.tokenizer.encode(f"<{self.tags[mode]}>\n", add_special_tokens=False))

    def findings(self) -> dict[str, str]:
        return {"formats": ", ".join(f"<{t}>" for t in self.tags.values()), "prompt ends in": repr(self.prompt_end)}

    # ------------------------------------------------------------------------------- the cold start on chains

    # LLaMA-Factory's template "default", which ARM is trained with: EOS and a newline follow a finished answer.
    TEMPLATE = (
        "{% for message in messages %}{% if message['role'] == 'user' %}Human: {{ message['content'] }}\n"
        "{% else %}Assistant:{{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    SPECIAL = ("<|begin|>", "<|end|>")
    TOKENS = ("Human:", "Assistant:")

    @classmethod
    def rationale(cls, question: Question, mode: str) -> str:
        """Return what stands between the tags of a format."""
        problem, steps = question.problem, chain.steps(question.problem)
        if mode == "cot":
            return " ".join(text for text, _ in steps[: WRITTEN["cot"]])
        if mode == "code":
            shown = "\n".join(text for text, _ in steps[: WRITTEN["code"]])
            return f">>> trace('{problem}')\n{shown}"
        assert mode == "long_cot", f"there is no mode {mode!r}"
        first = "\n".join(f"Now {text}." for text, _ in steps)
        check = "\n".join(f"Check: {text}, yes." for text, _ in steps)
        plan, answer = "I go from left to right and keep the last digit.", question.answer
        return (
            f"Okay, let me see. {plan}\n{first}\nWait, let me check. {plan}\n{check}\n"
            f"So it is {answer}. Wait, is it {answer}? Yes, it is {answer}."
        )

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        answer, tag = f"<ANSWER>\n{question.answer}\n</ANSWER>", cls.tags[mode]
        return answer if mode == "direct" else f"<{tag}>\n{cls.rationale(question, mode)}\n</{tag}>\n{answer}"

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return chains, each in all formats, as in the paper.

        The paper starts from a base model that can calculate. Ours starts from nothing, so it first learns to answer
        single operations and to work chains out.
        """
        if step > PLAIN * args.max_steps:
            return cls.in_every_mode(args, rng, n, step)
        known = [chain.make_question(rng, 1 if i % 4 else 1 + i // 4 % 6, f"chain/cold/{step}/{i}") for i in range(n)]
        worked = ["\n".join(text for text, _ in chain.steps(q.problem)) for q in known]
        return [Row(q, cls.response(q, "direct", rng) if i % 4 else worked[i]) for i, q in enumerate(known)]
