"""AdaptThink's two modes: think and answer, or close the thinking at once and answer.

The prompt ends where the template's two ways of opening a response part (`tasks/think_template.py`): with R1's template
in an opened thinking block, where a response that starts with `</think>` is "nothinking", and any other one "thinking".

On chains the thinking is as wordy as that of the models the paper starts from: it opens with a phrase, works step by
step, and checks itself once more before it answers. On stories, whose tokens are dearer, it does not check.
"""

from dataclasses import dataclass

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import MAKERS, ResponseFormat, Row
from adaptive_reasoning.tasks import chain, prompts

OPENERS = (("Alright", 0.7), ("Okay", 0.3))  # how a thinking response starts, and how often


@dataclass
class ThinkArgs:
    """Options of the format."""

    first_word: str = "Alright"
    """w_start of Eq. 8: the word that forced Thinking responses start with, where the template has no opening."""


class Think(ResponseFormat):
    """Two modes by whether a response begins with the template's NoThinking opening, `</think>` in R1's."""

    modes = {"thinking": "Thinking", "nothinking": "NoThinking"}
    skips = ("nothinking",)
    Options, chooses, bias_mode = ThinkArgs, True, "nothinking"

    TEMPLATE = ResponseFormat.TEMPLATE.replace("<|Assistant|>{% endif %}", "<|Assistant|><think>\n{% endif %}")
    TOKENS = ("<think>", "</think>")

    def __init__(self, tokenizer, args):
        super().__init__(tokenizer, args)
        if self.template.kind == "prefilled":
            prompts.control_token(tokenizer, self.template.tags[1])
        self.word = [*self.template.thinking] or tokenizer.encode(self.options.first_word, add_special_tokens=False)
        if not self.word:
            raise UserError(f"--first_word {self.options.first_word!r} has no token.")
        self.eot = self.template.nothinking[0]

    @classmethod
    def needed_tokens(cls) -> tuple[str, ...]:
        return ("<think>", "</think>")

    def mode_of(self, response_ids) -> str:
        return self.template.mode_of(response_ids)

    def extract_answer(self, response: str) -> str | None:
        return self.template.answer(response)

    def opening(self, mode: str) -> tuple[int, ...]:
        """Return the template's opening; its first token is the choice, the others (if any) follow from it.

        Where anything but the NoThinking opening is Thinking, Thinking opens with w_start.
        """
        return self.template.nothinking if mode == "nothinking" else tuple(self.word)

    def mode_openings(self) -> dict[str, tuple[int, ...]]:
        return {"nothinking": self.template.nothinking}

    def answer_part(self, response: str, mode: str) -> str | None:
        return self.template.answer_part(response, mode in self.skips)

    def hidden_in(self, response: str, mode: str) -> tuple[str, tuple[str, ...]]:
        return self.answer_part(response, mode), self.template.tags

    def forced_settings(self) -> dict[str, str]:
        return {"always_think": "thinking", "never_think": "nothinking"}

    def findings(self) -> dict[str, str]:
        return {} if self.template.thinking else {"w_start": f"{self.options.first_word!r} {self.word}"}

    # ------------------------------------------------------------------------------------------------- cold start

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        if mode == "nothinking":
            return f"</think>\n\\boxed{{{question.answer}}}"
        assert mode == "thinking", f"there is no mode {mode!r}"
        return cls.thinking(question, rng, checks=int(question.source == "chain"))

    @classmethod
    def thinking(cls, question: Question, rng: np.random.Generator, checks: int, slip: float = 0.0) -> str:
        """Return a response that thinks: a first pass over the question, then `checks` passes that check it.

        Args:
            slip: of a chain: probability that an operation of the first pass is off by one and the work goes on from
                it. In a check it is a quarter of that. The answer is that of the last pass, right or wrong.
        """
        words, shares = zip(*OPENERS)
        opener = rng.choice(words, p=shares)
        passes, answer = [question.work] * (checks + 1), question.answer
        if slip:
            slipped = [chain.steps(question.problem, slip / (4 if i else 1), rng) for i in range(checks + 1)]
            passes, answer = [[text for text, _ in steps] for steps in slipped], slipped[-1][-1][1]
        work = "Wait, let me check.\n".join("".join(f"{text}\n" for text in lines) for lines in passes)
        return f"{opener}, let me see.\n{work}So it is {answer}.\n</think>\n\\boxed{{{answer}}}"

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return chains or stories answered in both modes.

        Half are answered after thinking, half at once. Models such as R1 hardly ever choose to skip their thinking, and
        learning to is the point of the method, so `</think>` as a first token is supervised in a few of the direct rows
        only (`nothinking_supervised`): the model can answer directly but seldom does.

        With `checks` the thinking varies in length, and with `slip` in its answer: what methods need that shorten it.
        """
        shares = chain.parse_mix(args.chain_mix)
        checks = chain.parse_mix(args.checks, "--checks", "0, 1, ... checks") if args.checks else None
        make, out = MAKERS[args.task], []
        for i in range(n):
            mode = "nothinking" if rng.random() < args.nothinking_rows else "thinking"
            operations = int(rng.choice(len(shares), p=shares)) + 1
            question = make(rng, operations, f"{args.task}/cold/{step}/{i}")
            masked = mode == "nothinking" and rng.random() >= args.nothinking_supervised
            if checks and mode == "thinking":
                response = cls.thinking(question, rng, int(rng.choice(len(checks), p=checks)), args.slip)
            else:
                response = cls.response(question, mode, rng)
            out.append(Row(question, response, int(masked)))
        return out
