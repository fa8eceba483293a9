"""The engine over pages, on the CPU: what it gives is what contiguous rows give, and no page is ever lost."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, make_model
from graph_stand_in import StandIn
from test_rollout import NEVER, prompts, reference_logprobs

from adaptive_reasoning import kernels
from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout import Decoder, Engine, Forced, Request, Sampling
from adaptive_reasoning.rollout import engine as engine_module
from adaptive_reasoning.rollout.graphs import Graphs, buckets
from adaptive_reasoning.rollout.kv_cache import TRASH, Shares

PAGE = 8


def paged(model, pages=400, page=PAGE, **kw):
    decoder = Decoder.from_model(model)
    return Engine(decoder, cache_bytes=pages * page * decoder.cache_bytes_per_token(), page=page, **kw)


SECOND = Forced(((70, 0.5), (71, 1.0)), after=tuple(range(0, 120, 12)))  # at the second sentence


def closer(at):
    """What closes a budget: no action, unless its second token came before."""
    return Forced(((60, 1.0), (61, 1.0)), at, unless=(61,), action=False)


def mixed(n=14, keep=False):
    """Groups of one prompt and single ones around the edges of pages, with every feature of a request."""
    asked = [[3] * 8, [4] * 7, [5] * 9, [6] * 16, *prompts(4)]
    extras = (
        {}, {"forced": ((50, 0.5), (51, 1.0))}, {"forced": (SECOND,)}, {"forced": (closer(5),)},
        {"forced": ((61, 1.0), closer(5))}, {},
    )  # fmt: skip
    return [
        Request(asked[i % 8], 8 + 5 * (i % 5), (7, 8, 9)[: i % 4], i, keep=keep, **extras[i % len(extras)])
        for i in range(n)
    ]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.response_ids.tolist() == y.response_ids.tolist()
        assert torch.allclose(x.logprobs, y.logprobs, atol=1e-5)
        assert (x.finish_reason, x.action_mask.tolist()) == (y.finish_reason, y.action_mask.tolist())
        assert x.forced.tolist() == y.forced.tolist()


def all_free(engine):
    kv_cache = engine.kv_cache
    return kv_cache.free_pages == kv_cache.cache.shape[1] - 1 and (kv_cache.host == TRASH).all()


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(0.7, top_p=0.8)], ids=str)
def test_pages_give_what_contiguous_rows_give(model, sampling):
    want = Engine(Decoder.from_model(model)).run(mixed(), sampling)
    for engine in (paged(model, max_rows=5), paged(model, sync_every=4), paged(model, page=16, prefill_tokens=20)):
        same(engine.run(mixed(), sampling), want)
        assert all_free(engine)


@pytest.mark.parametrize("name", CONFIGS)
def test_pages_give_what_transformers_give(name):
    """P3 on the path that CUDA takes: every family's decode step out of the operations of `kernels/`."""
    model = make_model(name)
    requests = [Request(p, 5 + 7 * (i % 4), (1, 2, 3), i) for i, p in enumerate(prompts(8))]
    engine = paged(model, max_rows=5)
    for c in engine.run(requests, Sampling(0.7)):
        assert torch.allclose(c.logprobs, reference_logprobs(model, c, 0.7), atol=1e-5)
    for c in engine.run(requests, Sampling(0.0)):
        ids = torch.tensor([c.context_ids + c.response_ids.tolist()])
        with torch.no_grad():
            best = model(ids).logits[0, len(c.context_ids) - 1 : -1].argmax(-1)
        assert c.response_ids.tolist() == best.tolist()


