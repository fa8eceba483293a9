"""Episode: the only currency between rollout, reward, advantage and update.

Token ids in, token ids out. `text` is made once for grading and tables and is never tokenised again. Masks come from
lengths, never from token values: a pad id may equal EOS, and EOS is an action that gets gradient.
"""

from dataclasses import dataclass, field

import torch

from adaptive_reasoning.core.question import Question


@dataclass(eq=False)
class Episode:
    """One prompt and one response to it.

    Legend of shapes: P prompt tokens, T response tokens.
    """

    question: Question
    group: int  # index of the question in the task: the samples of a question share it, on every process alike
    prompt_ids: torch.Tensor  # [P] int64
    response_ids: torch.Tensor  # [T] int64, EOS included when it was generated
    behaviour_logprobs: torch.Tensor  # [T] fp32, log-prob under the distribution sampled from; log q for a forced token
    action_mask: torch.Tensor  # [T] bool, False for tokens that nobody chose (budget forcing, user turns)
    finish_reason: str  # "stop" or "length"
    forced: torch.Tensor | None = None  # [T] bool, tokens that the behaviour policy was made to take; None: none was
    mode: str = ""  # which way of answering, from token ids, never from text
    text: str = ""  # decoded response, for grading and tables only
    answer: str | None = None  # what was graded; None where the response breaks its format
    correct: bool = False
    given: float | None = None  # what the task's own score or --reward gave in place of 1 or 0
    grader: str = ""  # what the grader said where it could not decide: "timeout: ..." or "error: ..."
    reward: float = 0.0
    advantage: float = 0.0  # of every token; where tokens differ their mean, for tables, beside `advantages`
    advantages: torch.Tensor | None = None  # [T] fp32, where the tokens of a response have different ones
    old_logprobs: torch.Tensor | None = None  # [T] fp32, log-probs the ratio is taken against; None: the behaviour's
    ref_logprobs: torch.Tensor | None = None  # [T] fp32, log-probs under the reference policy, where a loss wants them
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # [T] each: values, returns; in MicroBatch as [N]
    info: dict = field(default_factory=dict)  # for tables only: what a metric or sample table shows beside the above

    def __post_init__(self):
        if self.forced is None:
            self.forced = torch.zeros(len(self.response_ids), dtype=torch.bool)
        per_token = (self.behaviour_logprobs, self.action_mask, self.forced)
        assert all(len(x) == len(self.response_ids) for x in per_token), "one entry per response token"

    @classmethod
    def of(cls, completion, **more) -> "Episode":
        """Return the episode of a completion whose request is tagged (question, group)."""
        question, group = completion.request.tag
        return cls(
            question,
            group,
            torch.tensor(completion.context_ids),
            completion.response_ids,
            completion.logprobs,
            completion.action_mask,
            completion.finish_reason,
            completion.forced,
            **more,
        )

    @property
    def score(self) -> float:
        """What takes the place of correctness in a method's reward: 1 for right, 0 for wrong, or what was given."""
        return float(self.correct) if self.given is None else self.given

    @property
    def num_tokens(self) -> int:
        """Response tokens, forced ones and EOS included: the length every table reports."""
        return len(self.response_ids)

    @property
    def num_actions(self) -> int:
        """Tokens that the policy chose: without user turns and what a budget forced."""
        return int(self.action_mask.sum())

    @property
    def teaches(self) -> bool:
        """Whether any of its tokens has an advantage."""
        return self.advantage != 0 if self.advantages is None else bool(self.advantages.any())


def pick(episodes: list, n: int, step: int) -> list:
    """Return n episodes spread over the step, other ones at every step."""
    if not episodes or n < 1:
        return []
    stride = max(1, len(episodes) // n)
    return episodes[step % stride :: stride][:n]


def sample_row(e: Episode, step: int, split: str) -> dict:
    """Return the row of samples.jsonl for an episode."""
    row = {
        "step": step,
        "split": split,
        "mode": e.mode,
        "difficulty": e.question.difficulty,
        "problem": e.question.problem,
        "answer": e.question.answer,
        "response": e.text,
        "reward": e.reward,
        "tokens": e.num_actions,
        "finish_reason": e.finish_reason,
        "advantage": e.advantage,
    }
    if e.grader:
        row["grader"] = e.grader
    return row
