"""Dialogue: several turns of one conversation on the keys and values that were kept, graded on the way.

A dialogue is built from token ids and never rendered again: the context of a turn is a strict prefix of the next one's,
every response in it as it was sampled. A chat template would re-tokenise, and R1's drops the thinking of earlier turns.
What is asked, in which order, and what an answer has to be is the business of the algorithm (its `script`):

    script.stop_ids, script.end                 ids that end a response; the one put behind a response that was cut
    script.tokenizer, script.wave               for decoding; how many dialogues are held at a time
    script.next_stage(turns, setting)           the stage that comes next, None at the end
    script.ids(stage, problem)                  tokens before the response of a stage; `problem` None in later turns
    script.budget(stage)                        most tokens of its response
    script.read(stage, text, cut)               the answer to grade, or None
    script.target(stage, dialogue)               what that answer has to equal; the question itself: its answer
"""

import re
import time
from dataclasses import dataclass, field

import torch

from adaptive_reasoning.core.episode import Episode
from adaptive_reasoning.core.question import Question
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout.request import Completion, Request
from adaptive_reasoning.rollout.sampler import Sampling, request_seed
from adaptive_reasoning.tasks import prompts

CHATML = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Marks:
    """Text between the messages of a dialogue."""

    start: str  # before the user's first message
    header: str  # between a user's message and the response
    think: str  # opens a thinking block behind the header ("<think>\n"), or "" for a model that has none
    user: str  # between the end token of a response and the user's next message
    end: int  # token that ends a response


def turn_marks(tokenizer, template: str = "auto") -> Marks:
    """Return the marks of a turn: ChatML without a system turn, or those that the chat template puts around a probe.

    Args:
        template: "chatml", "own" (the tokenizer's chat template), or "auto": ChatML where the tokenizer knows it.

    Raises:
        UserError: the tokenizer does not know ChatML, or its template does not show how a dialogue goes on.
    """
    unknown = (None, tokenizer.unk_token_id)
    chatml = all(tokenizer.convert_tokens_to_ids(token) not in unknown for token in CHATML)
    if template == "chatml" and not chatml:
        raise UserError(f"--template chatml: {tokenizer.name_or_path!r} has no {' and '.join(CHATML)}. Take own.")
    if chatml and template != "own":
        begin, end = CHATML
        start, header, user = f"{begin}user\n", f"{end}\n{begin}assistant\n", f"\n{begin}user\n"
        return Marks(start, header, "", user, tokenizer.convert_tokens_to_ids(end))
    words = ("first question", "first response", "second question")
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), words)]
    prompts.prompt_text(tokenizer, words[0])  # UserError without a chat template
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    found = re.fullmatch("(.*)" + "(.*)".join(words) + "(.*)", text, re.DOTALL)
    start, header, user, last = found.groups() if found else [""] * 4
    end = next(iter(tokenizer(user, add_special_tokens=False)["input_ids"]), None)
    if not header or not last.startswith(header) or end not in prompts.stop_tokens(tokenizer):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} does not show how a dialogue goes on after a response "
            f"(EOS, user's mark, message, assistant's mark): a probe gave {text!r}. Take --chat_template "
            "plain, which keeps its turn marks alone, or --template chatml."
        )
    think = prompts.THINK_OPEN + "\n"
    think = think if last.endswith(think) else ""
    return Marks(start, last.removesuffix(think), think, user.removeprefix(tokenizer.decode([end])), end)


@dataclass(eq=False)
class Turn:
    """One response. T tokens."""

    start: int  # place of its first token among the tokens after the first prompt
    ids: torch.Tensor  # [T] int64
    logprobs: torch.Tensor  # [T] fp32, the sampler's
    cut: bool  # at its budget
    text: str
    answer: str | None
    correct: bool = False  # whether the answer is what script.target says
    given: float | None = None  # as in Episode
    logprob: float = 0.0  # of the response in another context, where a reward asks for it
    reward: float = 0.0

    @property
    def score(self) -> float:
        return float(self.correct) if self.given is None else self.given


