"""ARM's four formats: a tag opens the rationale, and the answer stands in <ANSWER>. Tags are ordinary text.

On chains and stories, the cheaper a mode, the more of a long one it has to do in its head:

    direct      no rationale: all operations in the head
    cot         the first two operations worked out, the others in the head
    code        a call, and the output that the model believes it has: the first four operations
    long_cot    every operation in words, and all of it once more as a check; wordy, however easy the question is
    any other   (of a subclass) every operation, one a line
"""

import re
from os.path import commonprefix

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import ResponseFormat, Row
from adaptive_reasoning.tasks import chain, chat_template, prompts
from adaptive_reasoning.tasks.answers import verified_answer

WRITTEN = {"cot": 2, "code": 4}  # operations that are worked out in writing; the others are done in the head
PLAIN = 0.3  # share of the cold start's steps that comes before the formats


class Arm(ResponseFormat):
    """Four modes by the tag a response opens with."""

    tags = {"direct": "ANSWER", "cot": "COT", "code": "CODE", "long_cot": "LONG_COT"}  # several tokens each
    modes = {
        "direct": "Direct Answer",
        "cot": "Short CoT",
        "code": "Code",
        "long_cot": "Long CoT",
        "unknown": "without a known opening",
    }
    malformed = "unknown"
    check, bias_mode = staticmethod(verified_answer), "long_cot"
    skips = ("direct", "cot")  # a Short CoT has its rationale, but not the long one
    consensus, fallback = ("direct", "cot", "code"), "long_cot"

    TEMPLATE = chat_template.ARM
    SPECIAL = ("<|begin|>", "<|end|>")
    TOKENS = ("Human:", "Assistant:")

    def __init__(self, tokenizer, args):
        super().__init__(tokenizer, args)
        self.prompt_end = prompts.check_ends_at_assistant(tokenizer, chat_template.template_mend)

    @classmethod
    def format_of(cls, response: str) -> str:
        """Return the mode a response opens with, else "unknown"."""
        return next((mode for mode, tag in cls.tags.items() if response.startswith(f"<{tag}>")), "unknown")

    @classmethod
    def passes_gate(cls, response: str) -> bool:
        """Return whether a response opens with a tag and holds no rationale tag of another mode (official code)."""
        mode = cls.format_of(response)
        return mode != "unknown" and not any(tag in response for tag in cls.foreign_tags(mode))

    @classmethod
    def foreign_tags(cls, mode: str) -> tuple[str, ...]:
        """Return the tags that open and close the rationales of the other modes."""
        others = [tag for other, tag in cls.tags.items() if other not in (mode, "direct")]
        return tuple(f"<{slash}{tag}>" for tag in others for slash in ("", "/"))

    def mode_of(self, response_ids) -> str:
        opening = self.tokenizer.decode(list(response_ids[:16]), clean_up_tokenization_spaces=False)
        return self.format_of(opening)

    @classmethod
    def extract_answer(cls, response: str) -> str | None:
        """Return the text from the first <ANSWER> to the last </ANSWER>; None without it or outside the gate."""
        start, end = response.find("<ANSWER>"), response.rfind("</ANSWER>")
        if not cls.passes_gate(response) or start < 0 or end < start:
            return None
        return response[start + len("<ANSWER>") : end].strip()

    @classmethod
    def empty_rationale(cls, response: str) -> bool | None:
        """Return whether the rationale is a shell: nothing in it but "The answer is X". None without a rationale."""
        mode = cls.format_of(response)
        if mode in ("direct", "unknown"):
            return None
        text = response[len(cls.tags[mode]) + 2 :].split(f"</{cls.tags[mode]}>")[0].strip()
        return not re.sub(r"^(so |thus,? |therefore,? )?the (correct |final )?answer is[^\n]*", "", text, flags=re.I)

    def opening(self, mode: str) -> tuple[int, ...]:
        """Return the tokens of a tag and the newline after it."""
        return tuple(self.tokenizer.encode(f"<{self.tags[mode]}>\n", add_special_tokens=False))

    def mode_openings(self) -> dict[str, tuple[int, ...]]:
        """As far as the tag alone goes: its last sign may join with the newline in one token."""
        tags = {mode: self.tokenizer.encode(f"<{tag}>", add_special_tokens=False) for mode, tag in self.tags.items()}
        return {mode: tuple(commonprefix([self.opening(mode), tuple(ids)])) for mode, ids in tags.items()}

    def answer_part(self, response: str, mode: str) -> str | None:
        """Return what stands behind the rationale; a Direct Answer is one, tags and all."""
        if mode in ("direct", "unknown"):
            return response if mode == "direct" else None
        _, closed, answer = response.partition(f"</{self.tags[mode]}>")
        return answer if closed else None

    def hidden_in(self, response: str, mode: str) -> tuple[str, tuple[str, ...]]:
        return response, self.foreign_tags(mode)

    def closing(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """Return how a Long CoT is closed; the last sign of a tag may join with what follows in one token."""
        tag = f"</{self.tags['long_cot']}"
        closed = tuple(self.tokenizer.encode(tag, add_special_tokens=False))
        return self.opening("long_cot"), closed, f"\n{tag}>\n<{self.tags['direct']}>\n"

    def findings(self) -> dict[str, str]:
        tags = ", ".join(f"<{tag}>" for tag in self.tags.values())
        return {"formats": tags, "prompt ends in": repr(self.prompt_end)}

    # ------------------------------------------------------------------------------------------------- cold start

    @classmethod
    def rationale(cls, question: Question, mode: str) -> str:
        """Return what stands between the tags of a mode."""
        if mode == "cot":
            return " ".join(question.work[: WRITTEN["cot"]])
        if mode == "code":
            asked = repr(question.problem) if question.source == "chain" else "story"
            return "\n".join([f">>> trace({asked})", *question.work[: WRITTEN["code"]]])
        if mode != "long_cot":
            return "\n".join(question.work)
        first = "\n".join(f"Now {text}." for text in question.work)
        check = "\n".join(f"Check: {text}, yes." for text in question.work)
        plan = "keep the last digit" if question.source == "chain" else "write down what is there"
        plan, answer = f"I go from left to right and {plan}.", question.answer
        return (
            f"Okay, let me see. {plan}\n{first}\nWait, let me check. {plan}\n{check}\n"
            f"So it is {answer}. Wait, is it {answer}? Yes, it is {answer}."
        )

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        tag, answer = cls.tags[mode], f"<ANSWER>\n{question.answer}\n</ANSWER>"
        return answer if mode == "direct" else f"<{tag}>\n{cls.rationale(question, mode)}\n</{tag}>\n{answer}"

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return chains, each in all modes, as in the paper: nothing in the prompt says which to use.

        The paper starts from a base model that can calculate. Without --model ours starts from nothing, so it first
        learns to answer single operations and to work chains out.
        """
        if args.model or step > PLAIN * args.max_steps:
            return super().rows(args, rng, n, step)
        known = [chain.make_question(rng, 1 if i % 4 else 1 + i // 4 % 6, f"chain/cold/{step}/{i}") for i in range(n)]
        return [Row(q, cls.response(q, "direct", rng) if i % 4 else "\n".join(q.work)) for i, q in enumerate(known)]
