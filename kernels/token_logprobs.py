"""Log-probs and entropies of given tokens without a [tokens, vocabulary] tensor, in plain torch.

    logits = hidden @ weight.T / temperature        logprob = logits[target] - logsumexp(logits)

With a vocabulary of 151,936 the logits of 16k tokens are 10 GB in fp32 and autograd would keep several copies of them.
Here a chunk of rows is computed, reduced and thrown away, and the backward pass computes it once more. Logits are
never rounded to bf16: next to 16 the bf16 grid is 0.125 wide, which is larger than the differences that matter.

Legend of shapes: N tokens, H hidden size, V vocabulary, C rows of a chunk.
"""

import torch

CHUNK_BYTES = 64 * 2**20  # of fp32 logits


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the log-prob of each target and, if asked for, the entropy of each distribution.

    Args:
        hidden: [N, H] floating point, the states that predict the targets.
        weight: [V, H] of the dtype of `hidden`, the output embedding.
        targets: [N] int64 in [0, V).
        temperature: logits are divided by it, as in sampling; greater than 0.
        chunk: rows of logits computed at a time; None takes as many as fit into 64 MiB, at least one.
        with_entropy: also return the entropies (in nats).

    Returns:
        logprobs [N] and entropy [N] or None, both differentiable, both fp32 (fp64 where `hidden` is fp64).
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1], "hidden [N,H], weight [V,H]"
    assert targets.shape == hidden.shape[:1], "one target per row of hidden"
    assert hidden.dtype == weight.dtype, "hidden and weight must have one dtype"
    assert temperature > 0, "the log-prob at temperature 0 is not defined"
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    logprobs, entropy = TokenLogprobs.apply(hidden, weight, targets, float(temperature), chunk, with_entropy)
    return logprobs, (entropy if with_entropy else None)


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b accumulated and returned in fp32 (fp64 for fp64 inputs), whatever the inputs are rounded to."""
    if a.dtype == b.dtype == accumulation_dtype(a):
        return torch.mm(a, b)
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


class TokenLogprobs(torch.autograd.Function):
    """The autograd function behind `token_logprobs`."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, with_entropy):
        N = hidden.shape[0]
        dtype = accumulation_dtype(hidden)
        logprobs = torch.empty(N, dtype=dtype, device=hidden.device)
        lse = torch.empty_like(logprobs)  # log of the sum of exp(logits), all that the backward pass has to know
        entropy = torch.empty_like(logprobs if with_entropy else logprobs[:0])
        with torch.autocast(hidden.device.type, enabled=False):
            # Off CUDA a narrower weight is widened once per call instead of once per chunk.
            wide = weight if weight.is_cuda else weight.to(dtype)
            for start in range(0, N, chunk):
                rows = slice(start, start + chunk)
                logits = matmul(hidden[rows], wide.t())  # [C, V]
                if temperature != 1.0:
                    logits.div_(temperature)
                target = logits.gather(1, targets[rows, None])[:, 0]
                peak = logits.amax(dim=1)
                logits.sub_(peak[:, None])
                if with_entropy:
                    shifted = logits.clone()
                logits.exp_()
                total = logits.sum(dim=1)
                log_total = total.log()
                lse[rows] = peak + log_total
                logprobs[rows] = target - peak - log_total
                if with_entropy:
                    # H = log sum e^x - sum x e^x / sum e^x for the shifted logits x; the product overwrites x.
                    entropy[rows] = log_total - shifted.mul_(logits).sum(dim=1) / total
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.chunk, ctx.with_entropy = temperature, chunk, with_entropy
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk = ctx.temperature, ctx.chunk
        dtype = accumulation_dtype(hidden)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if want_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            wide = weight if weight.is_cuda else weight.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                g = grad_logprobs[rows, None]  # [C, 1]
                logits = matmul(hidden[rows], wide.t())  # [C, V]
                if temperature != 1.0:
                    logits.div_(temperature)
                logits.sub_(lse[rows, None])  # log p
                if ctx.with_entropy:
                    # dH/dlogit_j = -p_j (log p_j + H); together with dlogprob/dlogit_j = [j = target] - p_j
                    p = logits.exp()
                    logits.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(g).mul_(p).neg_()
                    del p
                else:
                    logits.exp_().mul_(-g)
                logits.scatter_add_(1, targets[rows, None], g)
                if temperature != 1.0:
                    logits.div_(temperature)
                narrow = logits.to(wide.dtype)  # gradient of the logits, [C, V]
                if want_hidden:
                    grad_hidden[rows] = matmul(narrow, wide).to(hidden.dtype)
                if want_weight:
                    part = hidden[rows].to(narrow.dtype)
                    if narrow.dtype == dtype:
                        grad_weight.addmm_(narrow.t(), part)
                    else:
                        grad_weight.add_(matmul(narrow.t(), part))
        grad_weight = grad_weight.to(weight.dtype) if want_weight else None
        return grad_hidden, grad_weight, None, None, None, None
