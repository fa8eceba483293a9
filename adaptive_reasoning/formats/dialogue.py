"""Dialogue: Thinker's turns. A quick answer, a check of it, and where it was wrong a slow one and its summary.

    fast      answer within a small budget
    verify    is that right? \\boxed{Yes} or \\boxed{No}
    slow      think again
    summary   condense the slow work; in training alone
    qa        the baseline's only turn

The format is also what holds the dialogue (`rollout.dialogue`): what is asked, in which order, and what an answer has
to equal. The order here is that of inference, where the verdict decides; a method may give one of its own for training.

On chains:

    fast      the bare answer: a single operation is known by heart, a longer chain is mostly a guess
    verify    a verdict at once, which is a guess, or after working the chain through and subtracting the fast answer
    slow      one operation a line, once more from the start
    summary   the same work without a word more
    qa        one operation a line

In half of the dialogues the fast answer is wrong. It carries no loss, and what a good model says next does.

Before the dialogues, in the first part of the cold start, come single operations answered at once and chains in the
baseline's one turn. They stand for what a pretrained model knows: one that meets everything at once learns neither the
arithmetic nor the dialogue. For the same reason the check is a subtraction, which it knows, and not a comparison of two
digits, which it would have to learn (experiments/LOG.md).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jsonargparse.typing import PositiveInt

from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.formats import ResponseFormat, Row
from adaptive_reasoning.rollout.dialogue import Dialogue, Turn, turn_marks
from adaptive_reasoning.run.evaluation import EvalSpec
from adaptive_reasoning.tasks import chain, prompts
from adaptive_reasoning.tasks.answers import boxed_answer

STAGES = ("fast", "verify", "slow", "summary", "qa")
THINKING = ("verify", "slow", "qa")  # stages in which a model with a thinking block (R1) opens it
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
PROMPTS = {  # the user's turns
    "paper": {
        "fast": "Answer the question below with concise steps and put the final answer in \\boxed{}. Keep the response "
        "under 1000 words.\nQuestion: {q}",
        "verify": "Is the answer above correct? Check each step carefully, then output \\boxed{Yes} if it is correct "
        "or \\boxed{No} if it is not.",
        "slow": "The initial answer is incorrect. Consider possible errors and alternative solutions, reason step by "
        "step, and put the new final answer in \\boxed{}.",
        "summary": "The final answer is correct. Summarise the steps that lead to it concisely and precisely, without "
        "the internal reasoning, in 300 to 1000 words, ending with the final answer in \\boxed{}.",
        "qa": "Reason step by step and put the final answer in \\boxed{}.\nQuestion: {q}",
    },
    "chain": {  # short, as everything in the laboratory
        "fast": "{q} in short",
        "verify": "right?",
        "slow": "no, step by step",
        "summary": "yes, sum up",
        "qa": "{q} step by step",
    },
}
CAREFUL = 0.5  # share of the verdicts after a check
SINGLE = 0.4  # share of the drills that are single operations, answered at once
DRILLS = 0.5  # first part of the cold start: arithmetic alone
FAST_ROWS, QA_ROWS = 0.1, 0.15  # after it: share of the rows that end with a fast answer, or are of the baseline
NOT_SUPERVISED = 1_000_000  # beyond the end of any response


@dataclass
class DialogueArgs:
    """Options of the format. The defaults are the run with Qwen2.5-1.5B as far as it is known."""

    environment: Literal["dialogue", "qa"] = "dialogue"
    """"dialogue": all its stages. "qa": the baseline, one turn."""
    stage_prompts: Literal["paper", "chain"] = "paper"
    """The user's turns: "paper" (as far as they are known) or "chain" (the laboratory's)."""
    template: Literal["auto", "chatml", "own"] = "auto"
    """Marks of a turn: "chatml", "own" (of the tokenizer's chat template), "auto": ChatML where it is known."""
    fast_budget: PositiveInt = 1000
    """Most tokens of a Fast response; longer ones are cut."""
    verify_budget: PositiveInt = 6000
    """Most tokens of a Verify response."""
    slow_budget: PositiveInt = 6000
    """Most tokens of a Slow response."""
    summary_budget: PositiveInt = 1000
    """Most tokens of a Summary, of which evaluation has none."""
    qa_budget: PositiveInt = 8000
    """Most tokens of the baseline's response."""
    require_stop: bool = False
    """A response cut at its budget has no answer, even with a box before the cut."""
    skip_verify: bool = False
    """Leave Verify out: Slow follows a wrong Fast answer, at inference every one."""


def next_stage(turns: dict[str, Turn], setting: str, options: DialogueArgs) -> str | None:
    """Return the stage that comes next at inference, None at the end. `setting` is one of `DialogueFormat.eval_spec`.

    "adaptive" goes by the verdict; "fast", "slow" and "qa" end with the stage of that name.
    """
    if not turns:
        return "qa" if "qa" in (setting, options.environment) else "fast"
    last = list(turns)[-1]
    if last in (setting, "slow", "summary", "qa"):
        return None
    if last == "fast" and not options.skip_verify:
        return "verify"
    accepted = "verify" in turns and turns["verify"].answer == "yes"  # an unparsable verdict is a No
    return None if accepted and setting != "slow" else "slow"


def least_new_tokens(args) -> int:
    """Return the longest response: all turns of a dialogue, or the baseline's one, which evaluations have beside it."""
    turns = args.fast_budget + args.verify_budget + args.slow_budget + args.summary_budget
    return args.qa_budget if args.environment == "qa" else max(turns, args.qa_budget)


def check_budgets(args) -> None:
    """Raise UserError where --max_new_tokens, for which memory is planned, is less than a budget takes."""
    if args.max_new_tokens >= (longest := least_new_tokens(args)):
        return
    if longest == args.qa_budget:
        fault = f"--qa_budget {longest} is longer. The evaluations of a dialogue have the setting qa too"
    else:
        fault = f"the budgets of the stages add up to {longest}"
    raise UserError(f"--max_new_tokens {args.max_new_tokens}: {fault}. Raise it, or lower the budgets.")


class DialogueFormat(ResponseFormat):
    """Turns of a dialogue; the mode is the stage whose answer counts.

    Args:
        order: (turns, setting, args) -> stage that comes next, as `next_stage`, of a method that trains.

    Raises:
        UserError: the tokenizer or the budgets do not fit.
    """

    modes = {"fast": "Fast", "slow": "Slow", "qa": "QA"}
    Options = DialogueArgs

    def __init__(self, tokenizer, args, order: Callable | None = None):
        if not isinstance(args, DialogueArgs):
            raise UserError("the format 'dialogue' has turns: this command samples single responses.")
        super().__init__(tokenizer, args)
        self.order = order
        self.marks = turn_marks(tokenizer, self.options.template)
        self.end, self.wave = self.marks.end, args.rollout_rows
        self.stop_ids = tuple(dict.fromkeys((self.end, *prompts.stop_tokens(tokenizer))))
        self.stages = ("qa",) if self.options.environment == "qa" else STAGES[:-1]
        check_budgets(args)

    def ids(self, stage: str, problem: str | None) -> list[int]:
        """Return the tokens before the response of a stage: the user's turn, and how the model's turn opens."""
        message = PROMPTS[self.options.stage_prompts][stage].replace("{q}", problem or "")
        text = (self.marks.user if problem is None else self.marks.start) + message + self.marks.header
        text += self.marks.think if stage in THINKING else ""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def budget(self, stage: str) -> int:
        """Return the most tokens of the response of a stage."""
        return getattr(self.options, f"{stage}_budget")

    def next_stage(self, turns: dict[str, Turn], setting: str) -> str | None:
        if self.order is not None:
            return self.order(turns, setting, self.args)
        return next_stage(turns, setting, self.options)

    @classmethod
    def extract_answer(cls, response: str, stage: str = "qa") -> str | None:
        """Return what the last box holds; of Verify "yes" or "no", None for any other verdict."""
        answer = boxed_answer(response)
        if stage != "verify" or answer is None:
            return answer
        word = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer).strip().lower()
        return word if word in ("yes", "no") else None

    def read(self, stage: str, text: str, cut: bool) -> str | None:
        """Return the answer of a stage to grade, or None."""
        return None if cut and self.options.require_stop else self.extract_answer(text, stage)

    def target(self, stage: str, d: Dialogue) -> str | Question:
        """Return what the answer of a stage has to equal: Summary the answer of Slow, Verify the truth about Fast."""
        if stage == "verify":
            return "yes" if d.turns["fast"].correct else "no"
        return d.turns["slow"].answer if stage == "summary" else d.question

    @classmethod
    def mode_of(cls, turns: dict[str, Turn]) -> str:
        """Return the stage whose answer counts: the second answer where there is one."""
        return next(stage for stage in ("slow", "fast", "qa") if stage in turns)

    def findings(self) -> dict[str, str]:
        m, end = self.marks, self.tokenizer.decode([self.end])
        marks = " ... ".join(map(repr, (m.start, m.header + m.think, end + m.user)))
        return {"turns": marks, "budgets": ", ".join(f"{stage} {self.budget(stage):,}" for stage in self.stages)}

    def eval_spec(self) -> EvalSpec:
        """Return how evaluation holds dialogues: the verdict decides ("adaptive"), Fast alone, Slow always, or QA."""
        settings = ("adaptive",) if self.options.environment == "qa" else ("adaptive", "fast", "slow", "qa")
        forced = dict.fromkeys(settings, ())
        return EvalSpec(forced, self.mode_of, self.extract_answer, self.modes, self.check, script=self)

    # ------------------------------------------------------------------------------------------------- cold start

    @classmethod
    def cold_start_modes(cls) -> tuple[str, ...]:
        return STAGES

    @classmethod
    def response(cls, question: Question, mode: str, rng: np.random.Generator) -> str:
        assert mode in STAGES, f"there is no stage {mode!r}"
        if mode == "fast":
            return boxed(fast(question, rng))
        if mode == "verify":
            return verify(question, question.answer, rng)
        return "\n".join([*question.work, boxed(question.answer)])

    @classmethod
    def rows(cls, args, rng: np.random.Generator, n: int, step: int) -> list[Row]:
        """Return arithmetic in the first part of the cold start; then dialogues, half of them with a wrong fast answer,
        beside some rows of one turn."""
        shares, asks = chain.parse_mix(args.chain_mix), PROMPTS["chain"]
        drills = step <= DRILLS * args.max_steps
        out = []
        for i in range(n):
            operations = int(rng.choice(len(shares), p=shares)) + 1
            question = chain.make_question(rng, operations, f"chain/cold/{step}/{i}")
            kind = rng.random()
            if drills and kind < SINGLE:
                question = chain.make_question(rng, 1, question.id)
                asked = asks["fast"].replace("{q}", question.problem)
                out.append(Row(question, cls.response(question, "fast", rng), prompt=asked))
            elif drills or kind < FAST_ROWS + QA_ROWS:
                stage = "qa" if drills or kind < QA_ROWS else "fast"
                asked = asks[stage].replace("{q}", question.problem)
                out.append(Row(question, cls.response(question, stage, rng), prompt=asked))
            else:
                right = rng.random() < 0.5
                answer = fast(question, rng, right)
                turns = [(turn("verify"), verify(question, answer, rng))]
                if not right:
                    turns += [(turn(stage), cls.response(question, stage, rng)) for stage in ("slow", "summary")]
                asked = asks["fast"].replace("{q}", question.problem)
                out.append(Row(question, boxed(answer), 0 if right else NOT_SUPERVISED, tuple(turns), asked))
        return out


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def fast(question: Question, rng: np.random.Generator, right: bool = True) -> str:
    """Return the answer of a fast response, right or another digit."""
    return question.answer if right else str((int(question.answer) + rng.integers(1, 10)) % 10)


def verify(question: Question, answer: str, rng: np.random.Generator) -> str:
    """Return the right verdict on an answer."""
    verdict = "Yes" if answer == question.answer else "No"
    if rng.random() >= CAREFUL:
        return boxed(verdict)
    check = f"{question.answer}-{answer}={(int(question.answer) - int(answer)) % 10}"
    return "\n".join([*question.work, check, boxed(verdict)])


def turn(stage: str) -> str:
    """Return what stands between two responses: the user's turn and the header of the next response."""
    return f"{USER}{PROMPTS['chain'][stage]}{ASSISTANT}"
