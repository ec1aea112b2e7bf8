"""The fewest fetches that any plan could do with, found offline and without our code; and an inspector of plans."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gemini.planning.planner import Plan, Planner


def belady(
    cycle: Sequence[Collection[int]], capacity: int, cycles: int, lost: Collection[int] = (), horizon: int = 2
) -> list[int]:
    """Fetches of each cycle by Belady's rule, for chunks of one byte, from an empty device on.

    The whole sequence of uses is written down, ``horizon`` cycles longer than what counts, and searched for the next
    use of every chunk. Nothing is read ahead, so this is the least that any plan can do with.
    """
    sequence = [set(chunks) for _ in range(cycles + horizon) for chunks in cycle]
    never = len(sequence)
    next_use: list[dict[int, int]] = []
    upcoming: dict[int, int] = {}
    for now in reversed(range(len(sequence))):
        next_use.append({chunk: upcoming.get(chunk, never) for chunk in sequence[now]})
        upcoming.update(dict.fromkeys(sequence[now], now))
        if now % len(cycle) == 0:
            upcoming.update(dict.fromkeys(lost, never))
    next_use.reverse()

    resident: dict[int, int] = {}
    counts = [0] * cycles
    for now in range(cycles * len(cycle)):
        if now % len(cycle) == 0:
            resident = {chunk: use for chunk, use in resident.items() if chunk not in lost}
        need = sequence[now]
        counts[now // len(cycle)] += len(need - resident.keys())
        resident.update(next_use[now])
        while len(resident) > capacity:
            del resident[max(resident.keys() - need, key=lambda chunk: (resident[chunk], chunk))]
    return counts


@dataclass(frozen=True)
class Played:
    """What cycles of a plan did."""

    fetched: list[int]
    """Fetches and prefetches of each cycle, what was prefetched for the next one included."""
    waited: list[int]
    """Those that nothing had prefetched."""


def play(
    planner: Planner,
    nbytes: Mapping[int, int],
    capacity: int | Sequence[int],
    depth: int,
    cycles: int,
    lost: Collection[int] = (),
    resident: Collection[int] = (),
) -> Played:
    """Do what the plan says, cycle after cycle, and check at every step all that it promises."""
    there = set(resident)
    fetched, waited = [], []
    for _ in range(cycles):
        plan = planner.plan(there)
        count, count_waited = _play_cycle(plan, there, nbytes, capacity, depth)
        there -= set(lost)
        assert not plan.between.fetch
        count += _apply(plan.between.evict, plan.between.prefetch, there)
        assert len(plan.between.prefetch) <= depth
        first = [capacity] if isinstance(capacity, int) else capacity[:1]
        assert all(sum(nbytes[c] for c in there) <= room for room in first)
        assert there == plan.end
        fetched.append(count)
        waited.append(count_waited)
    return Played(fetched, waited)


def _play_cycle(
    plan: Plan, there: set[int], nbytes: Mapping[int, int], capacity: int | Sequence[int], depth: int
) -> tuple[int, int]:
    count = count_waited = 0
    assert len(plan.actions) == len(plan.trace.moments)
    for now, (moment, actions) in enumerate(zip(plan.trace.moments, plan.actions, strict=True)):
        in_use = {c for c in moment.in_use if c in nbytes}
        assert not set(actions.evict) & in_use
        count += _apply(actions.evict, (*actions.fetch, *actions.prefetch), there)
        count_waited += len(actions.fetch)
        assert set(actions.fetch) <= in_use <= there, "a chunk in use is not there"
        assert not set(actions.prefetch) & in_use
        if actions.prefetch:
            upcoming = _upcoming(plan, now, in_use, nbytes)
            assert set(actions.prefetch) <= set(upcoming[:depth]), "prefetched farther ahead than asked for"
        room = capacity if isinstance(capacity, int) else capacity[now]
        assert sum(nbytes[c] for c in there) <= room, "over capacity"
    return count, count_waited


def _apply(evict: Sequence[int], fetch: Sequence[int], there: set[int]) -> int:
    for chunk in evict:
        there.remove(chunk)
    for chunk in fetch:
        assert chunk not in there, "fetched twice"
        there.add(chunk)
    return len(fetch)


def _upcoming(plan: Plan, now: int, in_use: set[int], nbytes: Mapping[int, int]) -> list[int]:
    later = (c for moment in plan.trace.moments[now + 1 :] for c in sorted(moment.in_use))
    return [c for c in dict.fromkeys(later) if c in nbytes and c not in in_use]
