"""Advantages of ragged groups in one Triton launch: see `group_advantage.py` for the mathematics.

The first K programs take a group each and write the advantages of its samples. The others take a block of tokens each:
they go through the samples that occur in their block, nearly always one or two, and compute the statistics of the
sample's group once more instead of waiting for the program that has them. A group is read in blocks of 32 samples, and
three times: for the mean, for the deviations from it, and to write.
"""

import torch
import triton
import triton.language as tl
from adaptive_reasoning.kernels.group_advantage import STD, Advantages, Groups

BLOCK = 32  # samples
TOKENS = 128


@triton.jit
def shaped_block(
    rewards, order, formats, first, last, start, weight, FORMATS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return (samples, which are inside, r, r') of a block of a group, in fp64."""
    at = start + tl.arange(0, BLOCK)
    inside = at < last
    samples = tl.load(order + at, mask=inside, other=0).to(tl.int32)
    r = tl.load(rewards + samples, mask=inside, other=0.0).to(tl.float64)
    shaped = r
    if FORMATS:
        own = tl.load(formats + samples, mask=inside, other=0).to(tl.int32)
        same = tl.zeros((BLOCK,), tl.int32)  # F: samples of the group in the same format
        for other in range(first, last, BLOCK):
            there = other + tl.arange(0, BLOCK)
            beside = tl.load(order + there, mask=there < last, other=0).to(tl.int32)
            kinds = tl.load(formats + beside, mask=there < last, other=0).to(tl.int32)
            equal = (own[:, None] == kinds[None, :]) & (there < last)[None, :]
            same += tl.sum(equal.to(tl.int32), 1)
        n = (last - first).to(tl.float64)
        shaped = (1.0 + (n / tl.maximum(same, 1).to(tl.float64) - 1.0) * weight) * r
    return samples, inside, r, shaped


@triton.jit
def statistics(
    rewards, order, formats, first, last, weight, eps, spread,
    FORMATS: tl.constexpr, STD: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return (centre, factor) of a group: A = (r' - centre) * factor."""
    n = tl.maximum(last - first, 1).to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    raw_total = tl.zeros((BLOCK,), tl.float64)
    highest = tl.full((BLOCK,), float("-inf"), tl.float64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    raw_highest, raw_lowest = highest, lowest
    for start in range(first, last, BLOCK):
        _, inside, r, shaped = shaped_block(rewards, order, formats, first, last, start, weight, FORMATS, BLOCK)
        total += shaped
        raw_total += r
        highest = tl.maximum(highest, tl.where(inside, shaped, float("-inf")))
        lowest = tl.minimum(lowest, tl.where(inside, shaped, float("inf")))
        if RAW:
            raw_highest = tl.maximum(raw_highest, tl.where(inside, r, float("-inf")))
            raw_lowest = tl.minimum(raw_lowest, tl.where(inside, r, float("inf")))
    centre = tl.sum(total, 0) / n
    factor = (n * 0.0) + 1.0
    single = factor  # a group of one: mean 0, std 1
    if STD != 0:  # 1 population, 2 unbiased
        single = 1.0 / (single + eps)
        raw_centre = tl.sum(raw_total, 0) / n
        square = tl.zeros((BLOCK,), tl.float64)
        for start in range(first, last, BLOCK):
            _, inside, r, shaped = shaped_block(rewards, order, formats, first, last, start, weight, FORMATS, BLOCK)
            deviation = (r - raw_centre) if RAW else (shaped - centre)
            square += tl.where(inside, deviation * deviation, 0.0)
        degrees = n if STD == 1 else tl.maximum(n - 1.0, 1.0)
        factor = 1.0 / (tl.sqrt(tl.sum(square, 0) / degrees) + eps)
        if RAW:  # equal raw rewards have std 1
            factor = tl.where(tl.max(raw_highest, 0) == tl.min(raw_lowest, 0), single, factor)
    factor = tl.where(tl.max(highest, 0) - tl.min(lowest, 0) <= spread, 0.0, factor)
    alone = last - first == 1
    return tl.where(alone, 0.0, centre), tl.where(alone, single, factor)


@triton.jit(do_not_specialize=["groups", "N"])
def advantage_kernel(
    rewards, order, offsets, index, formats, sequence, samples_out, shaped_out, tokens_out, groups, N,
    weight_high, weight_low, eps, spread,
    FORMATS: tl.constexpr, STD: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # A number from Python arrives in fp32; two of them hold w to 48 bits.
    weight = tl.cast(weight_high, tl.float64) + tl.cast(weight_low, tl.float64)
    if program < groups:
        first, last = tl.load(offsets + program).to(tl.int32), tl.load(offsets + program + 1).to(tl.int32)
        centre, factor = statistics(
            rewards, order, formats, first, last, weight, eps, spread, FORMATS, STD, RAW, BLOCK
        )  # fmt: skip
        for start in range(first, last, BLOCK):
            samples, inside, r, shaped = shaped_block(
                rewards, order, formats, first, last, start, weight, FORMATS, BLOCK
            )  # fmt: skip
            A = (shaped - centre) * factor
            tl.store(samples_out + samples, A.to(samples_out.dtype.element_ty), mask=inside)
            tl.store(shaped_out + samples, shaped.to(shaped_out.dtype.element_ty), mask=inside)
    else:
        at = tl.cast(program - groups, tl.int64) * TOKENS + tl.arange(0, TOKENS)
        inside = at < N
        mine = tl.load(sequence + at, mask=inside, other=-1).to(tl.int32)
        result = tl.zeros((TOKENS,), tl.float32)
        sample = tl.min(tl.where(inside, mine, 2147483647), 0)
        end = tl.max(mine, 0)
        while sample <= end:
            group = tl.load(index + sample)
            first, last = tl.load(offsets + group).to(tl.int32), tl.load(offsets + group + 1).to(tl.int32)
            centre, factor = statistics(
                rewards, order, formats, first, last, weight, eps, spread, FORMATS, STD, RAW, BLOCK
            )  # fmt: skip
            for start in range(first, last, BLOCK):
                samples, here, r, shaped = shaped_block(
                    rewards, order, formats, first, last, start, weight, FORMATS, BLOCK
                )  # fmt: skip
                A = tl.sum(tl.where(here & (samples == sample), (shaped - centre) * factor, 0.0), 0)
                result += tl.where((mine == sample), A, 0.0).to(tl.float32)
            sample = tl.min(tl.where(inside & (mine > sample), mine, 2147483647), 0)  # the next one that occurs
        tl.store(tokens_out + at, result, mask=inside)


def group_advantage(
    rewards: torch.Tensor,
    groups: Groups,
    std: str = "unbiased",
    eps: float = 1e-6,
    spread: float = 0.0,
    formats: torch.Tensor | None = None,
    weight: float = 0.0,
    std_of: str = "shaped",
    sequence: torch.Tensor | None = None,
) -> Advantages:
    """See the twin. One launch."""
    assert std in STD and std_of in ("shaped", "raw"), f"std {std}, std_of {std_of}"
    assert rewards.dtype in (torch.float32, torch.float64), "rewards in fp32 or fp64"
    rewards = rewards.contiguous()
    samples, shaped = torch.empty_like(rewards), torch.empty_like(rewards)
    N = 0 if sequence is None else len(sequence)
    tokens = torch.empty(N, dtype=torch.float32, device=rewards.device) if sequence is not None else None
    K = len(groups.offsets) - 1
    high = torch.tensor(weight, dtype=torch.float32).item()
    if len(rewards):
        advantage_kernel[(K + triton.cdiv(N, TOKENS),)](
            rewards, groups.order, groups.offsets, groups.index,
            rewards if formats is None else formats.contiguous(),
            groups.index if sequence is None else sequence.contiguous(),
            samples, shaped, samples if tokens is None else tokens, K, N, high, weight - high, eps, spread,
            FORMATS=formats is not None, STD=STD.index(std), RAW=std_of == "raw" and std != "none",
            BLOCK=BLOCK, TOKENS=TOKENS, num_warps=1,
        )  # fmt: skip
    return Advantages(samples, shaped, tokens)
