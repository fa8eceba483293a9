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
from adaptive_reasoning.kernels.policy_loss import RATIOS

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


def one_by_one(rewards, ids, std, formats, w, std_of):
    """Ada-GRPO's advantage, group by group in plain Python."""
    A, shaped = [0.0] * len(rewards), list(rewards)
    for group in set(ids):
        mine = [i for i, g in enumerate(ids) if g == group]
        n = len(mine)
        for i in mine:
            if formats is not None:
                F = sum(formats[j] == formats[i] for j in mine)
                shaped[i] = (1 + (n / F - 1) * w) * rewards[i]
        base = [(shaped if std_of == "shaped" or std == "none" else rewards)[i] for i in mine]
        mine_shaped = [shaped[i] for i in mine]
        mean, centre = math.fsum(mine_shaped) / n, math.fsum(base) / n
        squares = math.fsum((x - centre) ** 2 for x in base)
        divisor = {"none": 1.0, "population": math.sqrt(squares / n) + 1e-6}.get(std)
        divisor = math.sqrt(squares / max(n - 1, 1)) + 1e-6 if divisor is None else divisor
        for i in mine:
            if n == 1:
                A[i] = shaped[i] / (1.0 if std == "none" else 1.0 + 1e-6)
            elif max(mine_shaped) > min(mine_shaped):
                A[i] = (shaped[i] - mean) / (divisor if std == "none" or max(base) > min(base) else 1.0 + 1e-6)
    return torch.tensor(A, dtype=torch.float64), torch.tensor(shaped, dtype=torch.float64)


@check(*((std, std_of) for std in ("none", "population", "unbiased") for std_of in ("shaped", "raw")))
def group_advantage_equals_python(kernels, device, std, std_of):
    """Groups out of order, empty, of one, of equal rewards and of more than a block; and their tokens."""
    ids = integers(6, (80,), seed=2)
    ids[ids == 3], ids[5], ids[40:75] = 4, 7, 1
    rewards, formats = normal(80, seed=3), integers(4, (80,), seed=4)
    rewards[ids == 2] = 0.1
    sequence = torch.repeat_interleave(torch.tensor([0, 3, 44, 79, 1]), torch.tensor([100, 1, 30, 2, 5]))  # 1: no order
    groups = Groups.of(ids.to(device), 9)
    for kind in (None, formats):
        got = kernels.group_advantage(
            rewards.to(device), groups, std, formats=None if kind is None else kind.to(device), weight=1 / 3,
            std_of=std_of, sequence=sequence.to(device),
        )  # fmt: skip
        listed = None if kind is None else kind.tolist()
        A, shaped = one_by_one(rewards.tolist(), ids.tolist(), std, listed, 1 / 3, std_of)
        close(got.samples, A, 1e-10, "advantage")
        close(got.shaped, shaped, 1e-12, "shaped reward")
        close(got.tokens, A[sequence].float(), 1e-6, "tokens")
        if kind is None:
            assert (got.samples.cpu()[ids == 2] == 0).all(), "equal rewards must give exactly 0"


@check()
def group_advantage_in_fp32_without_tokens_and_of_nothing(kernels, device):
    ids = torch.tensor([0] * 8 + [1] * 7, device=device)
    rewards = torch.tensor([0.1] * 8 + [0.3] * 7, device=device)  # fp32 cannot hold them: official code gives 0.029
    got = kernels.group_advantage(rewards, Groups.of(ids))
    assert got.tokens is None and got.samples.dtype == torch.float32 and (got.samples == 0).all()
    got = kernels.group_advantage(rewards[:0], Groups.of(ids[:0]), sequence=ids[:0])
    assert got.samples.shape == got.tokens.shape == (0,)
    rewards = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64, device=device)
    groups = Groups.of(ids[:2])
    assert (kernels.group_advantage(rewards, groups, spread=1e-8).samples == 0).all()
    assert (kernels.group_advantage(rewards, groups, std="none").samples != 0).all()


