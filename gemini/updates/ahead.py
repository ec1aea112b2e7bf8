"""Updates that begin in backward by themselves, where the disk would be idle until ``optimizer.step()``.

A chunk whose homes are on disk is updated as soon as its gradient is complete, with the results beside its homes (see
`Trial`). The step takes those results if they are what it would compute: of the same gradients, homes, options and
counts. Else they are dropped, and it computes what it always did. So this changes no number and forbids nothing; a
wrong guess costs the work. Where the next forward would find the chunk's full copy, the update fills its memory: until
the step the chunk is at home for all others, with the values before it (see `FullCopies.hand_out`). Who accumulates,
clips by hand or looks at gradients makes every guess wrong: after a wrong one some steps go by without, twice as many
each time (`Trust`).
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ..chunk import GRADIENT, Chunk, ChunkManager, ChunkState, DiskBuffer, GradientBuffer, Tier
from ..errors import OffloadError, OutOfMemory
from ..nn.optimizer.rules.rules import Rules
from .commitment import surely
from .gradients import Gradients
from .options import Options, first_change
from .ticket import Ticket
from .trial import Trial
from .update_pipeline import ChunkUpdate, Run
from .update_queue import UpdateQueue
from .updater import Groups, Planned, Updater

MOST_STEPS_WITHOUT = 64
REST_SECONDS = 1.0
"""What a step waits at most for a block that is under way and that nobody wants."""


@dataclass(slots=True)
class Trust:
    """How many steps go by before the next guess. Pure."""

    steps_without: int = 1
    """The first step shows how the user trains."""
    next_pause: int = 1

    @property
    def is_given(self) -> bool:
        """True if updates may begin ahead of the step now."""
        return self.steps_without == 0

    def after_step(self, was_right: bool) -> None:
        """A step has been taken: as was guessed, or would have been, or otherwise."""
        if not was_right:
            self.steps_without, self.next_pause = self.next_pause, min(2 * self.next_pause, MOST_STEPS_WITHOUT)
        elif self.steps_without:
            self.steps_without -= 1
        else:
            self.next_pause = 1


@dataclass(frozen=True, slots=True)
class _Begun:
    """An update under way, and what it was computed of."""

    trial: Trial
    ticket: Ticket
    terms: object
    homes: object
    gradient: object


class Ahead(Protocol):
    """Begins updates before the step, and hands them to it."""

    def backward_begins(self) -> None:
        """A new, outermost backward."""

    def begin(self, chunk: Chunk, options: Options, refresh: bool) -> None:
        """The gradient of a chunk is complete, and backward needs it no more.

        Parameters
        ----------
        refresh
            The next forward will find the full copy, if there is one.
        """

    def take(self, planned: Sequence[Planned], options: Options) -> dict[Chunk, Ticket]:
        """The updates under way that are what the step has planned, by their chunks; the others are called off."""

    def call_off(self) -> None:
        """The gradients are not what they were."""

    def gradients_dropped(self) -> None:
        """There are no gradients."""


class NothingAhead:
    """All updates begin in the step."""

    def backward_begins(self) -> None:
        pass

    def begin(self, chunk: Chunk, options: Options, refresh: bool) -> None:
        pass

    def take(self, planned: Sequence[Planned], options: Options) -> dict[Chunk, Ticket]:
        return {}

    def call_off(self) -> None:
        pass

    def gradients_dropped(self) -> None:
        pass


@dataclass(slots=True)
class _Step:
    """What has happened since the last step."""

    backwards: int = 0
    reads: int = 0
    """Of gradients, by the user, since the start and until it began."""
    rules: Rules | None = None
    options: Sequence[Mapping[str, Any]] = ()
    groups: Groups | None = None
    """Those that updates were begun with."""
    begun: dict[Chunk, _Begun] = field(default_factory=dict)

    def backward_begins(self) -> bool:
        """Count it; False if it is not the first."""
        self.backwards += 1
        return self.backwards == 1

    def groups_of(self, updater: Updater, options: Options) -> Groups:
        """The groups with their options at the first update that is begun: if they change, all were guessed wrong."""
        if self.groups is None:
            self.rules, self.options = options.rules, options.copied()
            self.groups = updater.groups(options)
        return self.groups

    def has(self, options: Options) -> bool:
        """True if updates were begun, and with these options."""
        return self.rules == options.rules and first_change(self.options, options.copied()) is None


class UpdatesAhead:
    """Begins the updates of chunks whose homes are all on disk.

    Parameters
    ----------
    manager, gradients, updater, queue
        The chunks, what tells whether somebody has seen their gradients, and what plans and does their updates.
    """

    def __init__(self, manager: ChunkManager, gradients: Gradients, updater: Updater, queue: UpdateQueue) -> None:
        self.trust = Trust()
        self.taken_count = 0
        """Updates that steps have taken so far."""
        self.dropped_count = 0
        """Updates that were begun, and that no step has taken."""
        self._manager = manager
        self._gradients = gradients
        self._updater = updater
        self._queue = queue
        self._step = _Step()

    def backward_begins(self) -> None:
        if not self._step.backward_begins():
            self.call_off()

    def begin(self, chunk: Chunk, options: Options, refresh: bool) -> None:
        step, disk = self._step, self._manager.disk
        if options.rules.of(chunk.bindings[0].parameter).is_whole:
            return  # side states have no place beside themselves
        if not self.trust.is_given or step.backwards != 1 or chunk in step.begun or disk is None:
            return
        if not _can_be_tried(chunk) or not self._has_room(chunk):
            return
        assert isinstance(chunk.gradient, GradientBuffer) and chunk.gradient.buffer is not None
        try:
            planned = self._updater.plan(step.groups_of(self._updater, options), chunk)
            trial = Trial(chunk, disk, (GRADIENT, chunk.gradient.buffer), self._arrival_of(chunk.gradient))
        except (OutOfMemory, OffloadError, ValueError, TypeError):
            self.trust.after_step(was_right=False)  # the step says what is wrong, if it is not only the room
            return
        try:
            begun = self._submitted(trial, planned, refresh) if _covers_all(chunk, planned) else None
        except BaseException:
            surely(trial.call_off)
            raise
        if begun is None:
            surely(trial.call_off)
        else:
            step.begun[chunk] = begun

    def _submitted(self, trial: Trial, planned: Planned, refresh: bool) -> "_Begun":
        chunk = trial.chunk
        assert isinstance(chunk.gradient, GradientBuffer)
        self._gradients.watch(chunk)
        run = Run(chunk.extent.start, chunk.extent.stop, planned.update.runs[0].at_step)  # what is between stays zero
        update = ChunkUpdate(chunk, (run,), self._filled(chunk, trial, refresh), trial=trial)
        homes, gradient = _identity(chunk), chunk.gradient.version
        (ticket,) = self._queue.submit([update], self._manager.device.caller())
        return _Begun(trial, ticket, planned.terms, homes, gradient)

    def _filled(self, chunk: Chunk, trial: Trial, refresh: bool) -> Tensor | None:
        """The memory of the full copy, for the results: what it has now, others find at home until the step."""
        if not (refresh and chunk.plan.update_reaches_full):
            return None
        return self._manager.full_copies.hand_out(chunk, trial.end)

    def _arrival_of(self, gradient: GradientBuffer) -> Callable[[], None]:
        """What returns when the update can read a gradient: in RAM, when downloads are over, for which it waits."""
        if gradient.buffer is None or not gradient.is_file:
            return _nothing
        return partial(self._manager.device.wait_for_stored, gradient.buffer)

    def take(self, planned: Sequence[Planned], options: Options) -> dict[Chunk, Ticket]:
        step, after = self._step, _Step(reads=self._gradients.reads)
        are_same = step.has(options)
        wanted = [
            begun
            for each in planned
            if are_same and (begun := step.begun.get(each.chunk)) is not None and self._is_right(each, begun)
        ]
        taken: dict[Chunk, Ticket] = {}
        self._step = after
        for begun in wanted:
            surely(self._take, begun, taken)
        for begun in step.begun.values():
            surely(self._let_go, begun)
        surely(self._judge, step, taken)
        return taken

    def _take(self, begun: _Begun, taken: dict[Chunk, Ticket]) -> None:
        """Confirm an update. The full copy has older values then, and goes."""
        chunk = begun.trial.chunk
        if begun.trial.confirm():
            taken[chunk] = begun.ticket
            if chunk.is_resident:
                self._manager.evict(chunk)

    def _let_go(self, begun: _Begun) -> None:
        begun.trial.call_off()  # if it is not confirmed
        if begun.trial.rest(REST_SECONDS) and begun.trial.is_off:  # so that a step leaves nothing behind
            self._manager.full_copies.reclaim(begun.trial.chunk)

    def _judge(self, step: _Step, taken: Sized) -> None:
        """Learn from what has become of the guesses."""
        self.taken_count += len(taken)
        self.dropped_count += len(step.begun) - len(taken)
        untouched = step.backwards == 1 and step.reads == self._gradients.reads
        wanted = [begun for begun in step.begun.values() if begun.trial.has_begun]
        self.trust.after_step(untouched and len(taken) >= len(wanted))

    def _is_right(self, planned: Planned, begun: _Begun) -> bool:
        """True if an update is the planned one."""
        chunk = planned.chunk
        return (
            begun.trial.has_begun  # else, as it was planned, it writes through to the full copy
            and _can_be_tried(chunk)
            and isinstance(chunk.gradient, GradientBuffer)
            and begun.terms == planned.terms
            and begun.homes == _identity(chunk)
            and begun.gradient == chunk.gradient.version
            and not self._gradients.were_seen(chunk)
        )

    def call_off(self) -> None:
        for begun in self._step.begun.values():
            surely(begun.trial.call_off)
        self.dropped_count += len(self._step.begun)
        self._step.begun.clear()

    def gradients_dropped(self) -> None:
        if self._step.begun:
            self.trust.after_step(was_right=False)
        self.call_off()
        self._step = _Step(reads=self._gradients.reads)

    def _has_room(self, chunk: Chunk) -> bool:
        """True if the results leave as much room on disk as homes take there: others may want homes, too."""
        ledger = self._manager.ledger
        return ledger.free(Tier.DISK) - _home_nbytes(chunk) >= ledger.used(Tier.DISK)


def _nothing() -> None:
    pass


def _can_be_tried(chunk: Chunk) -> bool:
    """True if all that an update of this chunk changes is on disk, and is nobody else's just now."""
    return (
        isinstance(chunk.gradient, GradientBuffer)
        and chunk.gradient.buffer is not None
        and not chunk.gradient.is_borrowed
        and not chunk.plan.averages
        and not chunk.homes.are_watched
        and all(isinstance(home, DiskBuffer) for home in chunk.homes.values())
        and not chunk.pins
        and not chunk.is_lent
        and chunk.update is None
        and chunk.state in (ChunkState.HOME, ChunkState.READY)
    )


def _covers_all(chunk: Chunk, planned: Planned) -> bool:
    """True if every parameter of the chunk takes the same step: else there is more in its homes than is computed."""
    gradient = chunk.gradient
    return gradient is not None and len(gradient.present) == len(chunk.layout.slots) and len(planned.update.runs) == 1


def _identity(chunk: Chunk) -> object:
    """Differs from what it was if the chunk has other homes, or other values in them."""
    return {name: id(home) for name, home in chunk.homes.items()}, chunk.homes.changes


def _home_nbytes(chunk: Chunk) -> int:
    return sum(home.nbytes for home in chunk.homes.values())
