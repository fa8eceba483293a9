"""Advantages of ragged groups in one Triton launch: see `group_advantage.py` for the mathematics.

A program takes a group and reads it in blocks of 32 samples, three times: for the mean, for the deviations from it, and
to write.
"""

import torch
import triton
import triton.language as tl
from adaptive_reasoning.kernels.group_advantage import STD, Groups

BLOCK = 32  # samples


@triton.jit
def block_of(values, order, last, start, BLOCK: tl.constexpr):
    """Return (samples, which are inside, their values in fp64) of a block of a group."""
    at = start + tl.arange(0, BLOCK)
    inside = at < last
    samples = tl.load(order + at, mask=inside, other=0).to(tl.int32)
    return samples, inside, tl.load(values + samples, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def moments(values, order, first, last, STD: tl.constexpr, BLOCK: tl.constexpr):
    """Return (mean, standard deviation, largest minus smallest) of a group; STD 0: no deviation, 1 divides by n."""
    n = tl.maximum(last - first, 1).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    for start in range(first, last, BLOCK):
        _, inside, x = block_of(values, order, last, start, BLOCK)
        total += x
        highest = tl.maximum(highest, tl.where(inside, x, float("-inf")))
        lowest = tl.minimum(lowest, tl.where(inside, x, float("inf")))
    mean = tl.sum(total, 0) / n
    deviation = n * 0.0
    if STD != 0:
        square = tl.zeros((BLOCK,), tl.float64)
        for start in range(first, last, BLOCK):
            _, inside, x = block_of(values, order, last, start, BLOCK)
            square += tl.where(inside, (x - mean) * (x - mean), 0.0)
        degrees = n if STD == 1 else tl.maximum(n - 1.0, 1.0)
        deviation = tl.sqrt(tl.sum(square, 0) / degrees)
    return mean, deviation, tl.max(highest, 0) - tl.min(lowest, 0)


@triton.jit
def statistics(
    rewards, base, order, first, last, eps, spread, STD: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return (centre, factor) of a group: A = (r - centre) * factor."""
    centre, deviation, width = moments(rewards, order, first, last, 0 if BASE else STD, BLOCK)
    factor = centre * 0.0 + 1.0
    single = factor  # a group of one: mean 0, deviation 1
    if STD != 0:
        single = 1.0 / (single + eps)
        if BASE:
            _, deviation, unit = moments(base, order, first, last, STD, BLOCK)
            factor = tl.where(unit > 0, 1.0 / (deviation + eps), single)  # equal numbers are no unit
        else:
            factor = 1.0 / (deviation + eps)
    factor = tl.where(width <= spread, 0.0, factor)
    alone = last - first == 1
    return tl.where(alone, 0.0, centre), tl.where(alone, single, factor)


@triton.jit
def advantage_kernel(
    rewards, base, order, offsets, out, eps, spread, STD: tl.constexpr, BASE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0)
    first, last = tl.load(offsets + group).to(tl.int32), tl.load(offsets + group + 1).to(tl.int32)
    centre, factor = statistics(rewards, base, order, first, last, eps, spread, STD, BASE, BLOCK)
    for start in range(first, last, BLOCK):
        samples, inside, r = block_of(rewards, order, last, start, BLOCK)
        tl.store(out + samples, ((r - centre) * factor).to(out.dtype.element_ty), mask=inside)


def group_advantage(
    rewards: torch.Tensor,
    groups: Groups,
    std: str = "unbiased",
    eps: float = 1e-6,
    spread: float = 0.0,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the twin. One launch."""
    assert std in STD, f"std {std}"
    assert rewards.dtype in (torch.float32, torch.float64), "rewards in fp32 or fp64"
    rewards = rewards.contiguous()
    out = torch.empty_like(rewards)
    if len(rewards):
        advantage_kernel[(len(groups.offsets) - 1,)](
            rewards, rewards if base is None else base.contiguous(), groups.order, groups.offsets, out, eps, spread,
            STD=STD.index(std), BASE=base is not None, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
    return out
