"""One token a row from logits, and its log-prob under the very distribution it was drawn from, in plain torch.

    p = softmax(logits / temperature), cut to the top k, then to the nucleus top_p, renormalised
    token = first v with sum_{w <= v} p_w > u        logprob = log p_token

u is one uniform number a row. The nucleus is the smallest set of most likely tokens whose probability reaches top_p; of
equally likely tokens the first ones belong to it. Temperature 0 takes the largest logit; its log-prob is that of the
untempered softmax, because a point mass says nothing.

Bytes: 4 B V, the logits once, without a cut. Torch reads and writes them about ten times, and sorts for a nucleus.

Legend of shapes: B rows, V vocabulary.
"""

import torch


def restrict(logprobs: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Return log-probs [B, V] cut to the top k and the nucleus, renormalised; -inf outside."""
    if top_k:
        kth = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, float("-inf")).log_softmax(-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        probs = ordered.exp()
        outside = probs.cumsum(-1) - probs >= top_p  # mass before this token already reaches top_p
        logprobs = logprobs.masked_fill(outside.scatter(-1, order, outside), float("-inf")).log_softmax(-1)
    return logprobs


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B] int64 and log-probs [B] fp32.

    Args:
        logits: [B, V]; -inf marks a token that is not allowed. Every row needs an allowed one.
        uniform: [B] fp32 in [0, 1), one random number a row. An exponential race would need V of them.
        temperature: 0 is greedy.
        top_k, top_p: 0 and 1 mean no cut.
    """
    logits = logits.float()
    if temperature == 0:
        best, tokens = logits.max(-1)  # the log-prob of the largest logit needs no other one
        return tokens, -(logits - best.unsqueeze(-1)).exp_().sum(-1).log_()
    logprobs = logits.div(temperature).log_softmax(-1)
    if top_k or top_p < 1:
        logprobs = restrict(logprobs, top_p, top_k)
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # The target stays strictly below the total, so the first column that exceeds it has a positive probability.
    target = torch.minimum(uniform.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
