"""Do programs here wait for memory? What the kernel says of it: stalls (PSI), and events of control groups.

The events are those of the group's limits: ``high`` counts how often its processes were throttled because it was above
``memory.high``, ``max`` how often it was about to go above ``memory.max``.
"""

from dataclasses import dataclass
from pathlib import Path

from gemini.lease.limits import ROOT, cgroup_folders, field, ram_limits, read

STALLED_RATIO = 0.10
"""Part of the time between two looks that some task has waited for memory, from which on it is pressure."""
SHORT_RATIO = 0.2
"""Of a limit; where more is free, stalls and events have other reasons."""
_MICRO = 1e-6


@dataclass(frozen=True, slots=True)
class Counters:
    """What the kernel has counted so far."""

    stalled_seconds: float = 0.0
    """For which at least one task has waited for memory, here or in one of our groups, where that is more."""
    event_count: int = 0

    @classmethod
    def read(cls, root: Path = ROOT) -> "Counters":
        """The counters of now. Some ten small files; 0 where the kernel does not count."""
        folders = [folder for version, folder in cgroup_folders(root) if version == "v2"]
        stalls = [_stalled(read(root / "proc/pressure/memory"))]
        stalls += [_stalled(read(folder / "memory.pressure")) for folder in folders]
        events = [read(folder / "memory.events") for folder in folders]
        return cls(max(stalls), sum(field(text, "high") + field(text, "max") for text in events))


class PressureGauge:
    """Compares the counters of now with those of the last time.

    Parameters
    ----------
    root
        Below which the files are.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._last: tuple[float, Counters] | None = None

    def is_pressed(self, now: float) -> bool:
        """True if memory was short since the last time that this was asked, at ``now`` in seconds of any clock."""
        before, counters = self._last, Counters.read(self._root)
        self._last = (now, counters)
        if before is None or not is_pressure(before[1], counters, now - before[0]):
            return False
        # Groups full of file cache go to their limit all the time, and a stall may be that of a group beside ours.
        return any(limit.free < limit.total * SHORT_RATIO for limit in ram_limits(self._root) if limit.shared)


def is_pressure(before: Counters, after: Counters, seconds: float) -> bool:
    """True if what was counted within these seconds means that memory is short."""
    if after.event_count > before.event_count:
        return True
    stalled = after.stalled_seconds - before.stalled_seconds
    return seconds > 0 and stalled / seconds >= STALLED_RATIO


def _stalled(text: str) -> float:
    """Seconds of the line ``some avg10=0.00 avg60=0.00 avg300=0.00 total=1376845``."""
    for line in text.splitlines():
        kind, *pairs = line.split()
        if kind == "some":
            numbers = dict(pair.partition("=")[::2] for pair in pairs)
            return int(numbers.get("total", "0")) * _MICRO
    return 0.0
