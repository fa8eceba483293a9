"""KV cache: where keys and values of all rows live, and who may write where.

Two kinds with one interface. `Slots`, for the CPU: a row is a contiguous stretch, and attention reads it as it is.
`Pages`, for CUDA: memory is cut once into pages of C columns, a row is a list of pages (a line of the page table), and
it holds only the pages its tokens need. Samples of a group share the full pages of their prompt by count; compaction
moves lines of the table, never keys and values. Page 0 is the trash: whatever a row without an owner writes goes there.

    open(rows, wanted, longest)      start of a run: everything is free again; how many rows there are
    fitting(sequences, live, held)   how many of the sequences can have a row now
    hold(kv) / drop(held)            keep a prompt for its samples / forget it
    give(rows, held, n, last)        put a held prompt of n tokens into rows; the last one takes it over
    put(row, kv) / read(row, n)      write / read keys and values of one row
    grow(born, step, live)           make room for `step` more columns; how many columns to read, None if there is none
    move(source, target, used)       compaction; `free(first, last)` gives back what rows first .. last-1 hold

Legend: L layers, k key/value heads, D head size, S rows, T columns of a slot, P pages of C columns, W pages of a row,
n tokens. kv is [L, 2k, n, D].
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from adaptive_reasoning.errors import UserError
from adaptive_reasoning.rollout.decoder import Decoder

COLUMN_STEP = 32  # slots are read in multiples of this many columns, so that few shapes occur
TRASH = 0  # page


def too_small(longest: int, needed: int, there: int) -> UserError:
    return UserError(
        f"one response of {longest} tokens (prompt included) needs {needed / 2**30:.2f} GiB of cache, only "
        f"{there / 2**30:.2f} GiB are set aside. Lower max_new_tokens, or raise the cache memory."
    )


class Slots:
    """Contiguous rows: `cache` [L, S, 2k, T, D], `table` None. T doubles: most responses end far below the longest."""

    table, spare = None, True

    def __init__(self, decoder: Decoder, cache_bytes: int):
        self.decoder, self.cache_bytes = decoder, cache_bytes
        self.cache: torch.Tensor | None = None

    def open(self, rows: int, wanted: int, longest: int) -> int:
        """Return how many rows of `longest` tokens fit into the memory; drop a cache of another shape."""
        per_row = longest * self.decoder.cache_bytes_per_token()
        fitting = self.cache_bytes // per_row
        if fitting < 1:
            raise too_small(longest, per_row, self.cache_bytes)
        self.rows, self.longest = min(rows, wanted, fitting), longest
        if self.cache is not None and (self.cache.shape[1] < self.rows or self.cache.nbytes > self.cache_bytes):
            self.cache = None
        return self.rows

    def fitting(self, sequences: list, live: int, held: Iterable[int]) -> int:
        return len(sequences)

    def enough(self, live: int) -> int:
        """Return how many rows have to be free before it is worth while to stop decoding and fill them."""
        return max(1, self.rows // 8)

    def affords(self, n: int) -> bool:
        return True

    def hold(self, kv: torch.Tensor) -> torch.Tensor:
        return kv

    def drop(self, held: torch.Tensor) -> None:
        pass

    def give(self, rows: list[int], held: torch.Tensor, n: int, last: bool) -> None:
        self._reserve(n)
        self.cache[:, rows, :, :n] = held.unsqueeze(1)

    def put(self, row: int, kv: torch.Tensor) -> None:
        self._reserve(kv.shape[2])
        self.cache[:, row, :, : kv.shape[2]] = kv

    def read(self, row: int, n: int) -> torch.Tensor:
        return self.cache[:, row, :, :n].clone()

    def grow(self, born: list[int], step: int, live: list) -> int:
        columns = self._columns(max(born) + step)
        self._reserve(columns)
        return columns

    def move(self, source: list[int], target: list[int], used: int) -> None:
        self.cache[:, target, :, :used] = self.cache[:, source, :, :used]

    def free(self, first: int, last: int) -> None:
        pass

    def _columns(self, needed: int) -> int:
        return min(-(-needed // COLUMN_STEP) * COLUMN_STEP, self.longest)

    def _reserve(self, columns: int) -> None:
        old = self.cache
        if old is None:
            self.cache = self.decoder.new_cache(self.rows, self._columns(2 * columns))
        elif old.shape[3] < columns:
            rows = min(self.rows, old.shape[1])
            self.cache = self.decoder.new_cache(rows, self._columns(2 * columns))
            self.cache[:, :, :, : old.shape[3]] = old[:, :rows]


class Shares:
    """Which pages are free and how many share each of the others. Host numbers alone."""

    def __init__(self, pages: int):
        self.count = [0] * pages
        self.count[TRASH] = 1
        self.unused = list(range(pages - 1, TRASH, -1))

    def take(self, n: int) -> list[int]:
        """Return n pages that nobody has."""
        assert n <= len(self.unused), f"{n} pages wanted, {len(self.unused)} are free"
        pages = [self.unused.pop() for _ in range(n)]
        for page in pages:
            self.count[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        for page in pages:
            assert self.count[page] > 0 and page != TRASH, f"page {page} belongs to nobody"
            self.count[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        for page in pages:
            assert self.count[page] > 0 and page != TRASH, f"page {page} was given back before"
            self.count[page] -= 1
            if self.count[page] == 0:
                self.unused.append(page)


class Pages:
    """Rows as lists of pages: `cache` [L, P, 2k, C, D], `table` [S, W] int32 on the device.

    Args:
        page: columns of a page, a power of two; the Triton kernels need 16 or more.
        cache_bytes: memory of the pool. All of it is taken at the first run.
        least_width: fewest pages a line of the table has room for.
    """

    def __init__(self, decoder: Decoder, cache_bytes: int, page: int, least_width: int = 1):
        assert page > 0 and page & (page - 1) == 0, f"a page of {page} columns: a power of two"
        self.decoder, self.cache_bytes, self.page = decoder, cache_bytes, page
        self.least_width, self.left = least_width, 0
        self.cache: torch.Tensor | None = None
        self.table: torch.Tensor | None = None

    def open(self, rows: int, wanted: int, longest: int) -> int:
        """Return how many rows decode side by side at most. Pages of an earlier run that was left are free again.

        The table keeps its place in memory as long as it is large enough, so that graphs that read it stay valid.
        """
        bytes_per_page = self.page * self.decoder.cache_bytes_per_token()
        number = self.cache_bytes // bytes_per_page
        if number - 1 < self.pages_of(longest):
            raise too_small(longest, (self.pages_of(longest) + 1) * bytes_per_page, self.cache_bytes)
        if self.cache is None or self.cache.shape[1] != number:
            self.cache = None  # before its successor is made: there may be no room for both
            self.cache = self.decoder.new_cache(number, self.page)
        self.shares = Shares(number)
        width = max(self.least_width, 1 << (self.pages_of(longest) - 1).bit_length())
        if self.table is None or self.table.shape[0] < rows or self.table.shape[1] < width:
            self.table = torch.full((rows, width), TRASH, dtype=torch.int32, device=self.decoder.device)
        self.host = torch.full(self.table.shape, TRASH, dtype=torch.int32)
        self.owned: list[list[int]] = [[] for _ in range(rows)]
        self.changed, self.rows = True, min(rows, wanted)
        self.upload()
        return self.rows

    def pages_of(self, columns: int) -> int:
        return -(-columns // self.page)

    @property
    def free_pages(self) -> int:
        return len(self.shares.unused)

    @property
    def spare(self) -> bool:
        """Whether there is a page left to copy one to."""
        return self.free_pages > 0

    def upload(self) -> None:
        """Bring the table to the device; once before the steps that read it."""
        if self.changed:
            self.table.copy_(self.host)
            self.changed = False

    # --- admission

    def fitting(self, sequences: list, live: int, held: Iterable[int]) -> int:
        """Return how many of the sequences have room now, one page of growth for each row that lives set aside."""
        left, planned, number = self.free_pages - live, set(held), 0
        for seq in sequences:
            after = left - self._cost(seq, planned) - 1
            if after < 0:
                break
            left, number = after, number + 1
        self.left = max(left, 0) if number else 0
        return number

    def _cost(self, seq, planned: set) -> int:
        """Return how many pages a seq takes that nobody has yet; its prompt is `planned` from now on."""
        tokens = len(seq.prefix)
        cost = self.pages_of(tokens + 1)
        if not seq.turn:  # one more for the copy of the last page, which the prompt itself keeps
            cost += -(tokens // self.page) if seq.key in planned else 1
            planned.add(seq.key)
        return cost

    def enough(self, live: int) -> int:
        """See `Slots.enough`. Where pages are what is short, there are never many free rows to fill at once."""
        return max(1, min(self.rows // 8, live // 4))

    def affords(self, n: int) -> bool:
        """Return whether a prompt of n tokens may be run before one of its samples has a row."""
        pages = self.pages_of(n)
        if pages > self.left // 2:
            return False
        self.left -= pages
        return True

    # --- keys and values

    def _write(self, pages: list[int], kv: torch.Tensor) -> None:
        n = kv.shape[2]
        kv = F.pad(kv, (0, 0, 0, len(pages) * self.page - n))
        self.cache[:, pages] = kv.unflatten(2, (len(pages), self.page)).transpose(1, 2)

    def _assign(self, row: int, pages: list[int]) -> None:
        first = len(self.owned[row])
        self.owned[row] += pages
        self.host[row, first : len(self.owned[row])] = torch.tensor(pages, dtype=torch.int32)
        self.changed = True

    def hold(self, kv: torch.Tensor) -> list[int]:
        pages = self.shares.take(self.pages_of(kv.shape[2]))
        self._write(pages, kv)
        return pages

    def drop(self, held: list[int]) -> None:
        self.shares.release(held)

    def give(self, rows: list[int], held: list[int], n: int, last: bool) -> None:
        """Share the full pages and copy the last one, which each sample goes on to fill."""
        full = n // self.page
        copies = rows[:-1] if last else rows
        fresh = self.shares.take(len(copies)) if full < len(held) else []
        if fresh:
            index = torch.tensor(fresh, device=self.cache.device)
            for layer in self.cache:  # one layer at a time: a copy of all would be as large as the pages
                layer[index] = layer[held[full]].clone()
        for i, row in enumerate(copies):
            self._assign(row, self.shares.share(held[:full]) + fresh[i : i + 1])
        if last:
            self._assign(rows[-1], held)

    def put(self, row: int, kv: torch.Tensor) -> None:
        pages = self.shares.take(self.pages_of(kv.shape[2]))
        self._write(pages, kv)
        self._assign(row, pages)

    def read(self, row: int, n: int) -> torch.Tensor:
        pages = self.owned[row][: self.pages_of(n)]
        return self.cache[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :n].contiguous()

    def grow(self, born: list[int], step: int, live: list) -> int | None:
        """Give each row pages for its next columns. None where they run out: the caller has to free some."""
        for row, (start, seq) in enumerate(zip(born, live)):
            missing = self.pages_of(min(start + step, seq.total)) - len(self.owned[row])
            if missing > 0:
                if missing > self.free_pages:
                    return None
                self._assign(row, self.shares.take(missing))
        self.upload()
        return self.table.shape[1] * self.page

    def move(self, source: list[int], target: list[int], used: int) -> None:
        self.host[target] = self.host[source]
        for a, b in zip(source, target):
            self.shares.release(self.owned[b])
            self.owned[b], self.owned[a] = self.owned[a], []
        self.changed = True

    def free(self, first: int, last: int) -> None:
        for row in range(first, last):
            self.shares.release(self.owned[row])
            self.owned[row] = []
        self.host[first:last] = TRASH
        self.changed = True
