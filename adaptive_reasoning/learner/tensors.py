"""Tensors on disk: safetensors written one tensor at a time, hashed on the way, and read back in pieces of any size.

The library's own writer wants all tensors at once. Written one by one, the memory needed is that of one tensor, the
digest costs no second reading, and what comes out is an ordinary safetensors file.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from adaptive_reasoning.errors import UserError

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def write_tensors(path: Path, layout: list[tuple], tensors: Iterable[torch.Tensor], metadata: dict[str, str]) -> dict:
    """Write a safetensors file and force it to disk; return {"bytes", "sha256"} of it.

    Args:
        layout: (name, dtype, shape) of every tensor: the header comes before the first of them.
        tensors: in the same order, on any device; each is asked for after the one before has been written.
        metadata: texts for the header.

    Raises:
        OSError: the file cannot be written.
    """
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, dtype, shape in layout:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:

        def put(data) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for (name, dtype, shape), tensor in zip(layout, tensors, strict=True):
            assert tensor.dtype == dtype and tensor.shape == torch.Size(shape), name
            put(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def digest_of(path: Path) -> dict:
    """Return {"bytes", "sha256"} of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


class Pieces:
    """Safetensors files in which a tensor may be cut into consecutive flat pieces, one a file.

    Args:
        files: in the order of the pieces.
    """

    def __init__(self, files: list[Path]):
        self.where: dict[str, list] = {}
        self.metadata: list[dict] = []
        for path in files:
            opened = safe_open(path, "pt")
            self.metadata.append(opened.metadata())
            for key in opened.keys():
                self.where.setdefault(key, []).append(opened)

    def __contains__(self, key: str) -> bool:
        return key in self.where

    def read(self, key: str, start: int, stop: int, total: int) -> torch.Tensor:
        """Return the elements [start, stop) of the flattened tensor, fp32, reading no more than the rows they lie in.

        Raises:
            UserError: there is no such tensor, or it has not `total` elements.
        """
        parts, end = [], 0
        for file in self.where.get(key, []):
            piece = file.get_slice(key)
            shape = piece.get_shape()
            begin, end = end, end + math.prod(shape)
            a, b = max(start, begin) - begin, min(stop, end) - begin
            if a < b:
                row = (end - begin) // shape[0]
                first = a // row
                rows = piece[first : -(-b // row)].reshape(-1)
                parts.append(rows[a - first * row : b - first * row].float())
        if end != total:
            raise UserError(f"the checkpoint has {end} numbers for {key}, the model {total}: it is of another model.")
        return torch.cat(parts) if parts else torch.empty(0)
