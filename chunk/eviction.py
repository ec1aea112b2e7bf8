"""Eviction: which full copies go from DEVICE when another one, or a gradient, needs the memory."""

import logging
from collections.abc import Callable, Sequence

from gemini.errors import is_out_of_memory

from .chunk import Chunk
from .edits import has_to_stay
from .full_copies import FullCopies
from .ledger import Ledger
from .shortage import no_room
from .snapshots import Snapshots
from .state import ChunkState
from .tier import Tier

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""The first error may be an old one. Its wait has the update tried again at once, before there is more room."""


class Eviction:
    """Evicts the least recently used full copies within the capacity of DEVICE, and beyond it what is not in use.

    Parameters
    ----------
    ledger, full_copies
        The capacities, and what takes of them.
    headroom
        Bytes that DEVICE has beyond its capacity, as far as the system can tell. What code outside of units holds may
        take of it.
    snapshots
        Their copies go when nothing else can.
    """

    def __init__(
        self, ledger: Ledger, full_copies: FullCopies, headroom: Callable[[], int], snapshots: Snapshots
    ) -> None:
        self.headroom = headroom
        self._snapshots = snapshots
        self._ledger = ledger
        self._full_copies = full_copies
        self._last_used: dict[int, int] = {}
        """Chunk index -> the moment when it was pinned last."""

    def note_use(self, chunk: Chunk, moment: int) -> None:
        """A chunk is pinned."""
        self._last_used[chunk.layout.index] = moment  # at each visit: `index` is a call more

    def make_room(self, chunk: Chunk, keep: Sequence[Chunk] = (), overdraw: bool = False) -> None:
        """Evict others than those of ``keep`` until the full copy of ``chunk`` fits.

        What does not fit beside memory that is lent may go beyond the capacity, if the system has as much; with
        ``overdraw`` whatever does not fit.

        Raises
        ------
        OutOfMemory
            If it does not fit beside what is in use and what is to be kept.
        """
        while (missing := chunk.full_nbytes - self._ledger.free(Tier.DEVICE)) > 0:
            if not self._evict_one(keep) and not self._snapshots.give_room():
                resident = tuple(self._full_copies.resident)
                lent = sum(c.full_nbytes for c in resident if c.is_idle and has_to_stay(c))
                if not (overdraw or lent >= missing) or self.headroom() < missing:
                    raise no_room(self._ledger, resident, chunk, keep)
                self._ledger.overdraw(Tier.DEVICE, missing)

    def make_room_for(self, tier: Tier, nbytes: int) -> None:
        """Evict until ``nbytes`` of a tier are free, or nothing idle is left where that would help."""
        if self._ledger.memory.shares(tier, Tier.DEVICE):
            while self._ledger.free(tier) < nbytes and self._evict_one():
                pass
        if self._ledger.free(tier) < nbytes:
            self._snapshots.give_room()

    def repay(self) -> None:
        """Give back what went beyond the capacity of DEVICE, as far as nobody holds it."""
        while (overdraft := self._ledger.overdraft(Tier.DEVICE)) > 0:
            if self._ledger.free(Tier.DEVICE) >= overdraft or not self._evict_one():
                self._ledger.repay(Tier.DEVICE)
                return

    def evict_idle(self, keep: Sequence[Chunk] = ()) -> None:
        """Free every full copy that nothing uses, but for those of ``keep``."""
        for chunk in [chunk for chunk in self._full_copies.taken if chunk not in keep]:
            self._full_copies.reclaim(chunk)
        for chunk in self._idle(keep):
            try:
                self._full_copies.arrive(chunk)
                self._full_copies.evict(chunk)
            except BaseException as error:
                if not is_out_of_memory(error):
                    raise
                # A move has given its memory back; behind an update that is tried again the full copy stays.

    def clear(self, keep: Sequence[Chunk] = ()) -> None:
        """The same, and their memory goes back to the system."""
        self.evict_idle(keep)
        self._full_copies.trim()

    def settle(self, chunk: Chunk, keep: Sequence[Chunk] = ()) -> None:
        """Wait for the update of a chunk; one that ran out of memory is tried again in the room of all that is idle."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                chunk.settle()
                return
            except BaseException as error:
                if attempt == _ATTEMPTS or not is_out_of_memory(error):
                    raise
                logger.info("an update is tried again: %s", error)
                self.clear(keep)

    def _evict_one(self, keep: Sequence[Chunk] = ()) -> bool:
        """Evict the least recently used full copy, one that is arriving last; False if all are in use or ``keep``.

        An update that fills memory before a step has asked for it loses that after all of them.
        """
        idle = self._idle(keep)
        if idle:
            oldest = min(idle, key=lambda c: (c.state is ChunkState.FETCHING, self._last_used.get(c.index, 0), c.index))
            self._full_copies.evict(oldest)
            return True
        filled = next((chunk for chunk in self._full_copies.taken if chunk not in keep), None)
        return filled is not None and self._full_copies.reclaim(filled)

    def _idle(self, keep: Sequence[Chunk]) -> list[Chunk]:
        return [
            chunk
            for chunk in self._full_copies.resident
            if (chunk.is_idle or chunk.state is ChunkState.FETCHING) and chunk not in keep and not has_to_stay(chunk)
        ]
