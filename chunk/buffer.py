"""One buffer of one chunk on one tier: a flat run of elements that can be read and written in parts."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .tier import Tier


class Buffer(Protocol):
    """A home of a chunk.

    Attributes
    ----------
    tensor
        The memory itself (flat), or None where it is a file.
    """

    tier: Tier
    numel: int
    dtype: torch.dtype
    tensor: Tensor | None

    @property
    def nbytes(self) -> int: ...

    def read(self, start: int, out: Tensor) -> None:
        """Copy elements ``[start, start + out.numel())`` into ``out`` (flat, contiguous)."""

    def write(self, start: int, source: Tensor) -> None:
        """Copy ``source`` (flat, contiguous) to the elements from ``start`` on."""


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """Room on a tier of RAM that is counted and has no memory of its own: values come in tensors made elsewhere."""

    tier: Tier
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class MemoryBuffer:
    """A home in RAM or on the device."""

    def __init__(self, tier: Tier, tensor: Tensor) -> None:
        self.tier = tier
        self.tensor: Tensor | None = tensor
        self.numel = tensor.numel()
        self.dtype = tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        assert self.tensor is not None
        out.copy_(self.tensor.narrow(0, start, out.numel()))  # not a slice: a short one would broadcast

    def write(self, start: int, source: Tensor) -> None:
        assert self.tensor is not None
        self.tensor.narrow(0, start, source.numel()).copy_(source)
