"""Forced tokens at random, on every engine, against a reference that runs the whole text again for each token."""

import random
from dataclasses import replace

import pytest
import torch
from graph_stand_in import StandIn
from test_paged_engine import all_free, paged
from test_rollout import engine_of

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout import Bias, Forced, Request, Sampling
from adaptive_reasoning.rollout.graphs import Graphs
from adaptive_reasoning.rollout.sampler import sample, uniforms

V = 131


def requests_at_random(rng: random.Random) -> list[Request]:
    """Leading tokens, one or two places (some on conditions), a tail behind a sampled token, a bias; some or all."""
    ids = lambda least, most: tuple(rng.randrange(V) for _ in range(rng.randint(least, most)))  # noqa: E731
    pairs = lambda most: tuple((i, rng.choice((0.25, 0.5, 1.0))) for i in ids(1, most))  # noqa: E731
    found = []
    while len(found) < 8:
        forced = [*(pairs(3) if rng.random() < 0.6 else ())]
        at = len(forced)
        for place in range(rng.randint(0, 2)):
            tokens, at = pairs(3), at + rng.randint(0, 16)
            said = tuple(i for i, _ in forced) if place == 0 else ()
            unless = rng.choice(((), (7,), said[-2:], said[1:3], tokens[0][:1])) if place == 0 else ()
            given = rng.choice(((), said[:1], said[:2], (7,)))[:at] if place == 0 else ()
            room = rng.choice((0, 1, 9)) if given or unless else 0
            forced.append(Forced(tokens, at, given=given, unless=unless, room=room, action=rng.random() < 0.5))
            at += len(tokens)
        if rng.random() < 0.6:
            forced.append(Forced(pairs(4), after=ids(1, 40), action=rng.random() < 0.5))
        leading = tuple(pair[0] for pair in forced if not isinstance(pair, Forced))
        opening = (*rng.choice(((), leading[:1], leading, (7,))), rng.randrange(V))
        bias = Bias(opening, rng.choice((-4.0, 3.0, 8.0))) if rng.random() < 0.6 else None
        request = Request([*ids(1, 12)], rng.randint(3, 40), ids(0, 2), rng.getrandbits(40), tuple(forced), bias)
        try:
            request.check(V)
            found.append(request)
        except UserError:
            pass  # a place behind the end
    return found


def came(part: tuple[int, ...], ids: list[int]) -> bool:
    return bool(part) and any(tuple(ids[i : i + len(part)]) == part for i in range(len(ids)))


@torch.no_grad()
def reference(model, request: Request, temperature: float) -> tuple[list, ...]:
    """Return (ids, log-probs, action mask, forced, finish reason) of a response."""
    uniform, entries = torch.from_numpy(uniforms(request.seed, request.max_new_tokens)), request.forcing()
    entries.sort(key=lambda f: f.after is not None)  # those at a position first
    begins = {f: f.at for f in entries if f.after is None}
    ids, rows = [], []
    end = request.max_new_tokens
    while (t := len(ids)) < end:
        active = [f for f in entries if f in begins and begins[f] <= t < begins[f] + len(f.tokens)]
        active = [f for f in active if tuple(ids[: len(f.given)]) == f.given and not came(f.unless, ids[: begins[f]])]
        if active:
            f = active[0]
            token, q = f.tokens[t - begins[f]]
            end = min(end, begins[f] + len(f.tokens) + f.room) if f.room else end
            rows.append((torch.tensor(q).log().item() if f.action else 0.0, f.action, True))
        else:
            logits = model(torch.tensor([request.prompt_ids + ids])).logits[0, -1:]
            if request.bias and request.bias.opening[:-1] == tuple(ids):
                logits[0, request.bias.opening[-1]] += request.bias.amount
            token, logprob = (x.item() for x in sample(logits, uniform[t : t + 1], Sampling(temperature)))
            rows.append((logprob, True, False))
            begins |= {f: t + 1 for f in entries if f.after and token in f.after and f not in begins}
        ids.append(token)
        if not active and token in request.stop_ids:
            return ids, *map(list, zip(*rows)), "stop"
    return ids, *map(list, zip(*rows)), "length"


ENGINES = {
    "slots": engine_of,
    "few slots": lambda model: engine_of(model, max_rows=2),
    "pages": lambda model: paged(model, max_rows=4),
    "few pages": lambda model: paged(model, pages=8, sync_every=4),
    "graphs": lambda model: paged(model, pages=9, max_rows=6, sync_every=3, graphs=Graphs(StandIn())),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_forced_tokens_at_random(model, kind):
    rng, engine, preempted = random.Random(kind), ENGINES[kind](model), 0
    for temperature in (1.0, 0.7, 0.0):
        requests = requests_at_random(rng)
        for request, c in zip(requests, engine.run(requests, Sampling(temperature))):
            ids, logprobs, action, forced, reason = reference(model, request, temperature)
            got = c.response_ids.tolist(), c.action_mask.tolist(), c.forced.tolist(), c.finish_reason
            assert got == (ids, action, forced, reason), request
            torch.testing.assert_close(c.logprobs, torch.tensor(logprobs), atol=2e-5, rtol=0)
        preempted += engine.stats["preempted"]
    assert kind not in ("few pages", "graphs") or (preempted and all_free(engine))


def test_a_preempted_row_remembers_the_token_that_frees_a_place(model):
    forced = ((61, 1.0), Forced(((60, 1.0), (61, 1.0)), at=25, unless=(61,), action=False))
    requests = [Request([i % 4] * 5, 30 + i, (), i, forced=forced) for i in range(12)]
    engine = paged(model, pages=9)
    assert all(c.action_mask.all() for c in engine.run(requests, Sampling(1.0)))
    assert engine.stats["preempted"] and all_free(engine)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("opening", [(5,), (50, 5)])
def test_a_bias_moves_one_choice_and_more_of_it_never_takes_that_back(model, kind, opening):
    """The noise is the same: a token's part of [0, 1) grows on both sides with its logit, so choices are nested."""
    engine, place = ENGINES[kind](model), len(opening) - 1
    leading = tuple((token, 1.0) for token in opening[:-1])
    requests = [Request([i % 9, 3], 4, (), i, forced=leading) for i in range(40)]

    def biased(amount: float) -> list:
        return engine.run([replace(r, bias=Bias(opening, amount)) for r in requests], Sampling(1.0))

    free, nothing = engine.run(requests, Sampling(1.0)), biased(0.0)
    assert all(a.response_ids.equal(b.response_ids) and a.logprobs.equal(b.logprobs) for a, b in zip(free, nothing))
    chosen: set[int] = set()
    sizes = []
    for amount in (-40.0, 0.0, 2.0, 4.0, 6.0, 40.0):
        done = biased(amount)
        now = {i for i, c in enumerate(done) if c.response_ids[place] == opening[-1]}
        assert chosen <= now
        chosen, sizes = now, [*sizes, len(now)]
        for a, b in zip(free, done):  # where the choice is the same, so is the rest
            assert a.response_ids[place] != b.response_ids[place] or a.response_ids.equal(b.response_ids)
    assert sizes[0] == 0 and sizes[-1] == 40 and len(set(sizes)) >= 4
