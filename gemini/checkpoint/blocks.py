"""A file's tensors cut into blocks, which threads move one by one between the file and where the values are.

::

    tensors   | a                                     | b | c | d               |
    blocks    | a[0:n]     | a[n:2n]    | a[2n:3n]   | a[3n:], b, c | d[0:n] |...      at most BLOCK_BYTES each
    runs      | what a thread takes at a time                                   |...      at most RUN_BYTES each

Memory for a block is all that a thread needs, however large a tensor is.
"""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .flat_values import FlatValues

BLOCK_BYTES = 1 << 20
RUN_BYTES = 16 << 20
_RUN_PARTS = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """Elements ``[start, stop)`` of a tensor, and where the file has them."""

    index: int
    """Of the tensor, in the file's header."""
    values: FlatValues
    start: int
    stop: int
    dtype: torch.dtype
    """In the file."""
    begin: int
    """First byte in the file."""

    @property
    def end(self) -> int:
        return self.begin + (self.stop - self.start) * self.dtype.itemsize

    @property
    def is_kept_so(self) -> bool:
        """True if the values are kept as the file has them."""
        return self.values.dtype == self.dtype

    @property
    def page_offset(self) -> int:
        """Where in a page the part should be that is read from the file."""
        return self.values.page_offset(self.start) if self.is_kept_so else 0


Block = list[Part]
"""Parts that follow each other in the file."""


def parts_to_write(index: int, values: FlatValues, dtype: torch.dtype, begin: int) -> Iterator[Part]:
    """Cut one tensor where blocks of the file begin."""
    step = BLOCK_BYTES // dtype.itemsize
    return _parts(index, values, dtype, begin, begin % BLOCK_BYTES // dtype.itemsize, step)


def parts_to_read(index: int, values: FlatValues, dtype: torch.dtype, begin: int) -> Iterator[Part]:
    """Cut one tensor where pages of its home begin."""
    step = BLOCK_BYTES // max(dtype.itemsize, values.dtype.itemsize)
    return _parts(index, values, dtype, begin, values.page_offset(0) // values.dtype.itemsize, step)


def _parts(index: int, values: FlatValues, dtype: torch.dtype, begin: int, offset: int, step: int) -> Iterator[Part]:
    """Parts of ``step`` elements; the first one has ``offset`` less. An empty tensor has none."""
    start, stop = 0, step - offset
    while start < values.numel:
        yield Part(index, values, start, min(stop, values.numel), dtype, begin + start * dtype.itemsize)
        start, stop = stop, stop + step


def runs_of(parts: Iterable[Part | None]) -> Iterator[list[Block]]:
    """Put parts, in the order of the file, together again; None among them ends a run."""
    run: list[Block] = []
    begin = end = count = 0
    for part in parts:
        if run and (part is None or part.end - begin > RUN_BYTES or count == _RUN_PARTS):
            yield run
            run, count = [], 0
        if part is None:
            continue
        if not run:
            begin = part.begin
        if run and part.begin == end and part.end - run[-1][0].begin <= BLOCK_BYTES:
            run[-1].append(part)
        else:
            run.append([part])
        end, count = part.end, count + 1
    if run:
        yield run


class BlockMemory:
    """Room for one block: in the file's form, and as the values are kept. Both begin with a page."""

    def __init__(self) -> None:
        self._filed = _pages(BLOCK_BYTES + mmap.PAGESIZE)
        self.room = _pages(BLOCK_BYTES + 2 * mmap.PAGESIZE)

    def filed(self, nbytes: int, page_offset: int) -> Tensor:
        """Bytes as the file has them, from this place in a page on."""
        return self._filed.narrow(0, page_offset, nbytes)


def _pages(nbytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
