"""RAM for homes in large blocks, each page-locked once."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .free_room import FreeRoom
from .numa import interleave

PAGE_BYTES = 4096
HOME_ALIGN_BYTES = 256
"""Copies are fastest between addresses that are multiples of this."""


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """One piece of memory (uint8). What is free of it is zero."""

    memory: Tensor
    room: FreeRoom


class HostArena:
    """Homes carved out of blocks. A block without homes is let go.

    Of blocks, because each registration with the device costs a call into the driver and an entry in its tables, and
    because the host allocator of torch would round every home up to a power of two.

    Parameters
    ----------
    new_block
        Gives zeros (uint8). A block lives as long as its last home.
    """

    def __init__(self, new_block: Callable[[int], Tensor]) -> None:
        self._new_block = new_block
        self._blocks: list[_Block] = []

    def reserve(self, nbytes: int) -> None:
        """Have a block with room for homes of ``nbytes`` together, each `padded`."""
        if padded(nbytes) > max((block.room.largest for block in self._blocks), default=0):
            memory = self._new_block(padded(nbytes))
            self._blocks.append(_Block(memory, FreeRoom(memory.numel())))

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros for a home (flat)."""
        nbytes = numel * dtype.itemsize
        if nbytes == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        self.reserve(nbytes)
        for block in self._blocks:
            if (offset := block.room.take(padded(nbytes))) is not None:
                return block.memory[offset : offset + nbytes].view(dtype)
        raise AssertionError("there is a block with room, or it has just been taken")

    def give_back(self, home: Tensor) -> None:
        """Have the room of a home for later ones. Nobody may hold it any more."""
        for block in self._blocks if home.numel() else ():
            offset = home.data_ptr() - block.memory.data_ptr()
            if 0 <= offset < block.memory.numel():
                home.zero_()
                block.room.give(offset, padded(home.nbytes))
                if block.room.is_whole:
                    self._blocks.remove(block)
                return


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
