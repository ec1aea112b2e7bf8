"""The largest batch, the longest sequence, or the least memory that fits."""

from collections.abc import Callable

from .activations import Activations
from .demand import Demand, Machine, ModelData, demand, with_machine

LARGEST_BATCH = 1 << 16
LONGEST_SEQUENCE = 1 << 20
_MIB = 1 << 20


def largest(fits: Callable[[int], bool], start: int, limit: int, multiple: int = 1) -> int:
    """The largest multiple that fits, 0 if none does, for a ``fits`` that stays false once it is.

    Raises
    ------
    ValueError
        If everything up to ``limit`` fits.
    """
    low, high = 0, max(multiple, start // multiple * multiple)
    while fits(high):
        low, high = high, high * 2
        if low >= limit:
            raise ValueError(f"everything up to {limit} fits")
    while high - low > multiple:
        middle = (low + high) // 2 // multiple * multiple
        if middle <= low:
            break
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def solve_batch_size(data: ModelData, activations: Activations, machine: Machine, seq_len: int) -> int:
    """The largest batch size; what it needs is tracked at each size tried, not scaled."""
    return largest(lambda size: demand(data, activations.peak_bytes(size, seq_len), machine).fits, 1, LARGEST_BATCH)


def solve_seq_len(data: ModelData, activations: Activations, machine: Machine, batch_size: int, step: int = 32) -> int:
    """The longest sequence, to a multiple of ``step``; 0 if not even that fits or the model takes no longer ones."""

    def fits(length: int) -> bool:
        try:
            return demand(data, activations.peak_bytes(batch_size, length), machine).fits
        except (IndexError, ValueError, RuntimeError):  # longer than the model's table of positions
            return False

    return largest(fits, step, LONGEST_SEQUENCE, step)


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
