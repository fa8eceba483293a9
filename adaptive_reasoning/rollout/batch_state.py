"""Batch state: static buffers of all responses that decode side by side, and the step that moves them on by a token."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from adaptive_reasoning.rollout.decoder import Decoder
from adaptive_reasoning.rollout.request import Bias, Request
from adaptive_reasoning.rollout.sampler import Sampling, sample, uniforms

FREE, FORCED, SILENT, CONDITIONAL = 0, 1, 2, 4  # in `kind`: bits; 0: this position is sampled
NEVER = 1 << 30  # position that no response reaches
ANY, NONE = -1, -2  # ids in a pattern of tokens: every token fits, no token fits


class Shape(NamedTuple):
    """What sizes the buffers of a batch: the longest of each over its requests."""

    response: int  # max_new_tokens
    stops: int  # stop ids
    triggers: int  # ids of `Forced.after`
    tail: int  # tokens forced behind one of them
    given: int  # tokens of `Forced.given`
    unless: int  # and of `Forced.unless`
    opening: int  # tokens of `Bias.opening`

    @classmethod
    def of(cls, requests: list[Request]) -> "Shape":
        forcing = [f for r in requests for f in r.forcing()]
        lengths = (
            [r.max_new_tokens for r in requests],
            [len(r.stop_ids) for r in requests],
            [len(f.after) for f in forcing if f.after],
            [len(f.tokens) for f in forcing if f.after],
            [len(f.given) for f in forcing],
            [len(f.unless) for f in forcing],
            [len(r.bias.opening) for r in requests if r.bias],
        )
        return cls(*(max(each, default=0) for each in lengths))


@dataclass(frozen=True)
class Saved:
    """What a preempted row had said, on the host. n tokens."""

    token: torch.Tensor  # [n] int64
    logprob: torch.Tensor  # [n] fp32
    action: torch.Tensor  # [n] bool
    forced: torch.Tensor  # [n] bool
    closed: bool
    fired: int
    budget: int


class BatchState:
    """Buffers over S rows. Live rows are 0 .. n-1; a response of row r has `count[r]` tokens so far.

    Everything a decode step needs is a tensor here, so that a step neither asks the host nor tells it anything:
    forced tokens, stop ids and random numbers are looked up by (row, count).

    Args:
        shape: the least that they hold.
    """

    def __init__(self, rows: int, shape: Shape, device: torch.device):
        def new(*shape, dtype=torch.int64, value=0):
            return torch.full(shape, value, dtype=dtype, device=device)

        S, self.shape = rows, shape
        N, stops, triggers, tail, given, unless, opening = shape
        self.max_new_tokens = N
        self.token = new(S)  # last token, not yet in the cache
        self.position = new(S)  # where that token goes in the cache
        self.count = new(S)
        self.budget = new(S)
        self.done = new(S, dtype=torch.bool, value=True)
        self.stopped = new(S, dtype=torch.bool)
        self.stop = new(S, max(stops, 1), value=-1)
        # One column more than needed: finished rows write there until they are read back.
        self.kind = new(S, N + 1, dtype=torch.uint8)  # of a forced position
        self.force = new(S, N + 1, dtype=torch.int32)  # the token
        self.force_logq = new(S, N + 1, dtype=torch.float32)
        self.since = new(S, value=NEVER)  # where the conditional positions begin
        self.given = new(S, given, value=ANY)  # free unless the response begins with these
        self.unless = new(S, unless, value=NONE)  # free if these came before, one behind the other
        self.closed = new(S, dtype=torch.bool)  # whether they came
        self.limit = new(S, value=NEVER)  # the budget once the conditional positions are forced
        self.bias = new(S, dtype=torch.float32)  # on the logit of one token
        self.biased = new(S)
        self.biased_at = new(S, value=NEVER)
        self.biased_behind = new(S, max(opening - 1, 0), value=ANY)  # in a response that begins with these
        self.trigger = new(S, triggers, value=-1)  # what the tail is forced behind
        self.tail = new(S, tail)
        self.tail_logq = new(S, tail, dtype=torch.float32)
        self.tail_length = new(S)
        self.tail_action = new(S, dtype=torch.bool)
        self.fired = new(S, value=NEVER)  # position of its first token, once it is known
        self.uniform = new(S, N + 1, dtype=torch.float32)
        self.out_token = new(S, N + 1)
        self.out_logprob = new(S, N + 1, dtype=torch.float32)
        self.out_action = new(S, N + 1, dtype=torch.bool)
        self.out_forced = new(S, N + 1, dtype=torch.bool)
        self.outputs = (self.out_token, self.out_logprob, self.out_action, self.out_forced)
        self.all = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]

    def admit(self, first: int, requests: list[Request], contexts: list[list[int]], sampling: Sampling) -> None:
        """Set the free rows first, first + 1, ... up for `requests`, whose contexts are all in the cache."""
        B, N = len(requests), self.max_new_tokens
        stop = np.full((B, self.stop.shape[1]), -1)
        kind, force = np.zeros((B, N + 1), dtype=np.uint8), np.zeros((B, N + 1), dtype=np.int32)
        logq, uniform = np.zeros((B, N + 1), dtype=np.float32), np.zeros((B, N + 1), dtype=np.float32)
        given, unless = np.full((B, self.given.shape[1]), ANY), np.full((B, self.unless.shape[1]), NONE)
        behind = np.full((B, self.biased_behind.shape[1]), ANY)
        since, limit = np.full(B, NEVER), np.full(B, NEVER)
        trigger = np.full((B, self.trigger.shape[1]), -1)
        tail, tail_logq = (
            np.zeros((B, self.tail.shape[1]), dtype=np.int64),
            np.zeros((B, self.tail.shape[1]), np.float32),
        )
        about = np.zeros((B, 2), dtype=np.int64)  # tokens of the tail, and whether they are actions
        for b, request in enumerate(requests):
            stop[b, : len(request.stop_ids)] = request.stop_ids
            for f in request.forcing():
                ids, qs = zip(*f.tokens)
                logqs = torch.tensor(qs).log().numpy()  # as everywhere: the logarithm of the fp32 number
                if f.after:
                    trigger[b, : len(f.after)], about[b] = f.after, (len(ids), f.action)
                    tail[b, : len(ids)], tail_logq[b, : len(ids)] = ids, logqs
                    continue
                here = slice(f.at, f.at + len(ids))
                force[b, here], logq[b, here] = ids, logqs
                kind[b, here] = FORCED | SILENT * (not f.action) | CONDITIONAL * f.conditional
                if f.conditional:
                    since[b], given[b, : len(f.given)] = f.at, f.given
                    limit[b] = min(request.max_new_tokens, here.stop + f.room if f.room else NEVER)
                if f.unless:
                    unless[b] = [ANY] * (unless.shape[1] - len(f.unless)) + [*f.unless]
            if request.bias:
                behind[b, : len(request.bias.opening) - 1] = request.bias.opening[:-1]
            if sampling.temperature > 0:
                uniform[b, : request.max_new_tokens] = uniforms(request.seed, request.max_new_tokens)
        here = slice(first, first + B)
        self.position[here] = torch.tensor([len(c) - 1 for c in contexts])
        self.budget[here] = torch.tensor([r.max_new_tokens for r in requests])
        for buffer, values in (
            (self.stop, stop), (self.kind, kind), (self.force, force), (self.force_logq, logq), (self.uniform, uniform),
            (self.trigger, trigger), (self.tail, tail), (self.tail_logq, tail_logq),
            (self.since, since), (self.limit, limit),
            (self.given, given), (self.unless, unless), (self.biased_behind, behind),
        ):  # fmt: skip
            buffer[here] = torch.from_numpy(values)
        biases = [r.bias or Bias((0,), 0.0) for r in requests]
        self.bias[here] = torch.tensor([b.amount for b in biases])
        self.biased[here] = torch.tensor([b.opening[-1] for b in biases])
        self.biased_at[here] = torch.tensor([len(b.opening) - 1 for b in biases])
        self.tail_length[here], self.tail_action[here] = torch.from_numpy(about).T
        self.count[here], self.fired[here] = 0, NEVER
        self.done[here] = self.stopped[here] = self.closed[here] = False

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows onto free ones (compaction)."""
        for buffer in self.all:
            buffer[target] = buffer[source]

    def fit(self, shape: Shape) -> bool:
        """Return whether there is room for such responses."""
        return all(need <= room for need, room in zip(shape, self.shape))

    def clear(self, first: int, last: int) -> None:
        """Make rows first .. last-1 finished ones: a batch that is padded with them runs them to no effect."""
        self.done[first:last] = True
        self.position[first:last] = 0

    def save(self, row: int, n: int) -> Saved:
        """Read back what a row needs to go on later: its n tokens. Its random stream is a function of its seed."""
        said = (buffer[row, :n].cpu().clone() for buffer in self.outputs)
        return Saved(*said, bool(self.closed[row]), int(self.fired[row]), int(self.budget[row]))

    def restore(self, row: int, saved: Saved) -> None:
        """Go on with a row that was admitted anew and whose tokens, but for the last, are in the cache."""
        n = len(saved.token)
        said = (saved.token, saved.logprob, saved.action, saved.forced)
        for buffer, values in zip(self.outputs, said):
            buffer[row, :n] = values.to(buffer.device)
        self.token[row], self.count[row], self.closed[row] = saved.token[-1].item(), n, saved.closed
        self.fired[row], self.budget[row] = saved.fired, saved.budget
        self.position[row] += n  # from the last token of the context to the last token said

    def begins(self, here: slice, pattern: torch.Tensor) -> torch.Tensor:
        """Return [B] bool: whether rows begin with the tokens of a pattern [S, K], which they are long enough for."""
        said = self.out_token[here, : pattern.shape[1]]
        return ((said == pattern[here]) | (pattern[here] == ANY)).all(1)

    def advance(self, first: int, logits: torch.Tensor, sampling: Sampling) -> None:
        """Take one token for each of the rows first, first + 1 ... from logits [B, V].

        Tensors in, tensors out, nothing read back. The rows lie side by side, so all buffers are used through views.
        """
        here = slice(first, first + len(logits))
        count, done = self.count[here], self.done[here]
        column = count.masked_fill(done, self.max_new_tokens).unsqueeze(1)  # finished rows write the spare column
        if self.shape.opening:
            now = (count == self.biased_at[here]) & self.begins(here, self.biased_behind)
            logits.scatter_add_(1, self.biased[here].unsqueeze(1), (self.bias[here] * now).unsqueeze(1))
        token, logprob = sample(logits, self.uniform[here].gather(1, column).squeeze(1), sampling)

        kind, force, logq = (x[here].gather(1, column).squeeze(1) for x in (self.kind, self.force, self.force_logq))
        free = self.closed[here] | ~self.begins(here, self.given)
        forced = (kind != FREE) & ~((kind & CONDITIONAL != 0) & free)
        silent = forced & (kind & SILENT != 0)
        budget = self.budget[here]
        budget.copy_(torch.where(forced & (count == self.since[here]) & ~done, self.limit[here], budget))
        token, logprob = torch.where(forced, force.long(), token), torch.where(forced, logq, logprob)
        if self.shape.tail:
            fired = self.fired[here]
            place = count - fired
            inside = (place >= 0) & (place < self.tail_length[here]) & ~forced
            place = place.clamp(0, self.shape.tail - 1).unsqueeze(1)
            token = torch.where(inside, self.tail[here].gather(1, place).squeeze(1), token)
            logprob = torch.where(inside, self.tail_logq[here].gather(1, place).squeeze(1), logprob)
            silent, forced = silent | (inside & ~self.tail_action[here]), forced | inside
            found = (token.unsqueeze(1) == self.trigger[here]).any(1) & ~forced & ~done & (fired == NEVER)
            fired.copy_(torch.where(found, count + 1, fired))
        stopped = ~forced & (token.unsqueeze(1) == self.stop[here]).any(1)

        for buffer, values in zip(self.outputs, (token, logprob, ~silent, forced)):
            buffer[here].scatter_(1, column, values.unsqueeze(1))
        alive = ~done
        if self.shape.unless:
            place = column + torch.arange(1 - self.shape.unless, 1, device=column.device)  # [B, U] of the newest tokens
            newest = self.out_token[here].gather(1, place.clamp(min=0))
            fits = ((newest == self.unless[here]) & (place >= 0)) | (self.unless[here] == ANY)
            self.closed[here].bitwise_or_(fits.all(1) & alive & (count < self.since[here]))
        last = self.token[here]
        last.copy_(torch.where(done, last, token))
        self.stopped[here].bitwise_or_(stopped & alive)
        self.position[here].add_(alive)
        count.add_(alive)  # a view of the buffer, as `done` is
        done.bitwise_or_(stopped | (count >= budget))


@torch.inference_mode()  # cheaper than no_grad; nothing made inside leaves, only the buffers change
def decode_step(decoder: Decoder, kv_cache, rows: BatchState, n: int, columns: int, sampling: Sampling) -> None:
    """One token for the rows 0 .. n-1, whose positions all lie below `columns`: forward, sample, book-keeping.

    The whole step is a function of static buffers with shapes fixed by (n, columns): what a CUDA graph captures. Over
    pages the shapes follow from n alone.
    """
    token, position = rows.token[:n], rows.position[:n]
    if kv_cache.table is None:
        logits = decoder.decode(token, position, kv_cache.cache, columns)
    else:
        logits = decoder.decode_paged(token, position, kv_cache.cache, kv_cache.table[:n])
    rows.advance(0, logits, sampling)