@check(("grpo_advantage",), ("ada_grpo_advantage",))
def group_advantage_golden(kernels, device, name):
    """The official numbers; the 1 of a group of one is an fp32 constant there."""
    for case in golden(name):
        given = case["inputs"]
        names = sorted(set(given["group_id"]))
        ids = torch.tensor([names.index(g) for g in given["group_id"]])
        alone = torch.bincount(ids)[ids] == 1
        kinds, w = None, 0.0
        if "formats" in given:
            kinds = torch.tensor([sorted(set(given["formats"])).index(f) for f in given["formats"]], device=device)
            w = 0.5 * (1 + math.cos(math.pi * given["step"] / given["total_steps"]))
        rewards = torch.tensor(given["rewards"], dtype=torch.float64, device=device)
        got = kernels.group_advantage(rewards, Groups.of(ids.to(device)), formats=kinds, weight=w)
        want = torch.tensor(case["expected"]["advantage"], dtype=torch.float64)
        tolerance = 1e-7 if alone.any() else 1e-9
        close(got.samples, want, tolerance, case["name"])
        if "shaped_reward" in case["expected"]:
            close(got.shaped, torch.tensor(case["expected"]["shaped_reward"], dtype=torch.float64), 1e-12, case["name"])


# --------------------------------------------------------------------------------------------------------- policy_loss


@check(*((ratio, extras) for ratio in RATIOS for extras in (False, True)))
def policy_loss_equals_textbook(kernels, device, ratio, extras):
    """Loss, statistics and gradients; a sequence longer than a block, one of one token, one without any."""
    lengths = torch.tensor([1, 1100, 7, 0, 41])
    N, S = int(lengths.sum()), len(lengths)
    n = N if ratio == "token" else S
    sequence = torch.repeat_interleave(torch.arange(S), lengths)
    logp = (-normal(N).abs()).requires_grad_()
    old = logp.detach() + 0.3 * normal(N, seed=1) * (0.05 if ratio == "sequence_product" else 1)
    ref, A = logp.detach() + 2 * normal(N, seed=2), normal(n, seed=3)
    w, u = normal(n, seed=4).abs(), normal(N, seed=5).abs() / N
    entropy = normal(N, seed=6).abs().requires_grad_()

    d = logp - old
    if ratio != "token":
        d = torch.stack([d[sequence == s].sum() / (max(1, L) if ratio == "sequence_mean" else 1)
                         for s, L in enumerate(lengths.tolist())])  # fmt: skip
    free, cut = -A * d.exp(), -A * d.exp().clamp(0.8, 1.28)
    value = torch.maximum(free, cut)
    if extras:
        value = torch.where(A < 0, torch.minimum(value, -1.5 * A), value)
    mean = torch.full_like(A, 0.01) if extras else w
    stats = {
        "policy": (value * w).sum(),
        "clip_fraction": ((cut > free) * mean).sum(),
        "approx_kl": -(d * mean).sum(),
    }
    want, more = stats["policy"], {}
    if extras:
        k = ref - logp
        stats["ref_kl"] = ((k.exp() - k - 1).clamp(-10, 10) * u).sum()
        stats["entropy"] = (entropy * u).sum()
        want = want + 0.1 * stats["ref_kl"] - 0.2 * stats["entropy"]
        more = {"dual_clip": 1.5, "ref_logprobs": ref, "kl_coef": 0.1, "entropy": entropy, "entropy_coef": 0.2}
        more |= {"spread_weights": u, "stat_weight": 0.01}
    inputs = (logp, entropy) if extras else (logp,)
    want_grads = torch.autograd.grad(3 * want, inputs)

    dtype = fp32_on(kernels, torch.float64)
    given = {key: x.detach().to(device, dtype) if isinstance(x, torch.Tensor) else x for key, x in more.items()}
    mine = logp.detach().to(device, dtype).requires_grad_()
    if extras:
        given["entropy"].requires_grad_()
    got, got_stats = kernels.policy_loss(
        mine, *(x.to(device, dtype) for x in (old, A, w)), 0.2, 0.28, ratio,
        sequence=sequence.to(device), lengths=lengths.to(device), **given,
    )  # fmt: skip
    grads = torch.autograd.grad(3 * got, (mine, given["entropy"]) if extras else (mine,))
    close(got.detach(), want.detach(), 1e-5, "loss")
    assert set(got_stats) == set(stats)
    for key in stats:
        assert not got_stats[key].requires_grad
        close(got_stats[key], stats[key].detach(), 1e-5, key)
    for a, b in zip(grads, want_grads):
        close(a, b, 1e-5, "gradient")


@check(*((ratio,) for ratio in RATIOS))
def policy_loss_of_no_tokens(kernels, device, ratio):
    """A filler micro-batch: 0, and a graph that gives a gradient of no elements."""
    none, ints = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    logprobs = none.clone().requires_grad_()
    value, stats = kernels.policy_loss(logprobs, none, none, none, ratio=ratio, sequence=ints, lengths=ints)
    value.backward()
    assert value == 0 and all(x == 0 for x in stats.values()) and logprobs.grad.shape == (0,)


