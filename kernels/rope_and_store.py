"""Rotary embedding of queries and keys, and keys and values into the cache, in plain torch.

Pairs of neighbouring numbers (2i, 2i+1) of a head are the complex numbers x_i (the decoder interleaves the columns of
its weights so); at position m

    x_i <- x_i exp(i m theta_i) c        for the h query heads and the k key heads; values stay as they are

in fp32, rounded once. Queries are rotated in place; keys and values go to column m % C of page table[r, m // C] of the
cache, or of page r where there is no table (see `decode_attention.py`).

Bytes: (h + 2k) D numbers a row read and written, and 8 D/2 of angles.

Legend of shapes: R tokens, P pages of C columns, W pages of a row, h query heads, k key/value heads, D head size.
"""

import torch


def rope_and_store(
    qkv: torch.Tensor,
    angles: torch.Tensor,
    position: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate, write the cache of one layer, and return the queries: a view [R, h, D] of qkv.

    Args:
        qkv: [R, h + 2k, D] contiguous, queries, keys and values of one token each; the queries change in place.
        angles: [positions, D/2] complex64, c exp(i m theta).
        position: [R] int64, position of the token, and its column among those of its row.
        cache: [P, 2k, C, D] contiguous, of the type of qkv.
        table: [R, W] int32, pages of each token's row in order; None: token r belongs to page r.
    """
    R, heads, D = qkv.shape
    C, k = cache.shape[2], cache.shape[1] // 2
    h = heads - 2 * k
    turn = angles[position].unsqueeze(1)  # [R, 1, D/2]
    if qkv.dtype == torch.float32:
        torch.view_as_complex(qkv.view(R, heads, D // 2, 2))[:, : h + k].mul_(turn)
    else:
        pairs = torch.view_as_complex(qkv[:, : h + k].float().unflatten(-1, (D // 2, 2)))
        qkv[:, : h + k] = torch.view_as_real(pairs * turn).flatten(-2)
    if table is None:
        page = torch.arange(R, device=qkv.device)
    else:
        page = table.gather(1, (position // C).unsqueeze(1)).squeeze(1).long()
    slot = (page.unsqueeze(1) * 2 * k + torch.arange(2 * k, device=qkv.device)) * C + (position % C).unsqueeze(1)
    cache.view(-1, D).index_copy_(0, slot.flatten(), qkv[:, h:].reshape(-1, D))
    return qkv[:, :h]
