"""From a trace to a schedule: what to evict, fetch and prefetch at each moment. Pure: no torch.

Eviction takes the chunk whose next use is farthest away, counting round into the next step (Belady's OPT, which
PatrickStar applied to training). Forward and backward are a palindrome, where that equals LRU; evaluation and
generation are cyclic, where LRU would miss every time and OPT keeps a fixed part resident. Eviction is free (full
copies are clean), so the only cost counted is fetches.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from .trace import Moment, Trace


@dataclass(frozen=True, slots=True)
class Actions:
    """What the runtime does when a moment comes, in this order."""

    evict: tuple[int, ...] = ()
    fetch: tuple[int, ...] = ()
    prefetch: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The plan of one cycle."""

    trace: Trace
    actions: tuple[Actions, ...]
    """One per moment of the trace."""
    prologue: tuple[int, ...]
    """Chunks to prefetch before the cycle begins (after the optimizer step of the one before)."""


def plan(trace: Trace, nbytes: Mapping[int, int], capacity_bytes: int, depth: int) -> Schedule:
    """Plan the steady state of a cycle that repeats.

    Parameters
    ----------
    trace
        The moments of one cycle.
    nbytes
        Bytes of each chunk's full copy; chunks that are left out (their home is the full copy) are always there.
    capacity_bytes
        Room for full copies on DEVICE.
    depth
        How many chunks may be on their way ahead of use; 0 prefetches nothing.

    Raises
    ------
    ValueError
        If a moment needs more than ``capacity_bytes``.
    """
    moments = [Moment(m.unit, m.phase, frozenset(c for c in m.in_use if c in nbytes)) for m in trace.moments]
    for moment in moments:
        need = sum(nbytes[c] for c in moment.in_use)
        if need > capacity_bytes:
            raise ValueError(f"unit {moment.unit} needs {need} bytes of full copies at once, capacity is {capacity_bytes}")

    simulation = _Simulation(moments, nbytes, capacity_bytes, depth)
    simulation.lap()  # from nothing to the steady state
    prologue = simulation.look_ahead(-1, frozenset())[1]
    return Schedule(trace, tuple(simulation.lap()), tuple(prologue))


class _Simulation:
    """Plays laps of the cycle over a set of resident chunks."""

    def __init__(self, moments: list[Moment], nbytes: Mapping[int, int], capacity: int, depth: int) -> None:
        self.moments = moments
        self.nbytes = nbytes
        self.capacity = capacity
        self.depth = depth
        self.resident: set[int] = set()
        self.used = 0
        self.positions: dict[int, list[int]] = {}
        for i, moment in enumerate(moments):
            for chunk in moment.in_use:
                self.positions.setdefault(chunk, []).append(i)

    def next_use(self, chunk: int, now: int) -> int:
        """The first moment after ``now`` that uses the chunk, counted into the next lap."""
        positions = self.positions[chunk]
        i = bisect_right(positions, now)
        return positions[i] if i < len(positions) else positions[0] + len(self.moments)

    def lap(self) -> list[Actions]:
        return [self.step(now) for now in range(len(self.moments))]

    def step(self, now: int) -> Actions:
        in_use = self.moments[now].in_use
        missing = sorted(in_use - self.resident)
        evicted = self.evict_for(sum(self.nbytes[c] for c in missing), now, in_use, limit=None)
        assert evicted is not None
        for chunk in missing:
            self.add(chunk)
        more, prefetched = self.look_ahead(now, in_use)
        return Actions(tuple(evicted + more), tuple(missing), tuple(prefetched))

    def look_ahead(self, now: int, in_use: frozenset[int]) -> tuple[list[int], list[int]]:
        """Start the next fetches early, as long as what they displace is needed later than they are."""
        evicted: list[int] = []
        prefetched: list[int] = []
        ahead: dict[int, int] = {}
        # Not past the end: the optimizer step lies there, and what it rewrites would be fetched in vain.
        for i in range(now + 1, len(self.moments)):
            for chunk in sorted(self.moments[i].in_use):
                ahead.setdefault(chunk, i)
            if len(ahead) > self.depth:
                break
        for chunk, when in list(ahead.items())[: self.depth]:
            if chunk in self.resident:
                continue
            gone = self.evict_for(self.nbytes[chunk], now, in_use | set(prefetched), limit=when)
            if gone is None:
                break
            evicted += gone
            self.add(chunk)
            prefetched.append(chunk)
        return evicted, prefetched

    def evict_for(self, need: int, now: int, keep: frozenset[int], limit: int | None) -> list[int] | None:
        """Make room of ``need`` bytes; None (and nothing done) if only chunks used before ``limit`` could go."""
        gone: list[int] = []
        room = self.capacity - self.used
        for chunk in sorted(self.resident - keep, key=lambda c: (-self.next_use(c, now), c)):
            if room >= need:
                break
            if limit is not None and self.next_use(chunk, now) <= limit:
                return None
            gone.append(chunk)
            room += self.nbytes[chunk]
        if room < need:
            return None
        for chunk in gone:
            self.resident.remove(chunk)
            self.used -= self.nbytes[chunk]
        return gone

    def add(self, chunk: int) -> None:
        self.resident.add(chunk)
        self.used += self.nbytes[chunk]
