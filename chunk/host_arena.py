"""RAM for homes in large blocks, each page-locked once."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .numa import interleave

PAGE_BYTES = 4096
HOME_ALIGN_BYTES = 256
"""Copies are fastest between addresses that are multiples of this."""


class HostArena:
    """Homes carved out of a block, one after the other, never given back one by one.

    Of a block, because each registration with the device costs a call into the driver and an entry in its tables, and
    because the host allocator of torch would round every home up to a power of two.

    Parameters
    ----------
    new_block
        Gives zeros (uint8). A block lives as long as its last home.
    """

    def __init__(self, new_block: Callable[[int], Tensor]) -> None:
        self._new_block = new_block
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def reserve(self, nbytes: int) -> None:
        """Take a block for homes of ``nbytes`` together, each `padded`."""
        self._free = self._new_block(padded(nbytes))

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros for a home (flat)."""
        nbytes = numel * dtype.itemsize
        if nbytes > self._free.numel():
            self.reserve(nbytes)
        home, self._free = self._free[:nbytes], self._free[padded(nbytes) :]
        return home.view(dtype)


def registered_block(nbytes: int, lock: Callable[[int, int], bool], unlock: Callable[[int], None]) -> Tensor:
    """Zeros (uint8) in whole pages of their own, page-locked as one range.

    Parameters
    ----------
    lock
        Page-locks an address range; False where the system does not allow it: the block is then ordinary RAM.
    unlock
        Takes the address of a range that was locked; called before the memory goes back to the system.
    """
    room = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    # Zeros that the system gives page by page. Whole pages of our own: locking affects pages.
    memory = torch.zeros(room + PAGE_BYTES, dtype=torch.uint8)
    skip = -memory.data_ptr() % PAGE_BYTES
    block = memory[skip : skip + room]
    address = block.data_ptr()
    interleave(address, room)  # before locking, which brings the pages
    if room > 0 and lock(address, room):
        weakref.finalize(memory.untyped_storage(), unlock, address)
    return block


def padded(nbytes: int) -> int:
    """Bytes that a home of ``nbytes`` takes in an arena."""
    return -(-nbytes // HOME_ALIGN_BYTES) * HOME_ALIGN_BYTES
