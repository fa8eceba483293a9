"""Log-probs and entropies of the plain-torch kernel against log_softmax in fp64 (promise P9)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adaptive_reasoning.kernels import token_logprobs

from adaptive_reasoning.errors import UserError


def make_inputs(N, H, V, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=g)


def reference(hidden, weight, targets, temperature):
    """The textbook, in fp64, with all logits at once."""
    logp = (hidden.double() @ weight.double().t() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


SIZES = [(7, 5, 11, 3), (1, 8, 13, None), (6, 4, 1, 4), (130, 33, 257, 64), (5, 3, 2, 1), (4, 4, 9, 100)]


@pytest.mark.parametrize("N, H, V, chunk", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_log_softmax(N, H, V, chunk, temperature, dtype, tolerance):
    """Values and gradients, both outputs in the loss, chunks that do and do not divide the tokens, V = 1."""
    hidden, weight, targets = make_inputs(N, H, V, dtype)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, chunk, with_entropy=True)
    assert logprobs.dtype == entropy.dtype == dtype and logprobs.shape == entropy.shape == (N,)
    expected = reference(hidden, weight, targets, temperature)
    for got, want in zip((logprobs, entropy), expected):
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    factors = torch.linspace(-1, 2, N, dtype=torch.float64)
    got = torch.autograd.grad((logprobs * factors + entropy * factors.flip(0) ** 2).sum(), (hidden, weight))
    loss = (expected[0] * factors + expected[1] * factors.flip(0) ** 2).sum()
    for a, b in zip(got, torch.autograd.grad(loss, (hidden, weight))):
        torch.testing.assert_close(a.double(), b.double(), atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradcheck(with_entropy):
    hidden, weight, targets = make_inputs(5, 4, 7)

    def outputs(hidden, weight):
        logprobs, entropy = token_logprobs(hidden, weight, targets, 0.7, 2, with_entropy)
        return (logprobs, entropy) if with_entropy else logprobs

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_without_entropy_the_log_probs_are_the_same_and_no_entropy_comes_back():
    hidden, weight, targets = make_inputs(9, 6, 31, torch.float32)
    with_, _ = token_logprobs(hidden, weight, targets, 0.6, 4, with_entropy=True)
    without, entropy = token_logprobs(hidden, weight, targets, 0.6, 4)
    assert entropy is None and torch.equal(with_, without)


def test_chunk_size_changes_nothing_but_rounding():
    hidden, weight, targets = make_inputs(50, 16, 101, torch.float32)
    grads = []
    for chunk in (1, 7, 50, None):
        logprobs, _ = token_logprobs(hidden, weight, targets, chunk=chunk)
        grads.append((logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (hidden, weight))))
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_zero_tokens():
    """A rank without episodes still needs a graph that reaches both inputs, with zero gradients."""
    hidden, weight, targets = make_inputs(0, 4, 9, torch.float32)
    logprobs, entropy = token_logprobs(hidden, weight, targets, with_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == (0, 4)


def test_frozen_weight_or_hidden_gets_no_gradient():
    hidden, weight, targets = make_inputs(6, 4, 9)
    frozen = weight.detach()
    token_logprobs(hidden, frozen, targets)[0].sum().backward()
    expected = torch.autograd.grad(token_logprobs(hidden, weight, targets)[0].sum(), hidden)[0]
    assert frozen.grad is None and torch.equal(hidden.grad, expected)
    token_logprobs(hidden.detach(), weight, targets)[0].sum().backward()
    assert weight.grad is not None


def test_bf16_inputs_give_logits_in_fp32():
    """Rounding logits to bf16 costs about 0.06 each at a size of 16: log-probs must be far closer than that."""
    hidden, weight, targets = make_inputs(40, 64, 503, torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, weight, targets, 0.6, 16, with_entropy=True)
    assert logprobs.dtype == torch.float32
    expected, expected_entropy = reference(hidden, weight, targets, 0.6)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-4, rtol=1e-4)
    got = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert all(g.dtype == torch.bfloat16 for g in got)
    for a, b in zip(got, torch.autograd.grad(expected.sum(), (hidden, weight))):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-2, rtol=2e-2)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = make_inputs(6, 8, 33, torch.float32)
    with torch.no_grad():
        hidden.mul_(1e4)
    logprobs, entropy = token_logprobs(hidden, weight, targets, with_entropy=True)
    assert logprobs.isfinite().all() and entropy.isfinite().all()
    torch.testing.assert_close(logprobs.double(), reference(hidden, weight, targets, 1.0)[0], rtol=1e-5, atol=1e-2)
    (logprobs + entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_unknown_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("ADAPTIVE_REASONING_KERNELS", "cuda")
    with pytest.raises(UserError, match="takes auto or torch"):
        token_logprobs(*make_inputs(2, 3, 4))


MEMORY = """
import resource, torch
from adaptive_reasoning.kernels import token_logprobs
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hidden = torch.randn(512, 32, requires_grad=True)
weight = torch.randn(151936, 32, requires_grad=True)
targets = torch.randint(151936, (512,))
start = peak()
token_logprobs(hidden, weight, targets)[0].sum().backward()
ours = peak() - start
weight.grad = None
(hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
print(ours, peak() - start)
"""


def test_peak_memory_is_at_most_a_quarter_of_log_softmax():
    """512 tokens at the vocabulary of Qwen2: the logits alone are 297 MiB, and log_softmax holds three such tensors."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    ours, naive = map(int, done.stdout.split())
    assert ours <= naive / 4, f"{ours} KiB against {naive} KiB"