@dataclass(eq=False)
class Dialogue:
    """A question and what was said so far, by stage in order."""

    question: Question
    group: int
    seed: int
    turns: dict[str, Turn] = field(default_factory=dict)
    prompt_ids: list[int] = field(default_factory=list)  # before the first response
    last: Completion | None = None
    grader: str = ""  # what the grader said where it could not decide

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(len(turn.ids) for turn in self.turns.values())

    @property
    def text(self) -> str:
        """All responses, each behind the name of its stage."""
        return "\n".join(f"[{stage}] {turn.text}" for stage, turn in self.turns.items())

    @property
    def cut(self) -> bool:
        return any(turn.cut for turn in self.turns.values())

    def alone(self, stage: str) -> Episode:
        """Return the response of a stage as if it had been given to the first prompt, without the dialogue between."""
        ids = self.turns[stage].ids
        everything = torch.ones(len(ids), dtype=torch.bool)
        return Episode(
            self.question, self.group, torch.tensor(self.prompt_ids), ids, torch.zeros(len(ids)), everything, "stop"
        )

    def episode(self) -> Episode:
        """Return the dialogue as one episode: all after the first prompt, actions where the policy spoke."""
        ids = torch.tensor((self.last.context_ids + self.last.response_ids.tolist())[len(self.prompt_ids) :])
        logprobs, mask = torch.zeros(len(ids)), torch.zeros(len(ids), dtype=torch.bool)
        for turn in self.turns.values():
            here = slice(turn.start, turn.start + len(turn.ids))
            logprobs[here], mask[here] = turn.logprobs, True
        reason = "length" if self.cut else "stop"
        e = Episode(self.question, self.group, torch.tensor(self.prompt_ids), ids, logprobs, mask, reason)
        e.text, e.grader = self.text, self.grader
        return e


def converse(engine, grader, dialogues, script, sampling: Sampling, setting: str, progress: str = "") -> float:
    """Hold the dialogues, stage by stage; return the seconds spent waiting for grades.

    A wave of them is held at a time, which bounds the memory of the keys and values that are kept between turns.
    """
    waited = 0.0
    for first in range(0, len(dialogues), script.wave):
        wave = dialogues[first : first + script.wave]
        while live := [(d, stage) for d in wave if (stage := script.next_stage(d.turns, setting))]:

            def on_finish(i, completion, live=live):
                d, stage = live[i]
                if d.last:
                    d.last.cache = None
                d.last = completion
                completion.cache = completion.cache.cpu()  # the kv_cache fills a GPU: what waits does so on the host
                ids = completion.response_ids
                text = prompts.decode(script.tokenizer, ids.tolist(), script.stop_ids)
                cut = completion.finish_reason == "length"
                answer = script.read(stage, text, cut)
                start = len(completion.context_ids) - len(d.prompt_ids)
                d.turns[stage] = Turn(start, ids, completion.logprobs, cut, text, answer)
                if answer is not None:
                    grader.submit(answer, script.target(stage, d), i)

            requests = [next_request(d, stage, script) for d, stage in live]
            engine.run(requests, sampling, on_finish, progress and f"{progress}: {live[0][1]}")
            asked = time.perf_counter()
            for i, grade in grader.drain().items():
                d, stage = live[i]
                d.turns[stage].correct, d.turns[stage].given = grade.correct, grade.score
                if grade.status != "ok":
                    d.grader = f"{stage}: {grade.status}: {grade.detail}"
            waited += time.perf_counter() - asked
        for d in wave:
            d.last.cache = None
    return waited


def next_request(d: Dialogue, stage: str, script) -> Request:
    """Return the request for the response of a stage.

    A response that was cut at its budget stays in the history, and the end token it lacks is put behind it.
    """
    seed = request_seed(d.seed, len(d.turns))
    if d.last is None:
        d.prompt_ids = script.ids(stage, d.question.problem)
        return Request(d.prompt_ids, script.budget(stage), script.stop_ids, seed, keep=True)
    closing = [script.end] * (int(d.last.response_ids[-1]) != script.end)
    ids = closing + script.ids(stage, None)
    return Request(ids, script.budget(stage), script.stop_ids, seed, keep=True, continues=d.last)
