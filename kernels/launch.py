"""What the Triton files share: what the GPU is, and a dot product that Triton's interpreter can do."""

import functools
import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a @ b in fp32. The interpreter keeps bf16 as integers and would multiply those."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


def capability() -> int:
    """Return the compute capability that kernels are made for, 80 or 90 for example; in the interpreter 90."""
    if INTERPRETED.value:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; without a GPU that of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
