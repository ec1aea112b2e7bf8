"""Blocks of RAM between the disk and everything else."""

import mmap
from collections.abc import Iterator
from queue import SimpleQueue

import torch
from torch import Tensor


class Staging:
    """A fixed set of equal fp32 blocks in RAM that worker threads borrow.

    Each begins with a page, as homes on disk do: what lies at the same offset from a page in both can be moved around
    the page cache (see `DiskFile`).
    """

    def __init__(self, count: int, block_numel: int, pin: bool = False) -> None:
        self.count = count
        self.block_numel = block_numel
        self.nbytes = count * block_numel * 4
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(count):
            self._free.put(_block(block_numel, pin))

    def borrow(self) -> Tensor:
        """A block; blocks until one is free (holders never wait for another block)."""
        return self._free.get()

    @property
    def free_count(self) -> int:
        """Blocks that are free, if nobody borrows and gives back just now."""
        return self._free.qsize()

    def give_back(self, block: Tensor) -> None:
        self._free.put(block)


def _block(numel: int, pin: bool) -> Tensor:
    if pin:
        return torch.empty(numel, dtype=torch.float32, device="cpu", pin_memory=True)  # of whole pages
    return torch.frombuffer(mmap.mmap(-1, numel * 4), dtype=torch.float32).zero_()  # its pages come now


def pieces(start: int, stop: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """Cut ``[start, stop)`` at multiples of ``numel``: start and stop of each piece, and its offset from the multiple.

    Put at that offset into a block of ``numel`` elements, a piece lies in memory as its home lies in the file, and
    pieces that were written one by one are read as a whole.
    """
    while start < stop:
        offset = start % numel
        end = min(start - offset + numel, stop)
        yield start, end, offset
        start = end
