"""What every kernel must do, whether torch or Triton runs it: the checks of promise P9, as plain functions.

`test_kernels.py` runs them under pytest; `experiments/gpu_check.py` runs them by themselves on a machine without
pytest. A check gets the operations (`Kernels("torch")` or `Kernels("triton")`) and a device. References are textbook
formulas in fp64, written here once more. No size is a multiple of any block.
"""

import json
import math
from pathlib import Path

import torch
from adaptive_reasoning.kernels import torch_version, triton_version
from adaptive_reasoning.kernels.group_advantage import Groups

from adaptive_reasoning.rollout.sampler import Sampling
from adaptive_reasoning.rollout.sampler import sample as rollout_sample

GOLDEN = Path(__file__).parent / "golden"
CHECKS = {}  # name: function of (kernels, device)


class Kernels:
    """The operations of one implementation as attributes."""

    def __init__(self, implementation: str):
        self.implementation = implementation

    def __getattr__(self, name):
        return (triton_version if self.implementation == "triton" else torch_version)(name)


def check(*cases):
    """Register a check once, or once for each tuple of further arguments."""

    def register(function):
        for case in cases or ((),):
            label = "-".join(str(x).removeprefix("torch.") for x in case)
            name = f"{function.__name__}[{label}]" if case else function.__name__
            CHECKS[name] = lambda kernels, device, case=case: function(kernels, device, *case)
        return function

    return register


def close(got, want, tolerance, what=""):
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    want = want.to(got.device)
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance, msg=lambda m: f"{what} {m}")


def normal(*shape, seed=0, device="cpu", dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def integers(high, shape, seed=0, device="cpu"):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def fp32_on(kernels, want_fp64):
    """The type to compare golden numbers in: Triton computes losses in fp32."""
    return torch.float32 if kernels.implementation == "triton" else want_fp64


# ------------------------------------------------------------------------------------------------------ token_logprobs


@check(
    (7, 5, 11, torch.float32, 1e-5),
    (1, 8, 1, torch.float32, 1e-5),
    (70, 33, 300, torch.float32, 1e-5),
    (131, 72, 519, torch.bfloat16, 2e-2),
    (3, 64, 256, torch.float16, 4e-3),
)
def token_logprobs_equals_log_softmax(kernels, device, N, H, V, dtype, tolerance):
    """Values, entropies and both gradients; both outputs in the loss, at a temperature."""
    hidden = normal(N, H, device=device, dtype=dtype).requires_grad_()
    weight = normal(V, H, seed=1, device=device, dtype=dtype).requires_grad_()
    targets, factor = integers(V, (N,), device=device), torch.linspace(-1, 2, N, device=device)
    logp = (hidden.double() @ weight.double().t() / 0.6).log_softmax(-1)
    want = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    want_grad = torch.autograd.grad((want[0] * factor + want[1] * factor**2).sum(), (hidden, weight))
    got = kernels.token_logprobs(hidden, weight, targets, 0.6, 64, True)
    got_grad = torch.autograd.grad((got[0] * factor + got[1] * factor**2).sum(), (hidden, weight))
    for a, b, what in zip(got, want, ("logprob", "entropy")):
        assert a.dtype == torch.float32
        close(a, b, 2e-5, what)  # never rounded to the type of the inputs
    for a, b, what in zip(got_grad, want_grad, ("hidden", "weight")):
        assert a.dtype == dtype
        scale = b.double().abs().max().clamp(min=1.0)
        close(a.double() / scale, b.double() / scale, tolerance, f"gradient of {what}")


@check()
def token_logprobs_in_several_chunks_of_the_vocabulary(kernels, device):
    """A view of a larger weight, as ZeRO-3 gathers it, hidden with a row stride, and no entropy."""
    if kernels.implementation == "triton":
        from importlib import import_module

        module = import_module("adaptive_reasoning.kernels.token_logprobs_triton")
        before, module.WORKSPACE_BYTES = module.WORKSPACE_BYTES, 1
    flat = normal(900 * 40 + 3, device=device, dtype=torch.float32)
    hidden = normal(9, 80, seed=3, device=device, dtype=torch.float32)[:, :40].requires_grad_()
    weight, targets = flat[3:].view(900, 40).requires_grad_(), integers(900, (9,), device=device)
    try:
        got, entropy = kernels.token_logprobs(hidden, weight, targets, 1.0, 4)
        grads = torch.autograd.grad(got.sum(), (hidden, weight))
    finally:
        if kernels.implementation == "triton":
            module.WORKSPACE_BYTES = before
    want = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert entropy is None
    close(got, want, 1e-5)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), (hidden, weight))):
        close(a, b, 2e-5, "gradient")


