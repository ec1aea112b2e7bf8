"""The orchestrator: applies the plan as units enter and leave, and keeps working when a step leaves the plan."""

import time
from collections.abc import Callable, Collection, Sequence

from .chunk import Chunk, ChunkManager, ChunkState, Role, Tier
from .planner import Actions, Planner, Schedule
from .timeline import Point, Timeline
from .trace import Moment, Phase, Trace, TraceRecorder
from .tracker import NonModelMeter
from .units import Visit


class Cycle:
    """Where the current forward (and backward) stands against the plan of its kind.

    A kind of cycle (with gradients, without) has its own trace and planner. A cycle that leaves its plan goes on
    without one, and its recording becomes the next plan.
    """

    def __init__(self) -> None:
        self.planners: dict[bool, Planner] = {}
        self.with_gradients = False
        self._recorder = TraceRecorder()
        self._position = 0
        self._schedule: Schedule | None = None

    @property
    def is_first(self) -> bool:
        """True while the current kind of cycle has no plan yet: this is its warm-up."""
        return self.with_gradients not in self.planners

    @property
    def is_measured(self) -> bool:
        """True if a whole forward and backward lies in the recording."""
        return any(moment.phase is Phase.BACKWARD for moment in self._recorder.moments)

    def advance(self, moment: Moment) -> Actions | None:
        """Record a moment; its actions, if the cycle is on plan."""
        self._recorder.add(moment)
        schedule, position = self._schedule, self._position
        if schedule is None:
            return None
        self._position += 1
        expected = schedule.trace.moments[position] if position < len(schedule.trace.moments) else None
        if expected != moment:
            self._schedule = None
            return None
        return schedule.actions[position]

    def restart(self, with_gradients: bool, plan: Callable[[Trace], Planner], resident: Collection[int]) -> None:
        """The next cycle begins: plan anew if what was recorded differs from the plan, and plan from what is there."""
        trace = self._recorder.take()
        known = self.planners.get(self.with_gradients)
        complete = not self.with_gradients or any(m.phase is Phase.BACKWARD for m in trace.moments)
        if complete and trace.moments and (known is None or known.trace != trace):
            try:
                self.planners[self.with_gradients] = plan(trace)
            except ValueError:  # a moment outgrew the device since; fetching on demand will say so, or manage
                self.planners.pop(self.with_gradients, None)
        self.with_gradients = with_gradients
        planner = self.planners.get(with_gradients)
        self._schedule = planner.lap(resident) if planner is not None else None
        self._position = 0

    def between(self) -> Actions:
        """What to do for the next training cycle before it begins."""
        planner = self.planners.get(True)
        if planner is None:
            return Actions()
        if self.with_gradients and self._schedule is not None:
            return self._schedule.between
        return Actions(prefetch=planner.first)


