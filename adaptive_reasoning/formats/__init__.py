"""Formats: how a response says its mode and its answer, one class a file.

    arm.py          Arm             four tags in the text
    think.py        Think           the two modes of a template that opens thinking, or has a switch for it
    thinkless.py    Thinkless       one control token in front
    native.py       Native          the same, with the first tokens of a hybrid template's two modes
    boxed.py        Boxed           one mode, the answer in a box
    dialogue.py     DialogueFormat  turns of a dialogue
    attempts.py                     the parts of a thinking that each state an answer

A format of your own is a subclass anywhere on the Python path, named module.Class where a command asks for a format.
One more mode is one more tag:

    class WithSketch(Arm):                                              # --answer_format my_module.WithSketch
        tags = {**Arm.tags, "sketch": "SKETCH"}
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from adaptive_reasoning.core.named import named
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.run.evaluation import EvalSpec
from adaptive_reasoning.run.leak import reasoning_words
from adaptive_reasoning.tasks import chain, think_template, words
from adaptive_reasoning.tasks.answers import same_answer

NAMES = {
    "think": "Think", "arm": "Arm", "thinkless": "Thinkless", "native": "Native", "boxed": "Boxed",
    "dialogue": "DialogueFormat",
}  # fmt: skip
MAKERS = {"chain": chain.make_question, "words": words.make_question}  # questions of a cold start


@dataclass
class Row:
    """One supervised example.

    The loss falls on the tokens of `response` from `start` on and on its end token. In a dialogue, `turns` go on from
    there: (text between, response) each, the text as it stands in the token stream (end of turn excluded, next prompt
    and header included); loss falls on the responses and their end tokens alone. With `thinking` the response is what
    follows the thinking, and may follow an empty one.
    """

    question: Question
    response: str
    start: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    prompt: str = ""  # the user's first message, where it is not the problem itself
    thinking: str | None = None  # thoughts, in a row that opens and closes them as the chat template does


@dataclass
class NoOptions:
    """Options of a format that has none."""


class ResponseFormat(ABC):
    """How a response says its mode and its answer.

    Args:
        tokenizer: of the model. It gets the chat template that --thinking asks for: render prompts afterwards.
        args: options of the command. Where it does not have those of the format (`Options`), their defaults hold.

    Raises:
        UserError: the tokenizer does not fit the format.
    """

    tags: ClassVar[dict[str, str]] = {}  # mode -> what opens it
    modes: ClassVar[dict[str, str]] = {}  # mode -> its name in tables, in their order; a tag without one gets one
    malformed: ClassVar[str] = ""  # mode of a response that opens with no tag
    check: ClassVar[Callable[[str, str], bool]] = staticmethod(same_answer)  # (answer, target); graders import it
    consensus: ClassVar[tuple[str, ...]] = ()  # settings whose answers have to agree; else the fallback's answer counts
    fallback: ClassVar[str] = ""
    bias_mode: ClassVar[str] = ""  # whose token an evaluation moves with --mode_bias unless it names another
    chooses: ClassVar[bool] = False  # whether its modes are the two of a chat template that can think
    skips: ClassVar[tuple[str, ...]] = ()  # modes that say they skip the thinking, or the long one
    Options: ClassVar[type] = NoOptions  # a dataclass, from which the `Args` of a command may inherit

    # The laboratory's tokenizer: chat template, marks of a turn (special tokens), marks inside a response.
    TEMPLATE: ClassVar[str] = (
        "<|begin|>{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
        "{% else %}<|Assistant|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    )
    SPECIAL: ClassVar[tuple[str, ...]] = ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>")
    TOKENS: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        names = {mode: mode.replace("_", " ").capitalize() for mode in cls.tags} | cls.modes
        order = [*(mode for mode in (*cls.modes, *cls.tags) if mode != cls.malformed), *filter(None, [cls.malformed])]
        cls.modes = {mode: names[mode] for mode in order}

    def __init__(self, tokenizer, args):
        self.tokenizer, self.args = tokenizer, args
        self.template, self.prompt_lines = think_template.put(tokenizer, args, self.chooses, type(self).__name__)
        inherits = isinstance(args, self.Options)
        self.options = self.Options(**{f.name: vars(args)[f.name] for f in fields(self.Options)} if inherits else {})

    @classmethod
    def needed_tokens(cls) -> tuple[str, ...]:
        """Return the texts that have to be one token each, which --control_tokens gives a model that lacks them."""
        return ()

    @abstractmethod
    def mode_of(self, response_ids) -> str:
        """Return the mode of a response from its own first tokens [T]."""

    @abstractmethod
    def extract_answer(self, response: str) -> str | None:
        """Return the answer to grade, None where the response breaks the format."""

    def opening(self, mode: str) -> tuple[int, ...]:
        """Return the token ids that force a mode."""
        raise UserError(f"{type(self).__name__} has no tokens that force the mode {mode!r}.")

    def mode_openings(self) -> dict[str, tuple[int, ...]]:
        """Return {mode: token ids that a response of it begins with}; what begins otherwise is of the one mode left."""
        return {mode: self.opening(mode) for mode in self.tags}

    def answer_part(self, response: str, mode: str) -> str | None:
        """Return what stands behind the thinking, or the opening of a mode without one; None if that is not there."""
        return None if mode == self.malformed else response

    def hidden_in(self, response: str, mode: str) -> tuple[str, tuple[str, ...]]:
        """Return where the thinking of a mode of `skips` would hide, and the tags that may not stand there."""
        return self.answer_part(response, mode), ()

    def traces(self, response: str, mode: str, tokens: int, ended: bool) -> dict:
        """Return what `run.leak` needs of a response of so many tokens, its end token included if it `ended`."""
        answer, skips = self.answer_part(response, mode), mode in self.skips
        length = None
        if answer is not None and (ended or skips):  # a thinking that was cut is no yardstick
            length = self.answer_tokens(response, answer, tokens, ended)
        if not skips:
            return {"answer_tokens": length}
        body, tags = self.hidden_in(response, mode)
        words = len(reasoning_words(body))
        return {"answer_tokens": length, "words": words, "tags": any(tag in body for tag in tags)}

    def answer_tokens(self, response: str, answer: str, tokens: int, ended: bool) -> int:
        """Return the tokens of the end of a response, its end token included: of both parts the shorter one is
        tokenised."""
        before = response.removesuffix(answer)
        if len(before) < len(answer):
            return tokens - len(self.tokenizer.encode(before, add_special_tokens=False))
        return len(self.tokenizer.encode(answer, add_special_tokens=False)) + ended

    def closing(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """Return how a thinking is closed at its budget: token ids that open it, those that show that it is closed
        already, and the text that closes it."""
        assert self.chooses, "formats with modes of their own say how"
        return self.template.closing()

    def empty_rationale(self, response: str) -> bool | None:
        """Return whether a rationale has nothing in it; None for a response without one."""
        return None

    def findings(self) -> dict[str, str]:
        """Return the lines of the preflight table about the format."""
        return {"formats": ", ".join(self.modes)}

    # ------------------------------------------------------------------------------------------------- evaluation

    def forced_settings(self) -> dict[str, str]:
        """Return {setting of an evaluation: mode that it forces}."""
        return {mode: mode for mode in self.tags}

    def eval_spec(self) -> EvalSpec:
        """Return how evaluation forces and tells modes apart; the first setting forces nothing."""
        forced = {name: tuple((i, 1.0) for i in self.opening(mode)) for name, mode in self.forced_settings().items()}
        own = dict.fromkeys(self.template.own_settings(), ()) if self.chooses else {}
        return EvalSpec(
            {"adaptive": (), **forced, **own}, self.mode_of, self.extract_answer, self.modes, self.check,
            self.consensus, self.fallback, template=self.template if self.chooses else None,
            skips=self.skips, traces=self.traces,
        )  # fmt: skip

    def template_tokens(self) -> int | None:
        """Return what published tables add to the tokens of prompt and response; None: they count responses alone."""
        return None

    # ----------------------------------------------------------------------------- cold start, on chains or stories

    @classmethod
    def cold_start_modes(cls) -> tuple[str, ...]:
        """Return the ways of answering that `response` knows."""
        return tuple(cls.tags) or tuple(cls.modes)

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        """Return a correct response to a question made by code in a mode, without the end token."""
        raise UserError(f"{cls.__name__} has no cold start: give it a method `response`.")

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return n rows of a step of the cold start: every question once in each mode, all in the same batch.

        So the model starts with equal shares on every question, and the style of the text follows its first token.
        """
        shares, modes = chain.parse_mix(args.chain_mix), cls.cold_start_modes()
        make = MAKERS[args.task]
        out = []
        for i in range(n):
            if i % len(modes) == 0:
                operations = int(rng.choice(len(shares), p=shares)) + 1
                question = make(rng, operations, f"{args.task}/cold/{step}/{i}")
            out.append(Row(question, cls.response(question, modes[i % len(modes)], rng)))
        return out

    @classmethod
    def finish(cls, tokenizer):
        """Return the laboratory's tokenizer as the format needs it, once it is trained."""
        return tokenizer


def load(name: str, kind: type[ResponseFormat] = ResponseFormat) -> type[ResponseFormat]:
    """Return a format by its short name, or a class of the user's own by "module.Class".

    Args:
        kind: what the format has to be a subclass of.

    Raises:
        UserError: there is none of that name, or one of another kind.
    """
    known = {short: f"{__name__}.{short}.{attribute}" for short, attribute in NAMES.items()}
    found = named(name, known, "response format", "Class")
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(f"response format {name!r}: it is no subclass of {kind.__name__}.")
    return found


def tokenizer(name: str):
    """Return the laboratory's tokenizer of a format."""
    return chain.tokenizer(load(name))
