"""Which part of each chunk an owner keeps at home. Pure: no torch.

::

    the layout of a chunk, kept by three owners
    | slot 0        | slot 1 |//| slot 2                                   |
    |-- extent of 0 --------|-- extent of 1 --------|-- extent of 2 -------|
                            ^ a multiple of EXTENT_MULTIPLE

Masters, optimizer states and gradients of an extent are at home with its owner; the full copy is gathered from all.
Today a process owns everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from .layout import Slot, align

EXTENT_MULTIPLE = 256
"""Extents begin at multiples of this many elements, and so with a block of those that share a value."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One of those that keep the chunks together, each an extent of every chunk."""

    index: int = 0
    count: int = 1
    replicas: int = 1
    """How many times that is done: others keep the same extents, and all add to each other's gradients."""

    @property
    def is_alone(self) -> bool:
        """True if no other process trains the model."""
        return self.count == self.replicas == 1

    def extents(self, numel: int) -> tuple[range, ...]:
        """Cut a chunk of this length: an extent for each owner, in their order. The last ones may be empty."""
        if self.count == 1:
            return (range(numel),)
        share = align(-(-numel // self.count), EXTENT_MULTIPLE)
        return tuple(range(min(i * share, numel), min((i + 1) * share, numel)) for i in range(self.count))


SOLE = Owner()
"""Owns everything."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the values of one parameter are, of which there may be one for each block of elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    """Of the first one among those of the whole chunk."""
    parts: tuple[range, ...]
    """What each owner has of them, counted from the first one; empty where it has nothing."""
    own: range
    """What is at home here."""
    index: int
    """Where that begins in its buffer."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @staticmethod
    def of(slot: Slot, block_numel: int, extents: Sequence[range], owner: int) -> "Place":
        """The place of a parameter of a chunk that owners keep by these extents."""
        shape, stride = slot.shape, slot.stride
        if block_numel > 1:
            shape, stride = (-(-slot.numel // block_numel),), (1,)
        start, numel = slot.offset // block_numel, prod(shape)
        firsts = [extent.start // block_numel for extent in extents]
        stops = [-(-extent.stop // block_numel) if extent else 0 for extent in extents]
        parts = tuple(
            range(min(max(first - start, 0), numel), min(max(stop - start, 0), numel))
            for first, stop in zip(firsts, stops, strict=True)
        )
        own = parts[owner]
        return Place(shape, stride, start, parts, own, start + own.start - firsts[owner] if own else 0)
