"""Memory for values that live for a moment.

malloc keeps freed blocks of up to 32 MB on its heap, where the small objects that outlive them pin the pages: for GPT2
with 100M parameters, discarding every value, that left 175 MiB behind (measured), growing with the number of layers.
Anonymous maps go back to the system when they are dropped.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from .tape import Value

_MAP_FROM_NBYTES = 1 << 18
_KEEP_UP_TO_NBYTES = 32 << 20


def empty(value: Value, *, transient: bool) -> Tensor:
    """Return uninitialised memory with the geometry of `value`; `transient` if it will be freed soon."""
    nbytes = _extent_nbytes(value)
    if transient and value.device.type == "cpu" and nbytes >= _MAP_FROM_NBYTES:
        return _shaped(torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8), value)
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)


class Scratchpad:
    """Gives memory for draws whose result nobody needs; one buffer serves all but the largest."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def empty(self, value: Value) -> Tensor:
        """Return memory with the geometry of `value`, valid until the next call."""
        nbytes = _extent_nbytes(value)
        if value.device.type != "cpu" or nbytes > _KEEP_UP_TO_NBYTES:
            return empty(value, transient=True)
        if nbytes > self._buffer.numel():
            size = max(nbytes, mmap.PAGESIZE)
            self._buffer = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        return _shaped(self._buffer[:nbytes], value)


def _shaped(raw: Tensor, value: Value) -> Tensor:
    return raw.view(value.dtype).as_strided(value.shape, value.stride)


def _extent_nbytes(value: Value) -> int:
    """Bytes from the first to the last element of the view."""
    if 0 in value.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride, strict=True))
    return (last + 1) * value.dtype.itemsize
