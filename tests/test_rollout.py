"""The rollout loop against `transformers`, and its own promises: P2, P3, forced tokens, turns, refresh."""

import math

import pytest
import torch
from adaptive_reasoning.kernels.sample import restrict
from conftest import CONFIGS, make_model

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout import Decoder, Engine, Forced, Request, Sampling, request_seed
from adaptive_reasoning.rollout.sampler import sample

NEVER = ()  # no stop token


def prompts(n, seed=0, low=3, high=24):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=g).tolist()
    return [torch.randint(0, 131, (k,), generator=g).tolist() for k in lengths]


def engine_of(model, **kw):
    return Engine(Decoder.from_model(model), **kw)


def reference_logprobs(model, completion, temperature=1.0):
    """Log-probs [T] of a response by `transformers`, one forward pass over prompt and response."""
    ids = torch.tensor([completion.context_ids + completion.response_ids.tolist()])
    with torch.no_grad():
        logits = model(ids).logits[0, len(completion.context_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, completion.response_ids[:, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_generate(name):
    model = make_model(name)
    asked = prompts(5)
    got = engine_of(model).run([Request(p, 20, NEVER, 0) for p in asked], Sampling(0.0))
    for p, c in zip(asked, got):
        ids = torch.tensor([p])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        assert c.response_ids.tolist() == want[0, len(p) :].tolist()
        assert c.finish_reason == "length"


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_logprobs_are_those_of_a_full_forward(name):
    """P3: sampled token by token over the cache, or scored in one forward pass: the same number."""
    model = make_model(name)
    requests = [Request(p, 5 + 7 * (i % 4), (1, 2, 3), i) for i, p in enumerate(prompts(12))]
    for c in engine_of(model, max_rows=5).run(requests, Sampling(0.7)):
        assert torch.allclose(c.logprobs, reference_logprobs(model, c, 0.7), atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch_mates(model):
    """P2: alone, among others, with few rows (late admission, compaction) or looked at every 4 steps."""
    requests = [Request(p, 6 + 5 * (i % 5), (7, 8), request_seed(1, i)) for i, p in enumerate(prompts(16))]
    together = engine_of(model).run(requests, Sampling(1.0))
    for engine in (engine_of(model, max_rows=3), engine_of(model, sync_every=4), engine_of(model, prefill_tokens=1)):
        for a, b in zip(together, engine.run(requests, Sampling(1.0))):
            assert a.response_ids.tolist() == b.response_ids.tolist()
            assert torch.allclose(a.logprobs, b.logprobs, atol=1e-5)
            assert a.finish_reason == b.finish_reason
    alone = engine_of(model).run([requests[9]], Sampling(1.0))[0]
    assert alone.response_ids.tolist() == together[9].response_ids.tolist()


def test_the_same_run_twice_is_equal_bit_for_bit(model):
    """P1: nothing but the seeds decides."""
    requests = [Request(p, 12, (7,), i) for i, p in enumerate(prompts(8))]
    first, second = (engine_of(model).run(requests, Sampling(1.0)) for _ in range(2))
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(first, second))


def test_samples_of_one_prompt_differ_and_share_its_prefill(model):
    prompt = prompts(1)[0]
    calls = []
    engine = engine_of(model)
    prefill = engine.decoder.prefill
    engine.decoder.prefill = lambda tokens, lengths: calls.append(len(tokens)) or prefill(tokens, lengths)
    got = engine.run([Request(prompt, 8, NEVER, i) for i in range(6)], Sampling(1.0))
    assert calls == [1]
    assert len({tuple(c.response_ids.tolist()) for c in got}) == 6


def test_budgets_stop_tokens_and_finish_reasons(model):
    requests = [Request(p, n, tuple(range(40)), i) for i, (p, n) in enumerate(zip(prompts(20), range(1, 21)))]
    got = engine_of(model, max_rows=6).run(requests, Sampling(1.0))
    assert {c.finish_reason for c in got} == {"stop", "length"}
    for r, c in zip(requests, got):
        ids = c.response_ids.tolist()
        assert all(t not in r.stop_ids for t in ids[:-1])
        assert (ids[-1] in r.stop_ids) == (c.finish_reason == "stop")
        assert len(ids) == r.max_new_tokens or c.finish_reason == "stop"


def test_forced_first_tokens_come_back_with_the_log_of_their_probability(model):
    p = prompts(1)[0]
    c, free = engine_of(model).run(
        [Request(p, 9, NEVER, 3, forced=((50, 0.5), (51, 1.0))), Request(p, 9, NEVER, 3)], Sampling(0.6)
    )
    assert c.response_ids[:2].tolist() == [50, 51]
    assert c.logprobs[:2].tolist() == [pytest.approx(math.log(0.5)), 0.0]
    assert c.action_mask.all()
    assert torch.allclose(c.logprobs[2:], reference_logprobs(model, c, 0.6)[2:], atol=1e-5)
    assert free.response_ids[0] != 50 or free.response_ids[1] != 51


CLOSER = Forced(((60, 1.0), (61, 1.0)), at=5, unless=(61,), action=False)


def test_a_budget_is_closed_at_its_place_by_tokens_that_are_no_actions(model):
    p = prompts(1)[0]
    c = engine_of(model).run([Request(p, 12, NEVER, 1, forced=(CLOSER,))], Sampling(1.0))[0]
    assert c.response_ids[5:7].tolist() == [60, 61]
    assert c.action_mask.tolist() == [True] * 5 + [False] * 2 + [True] * 5 == (~c.forced).tolist()
    assert c.logprobs[5:7].tolist() == [0.0, 0.0]
    assert torch.allclose(c.logprobs[7:], reference_logprobs(model, c)[7:], atol=1e-5)


def test_what_closes_a_budget_is_left_out_where_its_token_came_before(model):
    p = prompts(1)[0]
    plain = Request(p, 12, NEVER, 1, forced=((61, 1.0),))
    closed = Request(p, 12, NEVER, 1, forced=((61, 1.0), CLOSER))
    a, b = engine_of(model).run([plain, closed], Sampling(1.0))
    assert a.response_ids.tolist() == b.response_ids.tolist()
    assert b.action_mask.all() and b.forced.tolist() == [True] + [False] * 11


def test_different_budgets_side_by_side_do_not_mix(model):
    p = prompts(1)[0]
    budgets = ((30, 3), (8, 6), (20, 19))
    requests = [
        Request(p, n, NEVER, 5, forced=(Forced(((60, 1.0),), at, unless=(60,), action=False),)) for n, at in budgets
    ]
    for (n, at), c in zip(budgets, engine_of(model, max_rows=2).run(requests, Sampling(1.0))):
        assert len(c.response_ids) == n and c.response_ids[at] == 60
        assert (~c.action_mask).nonzero().flatten().tolist() in ([at], [])


@pytest.mark.parametrize("action", [True, False])
def test_forced_at_the_second_sentence(model, action):
    """Behind the first sampled full stop two tokens are forced, once; before and behind them nothing is."""
    full_stops = tuple(range(0, 120, 6))  # frequent enough to come up
    p = prompts(1)[0]
    second = Forced(((50, 0.5), (51, 1.0)), after=full_stops, action=action)
    requests = [Request(p, 20, NEVER, seed, forced=(second,)) for seed in range(8)]
    requests.append(Request(p, 20, NEVER, 0, forced=((full_stops[1], 0.25), second)))  # a forced one is no full stop
    free = engine_of(model).run([Request(p, 20, NEVER, seed) for seed in range(8)], Sampling(1.0))
    found = engine_of(model, max_rows=3).run(requests, Sampling(1.0))
    fired = 0
    for c in found:
        ids, forced = c.response_ids.tolist(), c.forced.tolist()
        stops = [t for t, token in enumerate(ids) if token in full_stops and not forced[t]]
        leading = len([pair for pair in c.request.forced if not isinstance(pair, Forced)])
        places = [t for t in (stops[0] + 1, stops[0] + 2) if t < 20] if stops else []
        fired += bool(places)
        assert [t for t in range(20) if forced[t]] == [*range(leading), *places]
        assert [ids[t] for t in places] == [50, 51][: len(places)]
        assert c.logprobs[places].tolist() == pytest.approx([math.log(0.5) * action, 0.0][: len(places)])
        assert c.action_mask[places].tolist() == [action] * len(places)
        sampled = ~c.forced
        assert torch.allclose(c.logprobs[sampled], reference_logprobs(model, c)[sampled], atol=1e-5)
    assert fired >= 6
    for a, b in zip(free, found):  # the same until the full stop
        first = next((t for t in range(20) if b.forced[t]), 20)
        assert a.response_ids[:first].tolist() == b.response_ids[:first].tolist()


def test_forced_at_several_places(model):
    p = prompts(1)[0]
    places = (Forced(((40, 0.5),), at=3), Forced(((41, 0.25), (42, 1.0)), at=7), Forced(((43, 1.0),), at=99))
    c = engine_of(model).run([Request(p, 10, NEVER, 1, forced=((50, 0.5), *places))], Sampling(1.0))[0]
    assert c.forced.nonzero().flatten().tolist() == [0, 3, 7, 8]
    assert c.response_ids[c.forced].tolist() == [50, 40, 41, 42]
    assert c.logprobs[c.forced].tolist() == pytest.approx([math.log(0.5), math.log(0.5), math.log(0.25), 0.0])
    assert c.action_mask.all()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_turns_continue_on_the_kept_cache(name):
    """Three turns: greedy tokens and log-probs equal those of running the whole dialogue as one prompt."""
    model = make_model(name)
    engine = engine_of(model)
    first = engine.run([Request(p, 4 + i, NEVER, i, keep=True) for i, p in enumerate(prompts(4))], Sampling(0.0))
    users = [[11, 12, 13], [14], [15, 16], [17, 18, 19, 20]]
    second = engine.run([Request(u, 6, NEVER, 9, keep=True, continues=c) for u, c in zip(users, first)], Sampling(0.0))
    third = engine.run([Request([21, 22], 5, NEVER, 9, continues=c) for c in second], Sampling(0.0))
    for a, u, b, c in zip(first, users, second, third):
        assert b.context_ids == a.context_ids + a.response_ids.tolist() + u
        assert c.context_ids == b.context_ids + b.response_ids.tolist() + [21, 22]
        whole = engine.run([Request(c.context_ids, 5, NEVER, 0)], Sampling(0.0))[0]
        assert c.response_ids.tolist() == whole.response_ids.tolist()
        assert torch.allclose(c.logprobs, reference_logprobs(model, c), atol=1e-5)


def test_completions_are_handed_out_while_others_decode(model):
    order = []
    requests = [Request(prompts(1)[0], n, NEVER, 0) for n in (30, 3, 12)]
    got = engine_of(model).run(requests, Sampling(1.0), on_finish=lambda i, c: order.append(i))
    assert order == [1, 2, 0]
    assert [len(c.response_ids) for c in got] == [30, 3, 12]


def test_refresh_replaces_every_weight_in_place(model):
    """A refreshed replica samples like the new model; a cached prompt of the old weights must not survive."""
    engine = engine_of(model)
    requests = [Request(p, 10, NEVER, i) for i, p in enumerate(prompts(3))]
    engine.run(requests, Sampling(1.0))
    other = make_model(seed=1)
    addresses = [w.data_ptr() for w in engine.decoder.destinations.values()]
    engine.refresh(other.named_parameters())
    assert addresses == [w.data_ptr() for w in engine.decoder.destinations.values()]
    for c in engine.run(requests, Sampling(1.0)):
        assert torch.allclose(c.logprobs, reference_logprobs(other, c), atol=1e-5)


def test_first_logprobs(model):
    asked = prompts(7)
    got = engine_of(model, prefill_tokens=40).first_logprobs(asked, 42, 0.6)
    for p, value in zip(asked, got):
        with torch.no_grad():
            want = (model(torch.tensor([p])).logits[0, -1] / 0.6).log_softmax(-1)[42]
        assert value.item() == pytest.approx(want.item(), abs=1e-5)


# --- the sampler


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf"), -1.0]])
    n = 40_000
    uniform = (torch.arange(n) + 0.5) / n  # every quantile once: no luck involved
    tokens, logprobs = sample(logits.expand(n, -1), uniform, Sampling(0.8))
    want = (logits / 0.8).softmax(-1)[0]
    assert torch.allclose(torch.bincount(tokens, minlength=5) / n, want, atol=1e-4)
    assert torch.allclose(logprobs, want.log()[tokens])


def test_extreme_random_numbers_never_pick_an_impossible_token():
    logits = torch.full((3, 6), float("-inf"))
    logits[:, 2], logits[:, 3] = 0.0, -3.0
    tokens, logprobs = sample(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), Sampling(1.0))
    assert tokens.tolist() == [2, 2, 3] and logprobs.isfinite().all()


def test_top_p_and_top_k_keep_the_right_tokens():
    logprobs = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = lambda **kw: restrict(logprobs, **{"top_p": 1.0, "top_k": 0, **kw}).exp()[0].tolist()  # noqa: E731
    assert kept(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])  # the token that crosses 0.6 belongs to it
    assert kept(top_p=0.5) == pytest.approx([1, 0, 0, 0])
    assert kept(top_k=3) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0])
    assert kept(top_k=2, top_p=0.6) == pytest.approx([1, 0, 0, 0])  # top_k first: 0.67 of what is left reaches 0.6


