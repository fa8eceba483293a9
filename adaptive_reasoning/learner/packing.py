"""Packing: episodes into minibatches (one optimiser step) and micro-batches (one forward pass).

Nothing about the split may change the loss: every loss is divided by `Counts` of the whole minibatch over all ranks,
and every micro-batch holds whole sequences. Only action tokens are scored, so a loss needs no mask.

Legend of shapes: B rows of the input, W their width, S sequences of the micro-batch, N action tokens of the
micro-batch, P and T prompt and response tokens of one episode.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from adaptive_reasoning.core.episode import Episode


@dataclass(frozen=True)
class Counts:
    """Denominators of one optimiser step, over all ranks, episodes with zero advantage included."""

    tokens: int  # action tokens
    sequences: int  # episodes


@dataclass(eq=False)
class MicroBatch:
    """One forward pass: whole sequences, and what a loss has to know about each of their N action tokens.

    A filler (`weight` 0.0, S = N = 0) keeps the number of forward passes equal on all ranks. Sums over its tokens are
    zero, so a loss made of sums and whole-step counts needs no special case; `max()` of an empty tensor raises.
    """

    input_ids: torch.Tensor  # [B, W] int64: one sequence a row, padded at the right; or all in one row (B = 1)
    position_ids: torch.Tensor | None  # [1, W] int64 restarting with each sequence if they share a row, else None
    predict_index: torch.Tensor  # [N] int64, index into the B * W positions: the position that predicts the token
    targets: torch.Tensor  # [N] int64, the token
    sequence: torch.Tensor  # [N] int64, 0 .. S-1
    position: torch.Tensor  # [N] int64, 0 .. T-1: place of the token within its response
    old_logprobs: torch.Tensor  # [N] fp32, what the ratio is taken against (the behaviour's where not recomputed)
    behaviour_logprobs: torch.Tensor  # [N] fp32
    ref_logprobs: torch.Tensor  # [N] fp32, under the reference policy (0 where there is none)
    forced: torch.Tensor  # [N] bool, tokens that the behaviour policy was made to take
    advantages: torch.Tensor  # [N] fp32
    sequence_advantages: torch.Tensor  # [S] fp32, where all tokens of a sequence have the same; else their mean
    lengths: torch.Tensor  # [S] int64, action tokens of each sequence, at least one
    response_index: torch.Tensor  # [N] int64, index of the token in the concatenated responses of `episodes`
    columns: dict[str, torch.Tensor]  # [N] fp32 each: what the method put into `Episode.columns`
    episodes: list[Episode]  # S of them
    weight: float = 1.0  # 0.0 for a filler; `learner.backward` applies it
    last: bool = True  # last micro-batch of its minibatch: gradients are exchanged between ranks after this one

    def column(self, name: str) -> torch.Tensor:
        """Return a quantity [N] that the method put into `Episode.columns`; empty in a filler, which has none."""
        return self.columns[name] if self.episodes else self.advantages.new_zeros(0)


@dataclass(eq=False)
class Minibatch:
    """The micro-batches of one optimiser step. Iterating builds them one at a time, on `device`."""

    counts: Counts
    micro_batches: list[list[Episode]]  # an empty list stands for a filler
    zero_advantage: float  # share of the sequences of all ranks whose advantage is exactly zero
    device: torch.device
    one_row: bool

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for i, episodes in enumerate(self.micro_batches):
            yield pack(episodes, self.device, self.one_row, last=i == len(self.micro_batches) - 1)


def group_chunks(groups: int, minibatches: int, seed: int) -> np.ndarray:
    """Return the minibatch of each group: [groups] int64, sizes equal to within one.

    A function of the numbers alone, so every rank finds the same answer and a group is never torn apart, whichever
    ranks its episodes are on.
    """
    chunk = np.empty(groups, dtype=np.int64)
    chunk[np.random.default_rng(seed).permutation(groups)] = np.arange(groups) * minibatches // groups
    return chunk


def draw(number: int, size: int, step: int, seed: int) -> list[int]:
    """Return which `size` of `number` rows, pairs or answers step 1, 2, ... takes.

    Every epoch is a new permutation of all of them, and they follow on each other: the batch across the end of an epoch
    takes its rest from the beginning of the next. A function of its arguments alone.
    """
    places = range((step - 1) * size, step * size)
    orders = {e: np.random.default_rng([seed, e]).permutation(number) for e in {p // number for p in places}}
    return [int(orders[p // number][p % number]) for p in places]


def fill(episodes: list[Episode], budget: int, one_row: bool) -> list[list[Episode]]:
    """Return the episodes in micro-batches of at most `budget` tokens, padding included, longest first.

    What is longer than the budget is a micro-batch of its own: nothing is ever dropped. Ties keep their order.
    """

    def length(e: Episode) -> int:
        return len(e.prompt_ids) + len(e.response_ids)

    batches, size, width = [], 0, 0  # tokens of the last batch, and of its longest row
    for e in sorted(episodes, key=lambda e: -length(e)):
        if one_row:  # no padding
            grown = size + length(e)
        else:  # the first one has the longest row
            grown = (len(batches[-1]) + 1) * width if batches else 0
        if not batches or grown > budget:
            batches.append([])
            grown = width = length(e)
        batches[-1].append(e)
        size = grown
    return batches


def pack(episodes: list[Episode], device="cpu", one_row: bool = False, last: bool = True) -> MicroBatch:
    """Return the micro-batch of these episodes on `device`; of none: a filler.

    Padding stands at the right and causal attention never looks there, so no attention mask is needed and SDPA takes
    its causal path, on a GPU torch's own flash kernel. With `one_row` the sequences share one row without padding and
    positions restart at each of them: variable-length flash attention where flash-attn is installed. Without it rows
    stay padded, also on a GPU: for a packed row SDPA needs a block-diagonal mask, W x W numbers (1 GiB a copy at
    32,768 tokens), and takes a kernel that computes all W x W scores. The padding that a row would save is small, since
    `fill` puts sequences of like length together: of AdaptThink's lengths under a budget of 32,768 tokens 5 % with 256
    responses on a process, 1 % with 2,048 (tests/test_packing.py). The flash-attn path is not measured on a GPU.

    Example: prompts [5] and [6, 7], responses [8, 9] and [1], all of them actions:
        input_ids [[5, 8, 9], [6, 7, 1]], predict_index [0, 1, 4], targets [8, 9, 1], sequence [0, 0, 1],
        position [0, 1, 0], lengths [2, 1]
    """
    if not episodes:
        return filler(device, last)
    P = torch.tensor([len(e.prompt_ids) for e in episodes])  # [S]
    T = torch.tensor([len(e.response_ids) for e in episodes])  # [S]
    assert int(P.min()) > 0, "a response needs at least one prompt token that predicts its first token"
    L = P + T
    ends = L.cumsum(0)
    S, total, width = len(episodes), int(ends[-1]), int(L.max())
    starts = ends - L if one_row else torch.arange(S) * width  # [S] flat index of each sequence's first token
    ids = torch.cat([x for e in episodes for x in (e.prompt_ids, e.response_ids)])
    within = torch.arange(total) - torch.repeat_interleave(ends - L, L)  # [total] position within the sequence
    if one_row:
        input_ids, position_ids = ids[None], within[None]
    else:
        input_ids = torch.zeros(S * width, dtype=torch.int64)
        input_ids[torch.repeat_interleave(starts, L) + within] = ids
        input_ids, position_ids = input_ids.view(S, width), None

    row = torch.repeat_interleave(torch.arange(S), T)  # [sum T]
    t = torch.arange(len(row)) - torch.repeat_interleave(T.cumsum(0) - T, T)  # [sum T] place within the response
    index = torch.cat([e.action_mask for e in episodes]).nonzero()[:, 0]  # [N]
    row, t = row[index], t[index]
    behaviour = torch.cat([e.behaviour_logprobs for e in episodes])
    old = torch.cat([e.behaviour_logprobs if e.old_logprobs is None else e.old_logprobs for e in episodes])
    ref = torch.cat([torch.zeros(len(e.response_ids)) if e.ref_logprobs is None else e.ref_logprobs for e in episodes])
    advantage = torch.tensor([e.advantage for e in episodes], dtype=torch.float32)
    advantages = advantage[row]
    if any(e.advantages is not None for e in episodes):
        same = [torch.full((len(e.response_ids),), e.advantage) for e in episodes]
        advantages = torch.cat([s if e.advantages is None else e.advantages for s, e in zip(same, episodes)])[index]
    batch = MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        predict_index=(starts + P)[row] + t - 1,
        targets=torch.cat([e.response_ids for e in episodes])[index],
        sequence=row,
        position=t,
        old_logprobs=old[index],
        behaviour_logprobs=behaviour[index],
        ref_logprobs=ref[index],
        forced=torch.cat([e.forced for e in episodes])[index],
        advantages=advantages,
        sequence_advantages=advantage,
        lengths=torch.bincount(row, minlength=S),
        response_index=index,
        columns={name: torch.cat([e.columns[name] for e in episodes])[index] for name in episodes[0].columns},
        episodes=episodes,
        last=last,
    )
    return to_device(batch, device)


def filler(device="cpu", last: bool = True) -> MicroBatch:
    """Return the micro-batch without sequences that a rank runs while others still have work."""
    ids = torch.zeros(1, dtype=torch.int64)
    silent = Episode(None, 0, ids, ids[:0], torch.zeros(0), torch.zeros(0, dtype=torch.bool), "stop")
    mb = pack([silent], device, last=last)
    return replace(mb, sequence_advantages=mb.advantages, lengths=mb.targets, episodes=[], weight=0.0)


def to_device(batch: MicroBatch, device) -> MicroBatch:
    if torch.device(device).type != "cpu":
        for part in (vars(batch), batch.columns):
            for name, value in part.items():
                if isinstance(value, torch.Tensor):
                    part[name] = value.to(device, non_blocking=True)
    return batch
