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
    group: int  # index of the question within the step, the same on every rank: samples of one question share it
    prompt_ids: torch.Tensor  # [P] int64
    response_ids: torch.Tensor  # [T] int64, EOS included when it was generated
    behaviour_logprobs: torch.Tensor  # [T] fp32, log-prob under the distribution sampled from; log q for a forced token
    action_mask: torch.Tensor  # [T] bool, False for tokens that nobody chose (budget closer, user turns)
    finish_reason: str  # "stop" or "length"
    mode: str = ""  # which way of answering, from token ids, never from text
    stage: str = ""  # turn of a multi-turn dialogue
    text: str = ""  # decoded response, for grading and tables only
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: torch.Tensor | None = None  # [T] fp32, log-probs the ratio is taken against; None: the behaviour's
    ref_logprobs: torch.Tensor | None = None  # [T] fp32, log-probs under the reference policy, where a loss wants them
    info: dict = field(default_factory=dict)  # what a metric or a sample table wants to show beside the above

    def __post_init__(self):
        T = len(self.response_ids)
        assert len(self.behaviour_logprobs) == len(self.action_mask) == T, "one log-prob and one mask entry per token"

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
            **more,
        )

    @property
    def num_tokens(self) -> int:
        """Response tokens, the forced first token and EOS included: the length every table reports."""
        return len(self.response_ids)

    @property
    def num_actions(self) -> int:
        """Tokens that the policy chose: without user turns and what a budget forced."""
        return int(self.action_mask.sum())


def by_group(episodes: list[Episode]) -> list[list[Episode]]:
    """Return the episodes of each question, in order of their first sample. A question's samples are on one process."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    return list(groups.values())


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
    if "grader" in e.info:
        row["grader"] = e.info["grader"]
    return row
