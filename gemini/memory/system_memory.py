"""What to do about the system's own limit, where it is lower than what model data would need."""

from ..errors import OutOfMemory
from ..lease.room import room_of
from ..sizes import format_bytes
from .tracker import host_headroom

LEAST_ROOM_BYTES = 32 << 20
"""What the compilation of the step's kernels takes. With less the compiler ends the process, without any exception."""
_OF_RAM = ("CPUAllocator", "bad_alloc", "could not create a primitive")
_SLACK_BYTES = 16 << 20
"""What else the process takes until it is asked again."""


def more_room(capacity_bytes: int) -> str | None:
    """What to raise, so that model data may take so much of RAM; None if the system has the room."""
    free, limit = host_headroom()
    return None if room_of(capacity_bytes) <= free else _raised(limit, room_of(capacity_bytes) - free + _SLACK_BYTES)


def check_least_room() -> None:
    """Raise where the system leaves too little to find out what a model needs.

    Raises
    ------
    OutOfMemory
        The number that it names is a floor.
    """
    free, limit = host_headroom()
    if free < LEAST_ROOM_BYTES:
        raise OutOfMemory(
            f"host tier out of memory. {limit[0].upper()}{limit[1:]} is {format_bytes(free)}, and any model needs "
            f"{format_bytes(LEAST_ROOM_BYTES)} before it has a byte of its own; "
            f"{_raised(limit, LEAST_ROOM_BYTES + _SLACK_BYTES - free)} or more, a floor from which the rest can be told"
        )


def refused_memory(error: BaseException, free_bytes: int, capacity_bytes: int) -> OutOfMemory:
    """The error where the system gave no memory for what a model takes when it is boosted.

    Parameters
    ----------
    free_bytes
        What the system left before.
    capacity_bytes
        What model data may take of RAM.
    """
    limit = host_headroom()[1]
    lacking = max(room_of(capacity_bytes) - free_bytes, 2 * LEAST_ROOM_BYTES) + _SLACK_BYTES
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OutOfMemory(
        f"host tier out of memory. Model data may take {format_bytes(capacity_bytes)}, and the system gives no more "
        f"memory ({said}): before the model {limit} was {format_bytes(free_bytes)}; {_raised(limit, lacking)} or more"
    )


def is_of_ram(error: BaseException) -> bool:
    """True if it was RAM that an allocation did not get."""
    return isinstance(error, MemoryError | OSError) or any(text in str(error) for text in _OF_RAM)


def _raised(limit: str, nbytes: int) -> str:
    name = limit.split()[0]
    if name.startswith("RLIMIT_"):
        return f"raise {name} by {nbytes} bytes"
    return f"give this process {format_bytes(nbytes)} more of RAM (it is short of {limit})"
