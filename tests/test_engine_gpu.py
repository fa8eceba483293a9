"""What only a GPU can show of the rollout engine: real graphs, no waiting for the device, memory that stays put."""

import pytest
import torch
from conftest import make_model
from test_paged_engine import all_free, mixed, same
from test_rollout import NEVER, prompts, reference_logprobs

from adaptive_reasoning.rollout import Decoder, Engine, Request, Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def on_gpu(model, dtype=torch.float32, pages=200, **kw):
    decoder = Decoder.from_model(model, "cuda", dtype)
    return Engine(decoder, cache_bytes=pages * 64 * decoder.cache_bytes_per_token(), sync_every=4, **kw)


@pytest.fixture(autouse=True)
def fp32_matrix_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_log_probs_are_those_of_transformers(name):
    """P3 on CUDA: 1e-4 in fp32; the attention kernel, the norms and the sampler together, replayed from graphs."""
    model = make_model(name)
    requests = [Request(p, 5 + 7 * (i % 4), (1, 2, 3), i) for i, p in enumerate(prompts(12))]
    for c in on_gpu(model, max_rows=5).run(requests, Sampling(0.7)):
        assert torch.allclose(c.logprobs, reference_logprobs(model, c, 0.7), atol=1e-4)


def test_bf16_log_probs_are_near_those_of_fp32(model):
    """The stated tolerance of bf16: 2e-2 nats on average."""
    requests = [Request(p, 60, NEVER, i) for i, p in enumerate(prompts(12))]
    done = on_gpu(model, torch.bfloat16).run(requests, Sampling(1.0))
    rounded = make_model().to(torch.bfloat16).float()  # the same weights
    gaps = torch.cat([(c.logprobs - reference_logprobs(rounded, c)).abs() for c in done])
    assert gaps.mean() < 2e-2, gaps.mean()


def test_graphs_give_what_eager_steps_give(model):
    """Padding, forced tokens, closers, budgets, new weights and another sampling, replayed and not: equal tokens."""
    engines = on_gpu(model, max_rows=6), on_gpu(model, max_rows=6, graphs=False)
    for weights, sampling in ((None, Sampling(1.0)), (make_model(seed=1), Sampling(1.0)), (None, Sampling(0.0))):
        for engine in engines if weights is not None else ():
            engine.refresh(weights.named_parameters())
        got, want = (engine.run(mixed(), sampling) for engine in engines)
        for a, b in zip(got, want, strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()
            assert torch.allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert all(all_free(engine) for engine in engines)


def test_larger_buffers_mean_new_graphs_in_new_memory(model):
    """torch refuses to capture into a pool all of whose graphs are gone: a real run comes to it with its second step,
    whose longest prompt is longer than those of the first."""
    graphs, eager = on_gpu(model, max_rows=4), on_gpu(model, max_rows=4, graphs=False)
    for request in (Request([1, 2], 8, NEVER, 0), Request([1, 2], 200, NEVER, 0), Request([3] * 400, 8, NEVER, 0)):
        requests = [request, *mixed(3)]
        for a, b in zip(graphs.run(requests, Sampling(1.0)), eager.run(requests, Sampling(1.0)), strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()


def test_preempted_rows_go_on_where_they_were(model):
    requests = [Request([i % 4] * 50, 100 + i, NEVER, i) for i in range(12)]
    want = on_gpu(model).run(requests, Sampling(1.0))
    engine = on_gpu(model, pages=12)
    got = engine.run(requests, Sampling(1.0))
    assert engine.stats["preempted"] > 0 and all_free(engine)
    equal = sum(a.response_ids.tolist() == b.response_ids.tolist() for a, b in zip(got, want))
    assert equal >= 11, "a number next to the edge between two tokens may fall to the other side in one response"


def test_batch_invariant_log_probs_are_equal_bit_for_bit(model):
    engine = on_gpu(model, torch.bfloat16, max_rows=8, batch_invariant=True)
    together = engine.run(mixed(9), Sampling(1.0))
    for i in (0, 5, 8):
        same([together[i]], engine.run([mixed(9)[i]], Sampling(1.0)))
        assert torch.equal(together[i].logprobs, engine.run([mixed(9)[i]], Sampling(1.0))[0].logprobs)


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_do_not_wait_for_the_device(model, graphs):
    engine = on_gpu(model, max_rows=8, graphs=graphs)
    requests = [Request(p, 40, (1, 2), i, forced=((5, 0.5),)) for i, p in enumerate(prompts(8))]
    engine.run(requests, Sampling(1.0))  # compiles
    with torch.no_grad():
        run = engine._open(requests, Sampling(1.0))
        engine._admit(run, engine._next_sequences(run))
        columns = engine._grow(run)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine._decode(run, columns)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.step == 4


def test_memory_stays_put(model):
    """The KV cache is taken once: later runs allocate no more than small buffers of their own, and leave nothing."""
    engine = on_gpu(model, max_rows=8)
    requests = [Request(p, 60, (1, 2), i) for i, p in enumerate(prompts(24))]
    engine.run(requests, Sampling(1.0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        engine.run(requests, Sampling(1.0))
    assert abs(torch.cuda.memory_allocated() - before) < 1 << 20


def test_the_arena_is_measured_where_no_size_is_given(model):
    decoder = Decoder.from_model(model, "cuda", torch.bfloat16)
    free = torch.cuda.mem_get_info()[0]
    engine = Engine(decoder, max_rows=8, cache_bytes=None, sync_every=4)
    engine.run([Request(p, 20, NEVER, i) for i, p in enumerate(prompts(4))], Sampling(1.0))
    assert 0.5 * free < engine.kv_cache.cache.nbytes < 0.95 * free
