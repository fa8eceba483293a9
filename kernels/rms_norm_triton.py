"""Root mean square norm with an optional residual sum in Triton: see `rms_norm.py`. A program takes a row."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["inner"])
def norm_kernel(
    x, weight, residual, out, inner, outer_stride, inner_stride, H, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Row r of x is at (r // inner) * outer_stride + (r % inner) * inner_stride; residual and out are contiguous."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < H
    at = tl.cast(row // inner, tl.int64) * outer_stride + (row % inner) * inner_stride
    there = tl.cast(row, tl.int64) * H + i
    v = tl.load(x + at + i, mask=inside, other=0.0)
    if RESIDUAL:
        v = (v.to(tl.float32) + tl.load(residual + there, mask=inside, other=0.0).to(tl.float32)).to(v.dtype)
        tl.store(residual + there, v, mask=inside)
    v = v.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 0) / H + eps)
    y = v * scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + there, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """See the twin. x may be a slice of heads, [R, n, D] with any strides of the first two dimensions; no gradient."""
    assert not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)), "rms_norm has no gradient"
    H = x.shape[-1]
    assert weight.shape == (H,) and weight.is_contiguous(), "weight [H]"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.dim() > 3 or x.dim() < 2 or x.stride(-1) != 1:
        x = x.reshape(-1, H).contiguous()
    rows = x.numel() // max(1, H)
    if rows == 0:
        return out
    inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    assert residual is None or (residual.is_contiguous() and residual.shape == out.shape), "residual as x, contiguous"
    block = triton.next_power_of_2(H)
    norm_kernel[(rows,)](
        x, weight, out if residual is None else residual, out, inner, x.stride(0), inner_stride, H, eps,
        RESIDUAL=residual is not None, BLOCK=block, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return out
