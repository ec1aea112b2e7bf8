"""Memory for gradients that do not stay: a chunk borrows it at its first gradient and until its update is over.

Blocks are kept for the next chunk of about their size, so that in training nothing is asked of the system. Several
blocks and not one piece of memory: chunks come and go in about the order of the model, but not quite, and differ in
size, so that one piece would have holes too small for any. In RAM the largest ones go back to the system all the same:
an embedding's would lie idle from one backward to the next, through the moment that takes most memory.
"""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from gemini.errors import OutOfMemory, RankError

from .buffer import Buffer, MemoryBuffer
from .eviction import Eviction
from .gradient import GradientBuffer
from .layout import ChunkLayout, size_class
from .ledger import Ledger
from .memory import DeviceBackend
from .shared_gradient import Gradient
from .tier import Tier
from .tier_memory import TierMemory

logger = logging.getLogger(__name__)

KEPT_NBYTES = 32 << 20
"""Larger blocks of RAM are not kept: so does malloc with what is freed."""
WAITS = 3
"""How often an update that failed is waited for again: waiting has it tried again, and backward cannot be repeated."""


class Use(Protocol):
    """An update that still reads borrowed memory."""

    @property
    def is_over(self) -> bool: ...

    def wait(self) -> None:
        """Return when it is over; raise what stopped it, and have it tried again meanwhile."""


@dataclass(frozen=True, slots=True, eq=False)
class _Idle:
    """A block that is not lent."""

    block: MemoryBuffer
    last_use: Use | None
    """The update that has read it last. It is over, but for kernels that the device may still be at."""

    def taken(self) -> MemoryBuffer:
        """The block, for what this thread does next."""
        if self.last_use is not None:
            self.last_use.wait()
        return self.block


class GradientPool:
    """Lends gradient buffers, and takes them back when the updates that read them are over.

    Parameters
    ----------
    ledger, device
        The ledger, and the memory that blocks are made of.
    last_resort
        For gradients that find none there; None if there is no slower tier.
    eviction
        Evicts full copies that nothing uses, where these share their memory with gradients.
    """

    def __init__(
        self, ledger: Ledger, device: DeviceBackend, last_resort: TierMemory | None, eviction: Eviction
    ) -> None:
        self.growths = 0
        """How often the room that was set aside did not do."""
        self._ledger = ledger
        self._device = device
        self._last_resort = last_resort
        self._eviction = eviction
        self._room = dict.fromkeys(Tier, 0)
        self._idle: list[_Idle] = []
        self._lent: dict[int, MemoryBuffer] = {}
        """id of a buffer that was handed out -> the block that it lies in."""
        self._in_update: deque[tuple[GradientBuffer, Buffer, Use]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of memory set aside, lent or not."""
        return sum(self._room.values())

    def nbytes_on(self, tier: Tier) -> int:
        """Of them, those on one tier."""
        return self._room[tier]

    @property
    def blocks_nbytes(self) -> int:
        """Of them, those that have been in use, whose pages have come."""
        return sum(block.nbytes for block in (*(idle.block for idle in self._idle), *self._lent.values()))

    def reserve(self, tier: Tier, nbytes: int, what: str) -> None:
        """Set room aside.

        Raises
        ------
        OutOfMemory
            If the tier has none.
        """
        self._ledger.take(tier, nbytes, what)
        self._room[tier] += nbytes

    def borrow(self, layout: ChunkLayout, tier: Tier, dtype: torch.dtype) -> Buffer:
        """Memory for the gradient of a chunk. Waits for updates under way if there is none, and grows if that fails.

        Raises
        ------
        OutOfMemory
            If no tier has room for more. The message says how much more would do.
        """
        self._take_back()
        nbytes = size_class(layout.numel * dtype.itemsize)
        while (block := self._find(tier, nbytes)) is None:
            if self._in_update:
                self._wait()
                continue
            what = f"gradient of chunk {layout.index} (with {layout.slots[0].name}), beside those that wait for others,"
            self.growths += 1
            missing = nbytes + self._taken(tier) - self._room[tier]
            try:
                self._eviction.make_room_for(tier, missing)
                self.reserve(tier, missing, what)
            except OutOfMemory:
                if self._last_resort is None:
                    raise
                return self._last_resort.allocate(layout.numel, dtype, what)  # stays the chunk's
        assert block.tensor is not None
        part = MemoryBuffer(tier, block.tensor[: layout.numel * dtype.itemsize].view(dtype))
        self._lent[id(part)] = block
        return part

    def _find(self, tier: Tier, nbytes: int) -> MemoryBuffer | None:
        """A block of just this size: one that is idle, or a new one, for which others may have to go."""
        for i, idle in enumerate(self._idle):
            if (idle.block.tier, idle.block.nbytes) == (tier, nbytes):
                return self._idle.pop(i).taken()
        if nbytes + self._taken(tier) > self._room[tier]:
            return None
        others = [idle for idle in self._idle if idle.block.tier is tier]
        while nbytes + self._taken(tier) + sum(idle.block.nbytes for idle in others) > self._room[tier]:
            idle = others.pop()
            self._idle.remove(idle)
            self._device.release(idle.taken())
        return self._device.home(tier, nbytes, torch.uint8)

    def _taken(self, tier: Tier) -> int:
        return sum(block.nbytes for block in self._lent.values() if block.tier is tier)

    def retire(self, gradient: GradientBuffer, use: Use) -> None:
        """Take back what was lent to ``gradient`` once ``use`` is over."""
        assert gradient.buffer is not None
        self._in_update.append((gradient, gradient.buffer, use))
        gradient.give_up()

    def release(self, gradient: Gradient, use: Use | None = None) -> None:
        """Take back the memory of a gradient that is not wanted any more, once ``use`` is over."""
        if isinstance(gradient, GradientBuffer) and gradient.is_borrowed:
            if use is not None:
                self.retire(gradient, use)
            elif (buffer := gradient.give_up()) is not None:
                self._end_loan(gradient, buffer, None)

    def _end_loan(self, gradient: GradientBuffer, buffer: Buffer, use: Use | None) -> None:
        gradient.detach(buffer)
        block = self._lent.pop(id(buffer))
        if self._device.is_ram and block.nbytes > KEPT_NBYTES:
            self._device.release(block)
        else:
            self._idle.append(_Idle(block, use))

    def take_all_back(self) -> None:
        """Take back what is in use, when it no longer is: nothing will be borrowed for a while."""
        while self._in_update:
            self._in_update[0][2].wait()
            self._end_loan(*self._in_update.popleft())

    def let_go(self) -> None:
        """Give the memory of blocks that nobody has borrowed back to the system. They are made again when needed."""
        self.take_all_back()
        while self._idle:
            self._device.release(self._idle.pop().taken())

    def _take_back(self) -> None:
        while self._in_update and self._in_update[0][2].is_over:
            self._end_loan(*self._in_update.popleft())

    def _wait(self) -> None:
        for attempt in range(1, WAITS + 1):
            try:
                self._in_update[0][2].wait()
                break
            except RankError:
                raise  # it has waited for other ranks as long as it may
            except Exception as error:
                if attempt == WAITS:
                    raise
                logger.warning("an update within backward is tried again: %s", error)
        self._take_back()
