"""The rollout loop: continuous batching over cache rows, requests in, completions out as they finish.

One pass of the loop: fill free rows from the queue (longest budget first, so that the long answers do not start last),
decode one token for every live row, hand out what ended, and close the gaps so that live rows are always 0 .. n-1.
A prompt is run once and its keys and values are copied to every sample of it. Rows never depend on each other: each has
its own random stream, so a response is the same whatever else is in the batch.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout.decoder import Decoder
from adaptive_reasoning.rollout.request import Completion, Request
from adaptive_reasoning.rollout.rows import Rows, decode_step
from adaptive_reasoning.rollout.sampler import Sampling

COLUMN_STEP = 32  # the cache is read in multiples of this many columns, so that few shapes occur


@dataclass
class Prompt:
    """A prompt that was run: shared by all samples of it until the last one has a row."""

    kv: torch.Tensor  # [L, 2k, P, D]
    logits: torch.Tensor  # [V] fp32 after its last token
    waiting: int  # samples that still need it


class Engine:
    """Generates responses with a `Decoder`.

    Args:
        decoder: the weights to sample from; `refresh` replaces them after every optimiser step.
        max_rows: most rows that decode side by side.
        cache_bytes: memory the row cache may take. Rows are given up before this is exceeded.
        prefill_tokens: most prompt tokens (padding included) of one prefill pass.
        sync_every: look for finished rows every so many steps. 1 on the CPU; more where a look stalls a device.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_rows: int = 256,
        cache_bytes: int = 4 << 30,
        prefill_tokens: int = 8192,
        sync_every: int = 1,
    ):
        self.decoder, self.max_rows, self.cache_bytes = decoder, max_rows, cache_bytes
        self.prefill_tokens, self.sync_every = prefill_tokens, sync_every
        self.cache: torch.Tensor | None = None
        self.stats: dict[str, float] = {}

    def refresh(self, weights) -> None:
        """Replace the weights in place by (name, tensor) pairs, e.g. `learner.named_weights()`."""
        self.decoder.load(weights)

    def run(
        self,
        requests: list[Request],
        sampling: Sampling,
        on_finish: Callable[[int, Completion], None] | None = None,
        progress: str = "",
    ) -> list[Completion]:
        """Generate all requests and return their completions in the order of the requests.

        Args:
            on_finish: called with (index, completion) as each response ends, while the others still decode.
            progress: title of a progress bar in tokens; empty for none.
        """
        done: list[Completion | None] = [None] * len(requests)
        for i, completion in self.stream(requests, sampling, progress):
            done[i] = completion
            if on_finish is not None:
                on_finish(i, completion)
        return done

    @torch.no_grad()
    def first_logprobs(self, prompts: list[list[int]], token: int, temperature: float) -> torch.Tensor:
        """Return log pi(token | prompt) [B] fp32 of a first token, at a temperature: one prefill, nothing sampled."""
        self.decoder.reserve_positions(max(map(len, prompts)))
        out = torch.empty(len(prompts))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        while order:
            width = len(prompts[order[-1]])
            take = max(1, self.prefill_tokens // width)
            batch, order = order[-take:], order[:-take]
            logits, _ = self.decoder.prefill(*self._padded([prompts[i] for i in batch]))
            out[batch] = (logits / temperature).log_softmax(-1)[:, token].cpu()
        return out

    def _padded(self, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token rows as one right-padded tensor [B, n], and their lengths [B]."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = torch.tensor(row)
        return tokens.to(self.decoder.device), torch.tensor([len(row) for row in rows], device=self.decoder.device)

    @torch.no_grad()
    def stream(
        self, requests: list[Request], sampling: Sampling, progress: str = ""
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) in the order in which responses end."""
        if not requests:
            return
        started = time.perf_counter()
        contexts = [self._context(r) for r in requests]
        longest = max(len(c) + r.max_new_tokens for c, r in zip(contexts, requests))
        S = self._rows_for(longest, len(requests))
        rows = Rows(
            S,
            max(r.max_new_tokens for r in requests),
            max(len(r.stop_ids) for r in requests),
            self.decoder.device,
        )
        self.decoder.reserve_positions(longest)
        prompts: dict[tuple[int, ...], Prompt] = {}
        queue = sorted(range(len(requests)), key=lambda i: requests[i].max_new_tokens)  # popped from the end
        live: list[int] = []  # request index of row 0, 1, ...
        born: list[int] = []  # context length of row 0, 1, ... minus the step of its admission: born + step = length
        tokens = row_steps = step = 0
        show = None if progress else True  # tqdm's None: only on a terminal
        bar = tqdm(total=None, desc=progress, unit=" tok", unit_scale=True, leave=False, disable=show)

        while queue or live:
            free = S - len(live)
            if queue and (not live or free >= min(len(queue), max(1, S // 8))):
                admitted = [queue.pop() for _ in range(min(free, len(queue)))]
                self._reserve(S, max(len(contexts[i]) for i in admitted), longest)
                self._admit(admitted, requests, contexts, queue, rows, len(live), prompts, sampling)
                live += admitted
                born += [len(contexts[i]) - step for i in admitted]
                bar.update(len(admitted))
            else:
                for _ in range(self.sync_every):
                    columns = self._columns(max(born) + step + 1, longest)
                    self._reserve(S, columns, longest)
                    decode_step(self.decoder, self.cache, rows, len(live), columns, sampling)
                    step += 1
                row_steps += len(live) * self.sync_every
                bar.update(len(live) * self.sync_every)

            finished = rows.done[: len(live)].nonzero().flatten().tolist()
            for row in finished:
                i = live[row]
                completion = self._complete(requests[i], contexts[i], rows, row)
                tokens += len(completion.response_ids)
                yield i, completion
            if finished:
                self._compact(rows, live, born, step, finished)
        bar.close()
        seconds = time.perf_counter() - started
        self.stats = {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "steps": step,
            "rows_mean": row_steps / max(step, 1),
        }

    # ------------------------------------------------------------------------------------------------- memory

    def _rows_for(self, longest: int, wanted: int) -> int:
        """Return how many rows of `longest` tokens fit into the cache memory; drop a cache of another shape."""
        per_row = longest * self.decoder.cache_bytes_per_token()
        fitting = self.cache_bytes // per_row
        if fitting < 1:
            raise UserError(
                f"one response of {longest} tokens (prompt included) needs {per_row / 2**30:.2f} GiB of cache, only "
                f"{self.cache_bytes / 2**30:.2f} GiB are set aside. Lower max_new_tokens, or raise the cache memory."
            )
        rows = min(self.max_rows, wanted, fitting)
        if self.cache is not None and (self.cache.shape[1] < rows or self.cache.nbytes > self.cache_bytes):
            self.cache = None
        return rows

    @staticmethod
    def _columns(needed: int, longest: int) -> int:
        return min(-(-needed // COLUMN_STEP) * COLUMN_STEP, longest)

    def _reserve(self, rows: int, columns: int, longest: int) -> None:
        """Make the cache at least `columns` wide. It doubles: most responses end far below the longest possible one."""
        old = self.cache
        if old is None:
            self.cache = self.decoder.new_cache(rows, self._columns(2 * columns, longest))
        elif old.shape[3] < columns:
            rows = min(rows, old.shape[1])
            self.cache = self.decoder.new_cache(rows, self._columns(2 * columns, longest))
            self.cache[:, :, :, : old.shape[3]] = old[:, :rows]

    # ------------------------------------------------------------------------------------------------- rows

    def _context(self, request: Request) -> list[int]:
        request.check(self.decoder.vocab)
        before = request.continues
        if before is None:
            return list(request.prompt_ids)
        return before.context_ids + before.response_ids.tolist() + list(request.prompt_ids)

    def _admit(self, admitted, requests, contexts, queue, rows, first, prompts, sampling) -> None:
        """Give rows first, first + 1, ... to `admitted`: fill the cache with their context and take the first token."""
        fresh = [i for i in admitted if requests[i].continues is None]
        self._run_prompts(fresh, requests, contexts, queue, prompts)
        rows.admit(first, [requests[i] for i in admitted], [contexts[i] for i in admitted], sampling)
        logits = torch.empty(len(admitted), self.decoder.vocab, device=self.decoder.device)

        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for offset, i in enumerate(admitted):
            if requests[i].continues is None:
                by_prompt.setdefault(tuple(contexts[i]), []).append(offset)
        for key, offsets in by_prompt.items():
            prompt = prompts[key]
            self.cache[:, [first + o for o in offsets], :, : len(key)] = prompt.kv.unsqueeze(1)
            logits[offsets] = prompt.logits
            prompt.waiting -= len(offsets)
            if prompt.waiting == 0:
                del prompts[key]

        turns = [(o, i) for o, i in enumerate(admitted) if requests[i].continues is not None]
        if turns:
            self._extend(turns, requests, contexts, first, logits)

        for offset, i in enumerate(admitted):
            if requests[i].allowed_first and not requests[i].forced:
                allowed = torch.full_like(logits[offset], float("-inf"))
                allowed[list(requests[i].allowed_first)] = 0
                logits[offset] += allowed
        rows.advance(torch.arange(first, first + len(admitted), device=logits.device), logits, sampling)

    def _run_prompts(self, fresh, requests, contexts, queue, prompts) -> None:
        """Run every prompt of `fresh` that has not been run, and as many of those still queued as fill the pass."""
        wanted = dict.fromkeys(tuple(contexts[i]) for i in fresh)
        missing = [key for key in wanted if key not in prompts]
        if not missing:
            return
        counts: dict[tuple[int, ...], int] = {}
        for i in [*fresh, *reversed(queue)]:
            if requests[i].continues is None:
                key = tuple(contexts[i])
                counts[key] = counts.get(key, 0) + 1
        ahead = [key for key in counts if key not in prompts and key not in wanted]
        room = self.prefill_tokens - sum(map(len, missing))
        for key in ahead:
            room -= len(key)
            if room < 0:
                break
            missing.append(key)
        missing.sort(key=len)
        while missing:
            batch = [missing.pop()]  # the longest sets the width of the pass
            width = len(batch[0])
            while missing and (len(batch) + 1) * width <= self.prefill_tokens:
                batch.append(missing.pop())
            logits, kv = self.decoder.prefill(*self._padded(batch))
            for b, key in enumerate(batch):
                prompts[key] = Prompt(kv[:, b, :, : len(key)], logits[b], counts[key])

    def _extend(self, turns, requests, contexts, first, logits) -> None:
        """Put kept keys and values back into rows and run the new tokens of each dialogue behind them."""
        kept = [requests[i].continues.cache for _, i in turns]
        start = [cache.shape[2] for cache in kept]
        new = [contexts[i][s:] for (_, i), s in zip(turns, start)]
        width = max(map(len, new))
        past = self.decoder.new_cache(len(turns), max(start) + width)
        for b, cache in enumerate(kept):
            past[:, b, :, : start[b]] = cache
        out, past = self.decoder.extend(*self._padded(new), torch.tensor(start, device=past.device), past)
        for b, (offset, i) in enumerate(turns):
            n = len(contexts[i])
            self.cache[:, first + offset, :, :n] = past[:, b, :, :n]
            logits[offset] = out[b]

    def _complete(self, request: Request, context: list[int], rows: Rows, row: int) -> Completion:
        """Read a finished row back."""
        n = int(rows.count[row])
        action = rows.out_action[row, :n].cpu().clone()
        logprobs = rows.out_logprob[row, :n].cpu().clone()
        logprobs.masked_fill_(~action, 0.0)
        for t, (_, q) in enumerate(request.forced):
            logprobs[t] = torch.tensor(q).log()
        assert bool(logprobs.isfinite().all()), f"non-finite log-prob in a response to {context[-8:]}"
        return Completion(
            request,
            context,
            rows.out_token[row, :n].cpu().clone(),
            logprobs,
            action,
            "stop" if bool(rows.stopped[row]) else "length",
            # The last token was never fed back, so its keys and values do not exist yet: the next turn runs it first.
            self.cache[:, row, :, : len(context) + n - 1].clone() if request.keep else None,
        )

    def _compact(self, rows: Rows, live: list[int], born: list[int], step: int, finished: list[int]) -> None:
        """Move the last live rows into the gaps that `finished` rows leave, so that live rows are 0 .. n-1 again."""
        gone = set(finished)
        n = len(live) - len(finished)
        gaps = [row for row in finished if row < n]
        movers = [row for row in range(n, len(live)) if row not in gone]
        if gaps:
            used = max(born[row] for row in movers) + step
            self.cache[:, gaps, :, :used] = self.cache[:, movers, :, :used]
            rows.move(movers, gaps)
            for gap, mover in zip(gaps, movers):
                live[gap], born[gap] = live[mover], born[mover]
        del live[n:], born[n:]
