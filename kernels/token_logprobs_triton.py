"""Log-probs and entropies of given tokens in Triton: the logits exist only in registers, one tile at a time.

    x = hidden @ weight.T / temperature        logprob = x[target] - logsumexp(x)        H = logsumexp(x) - E_p[x]

Forward. A program owns a block of rows and a stretch of the vocabulary. For every tile it forms x by tl.dot in fp32 and
folds it into a running maximum m, l = sum e^(x-m) and s = sum (x-m) e^(x-m) (online softmax); a second small kernel
adds up the stretches. Programs are numbered so that those that run side by side share rows and weights in the L2
cache.

Backward. The vocabulary is cut into chunks of C columns. A kernel computes the tiles of a chunk once more and writes

    dx[j] = ( g ([j = target] - p_j) - g_H p_j (log p_j + H) ) / temperature

to a workspace [N, C] in the type of the inputs; two matrix products of the vendor's library make
grad_weight[chunk] = dx.T @ hidden, finished at once, and grad_hidden += dx @ weight[chunk], summed in fp32. No
atomics, so the result is the same every time, and no memory that grows with V but the gradient of the weight itself.
(Chunks of rows would need a second copy of that gradient in fp32 and would read and write it once a chunk.)

Bytes: forward N/128 V H b from L2 (b bytes a number), N H b + V H b from memory at best, 16 N V/2048 of partial
results. Backward as much again, plus 3 N V b for the workspace (written once, read twice) and 8 N H V/C for the sum.
FLOP: 2 N V H forward, 6 N V H backward.

Legend of shapes: N tokens, H hidden size, V vocabulary, C columns of a chunk.
"""

import torch
import triton
import triton.language as tl
from adaptive_reasoning.kernels.launch import capability, dot
from adaptive_reasoning.kernels.token_logprobs import matmul
from adaptive_reasoning.kernels.token_logprobs import token_logprobs as torch_token_logprobs

# (bytes of a number, Hopper or later): rows, columns, hidden of a tile; warps and pipeline stages. The largest tiles
# that fit into the registers.
TILES = {
    (2, True): (128, 256, 64, 8, 3),
    (2, False): (128, 128, 64, 8, 3),
    (4, True): (64, 64, 32, 8, 2),
    (4, False): (64, 64, 32, 8, 2),
}
MOST_TILES = 8  # of one program of the forward pass
FEWEST_PROGRAMS = 528  # four for each multiprocessor of an H100: below that a program takes fewer tiles
WORKSPACE_BYTES = 512 * 2**20

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # below every logit, and unlike -inf its differences are numbers


@triton.jit
def block_of(program, row_blocks, columns, GROUP: tl.constexpr):
    """Return (row block, column number) of a program: GROUP row blocks are walked through together."""
    group = program // (GROUP * columns)
    first = group * GROUP
    size = min(row_blocks - first, GROUP)
    return first + (program % (GROUP * columns)) % size, (program % (GROUP * columns)) // size


@triton.jit
def logits_tile(
    hidden, weight, rows, columns, N, V, H, hidden_stride, weight_stride, scale,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return hidden[rows] @ weight[columns].T * scale in fp32; rows and columns past the end repeat the last one."""
    k = tl.arange(0, BLOCK_H)
    a = hidden + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * hidden_stride + k[None, :]
    b = weight + tl.minimum(columns, V - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]
    tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=k[None, :] < H - start, other=0.0)
            right = tl.load(b, mask=k[:, None] < H - start, other=0.0)
        tile = dot(left, right, tile, PRECISION)
        a += BLOCK_H
        b += BLOCK_H
    return tile * scale


@triton.jit(do_not_specialize=["N", "stretches", "tiles_each"])
def forward_kernel(
    hidden, weight, targets, partial, N, V, H, hidden_stride, weight_stride, scale, stretches, tiles_each,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr, PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """partial [4, stretches, N]: maximum, sum, weighted sum and target's logit of each row and stretch, base 2."""
    block, stretch = block_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), stretches, GROUP=8)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    wanted = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_N,), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    last = min((stretch + 1) * tiles_each, tl.cdiv(V, BLOCK_V))
    for tile in range(stretch * tiles_each, last):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        x = logits_tile(
            hidden, weight, rows, columns, N, V, H, hidden_stride, weight_stride, scale,
            BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, PRECISION,
        )  # fmt: skip
        t += tl.sum(tl.where(columns[None, :] == wanted[:, None], x, 0.0), 1)
        x = tl.where(columns[None, :] < V, x, LOWEST)
        peak = tl.maximum(m, tl.max(x, 1))
        shrink = tl.exp2(m - peak)
        x -= peak[:, None]
        p = tl.exp2(x)
        if ENTROPY:
            s = shrink * (s + (m - peak) * l) + tl.sum(x * p, 1)
        l = l * shrink + tl.sum(p, 1)
        m = peak
    out = partial + tl.cast(stretch, tl.int64) * N + rows
    step = tl.cast(stretches, tl.int64) * N
    tl.store(out, m, mask=inside)
    tl.store(out + step, l, mask=inside)
    tl.store(out + 2 * step, s, mask=inside)
    tl.store(out + 3 * step, t, mask=inside)


