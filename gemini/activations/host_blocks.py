"""RAM for what leaves a device, in large blocks that are page-locked once."""

from collections.abc import Callable

from torch import Tensor

from ..chunk import FreeRoom, Ledger, Tier
from ..errors import OutOfMemory
from ..sizes import format_bytes

BLOCK_BYTES = 64 << 20
ALIGN_BYTES = 4096
"""What goes on to a disk, and comes from there, lies in a page as it does in the file."""


class _Block:
    """One piece of memory (uint8), and what is free of it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._room = FreeRoom(memory.numel())
        self._was_used = True
        """Since the last `is_idle`."""

    def take(self, nbytes: int) -> Tensor | None:
        offset = self._room.take(_padded(nbytes))
        if offset is None:
            return None
        self._was_used = True
        return self.memory[offset : offset + nbytes]

    def give_back(self, part: Tensor) -> bool:
        """False if the part is another block's."""
        offset = part.data_ptr() - self.memory.data_ptr()
        if not 0 <= offset < self.memory.numel():
            return False
        self._room.give(offset, _padded(part.numel()))
        return True

    def is_idle(self) -> bool:
        """True if nothing of it has been used since the last time that this was asked."""
        was_used, self._was_used = self._was_used, False
        return self._room.is_whole and not was_used


class HostBlocks:
    """Parts of blocks. A block stays while it is used from step to step: page-locking takes longer than copying.

    Parameters
    ----------
    new_block
        Gives memory (uint8).
    ledger
        Asked for each block.
    limit_bytes
        The most that all blocks together may take.
    """

    def __init__(self, new_block: Callable[[int], Tensor], ledger: Ledger, limit_bytes: int) -> None:
        self._new_block = new_block
        self._ledger = ledger
        self._limit_bytes = limit_bytes
        self._blocks: list[_Block] = []

    def take(self, nbytes: int) -> Tensor:
        """A part of ``nbytes``, with any values.

        Raises
        ------
        OutOfMemory
            If there is no room for another block.
        """
        for block in self._blocks:
            if (part := block.take(nbytes)) is not None:
                return part
        part = self._grow(_padded(nbytes)).take(nbytes)
        assert part is not None, "the new block has room"
        return part

    def _grow(self, nbytes: int) -> _Block:
        left = self._limit_bytes - sum(block.memory.numel() for block in self._blocks)
        left = min(left, self._ledger.free(Tier.HOST))
        if nbytes > left:
            raise OutOfMemory(
                f"host tier out of memory. Tensors saved for backward need {format_bytes(nbytes)}, "
                f"{format_bytes(max(left, 0))} are left of the {format_bytes(self._limit_bytes)} that they may take; "
                "set host_memory higher or offload_dir"
            )
        size = min(max(nbytes, BLOCK_BYTES), left)
        self._ledger.take(Tier.HOST, size, "tensors saved for backward")
        try:
            memory = self._new_block(size)
        except BaseException:
            self._ledger.give(Tier.HOST, size)
            raise
        self._blocks.append(block := _Block(memory))
        return block

    def give_back(self, part: Tensor) -> None:
        """Have a part for others. No copy may use it any more, but for those that later ones are put behind."""
        for block in self._blocks:
            if block.give_back(part):
                return
        raise AssertionError("it is a part of some block")

    def trim(self, before: Callable[[], None]) -> None:
        """Let go blocks of which nothing has been used since the last time; ``before`` waits for copies."""
        idle = [block for block in self._blocks if block.is_idle()]
        if idle:
            before()
        for block in idle:
            self._blocks.remove(block)
            self._ledger.give(Tier.HOST, block.memory.numel())


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
