"""From a trace to a plan: what to evict, fetch and prefetch at each moment. Pure: no torch.

Three questions, answered one after the other:

1. *What to keep.* Eviction takes the chunk whose next use is farthest away, also in the next cycle (Belady's
   OPT, which PatrickStar applied to training). Forward and backward are a palindrome, where that equals LRU; evaluation
   and generation are cyclic, where LRU would miss every time. Eviction is free (full copies are clean), so the only
   cost counted is fetches.
2. *When to fetch.* As early as ``depth`` allows into room where nothing is kept: reading ahead then costs no fetch.
   What is not kept stays until its room is needed.
3. *Whether to keep less.* Where OPT keeps so much that fetches must wait (a cycle that nearly fits), the next chunks
   are kept within reach as if they were in use, if that saves more waiting than it costs fetches.

A cycle is planned from what is there when it begins. Optimal ones need not repeat (of three chunks in a room of two, a
cycle keeps another one each time), and what is there may be the doing of another cycle.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import accumulate

from .trace import Trace

NEVER = 1 << 60
SETTLING_CYCLES = 3
"""Cycles that are planned to see what a choice costs in the long run."""
PLANS_REMEMBERED = 64
"""Plans kept, each for another set of copies at the beginning; training has one or two."""


@dataclass(frozen=True, slots=True)
class Actions:
    """What the runtime does when a moment comes, in this order."""

    evict: tuple[int, ...] = ()
    fetch: tuple[int, ...] = ()
    prefetch: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do in one cycle."""

    trace: Trace
    actions: tuple[Actions, ...]
    """One per moment of the trace."""
    between: Actions
    """For the time before the next cycle, when nothing is in use (behind the optimizer step)."""
    end: frozenset[int]
    """What is there when the next cycle begins."""


