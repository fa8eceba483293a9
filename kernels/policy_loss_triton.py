"""The clipped surrogate with divergence and entropy in Triton: see `policy_loss.py` for the mathematics.

One pass. With a ratio of the token a program takes a block of tokens; with a ratio of the sequence it takes a sequence,
adds up its log ratio and then goes over its tokens. Either way the gradient is written beside the sums, so the backward
pass is one multiplication. Sums of programs are added in fp64, always in the same order.
"""

import torch
import triton
import triton.language as tl
from adaptive_reasoning.kernels.policy_loss import RATIOS, STATISTICS, check

BLOCK = 1024


@triton.jit
def surrogate(d, A, w, clip_low, clip_high, dual_clip, DUAL: tl.constexpr):
    """Return (weighted value, its gradient to d, whether it was clipped) for a log ratio d."""
    r = tl.exp(d)
    free = -A * r
    clipped = -A * tl.minimum(tl.maximum(r, 1.0 - clip_low), 1.0 + clip_high)
    value = tl.maximum(free, clipped)
    cut = clipped > free
    slope = tl.where(cut, 0.0, free)
    if DUAL:
        bound = -A * dual_clip
        over = (A < 0.0) & (value > bound)
        value, slope = tl.where(over, bound, value), tl.where(over, 0.0, slope)
    return value * w, slope * w, cut


