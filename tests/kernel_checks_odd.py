"""More checks of promise P9: masked vocabularies, groups of odd and degenerate sizes.

`kernel_checks.py` imports this file at its end, so that they stand in its list.
"""

import torch
from adaptive_reasoning.kernels.group_advantage import Groups
from kernel_checks import check, close, integers, normal, one_by_one


@check((5, 129, torch.float32), (1, 1, torch.float32), (130, 257, torch.bfloat16))
def token_logprobs_of_a_masked_vocabulary(kernels, device, N, V, dtype):
    """Logits of -1e4 stand for -inf: probability exactly 0, no nan, and a target among them has a finite log-prob."""
    H = 24
    hidden = normal(N, H, device=device, dtype=dtype)
    hidden[:, 0] = 1.0
    weight = normal(V, H, seed=1, device=device, dtype=dtype)
    masked = integers(2, (V,), seed=2).bool()
    masked[0] = False  # one token at least is possible
    weight[masked.to(device), 0] = -1e4
    hidden, weight, targets = hidden.requires_grad_(), weight.requires_grad_(), integers(V, (N,), seed=3, device=device)
    logp = (hidden.double() @ weight.double().t()).log_softmax(-1)
    want = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    want_grad = torch.autograd.grad(want[0].sum() + want[1].sum(), (hidden, weight))
    got = kernels.token_logprobs(hidden, weight, targets, 1.0, 32, True)
    got_grad = torch.autograd.grad(got[0].sum() + got[1].sum(), (hidden, weight))
    for a, b, what in zip(got, want, ("logprob", "entropy")):
        close(a, b, 5e-5, what)
    for a, b in zip(got_grad, want_grad):
        scale = b.double().abs().max().clamp(min=1.0)
        close(a.double() / scale, b.double() / scale, 2e-2 if dtype == torch.bfloat16 else 1e-5, "gradient")


@check(*((sizes, based) for sizes in ((1,), (1, 1, 1), (33, 1, 32)) for based in (False, True)))
def group_advantage_of_odd_groups(kernels, device, sizes, based):
    """One sample, groups of one alone, sizes around the block, fp64 noise."""
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rewards, base = 1e6 + normal(len(ids), seed=1), normal(len(ids), seed=2)  # what fp32 sums would not hold
    got = kernels.group_advantage(
        rewards.to(device), Groups.of(ids.to(device)), "unbiased", 1e-6, 0.0, base.to(device) if based else None
    )
    A = one_by_one(rewards.tolist(), ids.tolist(), "unbiased", base.tolist() if based else None)
    close(got, A, 1e-7, "advantage")
