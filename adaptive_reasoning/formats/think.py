"""AdaptThink's two modes: think and answer, or close the thinking at once and answer.

The prompt ends in an opened thinking block (R1's template). A response that starts with `</think>` is "nothinking", any
other one is "thinking".

On chains the thinking is as wordy as that of the models the paper starts from: it opens with a phrase, works step by
step, and checks itself once more before it answers. On stories, whose tokens are dearer, it does not check.
"""

from dataclasses import dataclass

import numpy as np

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import MAKERS, ResponseFormat, Row
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.answers import boxed_answer

OPENERS = (("Alright", 0.7), ("Okay", 0.3))  # how a thinking response starts, and how often


@dataclass
class ThinkArgs:
    """Options of the format."""

    first_word: str = "Alright"
    """w_start of Eq. 8: the word that forced Thinking responses start with."""


class Think(ResponseFormat):
    """Two modes by whether the first token is `</think>`."""

    modes = {"thinking": "Thinking", "nothinking": "NoThinking"}
    Options = ThinkArgs

    TEMPLATE = ResponseFormat.TEMPLATE.replace("<|Assistant|>{% endif %}", "<|Assistant|><think>\n{% endif %}")
    TOKENS = ("<think>", "</think>")

    def __init__(self, tokenizer, args):
        super().__init__(tokenizer, args)
        self.prompt_end = prompts.check_opens_thinking(tokenizer)
        self.word = tokenizer.encode(self.options.first_word, add_special_tokens=False)
        if not self.word:
            raise UserError(f"--first_word {self.options.first_word!r} has no token.")
        self.eot = prompts.control_token(tokenizer, "</think>")

    @classmethod
    def needed_tokens(cls) -> tuple[str, ...]:
        return ("<think>", "</think>")

    def mode_of(self, response_ids) -> str:
        return "nothinking" if response_ids[0] == self.eot else "thinking"

    @classmethod
    def extract_answer(cls, response: str) -> str | None:
        """Return the last box after the one `</think>`; None if there is another tag (official adapt_think_rm)."""
        if "<think>" in response or response.count("</think>") != 1:
            return None
        return boxed_answer(response.split("</think>")[1])

    def opening(self, mode: str) -> tuple[int, ...]:
        """Return `</think>`, or w_start: its first token is the choice, the others (if any) follow from it."""
        return (self.eot,) if mode == "nothinking" else tuple(self.word)

    def forced_settings(self) -> dict[str, str]:
        return {"always_think": "thinking", "never_think": "nothinking"}

    def findings(self) -> dict[str, str]:
        word = f"{self.options.first_word!r}, token {self.word[0]}"
        word += f" and {len(self.word) - 1} more" * (len(self.word) > 1)
        return {"template": f"ends in {self.prompt_end!r}", "</think>": f"token {self.eot}", "w_start": word}

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
