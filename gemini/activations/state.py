"""The states of memory that a graph has saved, and the one function that changes them."""

from enum import Enum

from ..errors import StateError


class SavedState(Enum):
    """Where the values are."""

    HERE = "here"
    """In the memory that computes, and nowhere else."""
    LEAVING = "leaving"
    """There still; they are being copied to a tier below."""
    AWAY = "away"
    """On the tier below only."""
    COMING = "coming"
    """On their way back."""
    BACK = "back"
    """In both places: the memory that computes can drop them at any time."""

    @property
    def has_memory(self) -> bool:
        """True if the values can be used, now or once a copy is over."""
        return self is not SavedState.AWAY


_TRANSITIONS = {
    SavedState.HERE: {SavedState.LEAVING},
    SavedState.LEAVING: {SavedState.AWAY, SavedState.BACK, SavedState.HERE},  # HERE: called off, or it failed
    SavedState.AWAY: {SavedState.COMING},
    SavedState.COMING: {SavedState.BACK, SavedState.AWAY},  # AWAY: it failed
    SavedState.BACK: {SavedState.AWAY},
}


def changed(old: SavedState, new: SavedState) -> SavedState:
    """The new state.

    Raises
    ------
    StateError
        If it cannot follow the old one.
    """
    if new not in _TRANSITIONS[old]:
        raise StateError(f"memory saved for backward: {old.name} -> {new.name} is not a transition")
    return new
