"""Every kernel, as torch twin and in Triton, against fp64 textbook formulas (promise P9), and the switch between them.

Without a GPU the Triton kernels run in Triton's interpreter; with one (CUDA_VISIBLE_DEVICES set) they are compiled.
"""

import inspect
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from adaptive_reasoning.kernels.group_advantage import Groups
from conftest import make_model
from kernel_checks import CHECKS, Kernels

from adaptive_reasoning import adaptthink, grpo, kernels
from adaptive_reasoning.core.errors import UserError
from adaptive_reasoning.learner.packing import Counts
from adaptive_reasoning.rollout import Decoder

OPERATIONS = (
    "decode_attention", "group_advantage", "policy_loss", "rms_norm", "rope_and_store", "sample", "token_logprobs"
)  # fmt: skip


def compiles_without_gpu():
    """Return whether triton, without a GPU, was imported before its interpreter was asked for."""
    from triton.language import standard

    return not torch.cuda.is_available() and type(standard.sum).__name__ == "JITFunction"


@pytest.fixture(params=["torch", "triton"])
def ops(request):
    if request.param == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if request.param == "triton" and compiles_without_gpu():
        pytest.skip("there is no GPU and triton was imported without TRITON_INTERPRET=1")
    return Kernels(request.param)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, ops, device):
    CHECKS[name](ops, device)


# ----------------------------------------------------------------------------------------------- gradients of the twins


def leaf(n, seed, device="cpu"):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device).requires_grad_()


@pytest.mark.parametrize("ratio", ["token", "sequence_mean", "sequence_product"])
def test_gradcheck_of_the_loss(ratio):
    """Also dual clip, divergence and entropy. Away from the kinks, where no gradient exists."""
    lengths = torch.tensor([2, 4, 1])
    sequence, n = torch.repeat_interleave(torch.arange(3), lengths), 7 if ratio == "token" else 3
    A, w = leaf(n, 1).detach(), leaf(n, 2).detach().abs()
    old, ref, u = leaf(7, 3).detach(), leaf(7, 4).detach(), leaf(7, 5).detach().abs()

    def value(logprobs, entropy):
        return kernels.torch_version("policy_loss")(
            logprobs, old, A, w, 0.2, 0.3, ratio, sequence, lengths, 2.0, ref, 0.1, entropy, 0.2, u
        )[0]

    assert torch.autograd.gradcheck(value, (leaf(7, 6), leaf(7, 7)))


def test_gradient_at_the_edge_of_the_clip_range(ops, device):
    logprobs = torch.tensor([1.2, 0.8, 1.0, 2.0], device=device).log().requires_grad_()
    A = torch.tensor([1.0, -1.0, 0.0, -1.0], device=device)
    value, stats = ops.policy_loss(logprobs, torch.zeros_like(A), A, torch.ones_like(A))
    value.backward()
    # Rounding decides on which side of the edge the first two are; either way nothing but 0 or -A r may come out.
    for got, all_or_nothing in zip(logprobs.grad.tolist(), (-1.2, 0.8, 0.0, 2.0)):
        assert got == pytest.approx(all_or_nothing, rel=1e-6) or got == 0.0
    assert logprobs.grad[3] == pytest.approx(2.0) and 0 <= stats["clip_fraction"] <= 2


# ------------------------------------------------------------------------------------ the losses of the algorithm files


def micro_batch(lengths, device):
    """Return what a loss reads of a micro-batch."""
    L = torch.tensor(lengths, device=device)
    N, S = int(L.sum()), len(L)
    sequence = torch.repeat_interleave(torch.arange(S, device=device), L)
    A = leaf(S, 1, device).detach().float()
    old = -leaf(N, 2, device).detach().float().abs()
    ref = old + 0.2 * leaf(N, 3, device).detach().float()
    return SimpleNamespace(
        lengths=L, sequence=sequence, sequence_advantages=A, advantages=A[sequence], old_logprobs=old, ref_logprobs=ref
    )


@pytest.mark.parametrize("ratio", ["token", "sequence_mean", "sequence_product"])
def test_is_the_loss_of_adaptthink(ops, device, ratio):
    mb, counts = micro_batch([3, 1, 40], device), Counts(tokens=60, sequences=4)
    args = adaptthink.Args(ratio=ratio, clip_low=0.1)
    logprobs = (mb.old_logprobs + 0.1 * leaf(44, 4, device).detach().float()).requires_grad_()
    want, stats = adaptthink.loss(logprobs, mb, counts, args)
    want_grad = torch.autograd.grad(want, logprobs)[0]
    A = mb.advantages if ratio == "token" else mb.sequence_advantages
    w = torch.full_like(A, 1 / (counts.tokens if ratio == "token" else counts.sequences))
    got, shown = ops.policy_loss(
        logprobs, mb.old_logprobs, A, w, args.clip_low, args.clip_high, ratio, mb.sequence, mb.lengths
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logprobs)[0], want_grad)
    for name, value in stats.items():
        torch.testing.assert_close(shown[name.removeprefix("loss/")], value)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant", "micro_batch"])
