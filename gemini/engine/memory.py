"""What the tiers may hold changes: somebody says so, or memory has run out."""

import gc
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace

from ..activations import Saving, passing_bytes
from ..chunk import ChunkManager, GradientTensors, MemoryMap, Tier
from ..errors import OffloadError, OutOfMemory, is_out_of_memory
from ..memory.foresight import Foresight, capacity_between_steps, lacking_for_backward
from ..memory.giving import Shortage, bytes_to_give, is_hopeless
from ..memory.non_model import Batch
from ..memory.shortage import Given, asked_bytes, out_of_memory
from ..memory.tracker import host_headroom
from ..packing.packing import Packing
from ..process_wide import return_freed_memory
from .device_room import DeviceRoom
from .home_room import HomeRoom
from .listener import Listener
from .pacing import Pacing
from .sampling import Sampling

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 1.0
"""Between two looks at what the system has: each takes some 0.2 ms of reading files."""


class Memory:
    """Gives tiers other capacities, and has all that depends on them follow.

    Parameters
    ----------
    manager, device, homes
        The chunks, and what sizes the room for their full copies and for their homes.
    pacing, sampling, listener
        Plans the moves, measures what else is in memory, and hears of it.
    saving
        What becomes of the tensors that forwards save.
    """

    def __init__(
        self,
        manager: ChunkManager,
        device: DeviceRoom,
        homes: HomeRoom,
        pacing: Pacing,
        sampling: Sampling,
        listener: Listener,
        saving: Saving,
    ) -> None:
        self._saving = saving
        self._manager = manager
        self._device = device
        self._homes = homes
        self._pacing = pacing
        self._sampling = sampling
        self._listener = listener
        self._saving = saving
        self._foresight = Foresight()
        self._most_bytes = manager.ledger.capacity(Tier.HOST)
        """What HOST may hold at most: what it was given."""
        self._is_exhausted = False
        """No homes could make way any more when that was tried last."""
        self._looked_at = -math.inf

    @property
    def packing(self) -> Packing:
        """The plans of the chunks, as they are now."""
        return self._homes.packing

    @property
    def is_lowered(self) -> bool:
        """True if model data where units run have made way for what is not: what a unit needs may come back.

        Room was left for what had been needed at once until then.
        """
        ledger = self._manager.ledger
        return ledger.memory.compute_tier is Tier.HOST and ledger.capacity(Tier.HOST) < self._most_bytes

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
        self._most_bytes = self._manager.ledger.capacity(Tier.HOST)
        if Tier.DEVICE in capacities:
            self._device.limit(capacities[Tier.DEVICE])

    def _move(self, capacities: Mapping[Tier, int], *, at_least: bool = False, in_pass: bool = False) -> None:
        before = self._home_ram_bytes
        try:
            has_moved = self._homes.resize(capacities, at_least=at_least, in_pass=in_pass)
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

    # -- before memory runs out

    def begin(self, batch: Batch) -> None:
        """A forward begins: have homes leave room for what its non-model data are expected to take, or come back."""
        self._foresight.begin()
        peak = self._sampling.profile.expected_peak_bytes(batch)
        if peak is None or not self._can_balance or not self._is_time():
            return
        ledger = self._manager.ledger
        capacity, room = ledger.capacity(Tier.HOST), self._device.full_capacity_bytes
        free = self._manager.eviction.headroom() + self._manager.full_copies.nbytes
        wanted = capacity_between_steps(capacity, self._most_bytes, free, room, peak)
        if wanted > capacity and self._sampling.profile.is_measuring:
            return
        if wanted < capacity:
            self._give(Tier.HOST, capacity - wanted)
        elif wanted > capacity:
            self._rise(wanted)

    def foresee(self) -> None:
        """A moment of a measured cycle begins: have homes make room for the rest of it in time."""
        if not self._can_balance:
            return
        manager = self._manager
        room = self._device.full_capacity_bytes - manager.full_copies.nbytes
        done, taken, free = self._pacing.done, self._sampling.meter.last_bytes, manager.eviction.headroom()
        lacking = self._foresight.lacking(done, taken, free, room)
        if lacking and not self._is_exhausted:
            before = manager.ledger.capacity(Tier.HOST)
            self._give(Tier.HOST, lacking, in_pass=True)
            self._is_exhausted = manager.ledger.capacity(Tier.HOST) == before

    def makes_room_for_backward(self, loss_numel: int) -> bool:
        """A forward is over: have homes make room for its loss and its backward, which cannot be run again.

        Parameters
        ----------
        loss_numel
            Elements of which a loss will be computed.

        Returns
        -------
        bool
            True if they cannot, and the forward would keep less if it ran once more.
        """
        batch = self._sampling.batch
        if batch is None or not (batch.with_gradients and self._sampling.profile.is_measuring):
            return False
        lacking = self._lacking_for_backward(loss_numel)
        if lacking and self._can_balance:
            self._give(Tier.HOST, lacking, in_pass=True)
            lacking = self._lacking_for_backward(loss_numel)
        return lacking > 0 and self._keep_less(others_help=False)

    def _lacking_for_backward(self, loss_numel: int) -> int:
        manager, sampling = self._manager, self._sampling
        free = manager.eviction.headroom() + manager.full_copies.nbytes
        room = self._pacing.seen_bytes() + sampling.gradients_to_come_bytes()
        return lacking_for_backward(sampling.meter.last_bytes, loss_numel, free, room)

    @property
    def _can_balance(self) -> bool:
        """True if homes in RAM have another place, and nobody else has to agree."""
        manager = self._manager
        return manager.device.is_ram and manager.disk is not None and manager.together.communicator.owner.is_alone

    def _is_time(self) -> bool:
        """True if the last look at the system's memory was a while ago."""
        now = time.monotonic()
        if now - self._looked_at < _SECONDS_BETWEEN and not self._sampling.profile.is_measuring:
            return False
        self._looked_at = now
        return True

    def _rise(self, capacity: int) -> None:
        """Let homes come up."""
        try:
            self._move({Tier.HOST: capacity})
        except Exception as error:  # they were well where they are
            if not (isinstance(error, OffloadError) or is_out_of_memory(error)):
                raise
            logger.info("no homes came up: %s", error)

    # -- when memory has run out

    def make_room(self, error: BaseException, attempt: int, done: float) -> Given:
        """The model's own computation, or a move for it, has run out of memory: give it more from now on.

        Full copies go first, then homes go down a tier, then forwards keep less for their backwards. Nothing uses full
        copies.

        Parameters
        ----------
        attempt
            How often the same computation has failed before.
        done
            The part of a forward that had run, from 0 to 1.
        """
        manager, room = self._manager, self._device
        held, before, homes = manager.full_copies.nbytes, room.full_capacity_bytes, self.packing.placement.nbytes
        gc.collect()  # graphs that are in a cycle with their exception
        manager.eviction.evict_idle()
        manager.device.trim()
        if manager.device.is_ram:
            return_freed_memory()
        tier = self._short_tier(error)
        shortage = self._shortage(tier, asked_bytes(error), held, attempt, done)
        is_alone = manager.together.communicator.owner.is_alone
        if not is_hopeless(shortage):
            if tier is not Tier.HOST or manager.ledger.memory is MemoryMap.EMULATED or not is_alone:
                room.give_up(held, self._pacing.seen_bytes())
            if is_alone:
                self._give(tier, bytes_to_give(shortage))
        self._pacing.replan()
        after = self.packing.placement.nbytes
        moved = max(after[Tier.DISK] - homes[Tier.DISK], homes[Tier.DEVICE] - after[Tier.DEVICE], 0)
        given = Given(held, before, room.full_capacity_bytes, moved, keeps_less=False)
        return given if is_hopeless(shortage) else replace(given, keeps_less=self._keep_less(given.is_something))

    def _keep_less(self, others_help: bool) -> bool:
        """Have forwards keep less for their backwards; False if they keep as much as before."""
        batch = self._sampling.batch
        if batch is None or not batch.with_gradients:
            return False
        is_first, manager = self._saving.keeps_until_short, self._manager
        try:
            if not self._saving.ran_short(others_help):
                return False
        except Exception as error:  # as above: what had no memory has an error that tells of it
            if not (isinstance(error, OSError) or is_out_of_memory(error)):
                raise
            logger.info("what forwards save has no place below: %s", error)
            return False
        self._sampling.profile.forget_training()
        if is_first and manager.ledger.memory is MemoryMap.ACCELERATOR and manager.disk is not None:
            capacity = manager.ledger.capacity(Tier.HOST)
            if manager.together.communicator.owner.is_alone:
                self._give(Tier.HOST, passing_bytes(capacity))
                manager.ledger.resize(Tier.HOST, capacity)
        return True

    def _short_tier(self, error: BaseException) -> Tier:
        """Whose homes share the memory that has run out."""
        is_in_ram = self._manager.device.is_ram or isinstance(error, MemoryError) or "CPUAllocator" in str(error)
        return Tier.HOST if is_in_ram else Tier.DEVICE

    def _shortage(self, tier: Tier, asked: int, held: int, attempt: int, done: float) -> Shortage:
        manager = self._manager
        is_where_units_run = tier is Tier.DEVICE or manager.device.is_ram
        return Shortage(
            free_bytes=manager.eviction.headroom() if is_where_units_run else host_headroom()[0],
            held_bytes=held if is_where_units_run else 0,
            room_bytes=self._device.full_capacity_bytes if is_where_units_run else 0,
            home_bytes=self.packing.placement.nbytes[tier],
            asked_bytes=asked,
            done=done,
            attempt=attempt,
        )

    def _give(self, tier: Tier, nbytes: int, in_pass: bool = False) -> None:
        """Take bytes from a tier, as far as its homes have another place."""
        capacity = self._manager.ledger.capacity(tier)
        try:
            self._move({tier: max(capacity - nbytes, 0)}, at_least=True, in_pass=in_pass)
        except Exception as error:  # the computation's own error tells of the shortage, and this is what was tried
            if not (isinstance(error, OffloadError) or is_out_of_memory(error)):
                raise
            logger.info("no homes can leave %s: %s", tier.value, error)

    def explain(self, error: BaseException, torn: str = "") -> None:
        """If a backward ran out of memory: leave it more from now on, and say so. It cannot be run again.

        Parameters
        ----------
        torn
            What it has left half done, in words.

        Raises
        ------
        OutOfMemory
            From ``error``, if that is what happened. An `OutOfMemory` of ours says it all already.
        """
        if not is_out_of_memory(error):
            return
        given = self.make_room(error, attempt=0, done=1.0)
        if not given.keeps_less:  # it cannot run again, and the next one is not to fail as well
            given = replace(given, keeps_less=self._keep_less(others_help=False))
        if not isinstance(error, OutOfMemory):
            raise out_of_memory(error, self._manager, given, torn) from error