def test_turns_continue_on_kept_pages(model):
    engine, slots = paged(model, max_rows=3), Engine(Decoder.from_model(model))
    done = []
    for e in (engine, slots):
        first = e.run(mixed(6, keep=True), Sampling(1.0))
        second = e.run([Request([11, 12], 9, NEVER, 5, keep=True, continues=c) for c in first], Sampling(1.0))
        third = e.run([Request([13], 4, NEVER, 6, continues=c) for c in second], Sampling(1.0))
        done.append([*first, *second, *third])
    same(*done)
    for a, b in zip(done[0][:12], done[1][:12]):
        torch.testing.assert_close(a.cache, b.cache, atol=1e-5, rtol=1e-5)
    assert all_free(engine)


# --- too few pages


@pytest.mark.parametrize("pages, sync_every", [(9, 1), (12, 4), (20, 1)])
def test_preempted_rows_go_on_where_they_were(model, pages, sync_every):
    """A pool of a few rows' size: tokens, log-probs and finish reasons are those of a run with room for all."""
    requests = [Request([i % 4] * 5, 30 + i, NEVER, i, forced=(closer(25), SECOND)) for i in range(12)]
    requests += mixed(8)
    want = Engine(Decoder.from_model(model)).run(requests, Sampling(1.0))
    engine = paged(model, pages=pages, sync_every=sync_every)
    same(engine.run(requests, Sampling(1.0)), want)
    assert all_free(engine)
    assert engine.stats["preempted"] >= 4, engine.stats


def test_preempted_turns_of_a_dialogue(model):
    """A row that went on from a kept cache runs its whole context again."""
    slots = Engine(Decoder.from_model(model))
    first = slots.run(mixed(6, keep=True), Sampling(1.0))
    turns = [Request([11, 12], 20, NEVER, i, continues=c) for i, c in enumerate(first)]
    engine = paged(model, pages=16)
    same(engine.run(turns, Sampling(1.0)), slots.run(turns, Sampling(1.0)))
    assert engine.stats["preempted"] > 0 and all_free(engine)


def test_a_pool_for_one_longest_row_is_enough_and_one_page_less_is_refused(model):
    requests = [Request([1, 2, 3] * 4, 28, NEVER, i) for i in range(3)]  # 40 tokens: 5 pages, and the trash
    want = Engine(Decoder.from_model(model)).run(requests, Sampling(1.0))
    engine = paged(model, pages=6)
    same(engine.run(requests, Sampling(1.0)), want)
    assert all_free(engine)
    with pytest.raises(UserError, match="Lower max_new_tokens"):
        paged(model, pages=5).run(requests, Sampling(1.0))


