"""Memory of the tiers: one interface to allocate homes and to free them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from .buffer import Buffer, DividedBuffer, MemoryBuffer, Room
from .disk import DiskBackend
from .ledger import Ledger
from .memory import DeviceBackend
from .tier import Tier


class TierMemory(Protocol):
    """What homes on one tier are made of. It counts them in the ledger itself."""

    tier: Tier
    granularity: int
    """Bytes. What an allocation takes is rounded up to a multiple of it, in the ledger too."""

    def allocate(self, numel: int, dtype: torch.dtype, what: str) -> Buffer:
        """``numel`` zeros, for what the user knows as ``what``.

        Raises
        ------
        OutOfMemory, OffloadError
            If there is no room; nothing is counted then.
        """

    def free(self, buffer: Buffer) -> None:
        """Have the room of a buffer for later ones. No read or write of it may be under way, and none may follow."""


class CountedMemory:
    """The `TierMemory` of DEVICE or HOST."""

    granularity = 1

    def __init__(self, tier: Tier, ledger: Ledger, device: DeviceBackend) -> None:
        self.tier = tier
        self._ledger = ledger
        self._device = device

    def allocate(self, numel: int, dtype: torch.dtype, what: str) -> MemoryBuffer:
        nbytes = numel * dtype.itemsize
        self._ledger.take(self.tier, nbytes, what)
        try:
            return self._device.home(self.tier, numel, dtype)
        except BaseException:
            self._ledger.give(self.tier, nbytes)
            raise

    def free(self, buffer: Buffer) -> None:
        assert isinstance(buffer, MemoryBuffer) and buffer.tier is self.tier
        self._device.release(buffer)
        self._ledger.give(self.tier, buffer.nbytes)


class TierMemories:
    """The memory of each tier, fastest first; of DISK only where there is a folder."""

    def __init__(self, ledger: Ledger, device: DeviceBackend, disk: DiskBackend | None) -> None:
        memories: list[TierMemory] = [CountedMemory(tier, ledger, device) for tier in (Tier.DEVICE, Tier.HOST)]
        self._ledger = ledger
        self._memories = {memory.tier: memory for memory in (*memories, *([] if disk is None else [disk]))}
        self._allocated: list[Buffer | Room] | None = None
        """What `all_or_nothing` would have to free."""

    def allocate(self, tier: Tier, numel: int, dtype: torch.dtype, what: str) -> Buffer:
        """See `TierMemory.allocate`."""
        buffer = self._memories[tier].allocate(numel, dtype, what)
        if self._allocated is not None:
            self._allocated.append(buffer)
        return buffer

    def allocate_parts(self, parts: Sequence[tuple[Tier, int]], dtype: torch.dtype, what: str) -> Buffer:
        """Zeros in parts on these tiers, of these bytes: all of them or none. See `TierMemory.allocate`."""
        found: list[Buffer] = []
        try:
            for tier, nbytes in parts:
                found.append(self.allocate(tier, nbytes // dtype.itemsize, dtype, what))
        except BaseException:
            if self._allocated is None:
                for buffer in found:
                    self.free(buffer)
            raise
        return found[0] if len(found) == 1 else DividedBuffer(*found)

    def reserve(self, tier: Tier, numel: int, dtype: torch.dtype, what: str) -> Room:
        """Room on a tier of RAM for ``numel`` elements that come in tensors made elsewhere. Raises as `allocate`."""
        room = Room(tier, numel, dtype)
        self._ledger.take(tier, room.nbytes, what)
        if self._allocated is not None:
            self._allocated.append(room)
        return room

    def has(self, memory: TierMemory) -> bool:
        """True if homes on the tier of ``memory`` are in it."""
        return self._memories.get(memory.tier) is memory

    def free(self, buffer: Buffer | Room) -> None:
        """See `TierMemory.free`."""
        for part in buffer.parts:
            if isinstance(part, Room):
                self._ledger.give(part.tier, part.nbytes)
            else:
                self._memories[part.tier].free(part)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Free what is allocated inside if it ends with an error."""
        allocated: list[Buffer | Room] = []
        self._allocated = allocated
        try:
            yield
        except BaseException:
            for buffer in allocated:
                self.free(buffer)
            raise
        finally:
            self._allocated = None
