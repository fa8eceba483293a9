"""Rows: the static buffers of all responses that decode side by side, and the step that moves them on by one token."""

from dataclasses import dataclass

import numpy as np
import torch

from adaptive_reasoning.rollout.decoder import Decoder
from adaptive_reasoning.rollout.request import Request
from adaptive_reasoning.rollout.sampler import Sampling, sample, uniforms

FREE = -1  # in `force`: this position is sampled


@dataclass(frozen=True)
class Saved:
    """What a preempted row had said, on the host. n tokens."""

    token: torch.Tensor  # [n] int64
    logprob: torch.Tensor  # [n] fp32
    action: torch.Tensor  # [n] bool
    closed: bool


class Rows:
    """Buffers over S rows. Live rows are 0 .. n-1; a response of row r has `count[r]` tokens so far.

    Everything a decode step needs is a tensor here, so that a step neither asks the host nor tells it anything:
    forced tokens, the budget closer, stop ids and random numbers are looked up by (row, count).
    """

    def __init__(self, rows: int, max_new_tokens: int, num_stop: int, device: torch.device):
        def new(*shape, dtype=torch.int64, value=0):
            return torch.full(shape, value, dtype=dtype, device=device)

        S, N = rows, max_new_tokens
        self.max_new_tokens = N
        self.token = new(S)  # last token, not yet in the cache
        self.position = new(S)  # where that token goes in the cache
        self.count = new(S)
        self.budget = new(S)
        self.done = new(S, dtype=torch.bool, value=True)
        self.stopped = new(S, dtype=torch.bool)
        self.stop = new(S, max(num_stop, 1), value=-1)
        self.closer_at = new(S, value=N + 1)
        self.closer_unless = new(S, value=-1)
        self.closed = new(S, dtype=torch.bool)
        # One column more than needed: finished rows write there until they are read back.
        self.force = new(S, N + 1, dtype=torch.int32, value=FREE)
        self.uniform = new(S, N + 1, dtype=torch.float32)
        self.out_token = new(S, N + 1)
        self.out_logprob = new(S, N + 1, dtype=torch.float32)
        self.out_action = new(S, N + 1, dtype=torch.bool)
        self.all = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]

    def admit(self, first: int, requests: list[Request], contexts: list[list[int]], sampling: Sampling) -> None:
        """Set the free rows first, first + 1, ... up for `requests`, whose contexts are all in the cache."""
        B, N = len(requests), self.max_new_tokens
        stop = np.full((B, self.stop.shape[1]), -1)
        force = np.full((B, N + 1), FREE, dtype=np.int32)
        uniform = np.zeros((B, N + 1), dtype=np.float32)
        closer = np.tile([N + 1, -1], (B, 1))  # position, and the token that makes it unnecessary
        for b, request in enumerate(requests):
            stop[b, : len(request.stop_ids)] = request.stop_ids
            force[b, : len(request.forced)] = [token for token, _ in request.forced]
            if request.closer is not None and request.closer.at < request.max_new_tokens:
                at, ids = request.closer.at, request.closer.ids
                closer[b] = at, request.closer.unless
                force[b, at : at + len(ids)] = ids
            if sampling.temperature > 0:
                uniform[b, : request.max_new_tokens] = uniforms(request.seed, request.max_new_tokens)
        here = slice(first, first + B)
        self.position[here] = torch.tensor([len(c) - 1 for c in contexts])
        self.budget[here] = torch.tensor([r.max_new_tokens for r in requests])
        self.stop[here], self.force[here] = torch.from_numpy(stop), torch.from_numpy(force)
        self.uniform[here] = torch.from_numpy(uniform)
        self.closer_at[here], self.closer_unless[here] = torch.from_numpy(closer).T
        self.count[here] = 0
        self.done[here] = self.stopped[here] = self.closed[here] = False

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows onto free ones (compaction)."""
        for buffer in self.all:
            buffer[target] = buffer[source]

    def fit(self, max_new_tokens: int, num_stop: int) -> bool:
        """Return whether there is room for such responses."""
        return max_new_tokens <= self.max_new_tokens and num_stop <= self.stop.shape[1]

    def clear(self, first: int, last: int) -> None:
        """Make rows first .. last-1 finished ones: a batch that is padded with them runs them to no effect."""
        self.done[first:last] = True
        self.position[first:last] = 0

    def save(self, row: int, n: int) -> Saved:
        """Read back what a row needs to go on later: its n tokens. Its random stream is a function of its seed."""
        said = (buffer[row, :n].cpu().clone() for buffer in (self.out_token, self.out_logprob, self.out_action))
        return Saved(*said, bool(self.closed[row]))

    def restore(self, row: int, saved: Saved) -> None:
        """Go on with a row that was admitted anew and whose tokens, but for the last, are in the cache."""
        n = len(saved.token)
        self.out_token[row, :n] = saved.token.to(self.token.device)
        self.out_logprob[row, :n] = saved.logprob.to(self.token.device)
        self.out_action[row, :n] = saved.action.to(self.token.device)
        self.token[row], self.count[row], self.closed[row] = saved.token[-1].item(), n, saved.closed
        self.position[row] += n  # from the last token of the context to the last token said

    def advance(self, first: int, logits: torch.Tensor, sampling: Sampling) -> None:
        """Take one token for each of the rows first, first + 1 ... from logits [B, V].

        Tensors in, tensors out, nothing read back. The rows lie side by side, so all buffers are used through views.
        """
        here = slice(first, first + len(logits))
        count, done = self.count[here], self.done[here]
        column = count.masked_fill(done, self.max_new_tokens).unsqueeze(1)  # finished rows write the spare column
        token, logprob = sample(logits, self.uniform[here].gather(1, column).squeeze(1), sampling)

        force = self.force[here].gather(1, column).squeeze(1).long()
        closing = count >= self.closer_at[here]
        forced = (force != FREE) & ~(closing & self.closed[here])
        token = torch.where(forced, force, token)
        stopped = ~forced & (token.unsqueeze(1) == self.stop[here]).any(1)

        self.out_token[here].scatter_(1, column, token.unsqueeze(1))
        self.out_logprob[here].scatter_(1, column, logprob.unsqueeze(1))
        self.out_action[here].scatter_(1, column, ~(forced & closing).unsqueeze(1))
        alive = ~done
        self.closed[here].bitwise_or_((token == self.closer_unless[here]) & alive & ~closing)
        last = self.token[here]
        last.copy_(torch.where(done, last, token))
        self.stopped[here].bitwise_or_(stopped & alive)
        self.position[here].add_(alive)
        count.add_(alive)  # a view of the buffer, as `done` is
        done.bitwise_or_(stopped | (count >= self.budget[here]))


@torch.inference_mode()  # cheaper than no_grad; nothing made inside leaves, only the buffers change
def decode_step(decoder: Decoder, arena, rows: Rows, n: int, columns: int, sampling: Sampling) -> None:
    """One token for the rows 0 .. n-1, whose positions all lie below `columns`: forward, sample, book-keeping.

    The whole step is a function of static buffers with shapes fixed by (n, columns): what a CUDA graph captures. Over
    pages the shapes follow from n alone.
    """
    token, position = rows.token[:n], rows.position[:n]
    if arena.table is None:
        logits = decoder.decode(token, position, arena.cache, columns)
    else:
        logits = decoder.decode_paged(token, position, arena.cache, arena.table[:n])
    rows.advance(0, logits, sampling)
