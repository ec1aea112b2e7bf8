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
    def memory(self) -> Tensor | None:
        """The values themselves, if RAM has them as the file does."""
        memory = self.values.memory
        if memory is None or memory.dtype != self.dtype:
            return None
        return memory.narrow(0, self.start, self.stop - self.start)


Block = list[Part]
"""Parts that follow each other in the file."""


def parts_of(index: int, values: FlatValues, dtype: torch.dtype, begin: int) -> Iterator[Part]:
    """Cut one tensor where pages of its home end; an empty one has no parts."""
    step = BLOCK_BYTES // max(dtype.itemsize, values.dtype.itemsize)
    start, stop = 0, step - values.offset_in_page(0) // values.dtype.itemsize
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
    """Room for one block, twice: in the file's form, and as the values are kept. Of whole pages."""

    def __init__(self) -> None:
        self._areas = [
            torch.frombuffer(mmap.mmap(-1, BLOCK_BYTES + mmap.PAGESIZE), dtype=torch.uint8) for _ in range(2)
        ]

    def filed(self, nbytes: int, offset_in_page: int = 0) -> Tensor:
        """Bytes as the file has them."""
        return self._areas[0].narrow(0, offset_in_page, nbytes)

    def kept(self, numel: int, dtype: torch.dtype, offset_in_page: int = 0) -> Tensor:
        """Values as they are kept."""
        return self._areas[1].narrow(0, offset_in_page, numel * dtype.itemsize).view(dtype)