class Planner:
    """Plans cycles that repeat.

    Parameters
    ----------
    trace
        The moments of one cycle.
    nbytes
        Bytes of each chunk's full copy; chunks that are left out (their home is the full copy) are always there.
    capacity_bytes
        Room for full copies on DEVICE: the same at all moments, or a number for each (non-model data take the rest).
    depth
        How many chunks may be on their way ahead of use; 0 prefetches nothing.
    lost
        Chunks whose full copies do not outlive a cycle: the optimizer step rewrites their homes out of its reach.
    aside
        Units whose moments do not count for `least_bytes`.

    Raises
    ------
    ValueError
        If a moment needs more than its capacity.
    """

    def __init__(
        self,
        trace: Trace,
        nbytes: Mapping[int, int],
        capacity_bytes: int | Sequence[int],
        depth: int,
        lost: Collection[int] = (),
        aside: Collection[int] = (),
    ) -> None:
        self.trace = trace
        self.first_uses = trace.first_uses()
        self.least_bytes = 0
        """What one of the moments needs at least."""
        self._nbytes = nbytes
        self._depth = depth
        self._lost = frozenset(lost)
        in_use = [frozenset(c for c in moment.in_use if c in nbytes) for moment in trace.moments]
        capacity = [capacity_bytes] * len(in_use) if isinstance(capacity_bytes, int) else [*capacity_bytes]
        for moment, chunks, room in zip(trace.moments, in_use, capacity, strict=True):
            need = sum(nbytes[c] for c in chunks)
            if need > room:
                raise ValueError(f"unit {moment.unit} needs {need} bytes of full copies at once, capacity is {room}")
            if need > self.least_bytes and moment.unit not in aside:
                self.least_bytes = need
        self._in_use = [*in_use, frozenset()]  # the last one is the time between two cycles
        self._capacity = [*capacity, *capacity[:1]]
        self._ahead = _ahead(self._in_use, depth, self._lost)
        self._plans: dict[frozenset[int], Plan] = {}
        self._set_reach(0)
        if in_use and depth and sum(nbytes.values()) > min(capacity):
            self._set_reach(min(sorted({0, 1, depth}), key=self._cost_of_reach))

    @property
    def first(self) -> tuple[int, ...]:
        """The chunks to prefetch before a cycle when nothing else is known."""
        return self._ahead[-1]

    def plan(self, resident: Collection[int] = ()) -> Plan:
        """The plan of a cycle that begins with these full copies on DEVICE."""
        start = frozenset(c for c in resident if c in self._nbytes)
        plan = self._plans.get(start)
        if plan is None:
            if len(self._plans) >= PLANS_REMEMBERED:
                self._plans.clear()
            plan = self._plans[start] = self._planned(start)
        return plan

    def _set_reach(self, reach: int) -> None:
        """Let each moment need, besides what it uses, as many of the next ``reach`` chunks as there is room for."""
        self._plans.clear()
        self._needs = []
        for in_use, ahead, room in zip(self._in_use, self._ahead, self._capacity, strict=False):
            need, left = set(in_use), room - sum(self._nbytes[c] for c in in_use)
            for chunk in ahead[:reach]:
                left -= self._nbytes[chunk]
                if left < 0:
                    break
                need.add(chunk)
            self._needs.append(frozenset(need))

    def _cost_of_reach(self, reach: int) -> int:
        """Bytes moved in a cycle, and again those that are waited for."""
        self._set_reach(reach)
        plan, begin = self.plan(), frozenset[int]()
        for _ in range(SETTLING_CYCLES):
            if plan.end == begin:
                break
            begin = plan.end
            plan = self.plan(begin)
        waited = [c for actions in plan.actions for c in actions.fetch]
        moved = [c for actions in (*plan.actions, plan.between) for c in (*actions.fetch, *actions.prefetch)]
        return sum(self._nbytes[c] for c in (*waited, *moved))

    def _planned(self, start: frozenset[int]) -> Plan:
        if not self.trace.moments:
            return Plan(self.trace, (), Actions(), start - self._lost)
        cycle = _Cycle(self._needs, self._capacity, self._nbytes, start, self._lost)
        fetches: list[list[tuple[int, int]]] = [[] for _ in self._needs]
        between = len(self._needs) - 1
        for when in range(2 * len(self._needs)):
            # Of the cycle after this one only what can be fetched before it begins.
            earliest = 0 if when <= between else between
            now = when % len(self._needs)
            for chunk in self._in_order(cycle.missing[when], now):
                at = cycle.advance(chunk, when, earliest, self._ahead)
                if at <= between:
                    fetches[at].append((chunk, when))
        return self._emit(cycle, start, fetches)

    def _in_order(self, chunks: Collection[int], now: int) -> list[int]:
        """What a moment uses, then what it keeps within reach, nearest first."""
        ahead = {chunk: i for i, chunk in enumerate(self._ahead[now])}
        return sorted(chunks, key=lambda c: (-1 if c in self._in_use[now] else ahead[c], c))

    def _emit(self, cycle: "_Cycle", start: frozenset[int], fetches: Sequence[Sequence[tuple[int, int]]]) -> Plan:
        resident, used = set(start), sum(self._nbytes[c] for c in start)
        kept_until = dict(cycle.kept[-1])
        idle = deque(sorted(start - kept_until.keys()))
        actions = []
        for now, (needs, in_use) in enumerate(zip(self._needs, self._in_use, strict=True)):
            if now == len(self.trace.moments):
                used -= sum(self._nbytes[c] for c in resident & self._lost)
                resident -= self._lost
            kept_until.update((c, cycle.kept[now].get(c, now)) for c in needs)
            kept_until.update((c, until) for c, until in fetches[now] if c not in needs)
            new = [c for c, _ in fetches[now] if c not in resident]  # by chance it may be there still
            used += sum(self._nbytes[c] for c in new)
            evicted = []
            while used > self._capacity[now]:
                chunk = idle.popleft()
                if chunk in resident and kept_until.get(chunk, -1) < now:
                    evicted.append(chunk)
                    resident.remove(chunk)
                    used -= self._nbytes[chunk]
            resident.update(new)
            fetch = tuple(c for c in new if c in in_use)
            actions.append(Actions(tuple(evicted), fetch, tuple(c for c in new if c not in in_use)))
            idle.extend(c for c in sorted(needs) if kept_until[c] == now)
        return Plan(self.trace, tuple(actions[:-1]), actions[-1], frozenset(resident))


def _ahead(in_use: Sequence[frozenset[int]], depth: int, lost: frozenset[int]) -> list[tuple[int, ...]]:
    """Per moment the next ``depth`` chunks that are not in use then, nearest first.

    Not past the end of a cycle, because the optimizer step lies there, and what it rewrites would be fetched in vain.
    Between two of them, when nothing is in use, it looks from there to the beginning: what was in use last is there
    unless it is lost.
    """
    found: list[tuple[int, ...]] = [()] * len(in_use)
    enough = depth + max(map(len, in_use))  # this many are not all in use
    upcoming: tuple[int, ...] = ()
    for i in reversed(range(len(in_use))):
        found[i] = tuple([c for c in upcoming if c not in in_use[i]][:depth])
        upcoming = tuple(dict.fromkeys((*sorted(in_use[i]), *upcoming)))[:enough]
    there = in_use[-2] - lost if len(in_use) > 1 else frozenset()
    found[-1] = tuple([c for c in upcoming if c not in there][:depth])
    return found


