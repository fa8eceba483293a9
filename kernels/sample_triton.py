"""One token a row and its log-prob in Triton: see `sample.py` for the definition.

Without a cut the logits are read once. Many programs a row find maximum and sum of a chunk of the vocabulary; then one
program a row finds the chunk in which the cumulative sum passes u times the total, and reads this chunk again to find
the token. With top_k or top_p, which only evaluation uses, one program a row first looks for the smallest logit that
stays in: 16 candidates a pass, 8 passes over the row for each of the two cuts, exact to the last bit. Of equal logits
at the edge of the nucleus the first ones stay in, as many as it takes.

Sums are taken in another order than torch's: u within about 1e-6 of a boundary between two tokens may take the other
one.
"""

import torch
import triton
import triton.language as tl

CHUNK = 4096
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_logits(logits, row, columns, V, row_stride, temperature):
    """Return logits / temperature in fp32, -inf outside the vocabulary."""
    x = tl.load(logits + tl.cast(row, tl.int64) * row_stride + columns, mask=columns < V, other=float("-inf"))
    return x.to(tl.float32) / temperature


@triton.jit
def chunk_kernel(
    logits, maxima, sums, best, V, row_stride, chunks, temperature, CHUNK: tl.constexpr
):  # fmt: skip
    """maxima, sums [B, chunks]: largest logit of each chunk and sum of exp(x - it); best: where it is."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits, row, columns, V, row_stride, temperature)
    # Nothing but -inf in this chunk: its maximum is very low instead of -inf, so that differences are numbers.
    m = tl.maximum(tl.max(x, 0), LOWEST)
    at = row * chunks + chunk
    tl.store(maxima + at, m)
    tl.store(sums + at, tl.sum(tl.exp(x - m), 0))
    tl.store(best + at, tl.minimum(tl.min(tl.where(x >= m, columns, V), 0), V - 1))


@triton.jit
def just_below(total):
    """Return the next smaller fp32 number of a positive one."""
    return (total.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)


@triton.jit
def first_above(e, before, target, columns, V):
    """Return the first column with e > 0 whose cumulative sum, on top of `before`, exceeds the target.

    The parts of a sum can miss it by a rounding error; the last column with e > 0 is taken where none exceeds it.
    """
    cumulative = before + tl.cumsum(e, 0)
    found = tl.min(tl.where((cumulative > target) & (e > 0.0), columns, V), 0)
    last = tl.max(tl.where(e > 0.0, columns, 0), 0)
    return tl.where(found < V, found, last)


@triton.jit
def pick_kernel(
    logits, maxima, sums, best, uniform, tokens, logprobs, V, row_stride, chunks, temperature,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    i = tl.arange(0, CHUNKS)
    m_i = tl.load(maxima + row * chunks + i, mask=i < chunks, other=LOWEST)
    m = tl.max(m_i, 0)
    mass = tl.load(sums + row * chunks + i, mask=i < chunks, other=0.0) * tl.exp(m_i - m)
    if GREEDY:
        total = tl.sum(mass, 0)
        first = tl.minimum(tl.min(tl.where(m_i == m, i, CHUNKS), 0), chunks - 1)
        tl.store(tokens + row, tl.load(best + row * chunks + first).to(tl.int64))
        tl.store(logprobs + row, -tl.log(total))
    else:
        cumulative = tl.cumsum(mass, 0)
        total = tl.max(cumulative, 0)
        target = tl.minimum(tl.load(uniform + row) * total, just_below(total))
        chunk = tl.min(tl.where((cumulative > target) & (mass > 0.0), i, CHUNKS), 0)
        # The scan adds in a tree: behind the last chunk with mass a sum may come out a bit larger than its own.
        chunk = tl.minimum(chunk, tl.max(tl.where(mass > 0.0, i, 0), 0))
        before = tl.sum(tl.where(i < chunk, mass, 0.0), 0)
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        x = load_logits(logits, row, columns, V, row_stride, temperature)
        token = first_above(tl.exp(x - m), before, target, columns, V)
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, tl.sum(tl.where(columns == token, x, 0.0), 0) - m - tl.log(total))


@triton.jit
def sort_key(x):
    """Return a number between 0 and 2**32 - 1, in int64, that is ordered as x is."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return tl.where(bits < 0, -1 - (bits & 0x7FFFFFFF).to(tl.int64), bits.to(tl.int64)) + 2147483648