def packed(given, mask):
    """Return {name: [N]} of the entries inside the mask of [B, T] matrices, and the index of their rows."""
    inside = mask.bool()
    rows = torch.arange(len(mask))[:, None].expand_as(mask)[inside]
    names = ("log_prob", "old_log_prob", "advantages", "ref_log_prob")
    return {k: torch.tensor(given[k], dtype=torch.float64)[inside] for k in names if k in given}, rows


@check(("adaptthink_loss",), ("degrpo_loss",), ("ppo_gae",))
def policy_loss_golden(kernels, device, name):
    """Loss and gradient of the official code: AdaptThink's two paths, DeGRPO's two means, PPO's dual clip."""
    dtype, count = fp32_on(kernels, torch.float64), 0
    for case in golden(name):
        given, want = case["inputs"], case["expected"]
        kind = case.get("kind", "policy_loss")
        if kind not in ("policy_loss", "kl_k3"):
            continue
        mask = torch.tensor(given.get("response_mask") or given.get("eos_mask") or given["mask"])
        values, rows = packed(given, mask)
        first = torch.arange(mask.shape[1]).expand_as(mask)[mask.bool()] == 0
        lengths, (N, S) = mask.sum(1), (int(mask.sum()), len(mask))
        options, A = {}, values.get("advantages", torch.zeros(N, dtype=torch.float64))
        w = torch.full_like(A, 1 / N)
        if kind == "kl_k3":
            values["old_log_prob"], options = values["log_prob"], {"ref_logprobs": values["ref_log_prob"]}
            options["kl_coef"] = 1.0
        elif name == "degrpo_loss":
            options = {"clip_low": given["cliprange"], "clip_high": given["cliprange"]}
            if given["alpha"] is not None:
                w = w.masked_fill(first, given["alpha"] / S).masked_fill(~first, 1 / max(1, N - S))
        elif name == "ppo_gae":
            options = {"clip_low": given["clip"], "clip_high": given["clip"], "dual_clip": given["dual_clip"]}
        else:
            options = {"clip_low": given["clip_low"], "clip_high": given["clip_high"]}
            if given["adjust_old_log_prob"]:
                share = given["nothinking_ratio"]
                forced = torch.tensor(given["enforce_nothinking"]).bool()[rows]
                old = torch.full_like(A, math.log(1 - share) if share < 1 else 0.0)
                old = old.masked_fill(forced, math.log(share or 1))
                values["old_log_prob"] = torch.where(first, old, values["old_log_prob"])
                options["ratio"] = "sequence_mean"
                A, w = A[first], torch.full((S,), 1 / S, dtype=torch.float64)
            elif given["loss_agg_mode"] != "token-mean":
                w = 1 / (lengths[rows].double() if given["loss_agg_mode"].endswith("token-mean") else w * N) / S
        on = {k: x.to(device, dtype) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        logprobs = values["log_prob"].to(device, dtype).requires_grad_()
        others = [x.to(device, dtype) for x in (values["old_log_prob"], A, w)]
        loss, _ = kernels.policy_loss(logprobs, *others, sequence=rows.to(device), lengths=lengths.to(device), **on)
        grad = torch.zeros(mask.shape, dtype=torch.float64)
        grad[mask.bool()] = torch.autograd.grad(loss, logprobs)[0].double().cpu()
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        expected = want["kl_mean"] if kind == "kl_k3" else want["loss"]
        close(loss.detach().cpu(), torch.tensor(expected, dtype=torch.float64), tolerance, case["name"])
        if "grad_log_prob" in want:
            close(grad, torch.tensor(want["grad_log_prob"], dtype=torch.float64), tolerance, case["name"])
        count += 1
    assert count >= 6


# ---------------------------------------------------------------------------------------------------- decode_attention


@check(
    (3, 12, 2, 128, 130, torch.bfloat16, 1e-2),
    (4, 4, 2, 24, 77, torch.float32, 1e-5),
    (1, 28, 4, 64, 129, torch.bfloat16, 1e-2),
    (2, 2, 2, 16, 1, torch.float32, 1e-5),
)
def decode_attention_equals_softmax(kernels, device, B, h, k, D, T, dtype, tolerance):
    """BatchState of every length down to 1 and 0, one part and many, q a slice of qkv, contiguous rows."""
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
    for mask in (allowed, allowed.expand(5, V)):
        token, logprob = kernels.sample(
            logits.to(device), uniform.to(device), temperature, top_k, top_p, mask.to(device)
        )
        masked = logits.masked_fill(~allowed, -torch.inf)
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