@check()
def token_logprobs_of_no_tokens_frozen_inputs_and_huge_logits(kernels, device):
    hidden = normal(0, 4, device=device, dtype=torch.float32).requires_grad_()
    weight = normal(9, 4, device=device, dtype=torch.float32).requires_grad_()
    logprobs, entropy = kernels.token_logprobs(hidden, weight, integers(9, (0,), device=device), with_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == (0, 4)
    weight.grad = None
    states, targets = normal(6, 4, device=device, dtype=torch.float32), integers(9, (6,), device=device)
    kernels.token_logprobs(states.requires_grad_(), weight.detach(), targets)[0].sum().backward()
    assert states.grad is not None and weight.grad is None
    big = (1e4 * states.detach()).requires_grad_()
    logprobs, entropy = kernels.token_logprobs(big, weight, targets, with_entropy=True)
    (logprobs + entropy).sum().backward()
    assert all(x.isfinite().all() for x in (logprobs, entropy, big.grad, weight.grad))


# ----------------------------------------------------------------------------------------------------- group_advantage


def one_by_one(rewards, ids, std, base=None):
    """The advantage, group by group in plain Python."""
    A, numbers = [0.0] * len(rewards), rewards if base is None else base
    for group in set(ids):
        mine = [i for i, g in enumerate(ids) if g == group]
        n = len(mine)
        r, unit = [rewards[i] for i in mine], [numbers[i] for i in mine]
        mean, centre = math.fsum(r) / n, math.fsum(unit) / n
        squares = math.fsum((x - centre) ** 2 for x in unit)
        s = math.sqrt(squares / (n if std == "population" else max(n - 1, 1)))
        if n == 1 or (base is not None and max(unit) == min(unit)):
            s = 1.0
        for i in mine:
            if n == 1:
                A[i] = rewards[i] / (1.0 if std == "none" else 1.0 + 1e-6)
            elif max(r) > min(r):
                A[i] = (rewards[i] - mean) / (1.0 if std == "none" else s + 1e-6)
    return torch.tensor(A, dtype=torch.float64)


@check(*((std, based) for std in ("none", "population", "unbiased") for based in (False, True)))
def group_advantage_equals_python(kernels, device, std, based):
    """Groups out of order, of one, of equal rewards, of equal `base` and of more than a block."""
    ids = integers(6, (80,), seed=2)
    ids[ids == 3], ids[5], ids[40:75] = 4, 7, 1
    rewards, base = normal(80, seed=3), normal(80, seed=4)
    rewards[ids == 2], base[ids == 4] = 0.1, 0.7
    got = kernels.group_advantage(
        rewards.to(device), Groups.of(ids.to(device)), std, base=base.to(device) if based else None
    )
    A = one_by_one(rewards.tolist(), ids.tolist(), std, base.tolist() if based else None)
    close(got, A, 1e-10, "advantage")
    assert (got.cpu()[ids == 2] == 0).all(), "equal rewards must give exactly 0"


@check()
def group_advantage_of_empty_groups(kernels, device):
    """Groups that nobody is in, first, between others and last."""
    ids = torch.tensor([0, 0, 1, 1, 1], device=device)
    groups = Groups.of(ids)
    wide = Groups(groups.order, torch.tensor([0, 0, 2, 2, 5, 5], device=device), ids * 2 + 1)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64, device=device)
    assert torch.equal(kernels.group_advantage(rewards, wide), kernels.group_advantage(rewards, groups))


