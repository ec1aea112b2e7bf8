"""The largest batch, the longest sequence, or the least memory that fits."""

from collections.abc import Callable

from .activations import Activations, Ways
from .demand import Demand, Machine, ModelData, demand, with_machine

LARGEST_BATCH = 1 << 16
LONGEST_SEQUENCE = 1 << 20
MOST_RANKS = 1 << 12
_MIB = 1 << 20
_ROOM_STEPS = 12
"""Halvings by which the room for non-model data is found: to 1/4096 of the memory."""
_LEAP = 8
"""At most so much further at once, where nothing is known to be too large."""


def largest(need: Callable[[int], int | None], room: int, limit: int, multiple: int = 1) -> int:
    """The largest multiple whose need is at most ``room``, 0 if there is none.

    The need grows smoothly, so the secant through the last two points says where to look (Dekker, 1969: inside of what
    is still open, and by halves where that does not close in); asking is what takes time.

    Parameters
    ----------
    need
        Bytes; they grow with the number. None: too large for a reason of its own.

    Raises
    ------
    ValueError
        If everything up to ``limit`` fits.
    """
    low, high = 0, None
    points: list[tuple[int, int]] = []
    guess, widths = multiple, [limit, limit]
    while high is None or high - low > multiple:
        needed = need(guess)
        if needed is not None:
            points = [*points[-1:], (guess, needed)]
        if needed is not None and needed <= room:
            low = guess
            if low >= limit:
                raise ValueError(f"everything up to {limit} fits")
        else:
            high = guess
        top = min(low * _LEAP, limit) + multiple if high is None else high
        widths = [widths[1], top - low]
        halfway = (low + top) // 2
        slow = high is not None and 2 * widths[1] > widths[0]
        guess = halfway if slow or needed is None else _where(points, room, halfway)
        guess = min(max(guess // multiple * multiple, low + multiple), top - multiple)
    return low


def _where(points: list[tuple[int, int]], room: int, otherwise: int) -> int:
    """Where the line through both points comes to ``room``."""
    if len(points) < 2:
        return otherwise
    (a, of_a), (b, of_b) = points
    if of_a == of_b:
        return otherwise
    return b + (room - of_b) * (b - a) // (of_b - of_a)


def room(data: ModelData, machine: Machine) -> int:
    """The most bytes of non-model data with which training fits; -1 if it does not without any."""
    capacity = machine.ram_bytes if machine.device_bytes is None else machine.device_bytes
    if not demand(data, 0, machine).fits:
        return -1
    low, high = 0, capacity
    for _ in range(_ROOM_STEPS):
        middle = (low + high) // 2
        low, high = (middle, high) if demand(data, middle, machine).fits else (low, middle)
    return low


def demand_of(data: ModelData, ways: Ways, machine: Machine, batch_size: int, seq_len: int) -> Demand:
    """The demand of the first of a policy's ways with which it fits, else of the one that takes least memory."""
    found: list[tuple[int, Demand]] = []
    for way in ways.all:
        peak = way.peak_bytes(batch_size, seq_len)
        asked = demand(data, peak, machine, way.away_bytes(batch_size, seq_len))
        if asked.fits:
            return asked
        found.append((peak, asked))
    return min(found, key=lambda each: each[0])[1]


def solve_batch_size(
    data: ModelData, activations: Activations | Ways, machine: Machine, seq_len: int, most: int | None = None
) -> int:
    """The largest batch size, up to ``most``; what it needs is tracked at each size tried, not scaled."""

    def need(size: int) -> int | None:
        return None if most is not None and size > most else activations.peak_bytes(size, seq_len)

    return largest(need, room(data, machine), LARGEST_BATCH)


def solve_seq_len(
    data: ModelData,
    activations: Activations | Ways,
    machine: Machine,
    batch_size: int,
    step: int = 32,
    most: int | None = None,
) -> int:
    """The longest sequence, to a multiple of ``step``; 0 if not even that fits or the model takes no longer ones."""

    def need(length: int) -> int | None:
        if most is not None and length > most:
            return None
        try:
            return activations.peak_bytes(batch_size, length)
        except (IndexError, ValueError, RuntimeError):  # longer than the model's table of positions
            return None

    return largest(need, room(data, machine), LONGEST_SEQUENCE, step)


def solve_ranks(data: ModelData, non_model_bytes: int, machine_of: Callable[[int], Machine]) -> int | None:
    """The fewest ranks with which it fits; None if no number up to `MOST_RANKS` does.

    Parameters
    ----------
    machine_of
        From a number of ranks to what each of them has: those on one machine share its RAM and disk.
    """

    def fits(ranks: int) -> bool:
        return demand(data, non_model_bytes, machine_of(ranks)).fits

    low, high = 0, 1
    while not fits(high):
        low, high = high, high * 2
        if high > MOST_RANKS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def solve_memory(data: ModelData, non_model_bytes: int, machine: Machine, tier: str) -> int | None:
    """The least RAM (``"host"``) or disk in bytes with which it fits, to a MiB; None if more of it never helps."""
    field = {"host": "ram_bytes", "disk": "disk_bytes"}[tier]

    def at(mebibytes: int) -> Demand:
        return demand(data, non_model_bytes, with_machine(machine, **{field: mebibytes * _MIB}))

    low, high = 0, 64
    while not at(high).fits:
        low, high = high, high * 2
        if high > 1 << 30:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).fits else (middle, high)
    return high * _MIB
