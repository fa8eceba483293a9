"""Rows: the static buffers of all responses that decode side by side, and the step that moves them on by one token."""

import numpy as np
import torch

from adaptive_reasoning.rollout.decoder import Decoder
from adaptive_reasoning.rollout.request import Request
from adaptive_reasoning.rollout.sampler import Sampling, sample, uniforms

FREE = -1  # in `force`: this position is sampled


class Rows:
    """Buffers over S rows. Live rows are 0 .. n-1; a response of row r has `count[r]` tokens so far.

    Everything a decode step needs is a tensor here, so that a step neither asks the host nor tells it anything:
    forced tokens, the budget closer, stop ids and random numbers are looked up by (row, count).
    """

    def __init__(self, rows: int, max_new_tokens: int, num_stop: int, device: torch.device):
        def new(*shape, dtype=torch.int64, value=0):
            return torch.full(shape, value, dtype=dtype, device=device)

        S, N = rows, max_new_tokens
        self.capacity, self.max_new_tokens = S, N
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

    def advance(self, rows: torch.Tensor, logits: torch.Tensor, sampling: Sampling) -> None:
        """Take one token for each of `rows` [B] from logits [B, V]. Tensors in, tensors out, nothing read back."""
        count, done = self.count[rows], self.done[rows]
        column = torch.where(done, self.max_new_tokens, count)  # a finished row writes into the spare column
        token, logprob = sample(logits, self.uniform[rows, column], sampling)

        force = self.force[rows, column].long()
        closing = count >= self.closer_at[rows]
        forced = (force != FREE) & ~(closing & self.closed[rows])
        token = torch.where(forced, force, token)
        stopped = ~forced & (token.unsqueeze(1) == self.stop[rows]).any(1)

        self.out_token[rows, column] = token
        self.out_logprob[rows, column] = logprob
        self.out_action[rows, column] = ~(forced & closing)
        alive = ~done
        self.closed[rows] |= (token == self.closer_unless[rows]) & alive & ~closing
        self.token[rows] = torch.where(done, self.token[rows], token)
        self.position[rows] += alive
        self.count[rows] += alive
        self.stopped[rows] |= stopped & alive
        self.done[rows] |= alive & (stopped | (count + 1 >= self.budget[rows]))


@torch.inference_mode()  # cheaper than no_grad; nothing made inside leaves, only the buffers change
def decode_step(decoder: Decoder, cache: torch.Tensor, rows: Rows, n: int, columns: int, sampling: Sampling) -> None:
    """One token for the rows 0 .. n-1, whose positions all lie below `columns`: forward, sample, book-keeping.

    The whole step is a function of static buffers with shapes fixed by (n, columns): what a CUDA graph captures.
    """
    logits = decoder.decode(rows.token[:n], rows.position[:n], cache, columns)
    rows.advance(torch.arange(n, device=logits.device), logits, sampling)
