"""RAM for homes in one piece, page-locked once."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .numa import interleave

PAGE_BYTES = 4096
HOME_ALIGN_BYTES = 256
"""Copies are fastest between addresses that are multiples of this."""


class HostArena:
    """Homes carved out of one block, one after the other, never given back one by one.

    One block, because each registration with the device costs a call into the driver and an entry in its tables, and
    because the host allocator of torch would round every home up to a power of two.

    Parameters
    ----------
    nbytes
        Room for all homes, each rounded up to `HOME_ALIGN_BYTES`.
    lock
        Page-locks an address range; False where the system does not allow it: the arena is then ordinary RAM.
    unlock
        Takes the address of a range that was locked; called before the memory goes back to the system.
    """

    def __init__(self, nbytes: int, lock: Callable[[int, int], bool], unlock: Callable[[int], None]) -> None:
        room = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        # Zeros that the system gives page by page. Whole pages of our own: locking affects pages.
        block = torch.zeros(room + PAGE_BYTES, dtype=torch.uint8, device="cpu")
        skip = -block.data_ptr() % PAGE_BYTES
        self._free = block[skip : skip + room]
        address = self._free.data_ptr()
        interleave(address, room)  # before locking, which brings the pages
        self.is_locked = room > 0 and lock(address, room)
        if self.is_locked:
            # The storage lives as long as the last home in it.
            weakref.finalize(block.untyped_storage(), unlock, address)

    @property
    def free_bytes(self) -> int:
        return self._free.numel()

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros for a home (flat)."""
        nbytes = numel * dtype.itemsize
        assert nbytes <= self.free_bytes, "the arena was made for fewer homes"
        home, self._free = self._free[:nbytes], self._free[padded(nbytes) :]
        return home.view(dtype)


def padded(nbytes: int) -> int:
    """What a home of so many bytes takes in an arena."""
    return -(-nbytes // HOME_ALIGN_BYTES) * HOME_ALIGN_BYTES
