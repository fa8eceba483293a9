"""Root mean square norm over the last dimension, with an optional residual sum before it, in plain torch.

    residual += x   (if there is one)        y = x / sqrt(mean(x^2) + eps) * weight,   x = residual if there is one

Computed in fp32 and rounded once, at the end (F.rms_norm; the Qwen2 code of transformers rounds before the weight,
too). The residual is updated in place and normalised as it is stored, so both halves of a layer see the same numbers.
For inference: the Triton version has no gradient.

Bytes: R H numbers read and as many written; with a residual twice as many of both.
"""

from functools import cache

import torch
import torch.nn.functional as F


@cache
def filled(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows, 1), value)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """Return the norm of x [..., H], contiguous, of the type of x; with a residual [..., H] of their sum (in place)."""
    if residual is not None:
        x = residual.add_(x)
    if x.is_cuda or x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    if x.dim() == 2:  # for few rows every call counts: mean and eps in one product with a column of 1/H
        n = x.shape[1]
        scale = torch.addmm(filled(1, eps), x * x, filled(n, 1 / n)).rsqrt_()
    else:
        scale = (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)
