"""Forced tokens at random, on every engine, against a reference that runs the whole text again for each token."""

import random

import pytest
import torch
from graph_stand_in import StandIn
from test_paged_engine import all_free, paged
from test_rollout import engine_of

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout import Forced, Request, Sampling
from adaptive_reasoning.rollout.graphs import Graphs
from adaptive_reasoning.rollout.sampler import sample, uniforms

V = 131


def requests_at_random(rng: random.Random) -> list[Request]:
    """Leading tokens, one or two places (some with `unless`), a tail behind a sampled token; some of it or all."""
    ids = lambda least, most: tuple(rng.randrange(V) for _ in range(rng.randint(least, most)))  # noqa: E731
    pairs = lambda most: tuple((i, rng.choice((0.25, 0.5, 1.0))) for i in ids(1, most))  # noqa: E731
    found = []
    while len(found) < 8:
        forced = [*(pairs(3) if rng.random() < 0.6 else ())]
        at = len(forced)
        for place in range(rng.randint(0, 2)):
            tokens, at = pairs(3), at + rng.randint(0, 16)
            said = forced[0][0] if forced and place == 0 else 7
            unless = rng.choice((-1, said, tokens[0][0])) if place == 0 else -1
            forced.append(Forced(tokens, at, unless=unless, action=rng.random() < 0.5))
            at += len(tokens)
        if rng.random() < 0.6:
            forced.append(Forced(pairs(4), after=ids(1, 40), action=rng.random() < 0.5))
        request = Request([*ids(1, 12)], rng.randint(3, 40), ids(0, 2), rng.getrandbits(40), tuple(forced))
        try:
            request.check(V)
            found.append(request)
        except UserError:
            pass  # a place behind the end
    return found


@torch.no_grad()
def reference(model, request: Request, temperature: float) -> tuple[list, ...]:
    """Return (ids, log-probs, action mask, forced, finish reason) of a response."""
    uniform, entries = torch.from_numpy(uniforms(request.seed, request.max_new_tokens)), request.forcing()
    entries.sort(key=lambda f: f.after is not None)  # those at a position first
    begins = {f: f.at for f in entries if f.after is None}
    ids, rows = [], []
    for t in range(request.max_new_tokens):
        active = [f for f in entries if f in begins and begins[f] <= t < begins[f] + len(f.tokens)]
        active = [f for f in active if f.unless not in ids[: begins[f]]]
        if active:
            token, q = active[0].tokens[t - begins[active[0]]]
            rows.append((torch.tensor(q).log().item() if active[0].action else 0.0, active[0].action, True))
        else:
            logits = model(torch.tensor([request.prompt_ids + ids])).logits[0, -1:]
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
    forced = ((61, 1.0), Forced(((60, 1.0), (61, 1.0)), at=25, unless=61, action=False))
    requests = [Request([i % 4] * 5, 30 + i, (), i, forced=forced) for i in range(12)]
    engine = paged(model, pages=9)
    assert all(c.action_mask.all() for c in engine.run(requests, Sampling(1.0)))
    assert engine.stats["preempted"] and all_free(engine)
