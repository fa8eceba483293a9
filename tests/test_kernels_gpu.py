"""What only a GPU can show of the kernels: CUDA graphs, no waiting for the device, memory that does not grow with V."""

import pytest
import torch
from adaptive_reasoning.kernels import triton_version

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def decode_part(state):
    """A layer's attention and the sampling, on static buffers: what a decode step launches."""
    normed = triton_version("rms_norm")(state["x"], state["norm"], 1e-6)
    qkv = (normed @ state["qkv"]).view(len(normed), -1, 64)
    q = triton_version("rope_and_store")(qkv, state["angles"], state["position"], state["cache"], state["table"])
    out = triton_version("decode_attention")(q, state["cache"], state["position"] + 1, state["table"])
    token, logprob = triton_version("sample")((out @ state["head"]).float(), state["uniform"], 0.6)
    return out, token, logprob


def make_state(B=5, h=6, k=2, D=64, T=300, V=5003):
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.1

    angles = torch.polar(torch.ones(T, D // 2), torch.rand(T, D // 2)).cuda()
    return {
        "x": new(B, 96), "norm": new(96), "qkv": new(96, (h + 2 * k) * D), "angles": angles,
        "cache": new(B * 5, 2 * k, 64, D), "table": torch.randperm(B * 5).view(B, 5).int().cuda(),
        "head": new(h * D, V), "uniform": torch.rand(B, device="cuda"),
        "position": torch.tensor([0, 17, 64, 200, 298], device="cuda"),
    }  # fmt: skip


@torch.inference_mode()
def test_a_captured_step_equals_an_eager_one():
    """Replayed with other contents and lengths in the same buffers."""
    state = make_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode_part(state)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_part(state)
    for shift in (0, 1):
        state["x"].add_(shift)
        state["position"].copy_(torch.tensor([3, 250, 1, 99, 150], device="cuda") + shift)
        state["uniform"].uniform_()
        graph.replay()
        got = [x.clone() for x in captured]
        for a, b in zip(got, decode_part(state)):
            assert torch.equal(a, b)


@torch.inference_mode()
def test_nothing_waits_for_the_device():
    state = make_state()
    decode_part(state)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_part(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_log_probs_does_not_grow_with_the_vocabulary():
    """But for the gradient of the weight itself and small partial results."""
    extra = []
    for V in (40_000, 150_000):  # both fill the work space of the backward pass, whose size is capped
        hidden = torch.randn(8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(V, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(V, (8192,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        triton_version("token_logprobs")(hidden, weight, targets)[0].sum().backward()
        extra.append(torch.cuda.max_memory_allocated() - before - weight.grad.numel() * 2)
        del hidden, weight
    assert extra[1] < extra[0] + 2**27
