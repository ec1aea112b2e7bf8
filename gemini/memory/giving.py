"""How much model data give way when a model's own computation has run out of memory. Pure."""

from dataclasses import dataclass

_BACKWARD = 1.25
"""What backward takes at its peak, relative to what the forward has left: gradients of activations, mostly."""
_LEAST_DONE = 0.1
"""A forward that failed at once tells little of what it needs."""
_GUARD_BYTES = 16 << 20
"""What threads, kernels and malloc take besides, or an eighth of what is free."""
_LEAST_SHARE = 16
"""At least this part (one over it) of the homes goes at first, then twice as much each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A forward or backward that failed, and what memory looks like after it, when nothing runs."""

    free_bytes: int
    """What the process may take now, without its full copies."""
    held_bytes: int
    """Full copies that were there when it failed."""
    room_bytes: int
    """What full copies may take."""
    home_bytes: int
    """Homes that share the memory."""
    asked_bytes: int
    """The allocation that failed; 0 if that is not known."""
    done: float
    """The part of a forward that had run, from 0 to 1."""
    attempt: int
    """How often the same forward has failed before."""


def bytes_to_give(shortage: Shortage) -> int:
    """What full copies and homes are to take less from now on.

    When the computation failed it had taken all that is free now, but for the full copies and as much as it asked for.
    The rest of it is taken to need as much in proportion.
    """
    taken = max(shortage.free_bytes - shortage.held_bytes - shortage.asked_bytes, 0)
    guard = min(_GUARD_BYTES, shortage.free_bytes // 8)
    need = taken / max(min(shortage.done, 1.0), _LEAST_DONE) * _BACKWARD + shortage.asked_bytes + guard
    least = max(2 * shortage.asked_bytes, shortage.home_bytes // _LEAST_SHARE) << shortage.attempt
    return max(round(need) + shortage.room_bytes - shortage.free_bytes, least)


def is_hopeless(shortage: Shortage) -> bool:
    """True if all that there is would not do for the one allocation that failed."""
    return shortage.asked_bytes > shortage.free_bytes + shortage.home_bytes
