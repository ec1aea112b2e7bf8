"""Room in chunks for a running average: which tier each part lies on, and what it begins with."""

from collections.abc import Sequence
from dataclasses import replace

from ..chunk import MASTER, BufferSpec, Chunk, ChunkManager, ChunkPlan, Tier, read_part, write_part
from ..errors import OutOfMemory
from ..sizes import format_bytes
from ..updates.averages import PIECE_NUMEL, Average
from ..updates.updater import Updater


class AverageRoom:
    """Makes room for an average beside the masters that it follows, and frees it.

    Parameters
    ----------
    manager, updater
        Has the chunks, and updates them.
    """

    def __init__(self, manager: ChunkManager, updater: Updater) -> None:
        self._manager = manager
        self._updater = updater

    def make(self, average: Average, ring_bytes: int) -> list[ChunkPlan]:
        """Give each chunk that is trained the average's buffer, filled with its masters. Returns the plans of now.

        Parameters
        ----------
        ring_bytes
            What full copies need at least.

        Raises
        ------
        OutOfMemory
            If a tier has no room; nothing has been changed then.
        """
        manager = self._at_rest("begin an average")
        spec = BufferSpec(average.name)
        chunks = [chunk for chunk in manager.chunks if chunk.is_trainable]
        tiers = self._tiers(chunks, spec, ring_bytes)
        plans = [
            replace(c.plan, averages=(*c.plan.averages, spec), tiers={**c.plan.tiers, spec.name: tiers[c]})
            for c in chunks
        ]
        with manager.together.changing(f"the beginning of the average {average.name}"):
            manager.rehoming.extend(plans)
            for chunk in chunks:
                _fill(chunk, spec.name)
        self._updater.averages.add(average)
        return plans

    def free(self, average: Average) -> list[ChunkPlan]:
        """Free the buffers of an average. Returns the plans of now."""
        manager = self._at_rest("end an average")
        chunks = [chunk for chunk in manager.chunks if average.name in chunk.specs]
        plans = [_without(chunk.plan, average.name) for chunk in chunks]
        with manager.together.changing(f"the end of the average {average.name}"):
            self._updater.averages.remove(average)
            manager.rehoming.shorten(plans)
        return plans

    def swap(self, average: Average) -> None:
        """Exchange the values of masters and average where they are at home; full copies are dropped, or follow.

        Raises
        ------
        RuntimeError
            While a forward runs.
        """
        full_copies, chunks = self._manager.full_copies, self._manager.chunks
        if any(chunk.pins for chunk in chunks):
            raise RuntimeError("an average cannot be swapped in or out while a forward or backward runs")
        with self._manager.together.changing(f"swapping the average {average.name}"):
            for chunk in (chunk for chunk in chunks if average.name in chunk.specs):
                full_copies.bring_home(chunk)
                if chunk.is_resident:
                    full_copies.evict(chunk)
                _swap(chunk, average.name)
                if chunk.is_resident and not chunk.full_is_home:  # somebody holds its memory
                    full_copies.fill_again(chunk)
                if chunk.loan is not None:
                    chunk.loan.remember_all()
        average.swap()

    def _at_rest(self, doing: str) -> ChunkManager:
        """The chunks, when nothing reads their homes."""
        self._manager.refuse_released(doing)
        self._manager.snapshots.rest()
        return self._manager

    def _tiers(self, chunks: Sequence[Chunk], spec: BufferSpec, ring_bytes: int) -> dict[Chunk, Tier]:
        """Beside the masters, which are read for it, or below; beside full copies, as many of them as can stay."""
        copies = sum(chunk.full_nbytes for chunk in self._manager.chunks)
        for kept in (copies, ring_bytes):
            if (found := self._placed(chunks, spec, kept)) is not None:
                return found
        whole, tier = sum(spec.nbytes(len(chunk.extent)) for chunk in chunks), Tier.HOST
        raise OutOfMemory(
            f"{tier.value} tier out of memory. A running average needs {format_bytes(whole)} beside the masters; set "
            f"{tier.value}_memory to more"
        )

    def _placed(self, chunks: Sequence[Chunk], spec: BufferSpec, kept_bytes: int) -> dict[Chunk, Tier] | None:
        """Where each part lies if full copies keep this room; None if it does not fit."""
        ledger, found = self._manager.ledger, {}
        free = {tier: ledger.free(tier) for tier in Tier}
        for tier in Tier:
            if tier is Tier.DEVICE or ledger.memory.shares(tier, Tier.DEVICE):
                free[tier] += self._manager.full_copies.nbytes - kept_bytes
        order = [Tier.DEVICE, Tier.HOST, *([Tier.DISK] if self._updater.can_stream else [])]
        for chunk in chunks:
            need = spec.nbytes(len(chunk.extent))
            below = order[order.index(chunk.tier) :] if chunk.tier in order else []
            place = next((tier for tier in below if free[tier] >= need), None)
            if place is None:
                return None
            found[chunk] = place
            for tier in Tier:
                if ledger.memory.shares(tier, place):
                    free[tier] -= need
        return found


def _fill(chunk: Chunk, name: str) -> None:
    """Have the average be what the masters are."""
    numel = len(chunk.extent)
    for start in range(0, numel, PIECE_NUMEL):
        count = min(PIECE_NUMEL, numel - start)
        write_part(chunk, name, start, read_part(chunk, MASTER, start, count).float())


def _swap(chunk: Chunk, name: str) -> None:
    numel = len(chunk.extent)
    for start in range(0, numel, PIECE_NUMEL):
        count = min(PIECE_NUMEL, numel - start)
        masters, averaged = (read_part(chunk, each, start, count) for each in (MASTER, name))
        write_part(chunk, MASTER, start, averaged)
        write_part(chunk, name, start, masters)


def _without(plan: ChunkPlan, name: str) -> ChunkPlan:
    averages = tuple(spec for spec in plan.averages if spec.name != name)
    return replace(plan, averages=averages, tiers={key: tier for key, tier in plan.tiers.items() if key != name})
