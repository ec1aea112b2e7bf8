"""The orchestrator: applies the plan as units enter and leave, and keeps working when a step leaves the plan."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ..chunk import Chunk, ChunkManager, ChunkState, Tier
from ..errors import OutOfMemory, is_out_of_memory
from ..memory.native_memory import be_exact, be_quick, give_back_free, has_room_to_be_quick
from ..memory.non_model import Batch, NonModelProfile
from ..memory.prediction import Outlook
from ..memory.shortage import out_of_memory
from ..memory.timeline import Point, Timeline
from ..memory.tracker import NonModelMeter, host_headroom
from ..planning.cycle import Cycle
from ..planning.planner import Actions, Planner
from ..planning.trace import Moment, Phase, Trace
from ..units.units import Visit
from ..updates.backward_updates import BackwardUpdates
from ..updates.gradients import Gradients


class Runtime:
    """Brings chunks before units run and lets them go after.

    Parameters
    ----------
    manager, gradients
        The chunks, and what ``p.grad`` shows of their gradients.
    depth
        How many chunks may be on their way ahead of use.
    meter
        Samples the non-model data at each moment of the cycles that the profile wants to be measured.
    device_limit_bytes
        What model and non-model data may take on DEVICE together: once the latter have been measured, the rest goes to
        full copies. None: the capacity of DEVICE is what the user said.
    """

    def __init__(
        self,
        manager: ChunkManager,
        gradients: Gradients,
        depth: int,
        meter: NonModelMeter,
        device_limit_bytes: int | None = None,
    ) -> None:
        self.manager = manager
        self.lock = threading.RLock()
        """Held while chunks move and while parameters are used outside of units: any thread may read parameters."""
        self._gradients = gradients
        self.cycle = Cycle()
        self.depth = depth
        self.stall_seconds = 0.0
        self.timeline = Timeline(manager.ledger)
        self.meter = meter
        self.profile = NonModelProfile()
        self.outlook: Outlook | None = None
        """What was predicted after the warm-up and what was measured since; None until both are known."""
        self.batch: Batch | None = None
        """Of the cycle that runs."""
        self.on_abort: Callable[[], None] = lambda: None
        """Told when every visit is closed; whoever keeps visits forgets them."""
        self.in_backward: BackwardUpdates | None = None
        """Told of what backward is through with; None where nobody updates chunks before it is over."""
        self._device_limit_bytes = device_limit_bytes
        self._pool_growths = 0
        self._open: dict[Visit, None] = {}
        self._held: dict[Chunk, None] = {}
        self._backward_visits: dict[int, list[Visit]] = {}
        self._is_exact = False
        """malloc keeps nothing, because of a cycle that is (or was) measured; to be thought over."""
        self.given_up_bytes = 0
        """What full copies no longer take of their capacity since the model's own computation ran out of memory."""

    # -- units

    def enter(self, visit: Visit, phase: Phase) -> None:
        """Have the unit's chunks on DEVICE and pinned.

        Raises
        ------
        OutOfMemory, OffloadError
            If that is impossible; nothing of this visit stays pinned then.
        """
        if not visit.is_open:
            with self.lock:
                self._enter(visit, phase)

    def _enter(self, visit: Visit, phase: Phase) -> None:
        self.manager.device.take_over()
        chunks = visit.chunks
        in_use = frozenset(c.index for group in (chunks, *(v.pinned for v in self._open)) for c in group)
        actions = self.cycle.advance(Moment(visit.unit.index, phase, in_use)) or Actions()
        is_sampled = self.profile.is_measuring or self.timeline.is_on
        if is_sampled:
            self.meter.sample(self._model_bytes())
            self.timeline.close(self.meter.last_bytes)
            if self.profile.is_measuring:
                self.profile.add(self.meter.last_bytes)
        waits = any(c.update is not None or c.state in (ChunkState.HOME, ChunkState.FETCHING) for c in chunks)
        begin = time.perf_counter() if waits else 0.0
        visit.is_open = True
        self._open[visit] = None
        try:
            self._evict(actions.evict)
            beyond = bool(visit.unit.without_gradients) and visit.extra is visit.unit.without_gradients
            for chunk in chunks:
                self._fetch(chunk, chunks, overdraw=beyond)
            self._prefetch(actions.prefetch)  # behind what is needed now, ahead of waiting for it
            for chunk in chunks:
                self._pin(chunk, chunks)
                visit.pinned.append(chunk)
            if waits:
                self.stall_seconds += time.perf_counter() - begin
            if is_sampled:
                if self.manager.device.is_ram:
                    give_back_free()
                self.meter.mark()
                self.timeline.add(visit.unit.index, phase)
        except BaseException as error:
            self.leave(visit)
            if isinstance(error, OutOfMemory):
                raise self._with_units(error, visit) from error.__cause__
            raise

    def leave(self, visit: Visit) -> None:
        """Let the unit's chunks go. Idempotent: a recomputation and the end of backward may both say so."""
        if not visit.is_open:
            return
        with self.lock:
            visit.is_open = False
            del self._open[visit]
            for chunk in visit.pinned:
                self.manager.unpin(chunk)
            visit.pinned.clear()

    def add_to_open(self, visit: Visit, chunks: Sequence[Chunk]) -> None:
        """Bring chunks that an open (or new) visit turned out to need; it lists them already."""
        if visit.is_open:
            for chunk in chunks:
                self._fetch(chunk)
                self._pin(chunk, visit.chunks)
                visit.pinned.append(chunk)
        else:
            self.enter(visit, Phase.FORWARD)

    def enter_outside(self, visit: Visit) -> None:
        """Backward comes to what code outside of any unit made: bring its chunks. No moment of the cycle."""
        visit.is_open = True
        self._open[visit] = None
        try:
            visit.pinned.extend(self.bring(visit.chunks))
        except BaseException:
            self.leave(visit)
            raise

    def bring(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Pin chunks for code outside of any unit, beyond the capacity if need be. `let_go` ends it."""
        self.manager.device.take_over()
        pinned: list[Chunk] = []
        try:
            for chunk in chunks:
                chunk.settle()
                self._fetch(chunk, chunks, overdraw=True)
                self._pin(chunk, chunks)
                pinned.append(chunk)
        except BaseException:
            self.let_go(pinned)
            raise
        return pinned

    def let_go(self, chunks: Sequence[Chunk]) -> None:
        """Unpin what `bring` pinned."""
        for chunk in chunks:
            self.manager.unpin(chunk)
        self.manager.repay()

    def hold(self, chunks: Sequence[Chunk]) -> None:
        """Bring chunks and keep them until `release_held`, because nothing will tell when the last use is over."""
        for chunk in chunks:
            if chunk not in self._held:
                self._fetch(chunk, chunks, overdraw=True)
                self._pin(chunk, chunks)
                self._held[chunk] = None

    def release_held(self) -> None:
        """Let go what was held: the step is over, and no graph from before it can be used any more."""
        for chunk in self._held:
            self.manager.unpin(chunk)
        self._held.clear()

    def _model_bytes(self) -> int:
        """What the model data have grown by since boost: full copies, and gradients in memory that is lent."""
        return self.manager.gradient_pool.blocks_nbytes + sum(
            c.full_nbytes for c in self.manager.chunks if c.is_resident
        )

    def _fetch(self, chunk: Chunk, keep: Sequence[Chunk] = (), overdraw: bool = False) -> None:
        try:
            if overdraw or self._held:  # what is held for later has taken the room of what is needed now
                self.manager.fetch(chunk, keep, overdraw=True)
            else:
                self.manager.fetch(chunk, keep)
        except OutOfMemory:
            if not self.given_up_bytes:
                raise
            # Parameters must be there, whatever the model's own computation would rather have.
            self._resize_device(self.given_up_bytes)
            self.given_up_bytes = 0
            self.manager.fetch(chunk, keep)

    def _pin(self, chunk: Chunk, keep: Sequence[Chunk]) -> None:
        self.manager.pin(chunk, keep)
        if chunk in self._gradients.withdrawn:
            self._gradients.reveal(chunk)  # from here on nobody can tell us that ``p.grad`` is asked for

    def _evict(self, indices: Sequence[int]) -> None:
        for index in indices:
            chunk = self.manager.chunks[index]
            if chunk.state is ChunkState.READY:
                self.manager.evict(chunk)

    def _prefetch(self, indices: Sequence[int]) -> None:
        for index in indices:
            chunk = self.manager.chunks[index]
            if chunk.state is ChunkState.HOME and self.manager.ledger.free(Tier.DEVICE) >= chunk.full_nbytes:
                try:
                    self.manager.fetch(chunk, background=True)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    return  # it was only for speed; who needs it will make room

    # -- cycles

    @property
    def full_capacity_bytes(self) -> int:
        """Room for full copies on DEVICE."""
        resident = sum(c.full_nbytes for c in self.manager.chunks if c.is_resident)
        return self.manager.ledger.free(Tier.DEVICE) + resident

    def take_timeline(self) -> list[Point]:
        """The moments of the step that ends here; empty for one that was not sampled."""
        if self.timeline.points:
            self.meter.sample(self._model_bytes())
        return self.timeline.take(self.meter.last_bytes)

    def begin_forward(self, with_gradients: bool, shapes: tuple[tuple[int, ...], ...] = ()) -> None:
        """The model's forward begins, outside of any backward: a new cycle of the clock.

        ``shapes`` are those of its inputs; a heavier batch than any before is measured like the first one.
        """
        if self.in_backward is not None:
            self.in_backward.before_forward()
        if self.profile.is_measuring and self.cycle.is_complete:
            self.meter.sample(self._model_bytes())
            self.profile.end(self.meter.last_bytes)
        if not self._open:
            self._mend()
        self.manager.forget_addresses()
        self.manager.repay()
        self.batch = batch = Batch(with_gradients, shapes)
        self.profile.begin(batch)
        self._choose_malloc()
        self._leave_room_for(batch)
        if with_gradients != self.cycle.with_gradients:
            self.timeline.points.clear()  # an evaluation in between is no part of the step
        if self.manager.gradient_pool.growths > self._pool_growths:
            self._pool_growths = self.manager.gradient_pool.growths
            self.cycle.replan(self._plan)
        resident = [c.index for c in self.manager.chunks if c.is_resident]
        self.cycle.restart(with_gradients, self._plan, resident)

    def _choose_malloc(self) -> None:
        """Have malloc keep nothing while non-model data in RAM are measured, and for as long as RAM is short."""
        if not self.manager.device.is_ram:
            return
        if self.profile.is_measuring or self.timeline.is_on:
            be_exact()
            self._is_exact = True
        elif self._is_exact:
            self._is_exact = False  # asked once, until something is measured again
            away = sum(c.full_nbytes for c in self.manager.chunks if not c.is_resident)
            growth = min(self.manager.ledger.free(Tier.DEVICE), away)
            if has_room_to_be_quick(host_headroom()[0], growth, self.meter.peak_bytes):
                be_quick()

    def _leave_room_for(self, batch: Batch) -> None:
        """Give full copies what non-model data leave of DEVICE, once a training step has shown what they take."""
        if self._device_limit_bytes is None or True not in self.profile.heaviest:
            return
        expected = self.profile.expected_peak_bytes(batch) or 0
        peak = max(expected, *(measured.peak_bytes for measured in self.profile.heaviest.values()))
        ledger = self.manager.ledger
        homes = ledger.capacity(Tier.DEVICE) - self.full_capacity_bytes
        room = max(self._device_limit_bytes - peak - self.given_up_bytes, homes + self._least_bytes())
        if room != ledger.capacity(Tier.DEVICE):
            if room < ledger.used(Tier.DEVICE):
                self.manager.evict_idle()
            ledger.resize(Tier.DEVICE, room)
            self.cycle.replan(self._plan)

    def least_bytes(self, other: Mapping[int, int]) -> int:
        """What one moment would need at least, if full copies of some chunks took so many bytes; all before the first.

        ``other`` maps chunk indices to bytes.
        """
        nbytes = [other.get(c.index, c.full_nbytes) for c in self.manager.chunks]
        return max((sum(nbytes[c] for c in moment.in_use) for moment in self.cycle.moments()), default=sum(nbytes))

    def _least_bytes(self) -> int:
        return self.least_bytes({}) if any(True for _ in self.cycle.moments()) else 0

    def chunks_changed(self) -> None:
        """Some have other homes and other full copies than when the plans were made, and are trained."""
        self.profile.forget_training()
        self.cycle.replan(self._plan)

    def _plan(self, trace: Trace) -> Planner:
        chunks = [c for c in self.manager.chunks if not c.full_is_home]
        nbytes = {c.index: c.full_nbytes for c in chunks}
        lost = [c.index for c in chunks if c.is_trainable and not c.update_reaches_full]
        return Planner(trace, nbytes, self.full_capacity_bytes, self.depth, lost)

    def prefetch_next_cycle(self) -> None:
        """Start the first fetches of the next training cycle behind the optimizer's updates."""
        actions = self.cycle.between()
        self._evict(actions.evict)
        self._prefetch(actions.prefetch)

    def use_order(self) -> dict[int, int]:
        """Chunk index -> rank in the order of first use in a training cycle (by index while unknown)."""
        planner = self.cycle.expected(with_gradients=True)
        used = planner.trace.first_uses() if planner is not None else ()
        order = dict.fromkeys((*used, *(c.index for c in self.manager.chunks)))
        return {index: rank for rank, index in enumerate(order)}

    # -- backward

    @property
    def is_in_backward(self) -> bool:
        """True from the first unit of a backward to its end, and after a backward that never ended."""
        return bool(self._backward_visits)

    @property
    def open_visits(self) -> tuple[Visit, ...]:
        """Outermost first."""
        return tuple(self._open)

    def join_backward(self, task: int, visit: Visit) -> bool:
        """Note that ``visit`` belongs to the backward ``task``; True if it is the first of that task."""
        if self.in_backward is not None:
            self.in_backward.begin(task)
        is_first = task not in self._backward_visits
        self._backward_visits.setdefault(task, []).append(visit)
        return is_first

    def end_backward(self, task: int) -> None:
        """A backward (or the inner one of a reentrant checkpoint) is over: close what it left open."""
        for visit in self._backward_visits.pop(task, ()):
            self.leave_backward(visit)
        if self.in_backward is not None:
            self.in_backward.end(task)

    def leave_backward(self, visit: Visit) -> None:
        """A backward is through with a visit."""
        self.leave(visit)
        if self.in_backward is not None:
            self.in_backward.left(visit)

    def keeps(self, chunk: Chunk) -> bool:
        """True if the next cycle will find the full copy that a chunk has now, as far as the plan says."""
        return self.cycle.keeps(chunk.index)

    # -- when something went wrong

    def abort(self) -> None:
        """After an exception in user code: close every visit, so that no pin is left."""
        self.on_abort()
        self._backward_visits.clear()
        for visit in list(self._open):
            self.leave(visit)
        self._mend()

    def _mend(self) -> None:
        with self.lock:  # other threads may be reading parameters
            self.manager.mend(self._held)

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
        held = sum(c.full_nbytes for c in self.manager.chunks if c.is_resident)
        self.manager.evict_idle()
        self.manager.device.trim()
        if self.manager.device.is_ram:
            be_exact()
        before = self.full_capacity_bytes
        after = self._lower(held)
        raise out_of_memory(error, self.manager, held, before, after, torn) from error

    def _lower(self, held_bytes: int) -> int:
        """Keep half of the full copies that were there when it was too much, and what one moment needs at least."""
        before = self.full_capacity_bytes
        after = min(before, max(held_bytes // 2, self._least_bytes()))
        self._resize_device(after - before)
        self.given_up_bytes += before - after
        self.cycle.replan(self._plan)
        return after

    def _resize_device(self, more_bytes: int) -> None:
        tier = self.manager.ledger.bounded_by(Tier.DEVICE)
        self.manager.ledger.resize(tier, self.manager.ledger.capacity(tier) + more_bytes)

    def _with_units(self, error: OutOfMemory, visit: Visit) -> OutOfMemory:
        names = [v.unit.name for v in self._open if v.pinned]
        running = f", while {', '.join(names)} run" if names else ""
        held = f"; {len(self._held)} chunks are held until the next step, for uses outside of a module or a double "
        return OutOfMemory(f"{error} (for {visit.unit.name}{running}{held + 'backward' if self._held else ''})")