def test_logprobs_of_a_cut_distribution_are_renormalised(model):
    requests = [Request(p, 10, NEVER, i) for i, p in enumerate(prompts(6))]
    for c in engine_of(model).run(requests, Sampling(0.9, top_p=0.8, top_k=20)):
        ids = torch.tensor([c.context_ids + c.response_ids.tolist()])
        with torch.no_grad():
            logits = model(ids).logits[0, len(c.context_ids) - 1 : -1] / 0.9
        want = restrict(logits.log_softmax(-1), 0.8, 20).gather(-1, c.response_ids[:, None])[:, 0]
        assert torch.allclose(c.logprobs, want, atol=1e-5)


# --- mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_ids": []}, "at least one prompt token"),
        ({"prompt_ids": [131]}, "token id 131 does not exist"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"forced": ((5, 0.0),)}, "probability in"),
        ({"forced": ((5, 1.0),) * 9}, "do not fit"),
        ({"forced": (Forced(((60, 1.0), (61, 1.0)), at=7),)}, "do not fit"),
        ({"forced": ((5, 1.0), Forced(((60, 1.0),)))}, "at the same position"),
        ({"forced": (Forced(((60, 1.0),), after=(131,)),)}, "token id 131 does not exist"),
        ({"forced": (Forced(((60, 1.0),), after=(1,)), Forced(((60, 1.0),), after=(2,)))}, "one Forced with"),
        ({"forced": (Forced(((60, 1.0),), after=(1,), unless=(3,)),)}, "either `at`"),
        ({"forced": (Forced(((60, 1.0),), at=2, after=(1,)),)}, "either `at`"),
        ({"forced": (Forced(((60, 1.0),), after=()),)}, "or `after`"),  # it would stand in front
        ({"forced": (Forced(((60, 1.0),), at=-1),)}, "0 or more"),
        ({"forced": (Forced((), at=2),)}, "needs one token"),
    ],
)
def test_impossible_requests_are_refused(model, change, message):
    request = Request(**{"prompt_ids": [1, 2], "max_new_tokens": 8, "stop_ids": NEVER, "seed": 0, **change})
    with pytest.raises(UserError, match=message):
        engine_of(model).run([request], Sampling(1.0))