@triton.jit
def cut_kernel(
    logits, uniform, tokens, logprobs, V, row_stride, temperature, top_k, top_p,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    digit = tl.arange(0, 16)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    for start in range(0, V, BLOCK):
        peak = tl.maximum(peak, load_logits(logits, row, start + lane, V, row_stride, temperature))
    m = tl.max(peak, 0)

    edge = tl.sum(lane, 0).to(tl.int64) * 0  # key of the smallest logit that stays in
    if TOP_K:
        for place in range(8):
            candidates = edge + (digit.to(tl.int64) << (28 - 4 * place))
            count = tl.zeros((16,), tl.int32)
            for start in range(0, V, BLOCK):
                columns = start + lane
                x = load_logits(logits, row, columns, V, row_stride, temperature)
                above = (sort_key(x)[:, None] >= candidates[None, :]) & (columns < V)[:, None]
                count += tl.sum(above.to(tl.int32), 0)
            most = tl.sum((count >= top_k).to(tl.int32), 0) - 1
            edge += tl.maximum(most, 0).to(tl.int64) << (28 - 4 * place)

    quota = V  # how many of the logits equal to the edge stay in
    if TOP_P:
        kept = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = load_logits(logits, row, start + lane, V, row_stride, temperature)
            kept += tl.where(sort_key(x) >= edge, tl.exp(x - m), 0.0)
        wanted = top_p * tl.sum(kept, 0)
        floor = edge
        edge = edge * 0
        for place in range(8):
            candidates = tl.maximum(edge + (digit.to(tl.int64) << (28 - 4 * place)), floor)
            mass = tl.zeros((16,), tl.float32)
            for start in range(0, V, BLOCK):
                x = load_logits(logits, row, start + lane, V, row_stride, temperature)
                above = sort_key(x)[:, None] >= candidates[None, :]
                mass += tl.sum(tl.where(above, tl.exp(x - m)[:, None], 0.0), 0)
            most = tl.sum((mass >= wanted).to(tl.int32), 0) - 1
            edge += tl.maximum(most, 0).to(tl.int64) << (28 - 4 * place)
        edge = tl.maximum(edge, floor)

    # Mass above the edge and at it; with a nucleus, how many at the edge it takes to reach top_p.
    over = tl.zeros((BLOCK,), tl.float32)
    level = tl.zeros((BLOCK,), tl.float32)
    ties = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        x = load_logits(logits, row, start + lane, V, row_stride, temperature)
        key = sort_key(x)
        e = tl.exp(x - m)
        over += tl.where(key > edge, e, 0.0)
        level = tl.maximum(level, tl.where(key == edge, e, 0.0))
        ties += ((key == edge) & (start + lane < V)).to(tl.int32)
    above_edge, each, number = tl.sum(over, 0), tl.max(level, 0), tl.sum(ties, 0)
    if TOP_P:
        missing = tl.ceil((wanted - above_edge) / tl.maximum(each, 1e-37))
        quota = tl.minimum(tl.maximum(missing, 1.0), 1e9).to(tl.int32)
    quota = tl.minimum(quota, number)
    total = above_edge + each * quota.to(tl.float32)
    target = tl.minimum(tl.load(uniform + row) * total, just_below(total))

    before = tl.sum(over, 0) * 0.0
    seen = number * 0  # logits at the edge so far
    token = number * 0 - 1
    last = number * 0  # last column that stays in, should rounding let none exceed the target
    for start in range(0, V, BLOCK):
        columns = start + lane
        x = load_logits(logits, row, columns, V, row_stride, temperature)
        key = sort_key(x)
        tie = ((key == edge) & (columns < V)).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0) - tie
        e = tl.where((key > edge) | ((tie == 1) & (rank < quota)), tl.exp(x - m), 0.0)
        cumulative = before + tl.cumsum(e, 0)
        found = tl.min(tl.where((cumulative > target) & (e > 0.0), columns, V), 0)
        token = tl.where((token < 0) & (found < V), found, token)
        last = tl.maximum(last, tl.max(tl.where(e > 0.0, columns, 0), 0))
        before += tl.sum(e, 0)
        seen += tl.sum(tie, 0)
    token = tl.where(token < 0, last, token)
    x = load_logits(logits, row, token, V, row_stride, temperature)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, x - m - tl.log(total))


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the twin."""
    B, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    if B == 0:
        return tokens, logprobs
    if temperature > 0 and (top_k or top_p < 1):
        cut_kernel[(B,)](
            logits, uniform.contiguous(), tokens, logprobs, V, logits.stride(0), float(temperature), top_k,
            float(top_p), BLOCK=512, TOP_K=top_k > 0, TOP_P=top_p < 1, num_warps=8,
        )  # fmt: skip
        return tokens, logprobs
    chunks = triton.cdiv(V, CHUNK)
    maxima = torch.empty(B, chunks, dtype=torch.float32, device=logits.device)
    sums, best = torch.empty_like(maxima), torch.empty(B, chunks, dtype=torch.int32, device=logits.device)
    numbers = (V, logits.stride(0), chunks, float(temperature) or 1.0)
    flags = {"CHUNK": CHUNK, "num_warps": 8}
    chunk_kernel[(B, chunks)](logits, maxima, sums, best, *numbers, **flags)
    pick_kernel[(B,)](
        logits, maxima, sums, best, uniform.contiguous(), tokens, logprobs, *numbers,
        CHUNKS=triton.next_power_of_2(chunks), GREEDY=temperature == 0, **flags,
    )  # fmt: skip
    return tokens, logprobs