@triton.jit
def spread_terms(
    logprobs, ref, entropy, spread, at, inside, kl_coef, KL: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    """Return (k3, its gradient to the log-prob times kl_coef, entropy, weight), each weighted, of a block of tokens."""
    u = tl.load(spread + at, mask=inside, other=0.0)
    k3, slope, bonus = u * 0.0, u * 0.0, u * 0.0
    if KL:
        k = tl.load(ref + at, mask=inside, other=0.0) - tl.load(logprobs + at, mask=inside, other=0.0)
        e = tl.exp(k)
        k3 = e - k - 1.0
        slope = tl.where(k3 <= 10.0, (1.0 - e) * u * kl_coef, 0.0)
        k3 = tl.minimum(tl.maximum(k3, -10.0), 10.0) * u
    if ENTROPY:
        bonus = tl.load(entropy + at, mask=inside, other=0.0) * u
    return k3, slope, bonus, u


@triton.jit(do_not_specialize=["N"])
def token_kernel(
    logprobs, old, advantages, weights, ref, entropy, spread, grad, entropy_grad, sums, N,
    clip_low, clip_high, dual_clip, kl_coef, entropy_coef, stat_weight,
    DUAL: tl.constexpr, KL: tl.constexpr, ENTROPY: tl.constexpr, OWN_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [programs, 5]: policy, clipped, kl estimate, k3, entropy."""
    program = tl.program_id(0)
    at = tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    d = tl.load(logprobs + at, mask=inside, other=0.0) - tl.load(old + at, mask=inside, other=0.0)
    A = tl.load(advantages + at, mask=inside, other=0.0)
    w = tl.load(weights + at, mask=inside, other=0.0)
    value, slope, cut = surrogate(d, A, w, clip_low, clip_high, dual_clip, DUAL)
    mean = w if OWN_WEIGHT else tl.where(inside, stat_weight, 0.0)
    out = sums + program * 5
    tl.store(out, tl.sum(value, 0))
    tl.store(out + 1, tl.sum(tl.where(cut, mean, 0.0), 0))
    tl.store(out + 2, tl.sum(-d * mean, 0))
    k3, k3_slope, bonus, u = spread_terms(logprobs, ref, entropy, spread, at, inside, kl_coef, KL, ENTROPY)
    tl.store(out + 3, tl.sum(k3, 0))
    tl.store(out + 4, tl.sum(bonus, 0))
    tl.store(grad + at, slope + k3_slope, mask=inside)
    if ENTROPY:
        tl.store(entropy_grad + at, -entropy_coef * u, mask=inside)


@triton.jit
def sequence_kernel(
    logprobs, old, advantages, weights, ends, lengths, ref, entropy, spread, grad, entropy_grad, sums,
    clip_low, clip_high, dual_clip, kl_coef, entropy_coef, stat_weight, MEAN: tl.constexpr,
    DUAL: tl.constexpr, KL: tl.constexpr, ENTROPY: tl.constexpr, OWN_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    last = tl.load(ends + program)
    length = tl.load(lengths + program)
    first = last - length
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < last
        total += tl.load(logprobs + at, mask=inside, other=0.0) - tl.load(old + at, mask=inside, other=0.0)
    d = tl.sum(total, 0)
    share = 1.0
    if MEAN:
        share = 1.0 / tl.maximum(length, 1).to(tl.float32)
        d = d * share
    A = tl.load(advantages + program)
    w = tl.load(weights + program)
    value, slope, cut = surrogate(d, A, w, clip_low, clip_high, dual_clip, DUAL)
    slope = slope * share
    mean = w if OWN_WEIGHT else stat_weight
    out = sums + program * 5
    tl.store(out, value)
    tl.store(out + 1, tl.where(cut, mean, 0.0))
    tl.store(out + 2, -d * mean)
    k3_total = tl.zeros((BLOCK,), tl.float32)
    bonus_total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < last
        if KL or ENTROPY:
            k3, k3_slope, bonus, u = spread_terms(logprobs, ref, entropy, spread, at, inside, kl_coef, KL, ENTROPY)
            k3_total += k3
            bonus_total += bonus
            tl.store(grad + at, slope + k3_slope, mask=inside)
            if ENTROPY:
                tl.store(entropy_grad + at, -entropy_coef * u, mask=inside)
        else:
            tl.store(grad + at, tl.zeros((BLOCK,), tl.float32) + slope, mask=inside)
    tl.store(out + 3, tl.sum(k3_total, 0))
    tl.store(out + 4, tl.sum(bonus_total, 0))


class PolicyLoss(torch.autograd.Function):
    """The autograd function behind `policy_loss`: (loss, sums [5])."""

    @staticmethod
    def forward(
        ctx, logprobs, entropy, old, advantages, weights, ref, spread, lengths, ratio, clip_low, clip_high, dual_clip,
        kl_coef, entropy_coef, stat_weight,
    ):  # fmt: skip
        N = len(logprobs)
        grad = torch.empty(N, dtype=torch.float32, device=logprobs.device)
        entropy_grad = torch.empty_like(grad if entropy_coef else grad[:0])
        programs = triton.cdiv(N, BLOCK) if ratio == "token" else len(lengths)
        sums = torch.empty(programs, len(STATISTICS), dtype=torch.float32, device=logprobs.device)
        tensors = [x.float().contiguous() for x in (logprobs, old, advantages, weights)]
        more = [tensors[0] if x is None else x.float().contiguous() for x in (ref, entropy, spread)]
        numbers = [clip_low, clip_high, dual_clip or 0.0, kl_coef, entropy_coef, stat_weight or 0.0]
        flags = {"DUAL": dual_clip is not None, "KL": bool(kl_coef), "ENTROPY": bool(entropy_coef)}
        flags |= {"OWN_WEIGHT": stat_weight is None, "BLOCK": BLOCK}
        numbers = [float(x) for x in numbers]
        if programs and ratio == "token":
            token_kernel[(programs,)](*tensors, *more, grad, entropy_grad, sums, N, *numbers, **flags)
        elif programs:
            sequence_kernel[(programs,)](
                *tensors, lengths.cumsum(0), lengths.contiguous(), *more, grad, entropy_grad, sums, *numbers,
                MEAN=ratio == "sequence_mean", **flags,
            )  # fmt: skip
        sums = sums.sum(0, dtype=torch.float64)
        loss = sums[0] + kl_coef * sums[3] - entropy_coef * sums[4]
        ctx.save_for_backward(grad, entropy_grad)
        ctx.types = logprobs.dtype, entropy.dtype if entropy is not None and entropy_coef else None
        sums = sums.to(logprobs.dtype)
        ctx.mark_non_differentiable(sums)
        return loss.to(logprobs.dtype), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad, entropy_grad = ctx.saved_tensors
        first, second = ctx.types
        entropy_grad = (entropy_grad * grad_loss).to(second) if second is not None else None
        return (grad * grad_loss).to(first), entropy_grad, *[None] * 13


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: str = "token",
    sequence: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    dual_clip: float | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    spread_weights: torch.Tensor | None = None,
    stat_weight: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """See the twin; computed in fp32 whatever the inputs are."""
    coefs = (kl_coef, entropy_coef)
    check(logprobs, old_logprobs, advantages, weights, ratio, sequence, lengths, ref_logprobs, entropy, coefs)
    assert ratio in RATIOS
    spread = weights if spread_weights is None else spread_weights
    assert spread.shape == logprobs.shape or not any(coefs), "divergence and entropy need weights of tokens"
    loss, sums = PolicyLoss.apply(
        logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs, spread, lengths, ratio, clip_low, clip_high,
        dual_clip, kl_coef, entropy_coef, stat_weight,
    )  # fmt: skip
    shown = [name for name in STATISTICS if (name != "ref_kl" or kl_coef) and (name != "entropy" or entropy_coef)]
    return loss, {name: sums[STATISTICS.index(name)] for name in shown}
