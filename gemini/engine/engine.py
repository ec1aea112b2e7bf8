"""The mediator of a training step: hooks, the optimizer and outside uses call it, and it tells its parts what to do."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from ..chunk import VALID, Chunk, ChunkManager, Tier
from ..errors import OutOfMemory
from ..memory.non_model import Batch
from ..planning.trace import Phase
from ..torch_private import NO_BACKWARD, current_backward, current_node, number_of
from ..units.units import Units, Visit
from ..updates.updates import Updates
from .device_room import DeviceRoom
from .discovery import Discovery
from .guard import Guard
from .listener import Listener, StepFacts, Steps
from .memory import Memory
from .pacing import Pacing
from .pins import Pins
from .sampling import Sampling
from .visits import Visits

_HELD_SHARE = 4
"""A module may hold this part (one over it) of what full copies may take, for parameters that are not its own."""


class Engine:
    """Brings chunks before units run and lets them go after.

    Parameters
    ----------
    manager, units, updates
        The chunks, what brackets their uses, and what leads their gradients to their updates.
    pacing, room, memory, sampling, listener
        Plans the moves, sizes the room for full copies, moves homes, measures what else is on DEVICE, and hears of all
        this.
    """

    def __init__(
        self,
        manager: ChunkManager,
        units: Units,
        updates: Updates,
        pacing: Pacing,
        room: DeviceRoom,
        memory: Memory,
        sampling: Sampling,
        listener: Listener,
    ) -> None:
        self.manager = manager
        self.units = units
        """They lead to the model, which therefore lives for as long as its optimizer."""
        self.updates = updates
        self.pacing = pacing
        self.room = room
        self.memory = memory
        self.sampling = sampling
        self.listener = listener
        self.visits = Visits()
        self.pins = Pins(manager, updates.gradients, room)
        self.discovery = Discovery()
        self.lock = Guard()
        """Held while chunks move and while parameters are used outside of units: any thread may read parameters."""
        self.stall_seconds = 0.0
        self._steps = Steps()

    # -- units

    def enter(self, visit: Visit, phase: Phase) -> None:
        """Have the unit's chunks on DEVICE and pinned.

        Raises
        ------
        OutOfMemory, OffloadError
            If that is impossible; nothing of this visit stays pinned then.
        """
        if visit in self.visits.open:
            return
        with self.lock:
            self.manager.device.take_over()
            chunks, unit = visit.chunks, visit.unit
            actions = self.pacing.cycle.advance(self.visits.moment(unit, phase, chunks))
            if self.sampling.is_on:
                self.sampling.end_moment()
                self.memory.foresee()
            missing = [chunk for chunk in chunks if chunk.state not in VALID]
            begin = time.perf_counter() if missing else 0.0
            pinned = self.visits.begin(visit)
            try:
                if actions.evict:
                    self.pacing.evict(actions.evict)
                for chunk in missing:
                    if not chunk.is_resident:
                        # What stood for all units when there was room for all of them may come when there is not.
                        is_beyond = unit.is_joined or (bool(visit.extra) and visit.extra is unit.without_gradients)
                        self.pins.fetch(chunk, chunks, overdraw=is_beyond or self.memory.is_lowered)
                if actions.prefetch:
                    self.pacing.prefetch(actions.prefetch)  # behind what is needed now, ahead of waiting for it
                for chunk in chunks:
                    self.pins.pin(chunk, chunks)
                    pinned.append(chunk)
                if missing:
                    self.stall_seconds += time.perf_counter() - begin
                if self.sampling.is_on:
                    self.sampling.begin_moment(unit.index, phase)
            except BaseException as error:
                self.leave(visit)
                if isinstance(error, OutOfMemory):
                    raise self._with_units(error, visit) from error.__cause__
                raise

    def leave(self, visit: Visit) -> None:
        """Let the unit's chunks go. Idempotent: a recomputation and the end of backward may both say so."""
        with self.lock:
            self.visits.end(visit)

    def add_to_open(self, visit: Visit, chunks: Sequence[Chunk]) -> None:
        """Bring chunks that an open (or new) visit turned out to need; it lists them already."""
        if visit in self.visits.open:
            for chunk in chunks:
                self.pins.fetch(chunk)
                self.pins.pin(chunk, visit.chunks)
                self.visits.open[visit].append(chunk)
        else:
            self.enter(visit, Phase.FORWARD)

    def _with_units(self, error: OutOfMemory, visit: Visit) -> OutOfMemory:
        names, count = self.visits.names(), len(self.pins.held)
        running = f", while {names} run" if names else ""
        held = f"; {count} chunks are held until the next step, for uses outside of a module or a double backward"
        return OutOfMemory(f"{error} (for {visit.unit.name}{running}{held if count else ''})")

    # -- chunks that no unit brackets

    def enter_outside(self, visit: Visit) -> None:
        """Backward comes to what code outside of any unit made: bring its chunks. No moment of the cycle."""
        if visit in self.visits.open:
            return
        pinned = self.visits.begin(visit)
        try:
            pinned.extend(self.pins.bring(visit.chunks))
        except BaseException:
            self.leave(visit)
            raise

    def add_to_innermost(self, chunks: tuple[Chunk, ...], parameters: Collection[Tensor]) -> bool:
        """If a unit runs that uses parameters that it does not bracket, have them there until it ends; False if not."""
        visit = self.innermost
        if visit is None or not self.is_worth_holding(visit.chunks, *chunks):
            return False
        visit.needs(chunks)
        self.add_to_open(visit, chunks)
        self.discovery.ask_for(parameters)
        return True

    @property
    def innermost(self) -> Visit | None:
        """The unit whose forward this thread is in, if any."""
        return None if in_backward() else self.visits.innermost

    def is_worth_holding(self, held: tuple[Chunk, ...], *more: Chunk) -> bool:
        """False where a module that reaches for parameters of others would fill DEVICE with them.

        A model that looks at the weights of all of its layers (a penalty, a log) needs them one after the other. Where
        chunks are updated within backward, each use has to be known by its unit.
        """
        if self.updates.schedule.consumes_gradients:
            return True
        nbytes = sum(chunk.full_nbytes for chunk in {*held, *more})
        return nbytes * _HELD_SHARE <= self.room.full_capacity_bytes

    # -- cycles

    def begin_forward(self, with_gradients: bool, shapes: tuple[tuple[int, ...], ...] = ()) -> None:
        """The model's forward begins, outside of any backward: a new cycle.

        Parameters
        ----------
        shapes
            Of the model's inputs. A heavier batch than any before is measured like the first one.
        """
        self.updates.schedule.check_whole("run a forward")
        self.updates.schedule.forward_begins()
        self.manager.refuse_released("run a forward")
        if self.pacing.cycle.is_complete:
            self.sampling.end_cycle()
        if not self.visits.open:
            self._mend()
        self.manager.forget_addresses()
        self.manager.full_copies.refuse_lent_changes()
        self.manager.eviction.repay()
        batch = Batch(with_gradients, shapes)
        self.sampling.begin_cycle(batch, with_gradients == self.pacing.cycle.with_gradients)
        self.memory.begin(batch)
        if self.room.fit(self.sampling.profile, batch, self.pacing.seen_bytes):
            self.pacing.replan()
        self.pacing.begin_cycle(with_gradients)

    @property
    def needs_each_unit(self) -> bool:
        """True if each unit has to enter by itself: its moment is sampled, or its updates begin when it leaves."""
        return self.sampling.is_on or self.updates.schedule.watches_units

    @property
    def step(self) -> StepFacts:
        """The last one."""
        return self._steps.last

    def step_ended(self, facts: Callable[[StepFacts], StepFacts]) -> None:
        """The optimizer has stepped, or skipped a step whose gradients overflowed; it adds its own facts."""
        step = self._steps.ended(self.manager.together.communicator.take_wait_seconds(), facts)
        self.sampling.record_step(self.listener.step_ended(self, step))

    def resize(self, capacities: Mapping[Tier, int]) -> None:
        """Set what tiers may hold of model data while training goes on. Homes go down or up a tier as that asks for.

        Numbers stay what they are. Between steps, or when a forward or backward has failed. Several ranks do this
        together, with the same capacities and without gradients.

        Parameters
        ----------
        capacities
            Bytes of homes and full copies; tiers that are not named keep what they have.

        Raises
        ------
        OutOfMemory, OffloadError
            If homes have no place then, or cannot be moved. Nothing has been changed.
        RuntimeError
            While a forward or backward runs, or (`StateError`) the model is released.
        ValueError
            If capacities are negative, or tiers that share one memory are given several.
        """
        if in_backward() or (self.visits.running and not self.visits.is_in_backward):
            raise RuntimeError("a tier cannot be resized while a forward or backward runs: do it between steps")
        self.recover()
        with self.lock:
            self.manager.refuse_released("resize a tier")
            self.updates.schedule.check_whole("resize a tier")
            self.memory.resize(capacities)

    # -- backward

    def join_backward(self, task: int, visit: Visit) -> bool:
        """Note that ``visit`` belongs to the backward ``task``; True if it is the first of that task."""
        self.updates.backward_begins(task)
        is_first = self.visits.join_backward(task, visit)
        if is_first:
            self.sampling.begin_backward()
        return is_first

    def leave_passed(self, task: int) -> None:
        """This thread comes to a node of the backward ``task``: leave the visits all of whose nodes have run."""
        node = current_node()
        for visit in self.visits.passed(task, -1 if node is None else number_of(node)):
            self.leave_backward(visit)

    def end_backward(self, task: int) -> None:
        """A backward (or the inner one of a reentrant checkpoint) is over: close what it left open."""
        for visit in self.visits.of_backward(task):
            self.leave_backward(visit)
        self.visits.end_backward(task)
        if not self.visits.is_in_backward:
            self.manager.together.complete_gradients()
        if chunks := self.updates.schedule.backward_ended(task):
            self._update(chunks)

    def leave_backward(self, visit: Visit) -> None:
        """A backward has run every node of a visit."""
        self.leave(visit)
        if chunks := self.updates.schedule.unit_left(visit):
            self._update(chunks)

    def gradient_arrived(self, parameter: Tensor) -> None:
        """Autograd has put a gradient into ``p.grad``."""
        if chunks := self.updates.gradient_arrived(parameter, current_backward()):
            self._update(chunks)

    def _update(self, chunks: Sequence[Chunk]) -> None:
        """Update chunks while backward runs."""
        for chunk in chunks:
            self.updates.update(chunk, refresh=self.pacing.keeps(chunk))

    # -- when something went wrong

    def recover(self) -> None:
        """Clean up after a forward or backward that an exception ended, where nobody told."""
        self.manager.origin.refuse_elsewhere()
        if in_backward():
            return  # an optimizer that steps within backward
        if self.visits.is_in_backward:
            self.abort()
            self.updates.abandon("a backward did not come to its end")
        elif self.visits.running:
            self.abort()

    def backward_failed(self, error: BaseException) -> None:
        """Clean up after a backward that an exception ended: nothing stays pinned, its gradients are dropped.

        Raises
        ------
        OutOfMemory
            See `Memory.explain`.
        """
        self.listener.failed(self, error)
        self.abort()
        self.updates.abandon(f"{type(error).__name__}: {error}")
        torn = self.updates.schedule.torn_text
        self.memory.explain(error, torn)
        if torn and hasattr(error, "add_note"):
            error.add_note(torn)

    def abort(self) -> None:
        """After an exception in user code: close every visit, so that no pin is left."""
        self.discovery.stop()
        with self.lock:
            self.visits.end_all()
        self._mend()

    def _mend(self) -> None:
        with self.lock:  # other threads may be reading parameters
            self.manager.mend(self.pins.held)


def in_backward() -> bool:
    """True on a thread of autograd that runs a backward."""
    return current_backward() != NO_BACKWARD
