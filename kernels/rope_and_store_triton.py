"""Rotary embedding and the write into the cache in Triton: see `rope_and_store.py`. A program takes 16 heads of a
token.
"""

import torch
import triton
import triton.language as tl

HEADS = 16  # of a program


@triton.jit
def rope_kernel(
    qkv, angles, position, table, cache, heads, rotated, queries, cache_page, cache_head, cache_column, table_row,
    PAGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """heads = h + 2k, rotated = h + k, queries = h; HEADS heads a program; PAIRS is a power of two.

    PAGE: columns of a page, 0 where token r belongs to page r alone.
    """
    token = tl.program_id(0)
    where = tl.load(position + token)
    if PAGE:
        page = tl.load(table + tl.cast(token, tl.int64) * table_row + where // PAGE)
        column = where % PAGE
    else:
        page = token
        column = where
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < D // 2)
    at = qkv + tl.cast(token, tl.int64) * heads * D + head * D + 2 * pair
    x = tl.load(at, mask=inside, other=0.0)
    y = tl.load(at + 1, mask=inside, other=0.0)
    turn = angles + where.to(tl.int64) * D + 2 * pair  # D/2 complex numbers are D real ones
    cos = tl.load(turn, mask=pair < D // 2, other=0.0)
    sin = tl.load(turn + 1, mask=pair < D // 2, other=0.0)
    turns = head < rotated
    cos, sin = tl.where(turns, cos, 1.0), tl.where(turns, sin, 0.0)
    a, b = x.to(tl.float32), y.to(tl.float32)
    x, y = (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(y.dtype)
    is_query = inside & (head < queries)
    tl.store(at, x, mask=is_query)
    tl.store(at + 1, y, mask=is_query)
    to = cache + tl.cast(page, tl.int64) * cache_page + (head - queries) * cache_head
    to = to + column.to(tl.int64) * cache_column + 2 * pair
    is_cached = inside & (head >= queries)
    tl.store(to, x, mask=is_cached)
    tl.store(to + 1, y, mask=is_cached)


def rope_and_store(
    qkv: torch.Tensor,
    angles: torch.Tensor,
    position: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the twin; the strides of the cache are free but for the last one."""
    R, heads, D = qkv.shape
    k = cache.shape[1] // 2
    h = heads - 2 * k
    assert qkv.is_contiguous() and angles.is_contiguous() and cache.stride(3) == 1 and qkv.dtype == cache.dtype
    if R:
        rope_kernel[(R, triton.cdiv(heads, HEADS))](
            qkv, torch.view_as_real(angles), position, position if table is None else table, cache, heads, h + k, h,
            cache.stride(0), cache.stride(1), cache.stride(2), 0 if table is None else table.stride(0),
            PAGE=0 if table is None else cache.shape[2], HEADS=HEADS, D=D, PAIRS=triton.next_power_of_2(D // 2),
            num_warps=4,
        )  # fmt: skip
    return qkv[:, :h]