class Runtime:
    """Brings chunks before units run and lets them go after.

    Parameters
    ----------
    manager
        The chunks.
    depth
        How many chunks may be on their way ahead of use.
    meter
        Samples the non-model data at each moment of a warm-up cycle.
    device_limit_bytes
        What model and non-model data may take on DEVICE together: once the warm-up has measured the latter, the rest
        goes to full copies. None: the capacity of DEVICE is what the user said.
    """

    def __init__(
        self, manager: ChunkManager, depth: int, meter: NonModelMeter, device_limit_bytes: int | None = None
    ) -> None:
        self.manager = manager
        self.cycle = Cycle()
        self.depth = depth
        self.stall_seconds = 0.0
        self.timeline = Timeline(manager.ledger)
        self.meter = meter
        self._device_limit_bytes = device_limit_bytes
        self.full_capacity_bytes = manager.ledger.free(Tier.DEVICE)
        self._open: dict[Visit, None] = {}
        self._backward_visits: dict[int, list[Visit]] = {}

    # -- units

    def enter(self, visit: Visit, phase: Phase) -> None:
        """Have the unit's chunks on DEVICE and pinned.

        Raises
        ------
        OutOfMemory, OffloadError
            If that is impossible; nothing of this visit stays pinned then.
        """
        if visit.is_open:
            return
        chunks = visit.unit.chunks
        in_use = frozenset(c.index for group in (chunks, *(v.pinned for v in self._open)) for c in group)
        actions = self.cycle.advance(Moment(visit.unit.index, phase, in_use)) or Actions()
        is_sampled = self.cycle.is_first or self.timeline.is_on
        if is_sampled:
            self.meter.sample(self._model_bytes())
            self.timeline.close(self.meter.last_bytes)
        waits = any(c.update is not None or c.state in (ChunkState.HOME, ChunkState.FETCHING) for c in chunks)
        begin = time.perf_counter() if waits else 0.0
        visit.is_open = True
        self._open[visit] = None
        try:
            self._evict(actions.evict)
            for chunk in chunks:
                self.manager.fetch(chunk, keep=chunks)
            self._prefetch(actions.prefetch)  # behind what is needed now, ahead of waiting for it
            for chunk in chunks:
                self._pin(chunk, visit)
            if waits:
                self.stall_seconds += time.perf_counter() - begin
            if is_sampled:
                self.meter.mark()
                self.timeline.add(visit.unit.index, phase)
        except BaseException:
            self.leave(visit)
            raise

    def leave(self, visit: Visit) -> None:
        """Let the unit's chunks go. Idempotent: a recomputation and the end of backward may both say so."""
        if not visit.is_open:
            return
        visit.is_open = False
        del self._open[visit]
        for chunk in visit.pinned:
            self.manager.unpin(chunk)
        visit.pinned.clear()

    def add_to_open(self, visit: Visit, chunks: Sequence[Chunk]) -> None:
        """Bring chunks that an open (or new) visit turned out to need; its unit lists them already."""
        if visit.is_open:
            for chunk in chunks:
                self.manager.fetch(chunk)
                self._pin(chunk, visit)
        else:
            self.enter(visit, Phase.FORWARD)

    def _model_bytes(self) -> int:
        """What the model data have grown by since boost: full copies, and the gradients there are."""
        gradients = sum(
            slot.numel * chunk.gradient.buffer.dtype.itemsize
            for chunk in self.manager.chunks
            if chunk.gradient is not None and chunk.gradient.buffer.tensor is not None
            for position, slot in enumerate(chunk.layout.slots)
            if position in chunk.gradient.present
        )
        return gradients + sum(c.full_nbytes for c in self.manager.chunks if c.is_resident)

    def _pin(self, chunk: Chunk, visit: Visit) -> None:
        self.manager.pin(chunk)
        visit.pinned.append(chunk)

    def _evict(self, indices: Sequence[int]) -> None:
        for index in indices:
            chunk = self.manager.chunks[index]
            if chunk.state is ChunkState.READY:
                self.manager.evict(chunk)

    def _prefetch(self, indices: Sequence[int]) -> None:
        for index in indices:
            chunk = self.manager.chunks[index]
            if chunk.state is ChunkState.HOME and self.manager.ledger.free(Tier.DEVICE) >= chunk.full_nbytes:
                self.manager.fetch(chunk, background=True)

    # -- cycles

    def take_timeline(self) -> list[Point]:
        """The moments of the step that ends here; empty for one that was not sampled."""
        if self.timeline.points:
            self.meter.sample(self._model_bytes())
        return self.timeline.take(self.meter.last_bytes)

    def begin_forward(self, with_gradients: bool) -> None:
        """The model's forward begins, outside of any backward: a new cycle of the clock."""
        if self._device_limit_bytes is not None and self.cycle.is_measured:
            self._grow_device(self._device_limit_bytes - self.meter.peak_bytes)
            self._device_limit_bytes = None
        if with_gradients != self.cycle.with_gradients:
            self.timeline.points.clear()  # an evaluation in between is no part of the step
        resident = [c.index for c in self.manager.chunks if c.is_resident]
        self.cycle.restart(with_gradients, self._plan, resident)

    def _plan(self, trace: Trace) -> Planner:
        chunks = [c for c in self.manager.chunks if not c.full_is_home]
        nbytes = {c.index: c.full_nbytes for c in chunks}
        # Where the update runs on the host, it cannot refresh full copies on a device, and they are evicted instead.
        reached = self.manager.device.is_ram
        lost = [
            c.index
            for c in chunks
            if c.gradient is not None and not (reached or c.homes[Role.MASTER].tier is Tier.DEVICE)
        ]
        return Planner(trace, nbytes, self.full_capacity_bytes, self.depth, lost)

    def _grow_device(self, capacity_bytes: int) -> None:
        ledger = self.manager.ledger
        more = max(capacity_bytes - ledger.capacity(Tier.DEVICE), 0)
        ledger.resize(Tier.DEVICE, ledger.capacity(Tier.DEVICE) + more)
        self.full_capacity_bytes += more

    def prefetch_next_cycle(self) -> None:
        """Start the first fetches of the next training cycle behind the optimizer's updates."""
        actions = self.cycle.between()
        self._evict(actions.evict)
        self._prefetch(actions.prefetch)

    def use_order(self) -> dict[int, int]:
        """Chunk index -> rank in the order of first use in a training cycle (by index while unknown)."""
        planner = self.cycle.planners.get(True)
        used = planner.trace.first_uses() if planner is not None else ()
        order = dict.fromkeys((*used, *(c.index for c in self.manager.chunks)))
        return {index: rank for rank, index in enumerate(order)}

    # -- backward

    @property
    def is_in_backward(self) -> bool:
        """True from the first unit of a backward to its end, and after a backward that never ended."""
        return bool(self._backward_visits)

    @property
    def has_open_visits(self) -> bool:
        return bool(self._open)

    @property
    def open_visits(self) -> tuple[Visit, ...]:
        """Outermost first."""
        return tuple(self._open)

    def join_backward(self, task: int, visit: Visit) -> bool:
        """Note that ``visit`` belongs to the backward ``task``; True if it is the first of that task."""
        is_first = task not in self._backward_visits
        self._backward_visits.setdefault(task, []).append(visit)
        return is_first

    def end_backward(self, task: int) -> None:
        """A backward (or the inner one of a reentrant checkpoint) is over: close what it left open."""
        for visit in self._backward_visits.pop(task, ()):
            self.leave(visit)

    def abort(self) -> None:
        """After an exception in user code: close every visit, so that no pin is left."""
        self._backward_visits.clear()
        for visit in list(self._open):
            self.leave(visit)