@check()
def group_advantage_in_fp32_and_of_nothing(kernels, device):
    ids = torch.tensor([0] * 8 + [1] * 7, device=device)
    rewards = torch.tensor([0.1] * 8 + [0.3] * 7, device=device)  # fp32 cannot hold them: official code gives 0.029
    got = kernels.group_advantage(rewards, Groups.of(ids))
    assert got.dtype == torch.float32 and (got == 0).all()
    assert kernels.group_advantage(rewards[:0], Groups.of(ids[:0])).shape == (0,)
    rewards = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64, device=device)
    groups = Groups.of(ids[:2])
    assert (kernels.group_advantage(rewards, groups, spread=1e-8) == 0).all()
    assert (kernels.group_advantage(rewards, groups, std="none") != 0).all()


@check(("grpo_advantage",), ("ada_grpo_advantage",))
def group_advantage_golden(kernels, device, name):
    """The official numbers, of the shaped rewards where there are any; the 1 of a group of one is an fp32 constant."""
    for case in golden(name):
        given = case["inputs"]
        names = sorted(set(given["group_id"]))
        ids = torch.tensor([names.index(g) for g in given["group_id"]])
        alone = torch.bincount(ids)[ids] == 1
        rewards = torch.tensor(case["expected"].get("shaped_reward", given["rewards"]), dtype=torch.float64)
        got = kernels.group_advantage(rewards.to(device), Groups.of(ids.to(device)), spread=1e-6 * ("ada" in name))
        want = torch.tensor(case["expected"]["advantage"], dtype=torch.float64)
        close(got, want, 1e-7 if alone.any() else 1e-9, case["name"])


# ---------------------------------------------------------------------------------------------------- decode_attention


@check(
    (3, 12, 2, 128, 130, torch.bfloat16, 1e-2),
    (4, 4, 2, 24, 77, torch.float32, 1e-5),
    (1, 28, 4, 64, 129, torch.bfloat16, 1e-2),
    (2, 2, 2, 16, 1, torch.float32, 1e-5),
)
def decode_attention_equals_softmax(kernels, device, B, h, k, D, T, dtype, tolerance):
    """Rows of every length down to 1 and 0, one part and many, q a slice of qkv, contiguous rows."""
    q = normal(B, h + 2 * k, D, device=device, dtype=dtype)[:, :h]
    cache = normal(B + 1, 2 * k, T, D, seed=1, device=device, dtype=dtype)
    lengths = integers(T + 1, (B,), seed=2, device=device)
    lengths[0] = T
    if B > 2:
        lengths[1:3] = torch.tensor([0, 1])
    got = kernels.decode_attention(q, cache, lengths)
    assert got.dtype == dtype
    close(got, attention_in_fp64(q, cache, lengths), tolerance)
    assert kernels.decode_attention(q[:0], cache, lengths[:0]).shape == (0, h * D)


