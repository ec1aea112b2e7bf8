"""Values of chunks as they are at one moment, read while training goes on (copy on update)."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from threading import Condition

from torch import Tensor

from gemini.errors import OutOfMemory, StateError, is_out_of_memory

from .chunk import Chunk
from .communicator import ALONE
from .ledger import Ledger
from .names import MASTER
from .origin import Origin
from .tier import Tier
from .values import read_slot


class ValueState(Enum):
    """Where the old values of one parameter (its masters, or one state) are."""

    AT_HOME = auto()
    """At home, and nowhere else."""
    READING = auto()
    """The reader is copying them from home."""
    COPYING = auto()
    """What is about to change them copies them aside."""
    ASIDE = auto()
    """In memory of the snapshot; home may have newer ones."""
    READ = auto()
    """The reader has them."""


_TRANSITIONS: dict[ValueState, frozenset[ValueState]] = {
    ValueState.AT_HOME: frozenset({ValueState.READING, ValueState.COPYING}),
    ValueState.READING: frozenset({ValueState.READ, ValueState.AT_HOME}),
    ValueState.COPYING: frozenset({ValueState.ASIDE, ValueState.AT_HOME}),
    ValueState.ASIDE: frozenset({ValueState.READ}),
    ValueState.READ: frozenset(),
}


@dataclass(slots=True, eq=False)
class _Value:
    """The masters, or one state, of one parameter."""

    chunk: Chunk
    position: int
    name: str
    state: ValueState = ValueState.AT_HOME
    copy: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.chunk.place(self.position, self.name).numel * self.chunk.codecs[self.name].dtype.itemsize

    def move_to(self, state: ValueState) -> None:
        if state not in _TRANSITIONS[self.state]:
            raise StateError(f"{self.name} in a snapshot: {self.state.name} -> {state.name} is not a transition")
        self.state = state

    def read(self) -> Tensor:
        """A copy of what home has."""
        return read_slot(self.chunk, self.position, self.name, ALONE)

    def keep(self, copy: Tensor) -> None:
        """COPYING -> ASIDE."""
        self.move_to(ValueState.ASIDE)
        self.copy = copy

    def drop(self) -> None:
        """ASIDE -> READ."""
        self.move_to(ValueState.READ)
        self.copy = None


class Snapshot:
    """The values of some parameters as they are when it is made, each of which is read once.

    ::

                 read                                       taken
        AT_HOME ------> READING -----------------> READ <----------- ASIDE
           |                                                           ^
           '-- about to change, there is room --> COPYING -------------'
           '-- about to change, there is no room: the change waits until it is READ, or copies are

    Copies aside are counted on HOST, and never more than ``limit_bytes``. What is about to change waits for nothing but
    the reader, which takes no lock that training holds: with a limit of 0 each update comes right behind the reader.
    It does not matter in which order values are read: those that were read before an update need no copy, and until all
    are, the update of the last one has to wait for all that find no room.

    Parameters
    ----------
    wanted
        Names of values (`MASTER`, or a state's) by position and chunk. No update of these chunks is under way, no edit
        is on its way home, and each is whole at home here.
    ledger, limit_bytes
        What counts the copies, and how many bytes they may take.
    held_bytes
        Of the limit, taken for what the reader holds itself.

    Raises
    ------
    OutOfMemory
        If HOST has no room for ``held_bytes``.
    """

    def __init__(
        self,
        wanted: Mapping[Chunk, Mapping[int, Collection[str]]],
        ledger: Ledger,
        limit_bytes: int,
        held_bytes: int = 0,
    ) -> None:
        ledger.take(Tier.HOST, held_bytes, "what is held until it is saved")
        self.copied_bytes = 0
        """What was copied aside so far."""
        self.nbytes = 0
        """What the copies take now."""
        self._ledger = ledger
        self._limit_bytes = limit_bytes - held_bytes
        self._held_bytes = held_bytes
        self._changed = Condition()
        self._origin = Origin()
        self._fault: BaseException | None = None
        self._is_over = False
        self._values = {
            (chunk.index, position): [_Value(chunk, position, name) for name in names]
            for chunk, places in wanted.items()
            for position, names in places.items()
        }
        self._announced: set[tuple[int, int]] = set()
        """Chunk and position of parameters whose changes were told before they happened."""
        self._chunks = tuple(wanted)
        for chunk in self._chunks:
            chunk.homes.watch(_OfChunk(self, chunk))

    # -- the reader

    def read(self, chunk: Chunk, position: int, name: str) -> Tensor:
        """A copy, on CPU, of the values that were there when the snapshot was made, which are let go of.

        Raises
        ------
        OffloadError
            If they are on a disk that cannot be read.
        RuntimeError
            If they were changed without a word, or copying them aside failed.
        """
        values = self._values[chunk.index, position]
        value = next(each for each in values if each.name == name and each.state is not ValueState.READ)
        with self._changed:
            self._changed.wait_for(lambda: value.state is not ValueState.COPYING)
            self._check()
            if (copy := value.copy) is not None:
                self._drop(value)
                return copy
            value.move_to(ValueState.READING)
        try:
            read = value.read()
        except BaseException:
            self._become(value, ValueState.AT_HOME)
            raise
        self._become(value, ValueState.READ)
        if name == MASTER and chunk.full_is_home and chunk.bindings.is_ahead_of_accepted(position):
            self.changed_unannounced(chunk, [position])
        self._check()
        return read

    def give_room(self) -> bool:
        """Make no more copies, and return when those that there are have been read; False if there were none."""
        with self._changed:
            self._limit_bytes = 0
            had_some = self.nbytes > 0
            self._changed.wait_for(lambda: self.nbytes == 0)
        return had_some

    def close(self) -> None:
        """Let all go: nothing is read any more, and whatever waits to change values goes on."""
        for chunk in self._chunks:
            chunk.homes.watch(None)
        with self._changed:
            self._is_over = True
            self._ledger.give(Tier.HOST, self._held_bytes)
            self._held_bytes = 0
            for values in self._values.values():
                for value in values:
                    if value.copy is not None:
                        self._drop(value)
            self._changed.notify_all()

    # -- what changes values

    def before_change(self, chunk: Chunk, positions: Iterable[int]) -> None:
        """Return when the values of the parameters at these positions have been read, or are copied aside."""
        if not self._origin.is_here:
            return  # a forked child: the reader is not there, and what is changed here is not what it reads
        for position in positions:
            self._announced.add((chunk.index, position))
            for value in self._values.get((chunk.index, position), ()):
                self._save(value)

    def changed_unannounced(self, chunk: Chunk, positions: Iterable[int]) -> None:
        """Parameters were changed in place, and nobody had told: the reader may have got new values."""
        for position in positions:
            place = chunk.index, position
            if place in self._values and place not in self._announced:
                self._fail(
                    RuntimeError(
                        f"{chunk.layout.slots[position].name} was changed in place by a forward while its old values "
                        "were still to be saved. From now on it is copied first; save once more, or with "
                        "use_async=False"
                    )
                )

    def _save(self, value: _Value) -> None:
        """Have the old values somewhere else than at home, or not needed any more."""
        if value.state in (ValueState.ASIDE, ValueState.READ):
            return
        nbytes = value.nbytes
        try:
            with self._changed:
                self._changed.wait_for(partial(self._may_change, value, nbytes))
                if self._is_over or value.state is not ValueState.AT_HOME:
                    return
                value.move_to(ValueState.COPYING)
            copy = value.read()
        except BaseException as error:
            if value.state is ValueState.COPYING:
                self._give(nbytes)
                self._become(value, ValueState.AT_HOME)
            if not isinstance(error, Exception):
                raise  # an interrupt: nothing has been changed yet
            if is_out_of_memory(error):
                self._wait_until_read(value)
            else:
                self._fail(error)  # training goes on, and the reader is told
            return
        self._put_aside(value, copy)

    def _put_aside(self, value: _Value, copy: Tensor) -> None:
        with self._changed:
            self.copied_bytes += value.nbytes
            value.keep(copy)
            if self._is_over:
                self._drop(value)
            self._changed.notify_all()

    def _may_change(self, value: _Value, nbytes: int) -> bool:
        """True if `_save` need not wait. If it is to copy, the bytes have been taken."""
        if self._is_over or value.state in (ValueState.ASIDE, ValueState.READ):
            return True
        return value.state is ValueState.AT_HOME and self._take(nbytes)

    def _wait_until_read(self, value: _Value) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or value.state is ValueState.READ)

    # -- both

    def _take(self, nbytes: int) -> bool:
        if self.nbytes + nbytes > self._limit_bytes:
            return False
        try:
            self._ledger.take(Tier.HOST, nbytes, "a copy for a snapshot")
        except OutOfMemory:
            return False  # whatever took it: the change waits for the reader
        self.nbytes += nbytes
        return True

    def _give(self, nbytes: int) -> None:
        with self._changed:
            self._ledger.give(Tier.HOST, nbytes)
            self.nbytes -= nbytes

    def _drop(self, value: _Value) -> None:
        value.drop()
        self._give(value.nbytes)
        self._changed.notify_all()

    def _become(self, value: _Value, state: ValueState) -> None:
        with self._changed:
            value.move_to(state)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._fault = self._fault or error
            self._is_over = True  # nothing waits for a reader that will get no further
            self._changed.notify_all()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault


class _OfChunk:
    """What a snapshot has of one chunk (a `Watcher`)."""

    def __init__(self, snapshot: Snapshot, chunk: Chunk) -> None:
        self._snapshot = snapshot
        self._chunk = chunk

    def before_change(self, start: int, stop: int) -> None:
        slots = self._chunk.layout.slots
        touched = [position for position, slot in enumerate(slots) if slot.offset < stop and slot.stop > start]
        self._snapshot.before_change(self._chunk, touched)

    def changed_unannounced(self, positions: Iterable[int]) -> None:
        self._snapshot.changed_unannounced(self._chunk, positions)
