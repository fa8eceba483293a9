"""More checks of promise P9: masked vocabularies, groups and sequences of odd and degenerate sizes.

`kernel_checks.py` imports this file at its end, so that they stand in its list.
"""

import torch
from adaptive_reasoning.kernels.group_advantage import Groups
from adaptive_reasoning.kernels.policy_loss import RATIOS
from kernel_checks import check, close, fp32_on, integers, normal, one_by_one


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


@check(*((sizes, std_of) for sizes in ((1,), (1, 1, 1), (33, 1, 32)) for std_of in ("shaped", "raw")))
def group_advantage_of_odd_groups(kernels, device, sizes, std_of):
    """One sample, groups of one alone, sizes around the block, the last group empty, tokens backwards, fp64 noise."""
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rewards = 1e6 + normal(len(ids), seed=1)  # what fp32 sums would not hold
    formats = integers(50, (len(ids),), seed=2)
    sequence = torch.tensor([len(ids) - 1, len(ids) // 2, 0])
    for kinds in (None, formats):
        got = kernels.group_advantage(
            rewards.to(device), Groups.of(ids.to(device), len(sizes) + 2), "unbiased", 1e-6, 0.0,
            None if kinds is None else kinds.to(device), 0.25, std_of, sequence.to(device),
        )  # fmt: skip
        listed = None if kinds is None else kinds.tolist()
        A, shaped = one_by_one(rewards.tolist(), ids.tolist(), "unbiased", listed, 0.25, std_of)
        close(got.shaped, shaped, 1e-12, "shaped reward")
        close(got.samples, A, 1e-7, "advantage")
        close(got.tokens, A[sequence].float(), 1e-5, "tokens")


@check(*((ratio, lengths) for ratio in RATIOS for lengths in ((1,), (1, 1, 1), (1024, 1), (0, 1023, 0))))
def policy_loss_of_odd_sequences(kernels, device, ratio, lengths):
    """One token, blocks exactly full, sequences without tokens; far ratios, clamped k3, weights of 0, strided input."""
    lengths = torch.tensor(lengths)
    N, S, dtype = int(lengths.sum()), len(lengths), fp32_on(kernels, torch.float64)
    n, sequence = (N if ratio == "token" else S), torch.repeat_interleave(torch.arange(S), lengths)
    wide = 3.0 if ratio == "token" else 1e-2
    logp = (-normal(N).abs()).to(dtype)
    old, ref = (logp + wide * normal(N, seed=1)).to(dtype), (logp + 4 * normal(N, seed=2)).to(dtype)
    A, w, u = normal(n, seed=3).to(dtype), normal(n, seed=4).abs().to(dtype), normal(N, seed=5).abs().to(dtype) / N
    w[0] = 0.0  # as a token outside a mask
    leaf = logp.double().requires_grad_()
    d = leaf - old.double()
    if ratio != "token":
        d = torch.zeros(S, dtype=torch.float64).index_add(0, sequence, d)
        d = d / lengths.clamp(min=1) if ratio == "sequence_mean" else d
    free, cut = -A * d.exp(), -A * d.exp().clamp(0.8, 1.2)
    k = ref.double() - leaf
    k3 = ((k.exp() - k - 1).clamp(-10, 10) * u).sum()
    want = (torch.maximum(free, cut) * w).sum() + 0.1 * k3
    (want_grad,) = torch.autograd.grad(want, leaf)
    storage = torch.zeros(2 * N, dtype=dtype, device=device)
    storage[::2] = logp.to(device)
    mine = storage[::2].requires_grad_()  # every other number of a larger tensor
    got, _ = kernels.policy_loss(
        mine, *(x.to(device) for x in (old, A, w)), ratio=ratio, sequence=sequence.to(device),
        lengths=lengths.to(device), ref_logprobs=ref.to(device), kl_coef=0.1, spread_weights=u.to(device),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(got, mine)
    scale = want_grad.abs().max().clamp(min=1.0)
    close(got.detach() / scale.to(got.device), want.detach() / scale, 1e-5, "loss")
    close(grad.cpu().double() / scale, want_grad / scale, 1e-5, "gradient")
