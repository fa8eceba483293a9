"""Advantages of ragged groups: Ada-GRPO's shaping, the group's statistics and the broadcast to tokens, in plain torch.

For a group of n samples with rewards r_i and formats f_i, F_i of them in the format of sample i:

    alpha_i = 1 + (n / F_i - 1) w          r'_i = alpha_i r_i              (no formats: r' = r)
    A_i = r'_i - mean r'                   std "none"
    A_i = (r'_i - mean r') / (std + eps)   std "population" (divides by n) or "unbiased" (by n - 1), of r' or of r

A group of one has mean 0 and std 1, as in the official code: A = r' / (1 + eps). A group whose r' are all equal, or
differ by at most `spread`, gets exactly 0: the mean of equal numbers can miss them by a unit in the last place, and eps
does not hide that in fp32. With the std of r, a group whose r are all equal has std 1: a spread of 0 is no unit to
measure in. All sums are in fp64, whatever the type of the rewards.

Bytes: 8 B for the rewards and as many for each of order, formats, index, advantages and shaped rewards of B samples;
for N tokens 8 N for the sample numbers and 4 N for the result.

Legend of shapes: B samples, K groups, N tokens.
"""

from typing import NamedTuple

import torch

STD = ("none", "population", "unbiased")


class Groups(NamedTuple):
    """Ragged groups of B samples that may lie in any order: group k holds order[offsets[k] : offsets[k + 1]]."""

    order: torch.Tensor  # [B] int64, sample numbers sorted by group
    offsets: torch.Tensor  # [K + 1] int64
    index: torch.Tensor  # [B] int64, group of each sample

    @classmethod
    def of(cls, ids: torch.Tensor, number: int | None = None) -> "Groups":
        """Return the groups of samples with these group numbers [B] in 0 .. number-1 (None: the largest plus one)."""
        if number is None:
            number = int(ids.max()) + 1 if len(ids) else 0
        offsets = torch.zeros(number + 1, dtype=torch.int64, device=ids.device)
        torch.cumsum(torch.bincount(ids, minlength=number), 0, out=offsets[1:])
        return cls(torch.argsort(ids, stable=True), offsets, ids)


class Advantages(NamedTuple):
    samples: torch.Tensor  # [B], of the type of the rewards
    shaped: torch.Tensor  # [B] r', of the type of the rewards
    tokens: torch.Tensor | None  # [N] fp32


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
    """Return the advantage of each sample within its group, its shaped reward, and the advantage of each token.

    Args:
        rewards: [B] fp32 or fp64.
        groups: the groups of the samples; an empty group is allowed.
        std: what the centred reward is divided by, "none", "population" or "unbiased".
        eps: added to the standard deviation.
        spread: groups whose shaped rewards differ by at most this get advantage 0.
        formats: [B] int64, any numbers; None leaves the rewards as they are.
        weight: w, how much rarity counts; Ada-GRPO takes (1 + cos(pi t / T)) / 2.
        std_of: the standard deviation is that of the "shaped" or of the "raw" rewards.
        sequence: [N] int64, the sample of each packed token; fastest where tokens of a sample stand together.
    """
    assert std in STD and std_of in ("shaped", "raw"), f"std {std}, std_of {std_of}"
    r, index, K = rewards.double(), groups.index, len(groups.offsets) - 1
    size = groups.offsets.diff()  # [K]
    n = size.double()
    shaped = r
    if formats is not None:
        kinds, kind = torch.unique(formats, return_inverse=True)
        kinds = max(1, len(kinds))
        cell = index * kinds + kind  # [B]
        same = torch.bincount(cell, minlength=K * kinds)[cell]
        shaped = (1 + (n[index] / same - 1) * weight) * r

    def total(values):
        return torch.zeros(K, dtype=torch.float64, device=r.device).index_add(0, index, values)

    def width(values):  # the largest minus the smallest of each group
        infinite = torch.full((K,), torch.inf, dtype=torch.float64, device=r.device)
        highest = (-infinite).scatter_reduce(0, index, values, "amax")
        return highest - infinite.scatter_reduce(0, index, values, "amin")

    divisor = n.clamp(min=1)
    A = shaped - (total(shaped) / divisor)[index]
    if std != "none":
        base = r if std_of == "raw" else shaped
        deviation = base - (total(base) / divisor)[index]
        degrees = divisor if std == "population" else (n - 1).clamp(min=1)
        s = (total(deviation.square()) / degrees).sqrt()
        s = torch.where(width(base) == 0, 1.0, s) if std_of == "raw" else s
        A = A / (s + eps)[index]
    A = torch.where((width(shaped) <= spread)[index], 0.0, A)
    A = torch.where(size[index] == 1, shaped / (1 + eps) if std != "none" else shaped, A)
    tokens = A[sequence].float() if sequence is not None else None
    return Advantages(A.to(rewards.dtype), shaped.to(rewards.dtype), tokens)