def test_is_the_loss_of_grpo(ops, device, aggregation):
    mb, counts = micro_batch([3, 1, 40], device), Counts(tokens=60, sequences=4)
    args = grpo.Args(aggregation=aggregation, clip_high=0.28, kl_coef=0.01, entropy_coef=0.02)
    logprobs = (mb.old_logprobs + 0.3 * leaf(44, 4, device).detach().float()).requires_grad_()
    entropy = leaf(44, 5, device).detach().float().abs().requires_grad_()
    want, stats = grpo.loss(logprobs, entropy, mb, counts, args)
    want_grads = torch.autograd.grad(want, (logprobs, entropy))
    got, shown = ops.policy_loss(
        logprobs, mb.old_logprobs, mb.advantages, grpo.token_weights(mb, counts, args), args.clip_low, args.clip_high,
        ref_logprobs=mb.ref_logprobs, kl_coef=args.kl_coef, entropy=entropy, entropy_coef=args.entropy_coef,
        stat_weight=1 / counts.tokens,
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (logprobs, entropy)), want_grads):
        torch.testing.assert_close(a, b)
    assert {f"loss/{name}" for name in shown} == set(stats)
    for name, value in stats.items():
        torch.testing.assert_close(shown[name.removeprefix("loss/")], value)


@pytest.mark.parametrize("std", ["unbiased", "none"])
def test_is_the_advantage_of_grpo(ops, device, std):
    rewards, ids = [1.0, 0.0, 0.0, 0.3, 0.3, 0.3, 1.0], torch.tensor([0, 0, 0, 1, 1, 1, 2])
    args, want = grpo.Args(std=std), []
    for group in ([0, 1, 2], [3, 4, 5], [6]):
        want += grpo.advantages([SimpleNamespace(reward=rewards[i]) for i in group], args)
    rewards = torch.tensor(rewards, dtype=torch.float64, device=device)
    got = ops.group_advantage(rewards, Groups.of(ids.to(device)), std, grpo.STD_EPS)
    torch.testing.assert_close(got.samples.cpu(), torch.tensor(want, dtype=torch.float64), atol=1e-10, rtol=1e-12)


# --------------------------------------------------------------------------------------- the decode step of the decoder


def decode_with(ops, decoder, tokens, position, cache):
    """`Decoder.decode` written with the operations."""
    D, h, k, eps = decoder.head_dim, decoder.heads, decoder.kv_heads, decoder.eps
    x = F.embedding(tokens, decoder.embed)
    for layer, kv in zip(decoder.layers, cache):
        y = ops.rms_norm(x, layer.attn_norm, eps)
        qkv = y @ layer.qkv if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, y, layer.qkv)
        qkv = qkv.view(-1, h + 2 * k, D)
        if layer.q_norm is not None:
            qkv[:, :h] = ops.rms_norm(qkv[:, :h], layer.q_norm, eps)
            qkv[:, h : h + k] = ops.rms_norm(qkv[:, h : h + k], layer.k_norm, eps)
        q = ops.rope_and_store(qkv, decoder.angles, position, kv)
        x = torch.addmm(x, ops.decode_attention(q, kv, position + 1), layer.out)
        gate, up = (ops.rms_norm(x, layer.mlp_norm, eps) @ layer.gate_up).chunk(2, dim=-1)
        x = torch.addmm(x, F.silu(gate) * up, layer.down.T)
    return ops.rms_norm(x, decoder.norm, eps) @ decoder.head


@torch.inference_mode()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_decode_step_out_of_kernels_is_that_of_the_decoder(ops, device, family):
    """Logits and cache of rows at different positions: rms_norm, rope_and_store and decode_attention together."""
    decoder = Decoder.from_model(make_model(family), device)
    tokens, position = torch.tensor([5, 77, 130], device=device), torch.tensor([0, 9, 40], device=device)
    shape = decoder.new_cache(4, 64).shape
    cache = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    mine = cache.clone()
    want = decoder.decode(tokens, position, cache, 48)
    torch.testing.assert_close(decode_with(ops, decoder, tokens, position, mine), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine, cache, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- the switch


def test_signatures_and_docstrings_are_those_of_the_twin():
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    for name in OPERATIONS:
        twin, here = kernels.torch_version(name), getattr(kernels, name)
        assert inspect.signature(twin) == inspect.signature(kernels.triton_version(name)) == inspect.signature(here)
        assert here.__doc__ == twin.__doc__


def test_switch(monkeypatch):
    """auto takes torch on the CPU; torch and triton insist; the operation runs what the switch says."""
    x, weight = torch.ones(2, 4), torch.ones(4)
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    assert not kernels.uses_triton(x)
    monkeypatch.setenv(kernels.SWITCH, "torch")
    assert not kernels.uses_triton(x)
    if find_spec("triton") is not None:
        monkeypatch.setenv(kernels.SWITCH, "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert kernels.uses_triton(x)
        monkeypatch.setitem(kernels.__dict__, "triton_version", lambda name: lambda *a, **k: f"triton {name}")
        assert kernels.rms_norm(x, weight, 1e-6) == "triton rms_norm"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
            kernels.rms_norm(x, weight, 1e-6)


def test_unknown_switch_is_an_error(monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "cuda")
    with pytest.raises(UserError, match="takes auto or torch, or triton"):
        kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)


WITHOUT_TRITON = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util, os
real = importlib.util.find_spec
import adaptive_reasoning.kernels as kernels
kernels.find_spec = lambda name: None if name == "triton" else real(name)
import torch
print(kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item(), "triton" in sys.modules)
os.environ["ADAPTIVE_REASONING_KERNELS"] = "triton"
try:
    kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)
except kernels.UserError as error:
    print(error)
"""


def test_works_without_triton():
    """Importing the kernels and running their twins needs no triton; insisting on it is an error that says so."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("\n")
    assert first == "8.0 False" and "pip install triton" in second
