"""The rollout loop: continuous batching over cache rows, requests in, completions out as they finish.

One pass of the loop: fill free rows from the queue (longest budget first, so that the long answers do not start last),
decode one token for every live row, hand out what ended, and close the gaps so that live rows are always 0 .. n-1.
A prompt is run once for all samples of it. Rows never depend on each other: each has its own random stream, so a
response is the same whatever else is in the batch.

On CUDA rows are lists of pages (`kv_cache.py`), admitted by the pages they need now and not by the longest response
possible. Where pages run out, the row that has said least gives its own back and waits with what it has said; later its
prompt and response are run again as a prompt, and it goes on. The decode step is replayed from a graph (`graphs.py`).
"""

import time
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from adaptive_reasoning.rollout.batch_state import BatchState, Shape, decode_step
from adaptive_reasoning.rollout.decoder import Decoder, varlen_attention
from adaptive_reasoning.rollout.graphs import Graphs, buckets
from adaptive_reasoning.rollout.kv_cache import Pages, Slots
from adaptive_reasoning.rollout.request import Completion, Request
from adaptive_reasoning.rollout.sampler import Sampling
from adaptive_reasoning.rollout.scheduler import Prompt, SchedulerState, Sequence

CPU_CACHE_BYTES = 4 << 30
CUDA_SYNC_EVERY = 8
PAGE = 64  # columns of a page on CUDA: as many as a block of the attention kernel
FIXED_WIDTH = (
    64  # pages; a page table this wide gives the attention kernel its largest number of parts, whatever is run
)


