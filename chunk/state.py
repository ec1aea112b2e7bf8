"""The states of a chunk's full copy and the one table of allowed transitions.

::

    HOME --fetch--> FETCHING --arrived--> READY --pin--> IN_USE
     ^                 |                   |  ^------------|
     |---failed--------'                   |    last unpin
     '---------------evict-----------------'

The full copy is a clean cache of home: forward and backward never change parameters, so READY -> HOME copies nothing.
"""

from enum import Enum, auto

from gemini.errors import StateError


class ChunkState(Enum):
    """What exists of a chunk on DEVICE."""

    HOME = auto()
    """Only the home exists; the parameters point at NaN."""
    FETCHING = auto()
    """Memory is taken and a copy is under way."""
    READY = auto()
    """The full copy is valid and unused: it may be evicted."""
    IN_USE = auto()
    """At least one visit has it pinned: it must not move."""


TRANSITIONS: dict[ChunkState, frozenset[ChunkState]] = {
    ChunkState.HOME: frozenset({ChunkState.FETCHING}),
    ChunkState.FETCHING: frozenset({ChunkState.READY, ChunkState.HOME}),
    ChunkState.READY: frozenset({ChunkState.IN_USE, ChunkState.HOME}),
    ChunkState.IN_USE: frozenset({ChunkState.READY}),
}


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
