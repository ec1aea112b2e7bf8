"""The update of one chunk that is computed within backward, before ``optimizer.step()`` has asked for it.

::

    PENDING --confirm--> CONFIRMED --its last block is written--> the homes are where the results are
       |
       '--call_off, or a block fails--> CALLED_OFF --no block is under way--> the room of the results is free

It reads the homes of the chunk and its gradient, and changes neither: the results go to room on disk of their own,
beside the homes. To confirm it has the homes be there, which moves no data. So nothing is lost if the user does
anything else than to step.
"""

from collections.abc import Callable, Mapping
from enum import Enum, auto
from threading import Condition, RLock

from ..chunk import Buffer, Chunk, DiskBackend, DiskBuffer
from ..errors import StateError


class TrialState(Enum):
    """What is to become of the results."""

    PENDING = auto()
    """Nobody has asked for them yet."""
    CONFIRMED = auto()
    """They are the chunk's next values."""
    CALLED_OFF = auto()
    """They are worth nothing."""


_TRANSITIONS = {
    TrialState.PENDING: frozenset({TrialState.CONFIRMED, TrialState.CALLED_OFF}),
    TrialState.CONFIRMED: frozenset[TrialState](),
    TrialState.CALLED_OFF: frozenset[TrialState](),
}


class Trial:
    """The update, and the room of its results. Any thread may call its methods.

    Parameters
    ----------
    chunk, disk
        What is updated, and where all of its homes are.
    gradient
        Where its gradient is.
    gradient_arrives
        Returns when that can be read.

    Raises
    ------
    OutOfMemory, OffloadError
        If there is no room for the results.
    """

    def __init__(
        self, chunk: Chunk, disk: DiskBackend, gradient: tuple[str, Buffer], gradient_arrives: Callable[[], None]
    ) -> None:
        self.chunk = chunk
        self.gradient_arrives = gradient_arrives
        self.state = TrialState.PENDING
        self.has_begun = False
        """True from the first block on that was read."""
        homes = {name: home for name, home in chunk.homes.items() if isinstance(home, DiskBuffer)}
        self.sources: Mapping[str, Buffer] = {**homes, gradient[0]: gradient[1]}
        """Where the update reads: the chunk may get other homes meanwhile."""
        self._disk = disk
        self._numel_left = len(chunk.extent)
        self._under_way: set[int] = set()
        """The first elements of blocks."""
        self._lock = RLock()  # entered itself: to leave a `Condition` takes memory, which may have run out
        self._rested = Condition(self._lock)
        self._pairs: dict[str, tuple[DiskBuffer, DiskBuffer]] = {}
        """Each home, and the room of its results, while there is such a room."""
        try:
            for name, home in homes.items():
                self._pairs[name] = home, disk.beside(home)
        except BaseException:
            self._free()
            raise

    @property
    def is_off(self) -> bool:
        """True if its results are worth nothing."""
        return self.state is TrialState.CALLED_OFF

    def result(self, name: str) -> Buffer:
        """Where the results for a home go."""
        return self._pairs[name][1]

    # -- the thread that updates

    def begin(self, start: int) -> bool:
        """A block from this element on is about to be read; False if it is not wanted any more."""
        with self._lock:
            if self.is_off:
                return False
            self.has_begun = True
            self._under_way.add(start)
            return True

    def finish(self, start: int, numel: int) -> None:
        """A block is written."""
        with self._lock:
            self._under_way.discard(start)
            self._numel_left -= numel
            self._end()

    def abandon(self, start: int) -> None:
        """A block is not under way any more, and not done."""
        with self._lock:
            self._under_way.discard(start)
            self._end()

    def fail(self) -> bool:
        """Something went wrong with a block; False if that cannot be passed over, because the results are wanted."""
        with self._lock:
            if self.state is TrialState.PENDING:
                self._move_to(TrialState.CALLED_OFF)
            return self.is_off

    # -- the thread that trains

    def confirm(self) -> bool:
        """Have the homes be where the results are, as soon as all of them are; False if it is called off."""
        with self._lock:
            if self.is_off:
                return False
            if self.state is TrialState.PENDING:
                self._move_to(TrialState.CONFIRMED)
            self._end()
            return True

    def call_off(self) -> None:
        """Nobody wants the results. Does not wait for what is under way, which does no harm."""
        with self._lock:
            if self.state is TrialState.PENDING:
                self._move_to(TrialState.CALLED_OFF)
            self._end()

    def end(self) -> bool:
        """Call it off, and return when nothing of it is under way; False if the step has confirmed it."""
        self.call_off()
        self.rest(None)
        return self.is_off

    def rest(self, seconds: float | None) -> bool:
        """Return when nothing of what was called off is under way, or after so long: then False."""
        with self._lock:
            return self._rested.wait_for(lambda: not (self.is_off and self._under_way), seconds)

    # -- with the lock

    def _end(self) -> None:
        if self.state is TrialState.CONFIRMED and not self._numel_left:
            while self._pairs:
                _, (home, result) = self._pairs.popitem()
                self._disk.exchange(home, result)
        elif self.is_off and not self._under_way:
            self._free()
            self._rested.notify_all()

    def _free(self) -> None:
        while self._pairs:
            _, (_, result) = self._pairs.popitem()
            self._disk.free(result)

    def _move_to(self, state: TrialState) -> None:
        if state not in _TRANSITIONS[self.state]:
            raise StateError(f"update of chunk {self.chunk.index} ahead of the step: {self.state.name} -> {state.name}")
        self.state = state
