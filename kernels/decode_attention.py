"""Attention of one new token a row over its keys and values in the cache, in plain torch.

For row b, query head i of key/value head j = i // (h/k), and columns c < length_b:

    p_c = softmax_c( q_i . K_jc / sqrt(D) )        out_i = sum_c p_c V_jc

The cache of a layer is a pool of pages [P, 2k, C, D] of C columns each: keys in the first k heads, values in the last
k. Column c of row b is column c % C of page table[b, c // C]; rows of a group share the pages of their prompt that way.
Without a table page b is all that row b has, C columns: contiguous slots are the case of one page a row.

Bytes: 2 k D b sum(length), every key and value once (b bytes a number), which is all that matters; 2 B h D b for
queries and result, 8 B h D times the number of splits for partial results in fp32, and 4 for each page of a row.

Legend of shapes: B rows of the call, P pages of C columns, W pages of a row, h query heads, k key/value heads, D head
size.
"""

import torch
import torch.nn.functional as F


def decode_attention(
    q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the attention [B, h D] of q [B, h, D] over the cache of one layer; a row of length 0 gives 0.

    Args:
        q: [B, h, D], of the type of the cache.
        cache: [P, 2k, C, D]; without a table P is at least B.
        lengths: [B] int64, columns each row sees, the one of the new token included; at most W C.
        table: [B, W] int32, pages of each row in order; entries behind its length are not used. None: page b.
    """
    B, h, D = q.shape
    k = cache.shape[1] // 2
    if table is None:
        read = cache[:B]
    else:  # Triton reads the pages where they are; here they are gathered
        read = cache[table.flatten()].unflatten(0, table.shape).transpose(1, 2).flatten(2, 3)  # [B, 2k, W C, D]
    seen = torch.arange(read.shape[2], device=q.device) < lengths.unsqueeze(1)
    mask = torch.zeros(seen.shape, device=q.device, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    # The h/k query heads of a group stand as if they were so many positions: no copy of keys and values.
    q = q.reshape(B, k, h // k, D)
    out = F.scaled_dot_product_attention(q, read[:, :k], read[:, k:], attn_mask=mask[:, None, None])
    return out.masked_fill((lengths == 0)[:, None, None, None], 0.0).reshape(B, h * D)
