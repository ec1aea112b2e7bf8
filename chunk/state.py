"""The states of a chunk and the one table of allowed transitions.

::

                     fetch             arrived           pin
    HOME ----------------> FETCHING ----------> READY <-------> IN_USE
     |  ^                    ^  |                |  ^    unpin    |  ^
     |  '--------------------|--'-- failed       |  |             |  |
     |  '--------------------|--- evict ---------'  |             |  |
     v  | begin_update,      |                   v  |             v  |
    HOME_UPDATING -----------'         READY_UPDATING <- IN_USE_UPDATING
          settle      fetch (behind the update)    unpin

The full copy is a clean cache of home: forward and backward never change parameters, so READY -> HOME copies nothing.

HOME -> READY_UPDATING: the step takes an update ahead of it that fills the memory of the full copy.
"""

from enum import Enum, auto

from gemini.errors import StateError


class ChunkState(Enum):
    """What exists of a chunk on DEVICE, whether it is in use, and whether an update is changing it."""

    HOME = auto()
    """Only the home exists; the parameters point at NaN."""
    HOME_UPDATING = auto()
    """Only the home exists, and an update is changing it."""
    FETCHING = auto()
    """Memory is taken and a copy is under way, behind an update if there is one."""
    READY = auto()
    """The full copy is valid and unused: it may be evicted."""
    READY_UPDATING = auto()
    """An update is changing home and full copy, which nothing uses; the parameters point at NaN."""
    IN_USE = auto()
    """At least one visit has it pinned: it must not move."""
    IN_USE_UPDATING = auto()
    """An update is changing a chunk that is pinned: ``optimizer.step()`` waits for it before it returns."""

    __hash__ = object.__hash__  # states are looked up at each visit, and Enum's own is written in Python


TRANSITIONS: dict[ChunkState, frozenset[ChunkState]] = {
    ChunkState.HOME: frozenset({ChunkState.FETCHING, ChunkState.HOME_UPDATING, ChunkState.READY_UPDATING}),
    ChunkState.HOME_UPDATING: frozenset({ChunkState.FETCHING, ChunkState.HOME}),
    ChunkState.FETCHING: frozenset({ChunkState.READY, ChunkState.HOME, ChunkState.HOME_UPDATING}),
    ChunkState.READY: frozenset({ChunkState.IN_USE, ChunkState.HOME, ChunkState.READY_UPDATING}),
    ChunkState.READY_UPDATING: frozenset({ChunkState.READY}),
    ChunkState.IN_USE: frozenset({ChunkState.READY, ChunkState.IN_USE_UPDATING}),
    ChunkState.IN_USE_UPDATING: frozenset({ChunkState.IN_USE, ChunkState.READY_UPDATING}),
}

UPDATING = {
    ChunkState.HOME: ChunkState.HOME_UPDATING,
    ChunkState.READY: ChunkState.READY_UPDATING,
    ChunkState.IN_USE: ChunkState.IN_USE_UPDATING,
}
"""What a state becomes when an update begins."""

SETTLED = {updating: settled for settled, updating in UPDATING.items()}
"""What a state becomes when its update is over."""

RESIDENT = frozenset(ChunkState) - {ChunkState.HOME, ChunkState.HOME_UPDATING}
"""The full copy exists or is arriving."""

VALID = frozenset({ChunkState.READY, ChunkState.IN_USE})
"""The full copy has the values of home, and no update is changing them."""


def transition(chunk_index: int, old: ChunkState, new: ChunkState) -> ChunkState:
    """Return ``new`` if the table allows it.

    Raises
    ------
    StateError
        If it does not.
    """
    if new not in TRANSITIONS[old]:
        raise StateError(f"chunk {chunk_index}: {old.name} -> {new.name} is not a transition")
    return new
