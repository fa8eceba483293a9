"""Kernels: one function per operation, the same signature whatever runs it.

Every operation has two files: `<operation>.py` with the mathematics and a plain-torch twin, which works on any device
and is the reference of the tests, and `<operation>_triton.py` with the kernel. `ADAPTIVE_REASONING_KERNELS` is the
one switch: `auto` (the default) takes Triton for tensors on a CUDA device where triton is installed and torch
elsewhere, `torch` and `triton` take one of the two everywhere. Without a GPU the Triton files run in Triton's
interpreter (`TRITON_INTERPRET=1`). Importing this package imports neither a Triton file nor triton.
"""

import functools
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch

from adaptive_reasoning.errors import UserError

SWITCH = "ADAPTIVE_REASONING_KERNELS"


def wanted() -> str:
    """Return "auto", "torch" or "triton", from the environment.

    Raises:
        UserError: the variable holds anything else.
    """
    value = os.environ.get(SWITCH, "auto")
    if value not in ("auto", "torch", "triton"):
        raise UserError(f"{SWITCH}={value}: takes auto or torch, or triton to insist on it.")
    return value


@functools.cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def uses_triton(tensor: torch.Tensor) -> bool:
    """Return whether an operation on this tensor takes the Triton kernel.

    Raises:
        UserError: the switch insists on Triton where it cannot run, or holds an unknown value.
    """
    value = wanted()
    if value != "triton":
        return value == "auto" and tensor.is_cuda and has_triton()
    if not has_triton():
        raise UserError(f"{SWITCH}=triton, but triton is not installed: pip install triton, or take auto.")
    if not (tensor.is_cuda or tensor.is_meta or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UserError(f"{SWITCH}=triton on a {tensor.device.type} tensor: set TRITON_INTERPRET=1 as well.")
    return True


@functools.cache
def triton_version(name: str) -> Callable:
    """Return the Triton implementation of an operation; the same signature and docstring as its twin."""
    return getattr(import_module(f"{__name__}.{name}_triton"), name)


def device() -> torch.device:
    """Return where small tensors that no model holds are worked on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_version(name: str) -> Callable:
    """Return the plain-torch twin of an operation."""
    return getattr(import_module(f"{__name__}.{name}"), name)


def dispatched(name: str) -> Callable:
    """Return the operation: Triton or torch, decided at every call by its first argument, a tensor."""
    twin = torch_version(name)

    @functools.wraps(twin)
    def operation(tensor, *args, **kwargs):
        return (triton_version(name) if uses_triton(tensor) else twin)(tensor, *args, **kwargs)

    return operation


decode_attention = dispatched("decode_attention")
group_advantage = dispatched("group_advantage")
rms_norm = dispatched("rms_norm")
rope_and_store = dispatched("rope_and_store")
sample = dispatched("sample")
token_logprobs = dispatched("token_logprobs")