def attention_in_fp64(q, rows, lengths):
    """Return [B, h D]; rows [B, 2k, T, D] contiguous."""
    (B, h, D), k = q.shape, rows.shape[1] // 2
    want = torch.zeros(B, h, D, dtype=torch.float64, device=q.device)
    for b in range(B):
        for i in range(h if lengths[b] else 0):
            key, value = (rows[b, j, : lengths[b]].double() for j in (i // (h // k), k + i // (h // k)))
            want[b, i] = (key @ q[b, i].double() / D**0.5).softmax(0) @ value
    return want.flatten(1)


@check(
    (5, 12, 2, 128, 64, 5, torch.bfloat16, 1e-2),  # pages as long as a block
    (4, 4, 2, 24, 16, 7, torch.float32, 1e-5),  # shorter
    (3, 7, 1, 40, 128, 2, torch.bfloat16, 1e-2),  # longer, odd heads
    (1, 2, 2, 16, 16, 1, torch.float32, 1e-5),
)
def decode_attention_over_pages(kernels, device, B, h, k, D, C, W, dtype, tolerance):
    """Pages in any order, the first ones shared by two rows, rows that end on an edge, one before and one behind it.

    Entries behind a row's length point to a page of nan: they must not be looked at.
    """
    P = B * W + 2
    q = normal(B, h + 2 * k, D, device=device, dtype=dtype)[:, :h]
    cache = normal(P, 2 * k, C, D, seed=1, device=device, dtype=dtype)
    table = torch.randperm(P - 1, generator=torch.Generator().manual_seed(2))[: B * W].view(B, W).int() + 1
    table[-1, : W // 2] = table[0, : W // 2]
    lengths = torch.tensor([W * C, 0, C, C + 1, max(1, C * (W - 1) - 1)])[:B]
    rows = cache.cpu()[table.long()].transpose(1, 2).flatten(2, 3)
    want = attention_in_fp64(q.cpu(), rows, lengths)
    table, lengths = table.to(device), lengths.to(device)
    if kernels.implementation == "triton":  # the twin gathers whole rows, and the engine's pages are finite
        behind = torch.arange(W, device=device) * C >= lengths.unsqueeze(1)
        table.masked_fill_(behind, 0)
        cache[0] = torch.nan
    wide = torch.zeros(B, W + 3, dtype=torch.int32, device=device)
    wide[:, :W] = table
    for given in (table, wide, wide[:, :W]):  # a table may be wider than any row, and a slice of a wider one
        close(
            kernels.decode_attention(q, cache.nan_to_num() if given is wide else cache, lengths, given), want, tolerance
        )
    assert kernels.decode_attention(q[:0], cache, lengths[:0], table[:0]).shape == (0, h * D)


# -------------------------------------------------------------------------------------------------------------- sample


@check(*((t, k, p) for t in (1.0, 0.6) for k, p in ((0, 1.0), (5, 1.0), (0, 0.9), (7, 0.5))), (0.0, 0, 1.0))
def sample_equals_rollout(kernels, device, temperature, top_k, top_p):
    """The definition of `rollout/sampler.py`: the same tokens and log-probs, equal logits and -inf among them."""
    V = 1037 if not (top_k or top_p < 1) else 53
    logits = 3 * normal(5, V, dtype=torch.float32)
    logits[0] = 0.0
    logits[1, : V // 2] = -torch.inf
    logits[2] = logits[2].round()
    uniform = torch.tensor([0.31, 0.0, 0.77, 0.5, 0.999])
    token, logprob = kernels.sample(logits.to(device), uniform.to(device), temperature, top_k, top_p)
    want, want_logprob = rollout_sample(logits, uniform, Sampling(temperature, top_p, top_k))
    assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    assert token.tolist() == want.tolist()
    close(logprob, want_logprob, 1e-5)
    allowed = integers(2, (V,), seed=4).bool()
    allowed[-1] = True
    masked = logits.masked_fill(~allowed, -torch.inf)
    token, logprob = kernels.sample(masked.to(device), uniform.to(device), temperature, top_k, top_p)
    want, want_logprob = rollout_sample(masked, uniform, Sampling(temperature, top_p, top_k))
    assert allowed[token.cpu()].all()
    same = token.cpu() == want
    assert same.sum() >= 4, "at most the row of equal logits may differ, by rounding at the edge of the nucleus"
    close(logprob[same.to(device)][1:], want_logprob[same][1:], 1e-5)


@check((4096 * 2 + 7,), (3,))
def sample_inverts_the_distribution(kernels, device, V):
    """Over an even grid of u every token comes as often as its probability says, and never one of probability 0."""
    n = 64
    logits = torch.full((V,), -torch.inf)
    where = torch.tensor([1, 2]) if V == 3 else torch.tensor([0, 4095, 4096, 8191, V - 1])
    p = torch.arange(1.0, len(where) + 1)
    logits[where] = p.log() + 5
    uniform = (torch.arange(n) + 0.5) / n
    token, logprob = kernels.sample(logits.expand(n, V).to(device), uniform.to(device))
    token = token.cpu()
    p = p / p.sum()
    counts = (token[:, None] == where).sum(0)
    assert counts.sum() == n and (counts / n - p).abs().max() <= 1 / n
    close(logprob.cpu(), p.log()[(token[:, None] == where).int().argmax(1)], 1e-5)
    token, logprob = kernels.sample(torch.zeros(2, 1, device=device), torch.tensor([0.0, 0.9], device=device))
    assert token.tolist() == [0, 0] and logprob.abs().max() < 1e-6
    token, logprob = kernels.sample(logits.expand(1, V).to(device), torch.tensor([1 - 2**-24], device=device))
    assert token.item() == where[-1]
    assert kernels.sample(torch.zeros(0, 5, device=device), torch.zeros(0, device=device))[0].shape == (0,)


# --------------------------------------------------------------------------------------------- rms_norm, rope_and_store


@check(
    (5, 1536, torch.float32, 1e-6), (3, 33, torch.bfloat16, 2e-2), (1, 1, torch.float32, 1e-6), (0, 8, torch.float32, 0)
)
def rms_norm_equals_formula(kernels, device, R, H, dtype, tolerance):
    x, weight = normal(R, H, device=device, dtype=dtype), normal(H, seed=1, device=device, dtype=dtype)
    residual = normal(R, H, seed=2, device=device, dtype=dtype)

    def norm(v):
        v = v.double()
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()

    close(kernels.rms_norm(x, weight, 1e-6), norm(x), tolerance)
    both = x.double() + residual.double()
    got = kernels.rms_norm(x, weight, 1e-6, residual)
    close(residual, both, tolerance, "residual")
    close(got, norm(residual), tolerance)
    heads = normal(R, 6, H, seed=3, device=device, dtype=dtype)[:, :4]  # as Qwen3 norms queries and keys
    got = kernels.rms_norm(heads, weight, 1e-6)
    assert got.is_contiguous() and got.dtype == dtype
    close(got, norm(heads), tolerance)


@check((3, 12, 2, 128, torch.bfloat16, 2e-2), (2, 3, 1, 6, torch.float32, 1e-6), (0, 2, 1, 16, torch.float32, 0))
def rope_and_store_equals_formula(kernels, device, R, h, k, D, dtype, tolerance):
    """One page a row, and pages of a table that is a slice of a wider one: first, last and middle columns."""
    theta = torch.outer(torch.arange(80.0), 1 / 10.0 ** torch.arange(D // 2))
    angles = torch.polar(torch.full_like(theta, 1.1), theta).to(device)
    table = torch.tensor([[4, 0, 2, 9], [1, 3, 5, 9], [7, 6, 8, 9]], dtype=torch.int32, device=device)[:R, :3]
    for given, C in ((None, 77), (table, 16)):
        qkv = normal(R, h + 2 * k, D, device=device, dtype=dtype)
        cache = normal(10, 2 * k, C, D, seed=1, device=device, dtype=dtype)
        position = torch.tensor([31, 0, 47], device=device)[:R]
        want_qkv, want_cache = qkv.double().clone(), cache.double().clone()
        pairs = torch.view_as_complex(want_qkv.unflatten(-1, (D // 2, 2)).contiguous())
        pairs[:, : h + k] *= angles.to(torch.complex128)[position][:, None]
        want_qkv = torch.view_as_real(pairs).flatten(2)
        for r in range(R):
            page, column = (r, position[r]) if given is None else (given[r, position[r] // C], position[r] % C)
            want_cache[page, :, column] = want_qkv[r, h:]
        q = kernels.rope_and_store(qkv, angles, position, cache, given)
        close(q, want_qkv[:, :h], tolerance, "queries")
        close(cache, want_cache, tolerance, "cache")
        assert q.data_ptr() == qkv.data_ptr()


import kernel_checks_odd  # noqa: E402, F401  registers its checks as well
