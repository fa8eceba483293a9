"""Rotary embedding of queries and keys, and keys and values into the cache, in plain torch.

Pairs of neighbouring numbers (2i, 2i+1) of a head are the complex numbers x_i (the decoder interleaves the columns of
its weights so); at position m

    x_i <- x_i exp(i m theta_i) c        for the h query heads and the k key heads; values stay as they are

in fp32, rounded once. Queries are rotated in place; keys and values go to column m of the row's slot of the cache.

Bytes: (h + 2k) D numbers a row read and written, and 8 D/2 of angles.

Legend of shapes: R tokens, S rows and T columns of the cache, h query heads, k key/value heads, D head size.
"""

import torch


def rope_and_store(
    qkv: torch.Tensor,
    angles: torch.Tensor,
    position: torch.Tensor,
    cache: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate, write the cache of one layer, and return the queries: a view [R, h, D] of qkv.

    Args:
        qkv: [R, h + 2k, D] contiguous, queries, keys and values of one token each; the queries change in place.
        angles: [positions, D/2] complex64, c exp(i m theta).
        position: [R] int64, position of the token, and its column in the cache.
        cache: [S, 2k, T, D] contiguous, of the type of qkv.
        rows: [R] int64, cache row of each token; None: token r belongs to row r.
    """
    R, heads, D = qkv.shape
    T, k = cache.shape[2], cache.shape[1] // 2
    h = heads - 2 * k
    turn = angles[position].unsqueeze(1)  # [R, 1, D/2]
    if qkv.dtype == torch.float32:
        torch.view_as_complex(qkv.view(R, heads, D // 2, 2))[:, : h + k].mul_(turn)
    else:
        pairs = torch.view_as_complex(qkv[:, : h + k].float().unflatten(-1, (D // 2, 2)))
        qkv[:, : h + k] = torch.view_as_real(pairs * turn).flatten(-2)
    row = torch.arange(R, device=qkv.device) if rows is None else rows
    slot = (row.unsqueeze(1) * 2 * k + torch.arange(2 * k, device=qkv.device)) * T + position.unsqueeze(1)
    cache.view(-1, D).index_copy_(0, slot.flatten(), qkv[:, h:].reshape(-1, D))
    return qkv[:, :h]
