"""What would have been enough, where a model has no place: found by trying, and said."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..chunk import Tier
from ..errors import OutOfMemory
from ..memory.capacity import Capacities
from ..memory.tracker import Budget
from ..planning.placement import DoesNotFit
from ..sizes import format_bytes

REMEDY_ATTEMPTS = 32
"""Each changes a capacity by what the one before lacked; two or three do."""


class TooSmall(Exception):
    """What was tried last, with the smallest ring, and what it lacks."""

    def __init__(self, homes_bytes: int, unit: str, unit_bytes: int, fault: DoesNotFit) -> None:
        super().__init__(str(fault))
        self.homes_bytes = homes_bytes
        self.unit = unit
        self.unit_bytes = unit_bytes
        self.fault = fault


def remedy(
    tier: Tier, error: TooSmall, attempt: Callable[[Capacities], object], capacities: Capacities
) -> dict[Tier, int] | None:
    """Capacities that are enough when homes without a place go to ``tier``; None if none was found.

    Found by trying: other capacities make other chunks and other staging, so no formula is exact.
    """
    enough: dict[Tier, int] = {}
    for _ in range(REMEDY_ATTEMPTS):
        more = dict(error.fault.working_bytes)
        more[tier] = more.get(tier, 0) + error.fault.homes_bytes
        enough |= {t: enough.get(t, capacities.nbytes[t]) + nbytes for t, nbytes in more.items() if nbytes}
        tried = {**capacities.budgets, **{t: Budget(nbytes, "tried") for t, nbytes in enough.items()}}
        budgets = {t: tried[capacities.memory.pool(t)] for t in Tier}
        try:
            attempt(replace(capacities, budgets=budgets))
            return enough
        except TooSmall as again:
            error = again
    return None


def out_of_memory(error: TooSmall, remedies: Sequence[Mapping[Tier, int]], capacities: Capacities) -> OutOfMemory:
    """The error that says what is needed, what there is, and the capacities that would do."""
    budgets = capacities.budgets
    have = ", ".join(
        f"{t.value} {format_bytes(budgets[t].bytes)} ({budgets[t].source})" for t in capacities.memory.pools
    )
    where_units_run = capacities.memory.compute_tier
    if error.unit_bytes > budgets[where_units_run].bytes:
        problem = (
            f"{where_units_run.value} tier out of memory. Unit {error.unit!r} alone needs "
            f"{format_bytes(error.unit_bytes)} of parameters at once"
        )
    else:
        problem = (
            f"all tiers out of memory. The model data need {format_bytes(error.homes_bytes)} and room to work, "
            f"{format_bytes(error.fault.missing_bytes)} have no place"
        )
    told = list(dict.fromkeys(_told(enough, budgets[Tier.DISK].bytes > 0) for enough in remedies))
    if error.unit_bytes > budgets[where_units_run].bytes:
        told.append("make chunks smaller (chunk_config_dict)")
    return OutOfMemory(f"{problem}; there are {have}; {', or '.join(told)}")


def _told(enough: Mapping[Tier, int], has_disk: bool) -> str:
    parts = [f"{tier.value}_memory to {nbytes} bytes" for tier, nbytes in enough.items() if tier is not Tier.DISK]
    if Tier.DISK not in enough:
        return f"set {' and '.join(parts)} or more"
    disk = f"disk_memory to {enough[Tier.DISK]} bytes"
    if has_disk:
        return f"set {' and '.join((disk, *parts))} or more"
    folder = f"give a folder for the disk tier, GeminiPlugin(offload_dir=...), and set {disk}"
    return f"{' and '.join((folder, *parts))} or more"
