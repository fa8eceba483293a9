"""Where a request is on its way through the engine: what the loop of `engine.py` keeps on the host."""

from dataclasses import dataclass, field

import torch

from adaptive_reasoning.rollout.batch_state import BatchState, Saved
from adaptive_reasoning.rollout.request import Request
from adaptive_reasoning.rollout.sampler import Sampling


@dataclass(eq=False)
class Sequence:
    """A request on its way: in the queue, in a row, or back in the queue with what it has said."""

    index: int  # of the request
    request: Request
    context: list[int]  # everything before the response
    key: int  # equal for equal prompts that one prefill serves
    prefix: list[int]  # what has to be in the cache before the row can decode
    saved: Saved | None = None  # where it was preempted

    @property
    def total(self) -> int:
        return len(self.context) + self.request.max_new_tokens

    @property
    def turn(self) -> bool:
        """Whether its keys and values were kept by an earlier turn of the dialogue."""
        return self.request.continues is not None and self.saved is None


@dataclass
class Prompt:
    """A prompt that was run: shared by all samples of it until the last one has a row."""

    held: object  # what the KV cache returned for it
    tokens: int
    logits: torch.Tensor  # [V] fp32 after its last token
    waiting: int  # samples that still need it


@dataclass
class SchedulerState:
    """One run of the loop."""

    rows: BatchState
    size: int  # most live rows
    queue: list[Sequence]  # popped from the end
    sampling: Sampling
    prompts: dict[int, Prompt] = field(default_factory=dict)
    live: list[Sequence] = field(default_factory=list)  # of row 0, 1, ...
    born: list[int] = field(default_factory=list)  # of row 0, 1, ...: born + step = its tokens in the cache
    step: int = 0
    preempted: int = 0
