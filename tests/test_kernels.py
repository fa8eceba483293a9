"""Every kernel, as torch twin and in Triton, against fp64 textbook formulas (promise P9), and the switch between them.

Without a GPU the Triton kernels run in Triton's interpreter; with one (CUDA_VISIBLE_DEVICES set) they are compiled.
"""

import inspect
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adaptive_reasoning.kernels.group_advantage import Groups
from conftest import make_model
from kernel_checks import CHECKS, Kernels

from adaptive_reasoning import kernels
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout import Decoder

OPERATIONS = (
    "decode_attention", "group_advantage", "rms_norm", "rope_and_store", "sample", "token_logprobs"
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


# ------------------------------------------------------------------------------------------------ group advantages


@pytest.mark.parametrize("std", ["none", "population", "unbiased"])
def test_the_twin_is_torchs_mean_and_std_of_each_group(std):
    """Bit for bit, whatever the order of the samples: what is logged does not depend on who shares the step."""
    random = torch.Generator().manual_seed(0)
    for trial in range(20):
        ids = torch.randint(40, (60,), generator=random) * 1000
        rewards = torch.rand(60, generator=random, dtype=torch.float64).round(decimals=trial % 4)
        got = kernels.torch_version("group_advantage")(rewards, Groups.of(ids), std)
        for group in ids.unique():
            r = rewards[ids == group]
            want = r - r.mean() if len(r) > 1 else r
            if std != "none":
                want = want / ((r.std(unbiased=std == "unbiased") if len(r) > 1 else 1.0) + 1e-6)
            if len(r) > 1 and r.max() == r.min():
                want = torch.zeros_like(r)
            assert torch.equal(got[ids == group], want)


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
