"""Attention of one new token a row over its pages of the cache, in Triton: see `decode_attention.py`.

A program takes one row, one key/value head and a part of the row's columns (flash-decoding): it reads a block of keys
once for all query heads of the group, which stand as the rows of a tl.dot padded to 16, and keeps a running softmax.
A block never crosses a page, so a block costs one look into the page table.
Every row is cut into the same number of parts, of a size that follows from its own length, so the grid depends on
shapes alone (a CUDA graph can hold it) and short rows keep the machine as busy as long ones. A second kernel adds up
the parts.
"""

import torch
import triton
import triton.language as tl
from adaptive_reasoning.kernels.launch import dot, multiprocessors

TILES = {2: (64, 4, 3), 4: (32, 8, 3)}  # by bytes of a number: columns of a block, warps, pipeline stages
WAVES = 6  # programs for each multiprocessor: enough for several at once and a short tail
MOST_PARTS = 64

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def part_of(length, part, parts, BLOCK_T: tl.constexpr):
    """Return (first, last) column of a part: whole blocks, the same number for every part but the last ones."""
    each = tl.cdiv(tl.cdiv(length, BLOCK_T), parts) * BLOCK_T
    first = part * each
    return first, tl.minimum(first + each, length)


@triton.jit(do_not_specialize=["parts"])
def attention_kernel(
    q, cache, lengths, table, out, partial, parts,
    q_row, q_head, cache_page, cache_head, cache_column, table_row, kv_heads, group, D, scale,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, SPLIT: tl.constexpr,
    PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, h, D] if there is one part, else partial [B, h, parts, D + 2] fp32: sums, maximum, total.

    PAGE: columns of a page, 0 where row b has page b alone.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    first, last = part_of(length, part, parts, BLOCK_T)
    member = tl.arange(0, ROWS)  # query head of the group
    d = tl.arange(0, BLOCK_D)
    real = member < group
    if EVEN_D:
        d_real = d < BLOCK_D
    else:
        d_real = d < D
    heads = head * group + member
    q_at = q + row * q_row + heads[:, None] * q_head + d[None, :]
    query = tl.load(q_at, mask=real[:, None] & d_real[None, :], other=0.0)
    mine = cache + head * cache_head + d[None, :]
    pages = table + tl.cast(row, tl.int64) * table_row
    to_values = kv_heads * cache_head
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_T):
        column = start + tl.arange(0, BLOCK_T)
        inside = column < last
        if PAGE:
            page = tl.load(pages + start // PAGE)
            inner = start % PAGE + tl.arange(0, BLOCK_T)
        else:
            page = row
            inner = column
        at = mine + tl.cast(page, tl.int64) * cache_page + inner[:, None] * cache_column
        if EVEN_D:
            mask = inside[:, None]
        else:
            mask = inside[:, None] & d_real[None, :]
        key = tl.load(at, mask=mask, other=0.0)
        x = dot(query, tl.trans(key), tl.zeros((ROWS, BLOCK_T), tl.float32), PRECISION) * scale
        x = tl.where(inside[None, :], x, float("-inf"))
        peak = tl.maximum(m, tl.max(x, 1))
        shrink = tl.exp2(m - peak)
        p = tl.exp2(x - peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(at + to_values, mask=mask, other=0.0)
        sums = dot(p.to(value.dtype), value, sums * shrink[:, None], PRECISION)
        m = peak
    if SPLIT:
        if first < last:
            width = D + 2
            at = partial + ((tl.cast(row, tl.int64) * kv_heads * group + heads) * parts + part) * width
            tl.store(at[:, None] + d[None, :], sums, mask=real[:, None] & d_real[None, :])
            tl.store(at + D, m, mask=real)
            tl.store(at + D + 1, total, mask=real)
    else:
        sums = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        at = out + ((row * kv_heads * group + heads) * D)[:, None] + d[None, :]
        tl.store(at, sums.to(out.dtype.element_ty), mask=real[:, None] & d_real[None, :])


@triton.jit(do_not_specialize=["parts"])
def reduce_kernel(
    partial, lengths, out, parts, heads, D, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Add up the parts of a row and head, all at once; those without columns were never written."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    first, last = part_of(length, part, parts, BLOCK_T)
    live = (part < parts) & (first < last)
    at = partial + ((tl.cast(row, tl.int64) * heads + head) * parts + part) * (D + 2)
    m = tl.load(at + D, mask=live, other=-1e30)
    weight = tl.where(live, tl.exp2(m - tl.max(m, 0)), 0.0)
    total = tl.sum(tl.load(at + D + 1, mask=live, other=0.0) * weight, 0)
    sums = tl.load(at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(sums * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + (row * heads + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def number_of_parts(programs: int, columns: int, block: int, device: torch.device) -> int:
    """Return into how many parts to cut each row, a function of shapes alone."""
    wanted = triton.cdiv(WAVES * multiprocessors(device), max(1, programs))
    return max(1, min(wanted, triton.cdiv(columns, block), MOST_PARTS))


def decode_attention(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor | None = None
) -> torch.Tensor:
    """See the twin. With a table, pages have a power of two of columns, 16 or more."""
    B, h, D = q.shape
    k, C = cache.shape[1] // 2, cache.shape[2]
    assert q.dtype == cache.dtype and h % k == 0 and cache.shape[3] == D, "q [B,h,D], cache [P,2k,C,D] of one type"
    assert q.stride(2) == cache.stride(3) == 1, "head dimension must be contiguous"
    out = torch.empty(B, h * D, dtype=q.dtype, device=q.device)
    if B == 0:
        return out
    block, warps, stages = TILES[q.element_size()]
    if table is not None:
        assert C >= 16 and C & (C - 1) == 0 and table.stride(1) == 1, "pages of 16, 32, 64 ... columns"
        block = min(block, C)
    block_d = max(16, triton.next_power_of_2(D))
    parts = number_of_parts(B * k, C if table is None else C * table.shape[1], block, q.device)
    partial = torch.empty(B, h, parts, D + 2, dtype=torch.float32, device=q.device) if parts > 1 else out
    attention_kernel[(B, k, parts)](
        q, cache, lengths, lengths if table is None else table, out, partial, parts,
        q.stride(0), q.stride(1), cache.stride(0), cache.stride(1), cache.stride(2),
        0 if table is None else table.stride(0), k, h // k, D, LOG2E.value / D**0.5,
        ROWS=max(16, triton.next_power_of_2(h // k)), BLOCK_T=block, BLOCK_D=block_d, EVEN_D=block_d == D,
        SPLIT=parts > 1, PAGE=0 if table is None else C, PRECISION="ieee" if q.element_size() == 4 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        reduce_kernel[(B, h)](
            partial, lengths, out, parts, h, D, PARTS=triton.next_power_of_2(parts), BLOCK_T=block, BLOCK_D=block_d
        )  # fmt: skip
    return out