class Engine:
    """Generates responses with a `Decoder`.

    Args:
        decoder: the weights to sample from; `refresh` replaces them after every optimiser step.
        max_rows: most rows that decode side by side.
        cache_bytes: memory the cache of keys and values may take; rows wait or are preempted before it is exceeded.
            None: 4 GiB on the CPU; on CUDA what a warm-up leaves free, less a tenth.
        prefill_tokens: most prompt tokens (padding included) of one prefill pass.
        sync_every: look for finished rows every so many steps. None: 1 on the CPU; 8 on CUDA, which a look stalls.
        page: columns of a page, 0 for contiguous rows. None: pages of 64 on CUDA, contiguous rows elsewhere.
        graphs: None: CUDA graphs where there is CUDA and pages. True or False, or a `Graphs`, to say so.
        batch_invariant: for debugging: every step runs `max_rows` rows and every prompt is run alone, so the sums of a
            row are taken in the same order whatever else is in the batch, and bf16 log-probs of a request are the same
            bit for bit alone and in company. Costs the speed of a full batch at every step, however few rows live.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_rows: int = 256,
        cache_bytes: int | None = None,
        prefill_tokens: int = 8192,
        sync_every: int | None = None,
        page: int | None = None,
        graphs: bool | Graphs | None = None,
        batch_invariant: bool = False,
    ):
        cuda = decoder.device.type == "cuda"
        if cache_bytes is None and not cuda:
            cache_bytes = CPU_CACHE_BYTES
        if sync_every is None:
            sync_every = CUDA_SYNC_EVERY if cuda else 1
        if page is None:
            page = PAGE if cuda or batch_invariant else 0
        if graphs is None:
            graphs = cuda and page > 0
        assert page or not (graphs or batch_invariant), "graphs and batch invariance need pages"
        self.decoder, self.max_rows, self.batch_invariant = decoder, max_rows, batch_invariant
        self.prefill_tokens, self.sync_every = 1 if batch_invariant else prefill_tokens, sync_every
        width = FIXED_WIDTH if batch_invariant else 1
        self.kv_cache = Pages(decoder, cache_bytes, page, width) if page else Slots(decoder, cache_bytes)
        self.graphs = Graphs() if graphs is True else graphs or None
        self.rows: BatchState | None = None
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
            logits, _ = self._prefill([prompts[i] for i in batch])
            out[batch] = (logits / temperature).log_softmax(-1)[:, token].cpu()
        return out

    @torch.no_grad()
    def stream(
        self,
        requests: list[Request],
        sampling: Sampling,
        progress: str = "",
        on_step: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) in the order in which responses end.

        One stream of an engine at a time; starting another one ends it.

        Args:
            on_step: called with (index, response ids so far [n] int64) of every live row, each `sync_every` steps.
        """
        if not requests:
            return
        started = time.perf_counter()
        run = self._open(requests, sampling)
        rows, tokens, row_steps = run.rows, 0, 0
        show = None if progress else True  # tqdm's None: only on a terminal
        bar = tqdm(total=None, desc=progress, unit=" tok", unit_scale=True, leave=False, disable=show)
        while run.queue or run.live:
            sequences = self._next_sequences(run)
            if sequences:
                self._admit(run, sequences)
                bar.update(len(sequences))
            else:
                columns = self._grow(run)
                n = len(run.live)
                self._decode(run, columns)
                row_steps += n * self.sync_every
                bar.update(n * self.sync_every)

            if on_step is not None:
                for row, seq in enumerate(run.live):
                    on_step(seq.index, rows.out_token[row, : int(rows.count[row])])
            finished = rows.done[: len(run.live)].nonzero().flatten().tolist()
            for row in finished:
                seq = run.live[row]
                completion = self._complete(seq, rows, row)
                tokens += len(completion.response_ids)
                yield seq.index, completion
            if finished:
                self._compact(run, finished)
        bar.close()
        seconds = time.perf_counter() - started
        self.stats = {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "steps": run.step,
            "rows_mean": row_steps / max(run.step, 1),
            "preempted": run.preempted,
        }

    # ------------------------------------------------------------------------------------------------- a run

    def _open(self, requests: list[Request], sampling: Sampling) -> SchedulerState:
        """Set up buffers for these requests, and graphs where there are graphs."""
        sequences, prompts = [], {}
        for i, request in enumerate(requests):
            request.check(self.decoder.vocab)
            before, context = request.continues, list(request.prompt_ids)
            if before is not None:
                context = before.context_ids + before.response_ids.tolist() + context
            key = -1 - i if before is not None else prompts.setdefault(tuple(context), len(prompts))
            sequences.append(Sequence(i, request, context, key, context))
        longest = max(seq.total for seq in sequences)
        if self.kv_cache.cache_bytes is None:
            self.kv_cache.cache_bytes = measured_bytes(self.decoder, self.max_rows, self.prefill_tokens)
        size = self.kv_cache.open(self.max_rows, len(sequences), longest)
        self.decoder.reserve_positions(longest)
        need = Shape.of(requests)
        paged = self.kv_cache.table is not None
        if not paged:
            self.rows = BatchState(size, need, self.decoder.device)
        elif self.rows is None or not self.rows.fit(need):  # else kept where they are, for the graphs
            there = self.rows.shape if self.rows else [0] * len(need)
            self.rows = BatchState(self.max_rows, Shape(*map(max, need, there)), self.decoder.device)
        else:
            self.rows.clear(0, self.max_rows)
        if self.graphs is not None:
            columns = self.kv_cache.table.shape[1] * self.kv_cache.page
            self.graphs.prepare(
                [self.decoder.angles, self.kv_cache.cache, self.kv_cache.table, self.rows],
                sampling,
                self._sizes(size),
                lambda n: decode_step(self.decoder, self.kv_cache, self.rows, n, columns, sampling),
            )
        queue = sorted(sequences, key=lambda seq: seq.request.max_new_tokens)
        return SchedulerState(self.rows, size, queue, sampling)

    def _sizes(self, rows: int) -> list[int]:
        """Return the batch sizes that up to `rows` live rows can need."""
        sizes = [self.max_rows] if self.batch_invariant else buckets(self.max_rows)
        return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < rows]

    def _decode(self, run: SchedulerState, columns: int) -> None:
        """Take `sync_every` steps. Rows that end on the way go on to no effect."""
        n = len(run.live)
        if self.graphs is not None or self.batch_invariant:
            n = self._sizes(n)[-1]
        for _ in range(self.sync_every):
            if self.graphs is not None:
                self.graphs.replay(run.sampling, n)
            else:
                decode_step(self.decoder, self.kv_cache, run.rows, n, columns, run.sampling)
        run.step += self.sync_every

    # ------------------------------------------------------------------------------------------------- memory

    def _next_sequences(self, run: SchedulerState) -> list[Sequence]:
        """Take from the queue what can have a row now; nothing while there are only few free rows."""
        live = len(run.live)
        free = run.size - live
        if not run.queue or (live and free < min(len(run.queue), self.kv_cache.enough(live))):
            return []
        asked = run.queue[: -free - 1 : -1]  # from the end
        number = self.kv_cache.fitting(asked, live, run.prompts)
        if not number and not live:  # prompts that wait for their samples are in the way of all of them
            for key in [key for key in run.prompts if key != asked[0].key]:
                self.kv_cache.drop(run.prompts.pop(key).held)
            number = 1
        del run.queue[len(run.queue) - number :]
        return asked[:number]

    def _grow(self, run: SchedulerState) -> int:
        """Make room for the next steps of all live rows; return how many columns they read.

        Where room runs out, prompts give theirs back first, which only costs their prefill; then the row that has said
        least, and of those the one admitted last. The row that has said most always goes on.
        """
        while (columns := self.kv_cache.grow(run.born, run.step + self.sync_every, run.live)) is None:
            if run.prompts:
                self.kv_cache.drop(run.prompts.popitem()[1].held)
                continue
            assert len(run.live) > 1, "one row of any length has room"
            said = [born + run.step - len(seq.context) for born, seq in zip(run.born, run.live)]
            row = min(range(len(said)), key=lambda r: (said[r], -r))
            seq = run.live[row]
            seq.saved = run.rows.save(row, said[row] + 1)
            seq.prefix = seq.context + seq.saved.token[:-1].tolist()
            seq.key = -1 - seq.index
            run.queue.append(seq)
            run.preempted += 1
            self._compact(run, [row])
        return columns

    def _compact(self, run: SchedulerState, finished: list[int]) -> None:
        """Move the last live rows into the gaps that `finished` rows leave, so that live rows are 0 .. n-1 again."""
        live, born, gone = run.live, run.born, set(finished)
        before, n = len(live), len(live) - len(finished)
        gaps = [row for row in finished if row < n]
        movers = [row for row in range(n, before) if row not in gone]
        if gaps:
            self.kv_cache.move(movers, gaps, max(born[row] for row in movers) + run.step)
            run.rows.move(movers, gaps)
            for gap, mover in zip(gaps, movers):
                live[gap], born[gap] = live[mover], born[mover]
        del live[n:], born[n:]
        if self.kv_cache.table is not None:
            self.kv_cache.free(n, before)
            run.rows.clear(n, before)

    # ------------------------------------------------------------------------------------------------- rows

    def _admit(self, run: SchedulerState, sequences: list[Sequence]) -> None:
        """Give the next rows to `sequences`: fill the cache with their prefix and take the first token of each.

        Preempted ones come last: they have their next token already.
        """
        sequences = sorted(sequences, key=lambda seq: seq.saved is not None)
        new = [seq for seq in sequences if seq.saved is None]
        first, rows = len(run.live), run.rows
        self._run_prompts(run, [seq for seq in sequences if not seq.turn])
        rows.admit(first, [seq.request for seq in sequences], [seq.context for seq in sequences], run.sampling)
        logits = torch.empty(len(new), self.decoder.vocab, device=self.decoder.device)

        by_prompt: dict[int, list[int]] = {}
        for offset, seq in enumerate(sequences):
            if not seq.turn:
                by_prompt.setdefault(seq.key, []).append(offset)
        for key, offsets in by_prompt.items():
            prompt = run.prompts[key]
            prompt.waiting -= len(offsets)
            last = prompt.waiting == 0 or not self.kv_cache.spare
            self.kv_cache.give([first + o for o in offsets], prompt.held, prompt.tokens, last)
            if offsets[0] < len(new):
                logits[offsets] = prompt.logits
            if last:
                del run.prompts[key]
        self._extend([(o, seq) for o, seq in enumerate(sequences) if seq.turn], first, logits)

        if new:
            rows.advance(first, logits, run.sampling)
        for offset, seq in enumerate(sequences[len(new) :], len(new)):
            rows.restore(first + offset, seq.saved)
            seq.saved = None
        run.live += sequences
        run.born += [len(seq.prefix) - run.step for seq in sequences]

    def _run_prompts(self, run: SchedulerState, sequences: list[Sequence]) -> None:
        """Run every prompt of `sequences` that has not been run, and as many of those still queued as fill the pass."""
        missing = {seq.key: seq for seq in sequences if seq.key not in run.prompts}
        if not missing:
            return
        counts: dict[int, int] = {}
        room = self.prefill_tokens - sum(len(seq.prefix) for seq in missing.values())
        queued = [seq for seq in reversed(run.queue) if not seq.turn and seq.saved is None]
        for seq in [*sequences, *queued]:
            counts[seq.key] = counts.get(seq.key, 0) + 1
        for seq in queued:
            if seq.key not in run.prompts and seq.key not in missing:
                room -= len(seq.prefix)
                if room < 0 or not self.kv_cache.affords(len(seq.prefix)):
                    break
                missing[seq.key] = seq
        left = sorted(missing.values(), key=lambda seq: len(seq.prefix))
        while left:
            batch = [left.pop()]  # the longest sets the width of the pass
            width = len(batch[0].prefix)
            while left and (len(batch) + 1) * width <= self.prefill_tokens:
                batch.append(left.pop())
            logits, entries = self._prefill([seq.prefix for seq in batch])
            for b, (seq, kv) in enumerate(zip(batch, entries)):
                run.prompts[seq.key] = Prompt(self.kv_cache.hold(kv), len(seq.prefix), logits[b], counts[seq.key])

    @property
    def packs_prompts(self) -> bool:
        """Whether flash-attn, where installed, runs the prompts: it takes 16-bit numbers on CUDA."""
        return self.decoder.device.type == "cuda" and self.decoder.dtype.itemsize == 2

    def _prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return logits [B, V] after each prompt and its keys and values [L, 2k, n, D]."""
        attention = varlen_attention() if self.packs_prompts else None
        if attention is not None:
            tokens = torch.tensor([token for prompt in prompts for token in prompt], device=self.decoder.device)
            return self.decoder.prefill_packed(tokens, [len(prompt) for prompt in prompts], attention)
        logits, kv = self.decoder.prefill(*self._padded(prompts))
        return logits, [kv[:, b, :, : len(prompt)] for b, prompt in enumerate(prompts)]

    def _padded(self, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token rows as one right-padded tensor [B, n], and their lengths [B]."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = torch.tensor(row)
        return tokens.to(self.decoder.device), torch.tensor([len(row) for row in rows], device=self.decoder.device)

    def _extend(self, turns: list[tuple[int, Sequence]], first: int, logits: torch.Tensor) -> None:
        """Put kept keys and values back into rows and run the new tokens of each dialogue behind them."""
        turns = sorted(turns, key=lambda turn: len(turn[1].context))
        while turns:
            take = max(1, self.prefill_tokens // len(turns[-1][1].context))  # columns that are gathered at a time
            batch, turns = turns[-take:], turns[:-take]
            kept = [seq.request.continues.cache for _, seq in batch]
            start = [cache.shape[2] for cache in kept]
            new = [seq.context[s:] for (_, seq), s in zip(batch, start)]
            past = self.decoder.new_cache(len(batch), max(start) + max(map(len, new)))
            for b, cache in enumerate(kept):
                past[:, b, :, : start[b]] = cache
            out, past = self.decoder.extend(*self._padded(new), torch.tensor(start, device=past.device), past)
            for b, (offset, seq) in enumerate(batch):
                self.kv_cache.put(first + offset, past[:, b, :, : len(seq.context)])
                logits[offset] = out[b]

    def _complete(self, seq: Sequence, rows: BatchState, row: int) -> Completion:
        """Read a finished row back."""
        request, context, n = seq.request, seq.context, int(rows.count[row])
        action = rows.out_action[row, :n].cpu().clone()
        logprobs = rows.out_logprob[row, :n].cpu().clone()
        logprobs.masked_fill_(~action, 0.0)
        assert bool(logprobs.isfinite().all()), f"non-finite log-prob in a response to {context[-8:]}"
        return Completion(
            request,
            context,
            rows.out_token[row, :n].cpu().clone(),
            logprobs,
            action,
            rows.out_forced[row, :n].cpu().clone(),
            "stop" if bool(rows.stopped[row]) else "length",
            # The last token was never fed back, so its keys and values do not exist yet: the next turn runs it first.
            self.kv_cache.read(row, len(context) + n - 1) if request.keep else None,
        )


def measured_bytes(decoder: Decoder, max_rows: int, prefill_tokens: int) -> int:
    """Return how many bytes of a GPU are left for keys and values after a warm-up, less a tenth.

    Twice the peak of a full prefill pass and of the logits of all rows is set aside: a response that is run again may
    be longer than a pass.
    """
    device = decoder.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    decoder.reserve_positions(prefill_tokens)
    ones = torch.ones(1, prefill_tokens, dtype=torch.int64, device=device)
    decoder.prefill(ones, torch.tensor([prefill_tokens], device=device))
    torch.empty(2, max_rows, decoder.vocab, device=device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return int(0.9 * max(0, torch.cuda.mem_get_info(device)[0] - 2 * peak))
