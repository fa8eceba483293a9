"""Fused: what an algorithm file writes out in plain torch, in one kernel launch each (`--fused true`).

The algorithm files are the reference: each has its formula in plain torch and, above it, a branch to one of these two.
They give the same numbers, as tests hold for every switch of every algorithm. On a GPU the kernels are Triton's, else
their plain-torch twins.
"""

import torch

from adaptive_reasoning import kernels
from adaptive_reasoning.episode import Episode
from adaptive_reasoning.kernels.group_advantage import Groups
from adaptive_reasoning.learner.packing import MicroBatch


def fused_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mb: MicroBatch,
    args,
    entropy: torch.Tensor | None = None,
    spread: torch.Tensor | None = None,
    stat: float | None = None,
    ratio: str = "token",
) -> tuple[torch.Tensor, dict]:
    """Return (loss, statistics) of a micro-batch as the `loss` of an algorithm file does; see kernels/policy_loss.py.

    Args:
        logprobs, entropy: [N], with gradient; the entropy is needed only with args.entropy_coef.
        advantages, weights: [N]; [S] where `ratio` is the sequence's.
        args: clip_low, clip_high and, where the algorithm has them, dual_clip, kl_coef, entropy_coef.
        spread: [N], weights of divergence and entropy; None: `weights`.
        stat: weight of a token in clip_fraction and approx_kl; None: `weights`.
    """
    kl_coef, entropy_coef = getattr(args, "kl_coef", 0.0), getattr(args, "entropy_coef", 0.0)
    value, stats = kernels.policy_loss(
        logprobs, mb.old_logprobs, advantages, weights, args.clip_low, args.clip_high, ratio,
        sequence=mb.sequence, lengths=mb.lengths, dual_clip=getattr(args, "dual_clip", 0.0) or None,
        ref_logprobs=mb.ref_logprobs if kl_coef else None, kl_coef=kl_coef,
        entropy=entropy if entropy_coef else None, entropy_coef=entropy_coef, spread_weights=spread, stat_weight=stat,
    )  # fmt: skip
    return value, {f"loss/{name}": x for name, x in stats.items()}


def fused_advantages(
    episodes: list[Episode],
    std: str,
    eps: float,
    spread: float = 0.0,
    shaping: float | None = None,
    std_of: str = "shaped",
    drop_all_right: bool = False,
) -> list[float]:
    """Return the advantage of each episode within its group, all groups at once; see kernels/group_advantage.py.

    Args:
        std, eps, spread, std_of: as the kernel's.
        shaping: w of Ada-GRPO, with the modes as formats; None leaves the rewards as they are.
        drop_all_right: groups without a reward of 0 get advantage 0.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def numbered(names: list) -> torch.Tensor:
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([number[name] for name in names], dtype=torch.int64, device=device)

    ids = numbered([e.group for e in episodes])
    groups = Groups.of(ids)
    r = torch.tensor([e.reward for e in episodes], dtype=torch.float64, device=device)
    formats = None if shaping is None else numbered([e.mode for e in episodes])
    A = kernels.group_advantage(r, groups, std, eps, spread, formats, shaping or 0.0, std_of).samples
    if drop_all_right:
        wrong = r.new_zeros(len(groups.offsets) - 1).index_add(0, ids, (r == 0).double())
        A = A.masked_fill(wrong[ids] == 0, 0.0)
    return A.tolist()
