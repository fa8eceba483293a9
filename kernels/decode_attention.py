"""Attention of one new token a row over its slot of the cache, in plain torch.

For row b, query head i of key/value head j = i // (h/k), and columns c < length_b:

    p_c = softmax_c( q_i . K_jc / sqrt(D) )        out_i = sum_c p_c V_jc

The cache of a layer is [S, 2k, T, D]: keys in the first k heads, values in the last k, and row b of the call is row b
of the cache. With a shared prefix (`prefix_row`, `prefix_length`) the first columns of row b are those of another
cache row, where a prompt was written once for all its samples; the own columns stay where they are and the first ones
are never read.

Bytes: 2 k D b sum(length), every key and value once (b bytes a number), which is all that matters; 2 B h D b for
queries and result, and 8 B h D times the number of splits for partial results in fp32.

Legend of shapes: B rows of the call, S rows and T columns of the cache, h query heads, k key/value heads, D head size.
"""

import torch
import torch.nn.functional as F


def length_mask(lengths: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 for the columns a row sees and -inf for the others, [B, 1, 1, columns]: made once for all layers."""
    seen = torch.arange(columns, device=lengths.device) < lengths.unsqueeze(1)
    mask = torch.zeros(len(lengths), 1, 1, columns, device=lengths.device, dtype=dtype)
    return mask.masked_fill_(~seen[:, None, None], float("-inf"))


def decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    columns: int | None = None,
    mask: torch.Tensor | None = None,
    prefix_row: torch.Tensor | None = None,
    prefix_length: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention [B, h D] of q [B, h, D] over the cache of one layer; a row of length 0 gives 0.

    Args:
        q: [B, h, D], of the type of the cache.
        cache: [S, 2k, T, D], S at least B.
        lengths: [B] int64, columns each row sees, the one of the new token included.
        columns: no row is longer than this (None: T); shapes depend on it, not on `lengths`.
        mask: what `length_mask` returns for these lengths, made once for all layers; None: made here. The Triton kernel
            does not need it.
        prefix_row, prefix_length: [B] int64, the first columns of each row are those of this cache row; or both None.
    """
    B, h, D = q.shape
    k, columns = cache.shape[1] // 2, columns or cache.shape[2]
    read = cache[:B, :, :columns]
    if prefix_row is not None:
        shared = torch.arange(columns, device=q.device) < prefix_length.unsqueeze(1)  # [B, columns]
        read = torch.where(shared[:, None, :, None], cache[prefix_row, :, :columns], read)
    if mask is None:
        mask = length_mask(lengths, columns, q.dtype)
    # The h/k query heads of a group stand as if they were so many positions: no copy of keys and values.
    q = q.reshape(B, k, h // k, D)
    out = F.scaled_dot_product_attention(q, read[:, :k], read[:, k:], attn_mask=mask)
    return out.masked_fill((lengths == 0)[:, None, None, None], 0.0).reshape(B, h * D)
