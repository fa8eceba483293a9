"""The clipped surrogate with divergence and entropy, for packed tokens without padding, in plain torch.

For token n with weight w_n, advantage A_n and log ratio d_n = logprob_n - old_n, r = e^d:

    policy  = sum_n w_n max( -A_n r_n, -A_n clip(r_n, 1 - clip_low, 1 + clip_high) )
    ref_kl  = sum_n u_n clamp( e^k - k - 1, -10, 10 ),   k = ref_n - logprob_n           (k3)
    entropy = sum_n u_n H_n
    loss    = policy + kl_coef ref_kl - entropy_coef entropy

With a ratio of the sequence, "sequence_mean" (geometric mean) or "sequence_product", d_s is the mean or the sum of
d_n over the tokens of sequence s, and `policy` sums over sequences with weights and advantages [S]. With `dual_clip`
c a negative advantage costs at most -A c. Weights carry everything that tells the algorithms apart:

    GRPO, Ada-GRPO, PPO    w = u = 1/tokens of the step (or 1/(sequences x length))        ratio "token"
    DeGRPO                 w = alpha/S on the control token, 1/(T S) on the others; u apart    ratio "token"
    AdaptThink             w = 1/sequences, advantages of sequences                        ratio "sequence_mean"

Gradient: dpolicy/dlogprob_n = -w A r where the clipped term is not the larger one, else 0; divided by the length for
"sequence_mean". A clamped k3 has none.

Bytes (Triton): 12 to 24 bytes read and 4 to 8 written a token, once; the gradient is made in the forward pass.

Legend of shapes: N tokens, S sequences.
"""

import torch

RATIOS = ("token", "sequence_mean", "sequence_product")
STATISTICS = ("policy", "clip_fraction", "approx_kl", "ref_kl", "entropy")


def check(logprobs, old_logprobs, advantages, weights, ratio, sequence, lengths, ref_logprobs, entropy, coefs) -> None:
    assert ratio in RATIOS, f"ratio {ratio}: takes {', '.join(RATIOS)}"
    assert logprobs.shape == old_logprobs.shape and logprobs.dim() == 1, "logprobs and old_logprobs [N]"
    if ratio == "token":
        assert advantages.shape == weights.shape == logprobs.shape, "advantages and weights [N]"
    else:
        assert sequence is not None and lengths is not None, "a ratio of the sequence needs sequence [N], lengths [S]"
        assert advantages.shape == weights.shape == lengths.shape, "advantages and weights [S]"
    assert ref_logprobs is not None or not coefs[0], "kl_coef needs ref_logprobs"
    assert entropy is not None or not coefs[1], "entropy_coef needs entropy"


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
    """Return this micro-batch's share of the loss and of its statistics; no tokens give 0, with a gradient of 0.

    Args:
        logprobs: [N], with gradient.
        old_logprobs: [N], what the ratio is taken against.
        advantages, weights: [N]; [S] where the ratio is the sequence's.
        clip_low, clip_high: the ratio is clipped to 1 - clip_low .. 1 + clip_high.
        ratio: "token", "sequence_mean" or "sequence_product".
        sequence: [N] int64, the sequence of each token, not decreasing; not needed for ratio "token".
        lengths: [S] int64, tokens of each sequence.
        dual_clip: bound of the ratio for negative advantages, above 1; None: no bound.
        ref_logprobs, kl_coef: [N] log-probs of the reference policy and the weight of the divergence from it.
        entropy, entropy_coef: [N] with gradient, and the weight of the bonus.
        spread_weights: [N] u, the weights of divergence and entropy; None: `weights`.
        stat_weight: weight of a token (sequence) in clip_fraction and approx_kl; None: `weights`.

    Returns:
        the loss, and {"policy", "clip_fraction", "approx_kl", and "ref_kl", "entropy" where their coefficient is not
        0}, all sums, detached.
    """
    coefs = (kl_coef, entropy_coef)
    check(logprobs, old_logprobs, advantages, weights, ratio, sequence, lengths, ref_logprobs, entropy, coefs)
    log_ratio = logprobs - old_logprobs  # [N]
    if ratio != "token":
        log_ratio = torch.zeros_like(advantages, dtype=log_ratio.dtype).index_add(0, sequence, log_ratio)  # [S]
        if ratio == "sequence_mean":
            log_ratio = log_ratio / lengths.clamp(min=1)
    r = log_ratio.exp()
    free = -advantages * r
    clipped = -advantages * r.clamp(1 - clip_low, 1 + clip_high)
    value = torch.maximum(free, clipped)
    if dual_clip is not None:
        value = torch.where(advantages < 0, torch.minimum(value, -advantages * dual_clip), value)
    value = policy = (value * weights).sum()
    mean = weights if stat_weight is None else torch.full_like(weights, stat_weight)
    stats = {
        "policy": policy,
        "clip_fraction": ((clipped > free) * mean).sum(),
        "approx_kl": (-log_ratio * mean).sum(),
    }
    spread = weights if spread_weights is None else spread_weights
    if kl_coef:
        k = ref_logprobs - logprobs
        stats["ref_kl"] = ((k.exp() - k - 1).clamp(-10, 10) * spread).sum()
        value = value + kl_coef * stats["ref_kl"]
    if entropy_coef:
        stats["entropy"] = (entropy * spread).sum()
        value = value - entropy_coef * stats["entropy"]
    return value, {name: x.detach() for name, x in stats.items()}