@triton.jit(do_not_specialize=["N", "stretches"])
def combine_kernel(
    partial, logprobs, lse, entropy, N, stretches, BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    """Add up the stretches of each row. lse is kept in base 2: log2 of the sum of exp(x)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_N,), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    step = tl.cast(stretches, tl.int64) * N
    for i in range(stretches):
        at = partial + tl.cast(i, tl.int64) * N + rows
        m_i = tl.load(at, mask=inside, other=0.0)
        l_i = tl.load(at + step, mask=inside, other=1.0)
        peak = tl.maximum(m, m_i)
        here, there = tl.exp2(m - peak), tl.exp2(m_i - peak)
        if ENTROPY:
            s_i = tl.load(at + 2 * step, mask=inside, other=0.0)
            s = here * (s + (m - peak) * l) + there * (s_i + (m_i - peak) * l_i)
        l = l * here + l_i * there
        t += tl.load(at + 3 * step, mask=inside, other=0.0)
        m = peak
    total = tl.log2(l)
    tl.store(logprobs + rows, (t - m - total) * LN2, mask=inside)
    tl.store(lse + rows, m + total, mask=inside)
    if ENTROPY:
        tl.store(entropy + rows, (total - s / l) * LN2, mask=inside)


@triton.jit(do_not_specialize=["N", "first", "last"])
def gradient_kernel(
    hidden, weight, targets, lse, entropy, grad_logprobs, grad_entropy, out, N, V, H, hidden_stride, weight_stride,
    out_stride, scale, temperature, first, last,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr, PRECISION: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """out [N, last - first], rounded up to whole tiles: the gradient of the logits of the columns first .. last - 1."""
    block, tile = block_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(last - first, BLOCK_V), GROUP=8)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = first + tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = logits_tile(
        hidden, weight, rows, columns, N, V, H, hidden_stride, weight_stride, scale,
        BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, PRECISION,
    )  # fmt: skip
    inside = rows < N
    wanted = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    g = tl.load(grad_logprobs + rows, mask=inside, other=0.0) / temperature
    x -= tl.load(lse + rows, mask=inside, other=1e30)[:, None]  # log2 p; rows past the end get p = 0
    p = tl.exp2(x)
    if ENTROPY:  # g + g_H (log p + H), split into a number of the row and a factor of log2 p
        e = tl.load(grad_entropy + rows, mask=inside, other=0.0) / temperature
        row = g + e * tl.load(entropy + rows, mask=inside, other=0.0)
        d = -p * (row[:, None] + (e * LN2)[:, None] * x)
    else:
        d = -p * g[:, None]
    d = tl.where(columns[None, :] == wanted[:, None], d + g[:, None], d)
    # The workspace is a whole number of tiles, so nothing is masked, and it has less than 2**31 numbers.
    tl.store(out + (rows[:, None] * out_stride + (columns - first)[None, :]), d.to(out.dtype.element_ty))


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the twin. bf16, fp16 or fp32 (fp64, a type of tests, goes to the twin); `chunk` has no meaning here."""
    if hidden.dtype == torch.float64:
        return torch_token_logprobs(hidden, weight, targets, temperature, chunk, with_entropy)
    assert hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1], "hidden [N,H], weight [V,H]"
    assert targets.shape == hidden.shape[:1], "one target per row of hidden"
    assert hidden.dtype == weight.dtype, "hidden and weight must have one dtype"
    assert temperature > 0, "the log-prob at temperature 0 is not defined"
    logprobs, entropy = TokenLogprobs.apply(hidden, weight, targets, float(temperature), with_entropy)
    return logprobs, (entropy if with_entropy else None)


