"""A part of a tensor's memory as boxes of the tensor. Pure: no torch.

::

    a tensor of 4 x 5 in rows, and elements 3 to 17 of its memory
    . . . x x      head: a box of 1 x 2 at (0, 3)
    x x x x x      rows: a box of 2 x 5 at (1, 0)
    x x x x x
    x x . . .      tail: a box of 1 x 2 at (3, 0)

Chunks are cut into extents wherever their middle is; `torch.distributed.checkpoint` describes parts by offsets and
sizes. Of a tensor of n dimensions a part of the memory is at most 2 n - 1 boxes, and each box is one piece of memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor, whose elements follow each other in the tensor's memory."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    """Where its elements begin in the memory of the tensor."""
    order: tuple[int, ...]
    """Its dimensions from the outermost to the innermost in memory."""

    @property
    def numel(self) -> int:
        return prod(self.sizes)


def boxes(shape: Sequence[int], stride: Sequence[int], part: range) -> list[Box]:
    """The boxes that a part of a dense tensor's memory is made of, in the order of memory.

    Parameters
    ----------
    shape, stride
        Of the tensor; any order of dimensions.
    part
        Elements, counted from the first one of the tensor.
    """
    order = tuple(sorted(range(len(shape)), key=lambda dim: -stride[dim]))
    places = [order.index(dim) for dim in range(len(shape))]
    return [
        Box(tuple(offsets[i] for i in places), tuple(sizes[i] for i in places), start, order)
        for offsets, sizes, start in _cut([shape[dim] for dim in order], part.start, part.stop)
    ]


_Cut = tuple[tuple[int, ...], tuple[int, ...], int]


def _cut(sizes: Sequence[int], start: int, stop: int, first: int = 0) -> Iterator[_Cut]:
    """Offsets, sizes and start of the boxes of a tensor in rows; ``first`` is where its memory begins."""
    if start >= stop:
        return
    if not sizes:
        yield (), (), first
        return
    row = prod(sizes[1:])
    top, bottom = -(-start // row), stop // row
    if top > bottom:  # within one row
        yield from _row(sizes, bottom, start - bottom * row, stop - bottom * row, first)
        return
    yield from _row(sizes, top - 1, start - (top - 1) * row, row, first)
    if bottom > top:
        zeros = (0,) * (len(sizes) - 1)
        yield (top, *zeros), (bottom - top, *sizes[1:]), first + top * row
    yield from _row(sizes, bottom, 0, stop - bottom * row, first)


def _row(sizes: Sequence[int], index: int, start: int, stop: int, first: int) -> Iterator[_Cut]:
    row = prod(sizes[1:])
    for offsets, inner, begin in _cut(sizes[1:], start, stop, first + index * row):
        yield (index, *offsets), (1, *inner), begin