def test_continuing_what_was_not_kept_is_refused(model):
    engine = engine_of(model)
    c = engine.run([Request([1, 2], 3, NEVER, 0)], Sampling(1.0))[0]
    with pytest.raises(UserError, match="keep=True"):
        engine.run([Request([3], 3, NEVER, 0, continues=c)], Sampling(1.0))


def test_too_little_cache_memory_names_the_mend(model):
    with pytest.raises(UserError, match="Lower max_new_tokens"):
        engine_of(model, cache_bytes=10_000).run([Request([1, 2], 400, NEVER, 0)], Sampling(1.0))


def test_few_cache_bytes_only_cost_rows(model):
    """The cache never exceeds its memory; fewer rows run side by side and nothing else changes."""
    requests = [Request(p, 30, NEVER, i) for i, p in enumerate(prompts(8))]
    wide = engine_of(model).run(requests, Sampling(1.0))
    tight = engine_of(model, cache_bytes=3 * 60 * Decoder.from_model(model).cache_bytes_per_token())
    for a, b in zip(wide, tight.run(requests, Sampling(1.0))):
        assert a.response_ids.tolist() == b.response_ids.tolist()
    assert tight.kv_cache.cache.nbytes <= tight.kv_cache.cache_bytes and tight.kv_cache.cache.shape[1] < 8


def test_weights_of_another_model_are_refused(model):
    decoder = Decoder.from_model(model)
    with pytest.raises(UserError, match="not part of"):
        decoder.load([("model.layers.9.mlp.up_proj.weight", torch.zeros(2, 2))])
    with pytest.raises(UserError, match="weights are missing"):
        decoder.load([("model.norm.weight", torch.zeros(64))])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mistral"}, "models of type mistral"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    config = CONFIGS["qwen2"]()
    fake = type("Config", (), {**{k: getattr(config, k) for k in ("hidden_act", "layer_types", "rope_parameters")},
                               "model_type": "qwen2", **change})()  # fmt: skip
    with pytest.raises(UserError, match=message):
        Decoder(fake)