def test_prompts_of_one_page_less_than_the_pool(model):
    """Bug: the copy of a prompt's last page asked for a page where the prompt itself had taken all of them."""
    requests = [Request([i // 2] * 38, 2, NEVER, i) for i in range(6)]
    engine = paged(model, pages=6)
    same(engine.run(requests, Sampling(1.0)), Engine(Decoder.from_model(model)).run(requests, Sampling(1.0)))
    assert all_free(engine)


def test_more_rows_run_than_longest_responses_would_fit(model):
    """Admission by the pages needed now: with stop tokens few rows come near their budget."""
    requests = [Request(p, 200, tuple(range(0, 131, 4)), i) for i, p in enumerate(prompts(32))]
    engine = paged(model, pages=60)  # two responses of the longest possible length
    engine.run(requests, Sampling(1.0))
    assert engine.stats["rows_mean"] > 4 and all_free(engine)


# --- sharing


def test_a_group_shares_the_full_pages_of_its_prompt(model):
    engine = paged(model, pages=40)
    run = engine._open([Request([9] * 20, 30, NEVER, i) for i in range(5)], Sampling(1.0))
    engine._admit(run, engine._next_sequences(run))
    owned = engine.kv_cache.owned[:5]
    assert len({tuple(pages[:2]) for pages in owned}) == 1 and len({pages[2] for pages in owned}) == 5
    assert [engine.kv_cache.shares.count[page] for page in owned[0]] == [5, 5, 1]
    assert engine.kv_cache.free_pages == 39 - 2 - 5 and not run.prompts
    engine._grow(run)
    engine._compact(run, [0, 3])
    assert engine.kv_cache.shares.count[owned[1][0]] == 3 and engine.kv_cache.free_pages == 39 - 2 - 3
    assert (engine.kv_cache.host[3:] == TRASH).all() and run.rows.done[3:].all()


def test_a_stream_that_is_left_gives_its_pages_back(model):
    engine = paged(model, pages=30)
    for _ in engine.stream(mixed(), Sampling(1.0)):
        break
    same(engine.run(mixed(), Sampling(1.0)), Engine(Decoder.from_model(model)).run(mixed(), Sampling(1.0)))
    assert all_free(engine)


@pytest.mark.parametrize("seed", range(5))
def test_shares_at_random(seed):
    """No page has two owners who do not know of each other, none is lost, giving one back twice is noticed."""
    rng, shares, holders = random.Random(seed), Shares(30), []
    for _ in range(400):
        kind = rng.random()
        if kind < 0.4 and shares.unused:
            pages = shares.take(rng.randint(1, len(shares.unused)))
            assert not any(page in other for other in holders for page in pages) and TRASH not in pages
            holders.append(pages)
        elif kind < 0.6 and holders:
            pages = rng.choice(holders)
            holders.append(shares.share(pages[: rng.randint(0, len(pages))]))
        elif holders:
            shares.release(holders.pop(rng.randrange(len(holders))))
        held = [page for pages in holders for page in pages]
        assert [shares.count[page] for page in range(1, 30)] == [held.count(page) for page in range(1, 30)]
        assert len(shares.unused) == 29 - len(set(held)) == len(set(shares.unused))
    for pages in holders:
        shares.release(pages)
    assert sorted(shares.unused) == list(range(1, 30))
    with pytest.raises(AssertionError, match="given back before"):
        shares.release([5])


# --- graphs


def test_batch_sizes_that_get_a_graph():
    assert buckets(1) == [1] and buckets(3) == [1, 2, 3] and buckets(32) == [1, 2, 4, 8, 16, 32]
    assert buckets(100) == [1, 2, 4, 8, 16, 32, 64, 96, 100]


def test_graphs_give_what_eager_steps_give(model):
    """Every size is captured once for each sampling, batches are padded up, later runs and new weights replay."""
    stand_in = StandIn()
    engine = paged(model, max_rows=6, sync_every=3, graphs=Graphs(stand_in))
    eager = Engine(Decoder.from_model(model))
    same(engine.run(mixed(9), Sampling(1.0)), eager.run(mixed(9), Sampling(1.0)))
    assert stand_in.captures == 4  # 6, 4, 2, 1: the largest first
    assert {1, 2, 4} <= set(stand_in.replays) and len(stand_in.replays) == engine.stats["steps"]
    other = make_model(seed=1)
    for e in (engine, eager):
        e.refresh(other.named_parameters())
    shorter = mixed(4)
    same(engine.run(shorter, Sampling(1.0)), eager.run(shorter, Sampling(1.0)))
    assert stand_in.captures == 4
    same(engine.run(shorter, Sampling(0.0)), eager.run(shorter, Sampling(0.0)))
    same(engine.run(shorter[:2], Sampling(0.5)), eager.run(shorter[:2], Sampling(0.5)))
    assert stand_in.captures == 4 + 3 + 2 and all_free(engine)


def test_graphs_with_preemption(model):
    engine = paged(model, pages=10, max_rows=4, sync_every=2, graphs=Graphs(StandIn()))
    requests = [Request([i] * 5, 34, (7,), i) for i in range(6)]
    same(engine.run(requests, Sampling(1.0)), Engine(Decoder.from_model(model)).run(requests, Sampling(1.0)))
    assert engine.stats["preempted"] > 0 and all_free(engine)


@pytest.mark.parametrize(
    "longer",
    [
        Request([1, 2], 34, NEVER, 0),  # buffers of the rows, and the page table
        Request([1] * 400, 4, NEVER, 0),  # page table, rotary angles
        Request([1, 2], 4, (1, 2, 3, 4, 5, 6), 0),  # stop ids
    ],
)
def test_a_buffer_of_another_size_means_new_graphs(model, longer):
    """A graph that reads a buffer nobody writes any more would go on to sample from stale rows."""
    stand_in = StandIn()
    engine, eager = paged(model, max_rows=2, graphs=Graphs(stand_in)), Engine(Decoder.from_model(model))
    for requests, captures in ((mixed(3), 2), ([longer, *mixed(2)], 4), (mixed(3), 4)):
        same(engine.run(requests, Sampling(1.0)), eager.run(requests, Sampling(1.0)))
        assert (stand_in.captures, stand_in.forgotten) == (captures, captures // 4)


# --- modes


def test_batch_invariant_log_probs_are_equal_bit_for_bit(model):
    """Alone, in company, admitted late: the same sums in the same order."""
    requests = mixed(9)
    engine = paged(model, max_rows=4, batch_invariant=True)
    together = engine.run(requests, Sampling(1.0))
    for i in (0, 5, 8):
        alone = engine.run([requests[i]], Sampling(1.0))[0]
        assert alone.response_ids.tolist() == together[i].response_ids.tolist()
        assert torch.equal(alone.logprobs, together[i].logprobs)


def varlen(q, k, v, edges_q, edges_k, longest_q, longest_k, causal):
    """Stands in for flash-attn: [R, h, D] queries, [R, k, D] keys and values, sequences between edges."""
    assert causal and torch.equal(edges_q, edges_k) and longest_q == longest_k == edges_q.diff().max()
    assert edges_q.dtype == torch.int32
    out = torch.empty_like(q)
    for a, b in zip(edges_q[:-1].tolist(), edges_q[1:].tolist()):
        one = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        out[a:b] = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_packed_prefill_is_the_padded_one(name):
    decoder = Decoder.from_model(make_model(name))
    asked = prompts(6)
    engine = Engine(decoder)
    with torch.no_grad():
        want, want_kv = engine._prefill(asked)
        got, kv = decoder.prefill_packed(torch.tensor(sum(asked, [])), [len(p) for p in asked], varlen)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    for a, b in zip(kv, want_kv, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_packed_prefill_where_flash_attn_is(model, monkeypatch):
    """The engine takes it for 16-bit weights on CUDA alone; keys and values reach the pages like padded ones."""
    engine, plain = paged(model), paged(model)
    monkeypatch.setattr(engine_module, "varlen_attention", lambda: varlen)
    monkeypatch.setattr(type(engine), "packs_prompts", property(lambda self: self is engine))
    calls = []
    inner = engine.decoder.prefill_packed
    monkeypatch.setattr(engine.decoder, "prefill_packed", lambda *a: calls.append(len(a[1])) or inner(*a))
    same(engine.run(mixed(), Sampling(1.0)), plain.run(mixed(), Sampling(1.0)))
    assert sum(calls) == 8


@pytest.mark.slow
def test_the_whole_engine_on_triton_kernels(model, monkeypatch):
    """rms_norm, rope_and_store, decode_attention and sample in the interpreter, by the one switch."""
    pytest.importorskip("triton")
    requests = [Request(p, 3, NEVER, i) for i, p in enumerate([[9] * 17, [9] * 17, [4, 5]])]
    want = Engine(Decoder.from_model(model)).run(requests, Sampling(1.0))
    monkeypatch.setenv(kernels.SWITCH, "triton")
    used, find = set(), kernels.triton_version
    monkeypatch.setitem(kernels.__dict__, "triton_version", lambda name: used.add(name) or find(name))
    same(paged(model, page=16).run(requests, Sampling(1.0)), want)
    assert used == {"rms_norm", "rope_and_store", "decode_attention", "sample"}