class _Cycle:
    """What Belady's rule keeps in a cycle and in the one after it: the end of one is the beginning of the other.

    Moments are counted through both. ``kept[i]`` says until which use the chunks of moment ``i`` stay from there;
    ``kept[-1]`` says it for those that were there when the cycle began.
    """

    def __init__(
        self,
        needs: Sequence[frozenset[int]],
        capacity: Sequence[int],
        nbytes: Mapping[int, int],
        start: frozenset[int],
        lost: frozenset[int],
    ) -> None:
        self._nbytes = nbytes
        self._count = len(needs)
        needs = [*needs, *needs]
        self.missing = list(_belady(needs, [*capacity, *capacity], nbytes, start, lost))
        self.kept: list[dict[int, int]] = [{} for _ in range(len(needs) + 1)]
        self._needs = needs
        growth = [0] * (len(needs) + 1)  # of what is kept, from the moment before
        last = dict.fromkeys(start, -1)
        for now, chunks in enumerate(needs):
            for chunk in chunks:
                begin = now
                if chunk not in self.missing[now]:
                    self.kept[last[chunk]][chunk] = now
                    begin = last[chunk] + 1
                growth[begin] += nbytes[chunk]
                growth[now + 1] -= nbytes[chunk]
                last[chunk] = now
        self._free = [room - kept for room, kept in zip((*capacity, *capacity), accumulate(growth), strict=False)]

    def advance(self, chunk: int, use: int, earliest: int, ahead: Sequence[Collection[int]]) -> int:
        """The first moment from which the chunk can wait for its use without driving out anything; takes that room."""
        at = use
        while at > earliest:
            before = at - 1
            if chunk not in ahead[before % self._count] or chunk in self._needs[before]:
                break
            if self._free[before] < self._nbytes[chunk]:
                break
            self._free[before] -= self._nbytes[chunk]
            at = before
        return at


def _belady(
    needs: Sequence[frozenset[int]],
    capacity: Sequence[int],
    nbytes: Mapping[int, int],
    start: frozenset[int],
    lost: frozenset[int],
) -> Iterator[frozenset[int]]:
    """What is missing at each moment if the chunk that is needed last always goes first. ``needs`` are two cycles."""
    ends = (len(needs) // 2 - 1, len(needs) - 1)
    next_use: list[dict[int, int]] = []
    upcoming: dict[int, int] = {}
    for now in reversed(range(2 * len(needs))):  # two more cycles tell what comes after the second
        if now < len(needs):
            next_use.append({chunk: upcoming[chunk] for chunk in needs[now]})
        upcoming.update(dict.fromkeys(needs[now % len(needs)], now))
        if now % len(needs) in ends:
            upcoming.update(dict.fromkeys(lost, NEVER))
    next_use.reverse()

    room = capacity[0] - sum(nbytes[c] for c in start)
    resident = set(start)
    when = {chunk: upcoming.get(chunk, NEVER) for chunk in start}
    farthest = [(-when[c], c) for c in start]  # a heap; entries that are out of date are skipped
    heapify(farthest)
    for now, need in enumerate(needs):
        room += capacity[now] - capacity[max(now - 1, 0)]
        if now in ends:
            room += sum(nbytes[c] for c in resident & lost)
            resident -= lost
        when.update(next_use[now])
        missing = need - resident
        wanted = sum(nbytes[c] for c in missing)
        gone: list[int] = []
        back: list[int] = []
        while room < wanted:
            use, chunk = heappop(farthest)
            if chunk not in resident or use != -when[chunk] or chunk in need:
                continue  # what is needed gets a new entry below
            gone.append(chunk)
            resident.remove(chunk)
            room += nbytes[chunk]
        for chunk in reversed(gone):  # a large one that came last may have made smaller ones needless
            if room - nbytes[chunk] >= wanted:
                room -= nbytes[chunk]
                resident.add(chunk)
                back.append(chunk)
        room -= wanted
        resident |= need
        for chunk in (*back, *need):
            heappush(farthest, (-when[chunk], chunk))
        yield missing
