"""What the tiers may hold changes: somebody says so, or memory has run out."""

from collections.abc import Mapping

from ..chunk import ChunkManager, GradientTensors, Tier
from ..errors import OutOfMemory, is_out_of_memory
from ..packing.packing import Packing
from .device_room import DeviceRoom
from .home_room import HomeRoom
from .listener import Listener
from .pacing import Pacing
from .sampling import Sampling


class Memory:
    """Gives tiers other capacities, and has all that depends on them follow.

    Parameters
    ----------
    manager, device, homes
        The chunks, and what sizes the room for their full copies and for their homes.
    pacing, sampling, listener
        Plans the moves, measures what else is in memory, and hears of it.
    """

    def __init__(
        self,
        manager: ChunkManager,
        device: DeviceRoom,
        homes: HomeRoom,
        pacing: Pacing,
        sampling: Sampling,
        listener: Listener,
    ) -> None:
        self._manager = manager
        self._device = device
        self._homes = homes
        self._pacing = pacing
        self._sampling = sampling
        self._listener = listener

    @property
    def packing(self) -> Packing:
        """The plans of the chunks, as they are now."""
        return self._homes.packing

    def adopt(self, packing: Packing) -> None:
        """Some chunks have other plans now."""
        self._homes.adopt(packing)
        self.displaced(packing)

    def displaced(self, packing: Packing) -> None:
        """Homes lie elsewhere for a while, and will come back to where they were."""
        self._sampling.profile.forget_training()
        self._pacing.replan()
        self._listener.rebuilt(packing)

    def resize(self, capacities: Mapping[Tier, int]) -> None:
        """See `Engine.resize`. Nothing uses full copies but what code outside of the model holds."""
        self._move(capacities)
        if Tier.DEVICE in capacities:
            self._device.limit(capacities[Tier.DEVICE])

    def _move(self, capacities: Mapping[Tier, int]) -> None:
        before = self._home_ram_bytes
        try:
            has_moved = self._homes.resize(capacities)
        finally:
            self._sampling.homes_moved(self._home_ram_bytes - before)
        self._pacing.replan()
        if has_moved:
            self._listener.rebuilt(self.packing)

    @property
    def _home_ram_bytes(self) -> int:
        """What homes, and room set aside beside them, take of RAM."""
        manager, is_ram = self._manager, self._manager.device.is_ram
        pools = {manager.ledger.memory.pool(tier) for tier in (Tier.DEVICE, Tier.HOST)}
        used = sum(manager.ledger.used(pool) for pool in pools if pool is Tier.HOST or is_ram)
        gradients = (chunk.gradient for chunk in manager.chunks)
        in_tensors = sum(each.buffer.nbytes for each in gradients if isinstance(each, GradientTensors))
        return used - in_tensors - (manager.full_copies.nbytes if is_ram else 0)

    def explain(self, error: BaseException, torn: str = "") -> None:
        """If the model's own computation ran out of memory: leave it more from now on, and say so.

        Parameters
        ----------
        torn
            What it has left half done, in words.

        Raises
        ------
        OutOfMemory
            From ``error``, if that is what happened. An `OutOfMemory` of ours says it all already.
        """
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            return
        told = self._device.give_up(error, self._pacing.seen_bytes(), torn)
        self._pacing.replan()
        raise told from error
