"""Advantages of ragged groups: the reward against its group's mean, in units of its group's spread.

For a group of n samples with rewards r_i:

    A_i = r_i - mean r                   std "none"
    A_i = (r_i - mean r) / (s + eps)     s: "population" (divides by n) or "unbiased" (by n - 1) deviation, of r or of
                                         other numbers `base`

A group of one has mean 0 and s = 1, as in the official code: A = r / (1 + eps). A group whose r differ by at most
`spread` gets exactly 0: the mean of equal numbers can miss them by a unit in the last place, and eps does not hide that
in fp32. Where the numbers of `base` are all equal, s = 1: they are no unit to measure in. All sums are in fp64,
whatever the type of the rewards. What a method does to rewards or advantages besides stands in its own file.

Bytes: 8 B for the rewards and as many for each of order and advantages of B samples.

Legend of shapes: B samples, K groups.
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
    def of(cls, ids: torch.Tensor) -> "Groups":
        """Return the groups of samples [B] with the same number; any int64 numbers."""
        _, index, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
        offsets = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=ids.device)
        torch.cumsum(sizes, 0, out=offsets[1:])
        return cls(torch.argsort(index, stable=True), offsets, index)


def group_advantage(
    rewards: torch.Tensor,
    groups: Groups,
    std: str = "unbiased",
    eps: float = 1e-6,
    spread: float = 0.0,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the advantage [B] of each sample within its group, of the type of the rewards.

    Args:
        rewards: [B] fp32 or fp64.
        groups: the groups of the samples; an empty group is allowed.
        std: what the centred reward is divided by, "none", "population" or "unbiased".
        eps: added to the standard deviation.
        spread: groups whose rewards differ by at most this get advantage 0.
        base: [B], the numbers whose deviation is taken; None: the rewards.
    """
    assert std in STD, f"std {std}"
    r, A = rewards.double(), torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    for samples in groups.order.split(groups.offsets.diff().tolist()):
        of, unit = r[samples], (r if base is None else base.double())[samples]
        mean, s = 0.0, 1.0
        if len(of) > 1:
            mean = of.mean()
            if base is None or unit.max() > unit.min():
                s = unit.std(unbiased=std == "unbiased")
            if of.max() - of.min() <= spread:
                continue
        A[samples] = of - mean if std == "none" else (of - mean) / (s + eps)
    return A.to(rewards.dtype)
