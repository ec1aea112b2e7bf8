"""Moving chunks ahead of use and out of the way, by the plan of the cycle."""

from collections.abc import Iterator, Mapping, Sequence

from ..chunk import Chunk, ChunkManager, Tier
from ..errors import is_out_of_memory
from ..planning.cycle import Cycle
from ..planning.planner import Planner
from ..planning.trace import Moment, Trace
from ..units.units import Units


class Pacing:
    """Follows the plan of the cycle under way, and has plans made of what was seen.

    Parameters
    ----------
    manager, units
        The chunks, and what brackets their uses.
    depth
        How many chunks may be on their way ahead of use.
    """

    def __init__(self, manager: ChunkManager, units: Units, depth: int) -> None:
        self.cycle = Cycle()
        self._manager = manager
        self._units = units
        self._depth = depth
        self._pool_growths = 0
        """How often the gradients' room had grown when the plans were made."""

    def evict(self, indices: Sequence[int]) -> None:
        """Free full copies that the plan has no use for soon."""
        for index in indices:
            chunk = self._manager.chunks[index]
            if chunk.is_idle:
                self._manager.evict(chunk)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start to move what the plan needs next, where there is room for it."""
        for index in indices:
            chunk = self._manager.chunks[index]
            if not chunk.is_resident and self._manager.ledger.free(Tier.DEVICE) >= chunk.full_nbytes:
                try:
                    self._manager.fetch(chunk, background=True)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    return  # it was only for speed; the unit that needs the chunk will make room

    def begin_cycle(self, with_gradients: bool) -> None:
        """A cycle begins: plan from what is there."""
        if self._manager.gradient_pool.growths > self._pool_growths:
            self._pool_growths = self._manager.gradient_pool.growths
            self.replan()
        resident = [chunk.index for chunk in self._manager.chunks if chunk.is_resident]
        self.cycle.restart(with_gradients, self._planner_of, resident)

    def prefetch_next_cycle(self) -> None:
        """Start the first fetches of the next training cycle behind the optimizer's updates."""
        actions = self.cycle.between()
        self.evict(actions.evict)
        self.prefetch(actions.prefetch)

    def replan(self) -> None:
        """Make every plan anew: the room for full copies, or what they take, has changed."""
        self.cycle.replan(self._planner_of)

    def keeps(self, chunk: Chunk) -> bool:
        """True if the next cycle will find the full copy that a chunk has now, as far as the plan says."""
        return self.cycle.keeps(chunk.index)

    def use_order(self) -> dict[int, int]:
        """Chunk index -> rank in the order of first use in a training cycle (by index while unknown)."""
        planner = self.cycle.expected(with_gradients=True)
        used = planner.first_uses if planner is not None else ()
        order = dict.fromkeys((*used, *range(len(self._manager.chunks))))
        return {index: rank for rank, index in enumerate(order)}

    def least_bytes(self, other: Mapping[int, int]) -> int:
        """What one moment would need at least if some full copies took other bytes; all of them before the first.

        Parameters
        ----------
        other
            Chunk index -> bytes.
        """
        nbytes = [other.get(chunk.index, chunk.full_nbytes) for chunk in self._manager.chunks]
        return max((sum(nbytes[c] for c in moment.in_use) for moment in self._moments()), default=sum(nbytes))

    def seen(self) -> list[frozenset[int]]:
        """The chunks in use at each of the moments seen so far."""
        return [frozenset(moment.in_use) for moment in self._moments()]

    @property
    def done(self) -> float:
        """The part of its units that the cycle under way has entered, from 0 to 1."""
        entered = self.cycle.units()
        units = {unit.index for unit in self._units.all if unit.chunks and not unit.is_joined}
        if not units or any(self._units.all[index].is_joined for index in entered):
            return 1.0
        return len(entered & units) / len(units)

    def seen_bytes(self) -> int:
        """What one of the moments seen so far needs at least; 0 before the first."""
        chunks, units = self._manager.chunks, self._units.all
        new = [moment for moment in self.cycle.unplanned() if not units[moment.unit].is_joined]
        needs = [sum(chunks[index].full_nbytes for index in moment.in_use) for moment in new]
        return max((*needs, *(planner.least_bytes for planner in self.cycle.planners())), default=0)

    def _moments(self) -> Iterator[Moment]:
        """The moments known, without those of units that stand for several."""
        return (moment for moment in self.cycle.moments() if not self._units.all[moment.unit].is_joined)

    def _planner_of(self, trace: Trace) -> Planner:
        manager = self._manager
        chunks = [chunk for chunk in manager.chunks if not chunk.full_is_home]
        nbytes = {chunk.index: chunk.full_nbytes for chunk in chunks}
        # Where the update runs on the host, it cannot refresh full copies on a device, and they are evicted instead.
        lost = [chunk.index for chunk in chunks if chunk.is_trainable and not chunk.plan.update_reaches_full]
        capacity = manager.ledger.free(Tier.DEVICE) + manager.full_copies.nbytes
        joined = {unit.index for unit in self._units.all if unit.is_joined}
        return Planner(trace, nbytes, capacity, self._depth, lost, joined)
