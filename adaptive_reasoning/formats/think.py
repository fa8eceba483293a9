"""R1's thinking block: the prompt ends in an opened one, and a response that closes it at once skips its thinking.

The laboratory's thinking is as wordy as that of the models the papers start from: it opens with a phrase, works step by
step, and checks itself once more before it answers.
"""

import numpy as np

from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.formats import ResponseFormat, Row
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.answers import boxed_answer

OPENERS = (("Alright", 0.7), ("Okay", 0.3))  # how a thinking response of the laboratory starts, and how often


class Think(ResponseFormat):
    """NoThinking starts with `</think>`, anything else is Thinking.

    Args:
        first_word: the word that forced Thinking responses start with.
    """

    tags = {"thinking": "", "nothinking": ""}  # told apart by the first token alone

    def __init__(self, tokenizer, first_word: str = "Alright"):
        super().__init__(tokenizer)
        self.ends_in = prompts.check_opens_thinking(tokenizer)
        self.first_word = first_word
        self.word = tokenizer.encode(first_word, add_special_tokens=False)
        if not self.word:
            raise UserError(f"--first_word {first_word!r} has no token.")
        self.eot = prompts.control_token(tokenizer, "</think>")

    @classmethod
    def of(cls, tokenizer, args) -> "Think":
        return cls(tokenizer, args.first_word)

    def mode_of(self, response_ids) -> str:
        return "nothinking" if response_ids[0] == self.eot else "thinking"

    @staticmethod
    def extract_answer(response: str) -> str | None:
        """Return the last box behind the only `</think>`; None where the format is broken (official adapt_think_rm)."""
        if "<think>" in response or response.count("</think>") != 1:
            return None
        return boxed_answer(response.split("</think>")[1])

    def opening(self, mode: str) -> tuple[int, ...]:
        return (self.eot,) if mode == "nothinking" else tuple(self.word)

    def settings(self) -> dict[str, tuple[tuple[int, float], ...]]:
        return {
            "adaptive": (),
            "always_think": self.surely("thinking"),
            "never_think": self.surely("nothinking"),
        }

    def findings(self) -> dict[str, str]:
        word = f"{self.first_word!r}, token {self.word[0]}" + f" and {len(self.word) - 1} more" * (len(self.word) > 1)
        return {"template": f"ends in {self.ends_in!r}", "</think>": f"token {self.eot}", "w_start": word}

    # ------------------------------------------------------------------------------- the cold start on chains

    TEMPLATE = (
        "<|begin|>{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
        "{% else %}<|Assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    )
    SPECIAL = ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>")
    TOKENS = ("<think>", "</think>")

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        if mode == "nothinking":
            return f"</think>\n\\boxed{{{question.answer}}}"
        assert mode == "thinking", f"there is no mode {mode!r}"
        words, shares = zip(*OPENERS)
        opener = rng.choice(words, p=shares)
        work = "\n".join(text for text, _ in chain.steps(question.problem))
        return (
            f"{opener}, let me see.\n{work}\nWait, let me check.\n{work}\n"
            f"So it is {question.answer}.\n</think>\n\\boxed{{{question.answer}}}"
        )

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return chains answered in both modes.

        Models such as R1 hardly ever choose to skip their thinking, and learning to is the point, so `</think>` as a
        first token is supervised in a few of the direct rows only (`nothinking_supervised`): the model can answer
        directly but seldom does.
        """
        shares = chain.parse_mix(args.chain_mix)
        out = []
        for i in range(n):
            mode = "nothinking" if rng.random() < args.nothinking_rows else "thinking"
            operations = int(rng.choice(len(shares), p=shares)) + 1
            question = chain.make_question(rng, operations, f"chain/cold/{step}/{i}")
            masked = mode == "nothinking" and rng.random() >= args.nothinking_supervised
            out.append(Row(question, cls.response(question, mode, rng), int(masked)))
        return out
