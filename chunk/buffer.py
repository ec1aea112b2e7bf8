"""One buffer of one chunk: a flat run of elements that can be read and written in parts, on one tier or on two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .tier import Tier


class Buffer(Protocol):
    """A home of a chunk.

    Attributes
    ----------
    tier
        Where it is; of one that is divided the slower tier.
    tensor
        The memory itself (flat), or None where some of it is in a file.
    """

    tier: Tier
    numel: int
    dtype: torch.dtype
    tensor: Tensor | None

    @property
    def nbytes(self) -> int: ...

    @property
    def parts(self) -> "Sequence[Buffer]":
        """The buffers on one tier each that it consists of, in order."""
        return (self,)

    def in_memory(self, start: int, stop: int) -> Tensor | None:
        """The elements ``[start, stop)`` themselves (flat), or None where some of them are in a file."""
        return None if self.tensor is None else self.tensor[start:stop]

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

    @property
    def parts(self) -> "tuple[Room]":
        return (self,)


class MemoryBuffer(Buffer):
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


class DividedBuffer(Buffer):
    """A home whose first part is one buffer and whose rest is another one. See `Divided`."""

    tensor: Tensor | None = None

    def __init__(self, first: Buffer, rest: Buffer) -> None:
        self.tier = rest.tier
        self.numel = first.numel + rest.numel
        self.dtype = first.dtype
        self._first, self._rest = first, rest

    @property
    def nbytes(self) -> int:
        return self._first.nbytes + self._rest.nbytes

    @property
    def parts(self) -> Sequence[Buffer]:
        return (self._first, self._rest)

    def in_memory(self, start: int, stop: int) -> Tensor | None:
        cut = self._first.numel
        if stop <= cut:
            return self._first.in_memory(start, stop)
        return self._rest.in_memory(start - cut, stop - cut) if start >= cut else None

    def read(self, start: int, out: Tensor) -> None:
        ahead = self._ahead(start, out.numel())
        if ahead:
            self._first.read(start, out[:ahead])
        if ahead < out.numel():
            self._rest.read(start + ahead - self._first.numel, out[ahead:])

    def write(self, start: int, source: Tensor) -> None:
        ahead = self._ahead(start, source.numel())
        if ahead:
            self._first.write(start, source[:ahead])
        if ahead < source.numel():
            self._rest.write(start + ahead - self._first.numel, source[ahead:])

    def _ahead(self, start: int, numel: int) -> int:
        """How many of the elements from ``start`` on are in the first part."""
        return min(max(self._first.numel - start, 0), numel)