def settings(hidden: torch.Tensor) -> tuple[dict, dict]:
    """Return (block sizes, launch options) for these inputs."""
    size = hidden.element_size()
    rows, columns, inner, warps, stages = TILES[size, capability() >= 90]
    precision = "ieee" if size == 4 else "tf32"  # of no effect on bf16
    blocks = {"BLOCK_N": rows, "BLOCK_V": columns, "BLOCK_H": inner, "PRECISION": precision}
    return blocks | {"EVEN_H": hidden.shape[1] % inner == 0}, {"num_warps": warps, "num_stages": stages}


class TokenLogprobs(torch.autograd.Function):
    """The autograd function behind `token_logprobs`."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy):
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        targets = targets.contiguous()
        (N, H), V = hidden.shape, weight.shape[0]
        logprobs = torch.empty(N, dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs if with_entropy else logprobs[:0])
        if N:
            blocks, options = settings(hidden)
            row_blocks, tiles = triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(V, blocks["BLOCK_V"])
            each = max(1, min(MOST_TILES, tiles * row_blocks // FEWEST_PROGRAMS))
            stretches = triton.cdiv(tiles, each)
            partial = torch.empty(4, stretches, N, dtype=torch.float32, device=hidden.device)
            forward_kernel[(row_blocks * stretches,)](
                hidden, weight, targets, partial, N, V, H, hidden.stride(0), weight.stride(0),
                LOG2E.value / temperature, stretches, each, ENTROPY=with_entropy, **blocks, **options,
            )  # fmt: skip
            combine_kernel[(triton.cdiv(N, 128),)](
                partial, logprobs, lse, entropy, N, stretches, BLOCK_N=128, ENTROPY=with_entropy
            )
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        (N, H), V = hidden.shape, weight.shape[0]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros(N, H, dtype=torch.float32, device=hidden.device) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        blocks, options = settings(hidden)
        row_blocks, BLOCK_V = triton.cdiv(N, blocks["BLOCK_N"]), blocks["BLOCK_V"]
        padded = row_blocks * blocks["BLOCK_N"]
        width = max(1, WORKSPACE_BYTES // (max(1, padded) * BLOCK_V * hidden.element_size()))
        width = BLOCK_V * min(width, triton.cdiv(V, BLOCK_V))
        if N and (want_hidden or want_weight):
            grad_logprobs, grad_entropy = grad_logprobs.contiguous(), grad_entropy.contiguous()
            space = torch.empty(padded, width, dtype=hidden.dtype, device=hidden.device)
            for first in range(0, V, width):  # none of these products is one that autocast would touch
                last = min(first + width, V)
                gradient_kernel[(row_blocks * triton.cdiv(last - first, BLOCK_V),)](
                    hidden, weight, targets, lse, entropy, grad_logprobs, grad_entropy, space, N, V, H,
                    hidden.stride(0), weight.stride(0), width, LOG2E.value / ctx.temperature, ctx.temperature,
                    first, last, ENTROPY=ctx.with_entropy, **blocks, **options,
                )  # fmt: skip
                dx = space[:N, : last - first]
                if want_hidden and dx.dtype == torch.float32:
                    grad_hidden.addmm_(dx, weight[first:last])
                elif want_hidden:
                    grad_hidden.add_(matmul(dx, weight[first:last]))
                if want_weight:
                    torch.mm(dx.t(), hidden, out=grad_weight[first:last])
        grad_hidden = grad_hidden.to(hidden.dtype) if want_hidden else None
        return grad_hidden, grad_weight, None, None, None
