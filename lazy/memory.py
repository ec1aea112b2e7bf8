"""Memory for values that live for a moment.

malloc keeps freed blocks of up to 32 MB on its heap, where the small objects that outlive them pin the pages: for GPT2
with 100M parameters, discarding every value, that left 175 MiB behind (measured), growing with the number of layers.
Anonymous maps go back to the system when they are dropped, but touching a new map costs a page fault for every 4 KiB, a
third of the time that drawing normal numbers into it takes. So a few of them are kept and used again.
"""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

from .tape import Value

_MAP_FROM_NBYTES = 1 << 18
_KEEP_UP_TO_NBYTES = 64 << 20
_SLACK = 4


class Pool:
    """Gives memory for values of one replay and takes it back when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, value: Value) -> Tensor:
        """Return uninitialised memory with the geometry of `value`."""
        nbytes = _extent_nbytes(value)
        if value.device.type != "cpu" or nbytes < _MAP_FROM_NBYTES:
            return empty(value)
        room = self._take(nbytes)
        part = memoryview(room)[:nbytes]  # torch holds on to it as long as a tensor needs it
        weakref.finalize(part, self._give_back, room).atexit = False
        return torch.frombuffer(part, dtype=torch.uint8).view(value.dtype).as_strided(value.shape, value.stride)

    def _take(self, nbytes: int) -> mmap.mmap:
        # Not one that is far too large: the sink may keep the value, and with it all of the map.
        fitting = [free for free in self._free if nbytes <= len(free) <= _SLACK * nbytes]
        if fitting:
            best = min(fitting, key=len)
            self._free.remove(best)
            return best
        self._free = [free for free in self._free if len(free) > nbytes]  # the new one will do for the smaller ones
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _give_back(self, room: mmap.mmap) -> None:
        if len(room) + sum(map(len, self._free)) <= _KEEP_UP_TO_NBYTES:
            self._free.append(room)


def empty(value: Value) -> Tensor:
    """Return uninitialised memory that stays, with the geometry of `value`."""
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)


def _extent_nbytes(value: Value) -> int:
    """Bytes from the first to the last element of the view."""
    if 0 in value.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride, strict=True))
    return (last + 1) * value.dtype.itemsize
