"""From a trace to a schedule: what to evict, fetch and prefetch at each moment. Pure: no torch.

Eviction takes the chunk whose next use is farthest away, counting round into the next step (Belady's OPT, which
PatrickStar applied to training). Forward and backward are a palindrome, where that equals LRU; evaluation and
generation are cyclic, where LRU would miss every time and OPT keeps a fixed part resident. Eviction is free (full
copies are clean), so the only cost counted is fetches.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from .trace import Trace

LAPS = 8
"""After so many attempts to find a state that a lap leads back to, take the one that always works."""


@dataclass(frozen=True, slots=True)
class Actions:
    """What the runtime does when a moment comes, in this order."""

    evict: tuple[int, ...] = ()
    fetch: tuple[int, ...] = ()
    prefetch: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The plan of one cycle. Played again and again, each lap begins with the chunks that it expects."""

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
    in_use = [frozenset(c for c in moment.in_use if c in nbytes) for moment in trace.moments]
    for moment, chunks in zip(trace.moments, in_use, strict=True):
        need = sum(nbytes[c] for c in chunks)
        if need > capacity_bytes:
            raise ValueError(
                f"unit {moment.unit} needs {need} bytes of full copies at once, capacity is {capacity_bytes}"
            )
    if not in_use:
        return Schedule(trace, (), ())

    uses = _Uses(in_use, depth)
    start: frozenset[int] = frozenset()
    lap = _Lap(uses, nbytes, capacity_bytes, start)
    # A state that a lap leads back to, with nothing missing. Optimal laps may never repeat (of three chunks in a room
    # of two, a cycle keeps another one each time), so leave out what a lap does not keep until all of it is kept.
    for attempt in range(LAPS + 1):
        start = lap.resident if attempt == 0 else start & lap.resident if attempt < LAPS else in_use[-1]
        lap = _Lap(uses, nbytes, capacity_bytes, start)
        if start <= lap.resident:
            break
    return lap.schedule(trace, start)


class _Uses:
    """When each chunk is used; the same for all laps."""

    def __init__(self, in_use: Sequence[frozenset[int]], depth: int) -> None:
        self.in_use = in_use
        self.first: dict[int, int] = {}
        """The first moment of the lap that uses a chunk."""
        self.next: list[dict[int, int]] = [{} for _ in in_use]
        """Per moment, the next use of each of its chunks, counted into the next lap."""
        for i in reversed(range(len(in_use))):
            self.first.update(dict.fromkeys(in_use[i], i))
        upcoming = {chunk: i + len(in_use) for chunk, i in self.first.items()}
        # Per moment, the chunks used next; not past the end of a lap, because the optimizer step lies there, and what
        # it rewrites would be fetched in vain. The prologue looks from the end to the beginning.
        self._ahead: list[tuple[int, ...]] = [()] * len(in_use)
        enough = depth + max(map(len, in_use))
        ahead: tuple[int, ...] = ()
        for i in reversed(range(len(in_use))):
            self._ahead[i] = tuple([c for c in ahead if c not in in_use[i]][:depth])
            self.next[i] = {chunk: upcoming[chunk] for chunk in in_use[i]}
            upcoming.update(dict.fromkeys(in_use[i], i))
            ahead = tuple(dict.fromkeys((*sorted(in_use[i]), *ahead)))[:enough]
        self._ahead[-1] = tuple([c for c in ahead if c not in in_use[-1]][:depth])

    def ahead(self, now: int) -> tuple[int, ...]:
        """The chunks that are used next after the moment ``now`` and not in it, at most ``depth``, in order."""
        return self._ahead[now]


class _Lap:
    """One lap of the cycle, beginning with the chunks of ``start``."""

    def __init__(self, uses: _Uses, nbytes: Mapping[int, int], capacity: int, start: frozenset[int]) -> None:
        self._nbytes = nbytes
        self._room = capacity - sum(nbytes[c] for c in start)
        self._resident = set(start)
        self._next_use = dict(uses.first)
        self._farthest = [(-self._next_use[c], c) for c in start]
        """A heap of the resident chunks; entries that are out of date are skipped."""
        heapify(self._farthest)
        self._actions: list[Actions] = []
        for now, in_use in enumerate(uses.in_use):
            self._step(in_use, uses.next[now], uses.ahead(now))

    @property
    def resident(self) -> frozenset[int]:
        """What is there when the next lap begins."""
        return frozenset(self._resident)

    def schedule(self, trace: Trace, start: frozenset[int]) -> Schedule:
        """The lap as a schedule that ends with the chunks of ``start``, which it began with."""
        *actions, last = self._actions
        surplus = self._resident - start - set(last.prefetch)
        actions.append(Actions((*last.evict, *sorted(surplus)), last.fetch))
        return Schedule(trace, tuple(actions), tuple(c for c in last.prefetch if c in start))

    def _step(self, in_use: frozenset[int], next_use: Mapping[int, int], ahead: Sequence[int]) -> None:
        self._next_use.update(next_use)
        for chunk in in_use & self._resident:
            heappush(self._farthest, (-self._next_use[chunk], chunk))
        missing = sorted(in_use - self._resident)
        evicted = self._evict_for(sum(self._nbytes[c] for c in missing), in_use, limit=None)
        assert evicted is not None
        for chunk in missing:
            self._add(chunk)
        prefetched = []
        for chunk in ahead:
            if chunk in self._resident:
                continue
            # As long as what it displaces is needed later than it is.
            gone = self._evict_for(self._nbytes[chunk], in_use, limit=self._next_use[chunk])
            if gone is None:
                break
            evicted += gone
            self._add(chunk)
            prefetched.append(chunk)
        self._actions.append(Actions(tuple(evicted), tuple(missing), tuple(prefetched)))

    def _evict_for(self, need: int, keep: Collection[int], limit: int | None) -> list[int] | None:
        """Make room of ``need`` bytes; None (and nothing done) if only chunks used up to ``limit`` could go."""
        gone: list[int] = []
        back: list[int] = []
        room = self._room
        while room < need and self._farthest:
            when, chunk = heappop(self._farthest)
            if chunk not in self._resident or when != -self._next_use[chunk]:
                continue
            if chunk in keep:
                back.append(chunk)
            elif limit is not None and -when <= limit:
                back.append(chunk)
                break
            else:
                gone.append(chunk)
                room += self._nbytes[chunk]
        fits = room >= need
        for chunk in reversed(gone):  # a large one that came last may have made smaller ones needless
            if not fits or room - self._nbytes[chunk] >= need:
                room -= self._nbytes[chunk]
                back.append(chunk)
        for chunk in back:
            heappush(self._farthest, (-self._next_use[chunk], chunk))
        if not fits:
            return None
        self._room = room
        gone = [chunk for chunk in gone if chunk not in back]
        self._resident.difference_update(gone)
        return gone

    def _add(self, chunk: int) -> None:
        self._resident.add(chunk)
        self._room -= self._nbytes[chunk]
        heappush(self._farthest, (-self._next_use[chunk], chunk))
