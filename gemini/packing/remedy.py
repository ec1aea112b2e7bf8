"""What would have been enough, where a model has no place: found by trying, and said."""

from collections.abc import Mapping
from dataclasses import replace

from ..chunk.tier import Tier
from ..errors import OutOfMemory
from ..memory.system_memory import more_room
from ..memory.tracker import Budget
from ..sizes import format_bytes
from .problem import Problem
from .solve import Shortfall, Solution, solve

REMEDY_ATTEMPTS = 32
"""Each changes a capacity by what the one before lacked; two or three do."""


def out_of_memory(problem: Problem, shortfall: Shortfall, budgets: Mapping[Tier, Budget]) -> OutOfMemory:
    """The error that says what is needed, what there is, and the capacities that would do.

    Parameters
    ----------
    budgets
        Where each capacity comes from.
    """
    remedies = [_remedy(problem, shortfall, tier) for tier in (Tier.DISK, Tier.HOST)]
    memory, there_is = problem.capacity.memory, problem.capacity.nbytes
    have = ", ".join(f"{t.value} {format_bytes(budgets[t].bytes)} ({budgets[t].source})" for t in memory.pools)
    is_too_wide = shortfall.unit_bytes > there_is[memory.compute_tier]
    if is_too_wide:
        named = f"Unit {shortfall.unit!r}" if shortfall.unit else "The model, which is one unit,"
        fault = (
            f"{memory.compute_tier.value} tier out of memory. {named} alone needs "
            f"{format_bytes(shortfall.unit_bytes)} of parameters at once"
        )
    else:
        fault = (
            f"all tiers out of memory. The model data need {format_bytes(shortfall.homes_bytes)} and room to work, "
            f"{format_bytes(shortfall.unplaced.missing_bytes)} have no place"
        )
    is_said = budgets[Tier.HOST].source == "argument host_memory"
    told = list(
        dict.fromkeys(_told(enough, there_is[Tier.DISK] > 0, is_said) for enough in remedies if enough is not None)
    )
    if is_too_wide:
        told.append("make chunks smaller (chunk_config_dict)")
    return OutOfMemory(f"{fault}; there are {have}; {', or '.join(told)}")


def _remedy(problem: Problem, shortfall: Shortfall, tier: Tier) -> dict[Tier, int] | None:
    """Capacities that are enough when homes without a place go to ``tier``; None if none was found.

    Found by trying: other capacities make other chunks and other staging, so no formula is exact.
    """
    there_is, enough = problem.capacity.nbytes, dict[Tier, int]()
    for _ in range(REMEDY_ATTEMPTS):
        more = dict(shortfall.unplaced.working_bytes)
        more[tier] = more.get(tier, 0) + shortfall.unplaced.homes_bytes
        enough |= {t: enough.get(t, there_is[t]) + nbytes for t, nbytes in more.items() if nbytes}
        nbytes = problem.capacity.memory.capacities({**there_is, **enough})
        found = solve(replace(problem, capacity=replace(problem.capacity, nbytes=nbytes)))
        if isinstance(found, Solution):
            return enough
        shortfall = found
    return None


def _told(enough: Mapping[Tier, int], has_disk: bool, is_host_said: bool) -> str:
    """What to do, so that these are the capacities."""
    raised = more_room(enough[Tier.HOST]) if Tier.HOST in enough else None
    is_found = raised is not None and not is_host_said  # with more room more is found
    left_out = {Tier.DISK, Tier.HOST} if is_found else {Tier.DISK}
    parts = [f"{tier.value}_memory to {nbytes} bytes" for tier, nbytes in enough.items() if tier not in left_out]
    first = []
    if Tier.DISK in enough:
        parts.insert(0, f"disk_memory to {enough[Tier.DISK]} bytes")
        first = [] if has_disk else ["give a folder for the disk tier, GeminiPlugin(offload_dir=...),"]
    done = [*first, *([f"set {' and '.join(parts)}"] if parts else []), *([raised] if raised is not None else [])]
    return f"{' and '.join(done)} or more"
