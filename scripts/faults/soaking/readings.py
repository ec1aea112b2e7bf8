"""What the system says of this process at rest, and whether it stays so."""

import ctypes
import gc
import os
import random
import statistics
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_DRAWS, _BLOCKS = 200, 8
"""Of the bootstrap: how often, and of how many blocks of neighbours."""


class _MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost").split()
    ]


@dataclass(frozen=True, slots=True)
class Reading:
    """The process at rest."""

    step: int
    placement: str
    resident_bytes: int
    """Anonymous and shared memory: files that are mapped come and go as the system likes."""
    data_bytes: int
    """VmData."""
    descriptors: int
    threads: int
    """As the system counts them."""
    ledger_bytes: int
    """Of RAM, by our own ledger."""
    malloc_bytes: int = 0
    """In use of malloc's, counted to the byte; what Python takes for small objects is not among them."""
    python_blocks: int = 0
    """Small objects of Python that live."""

    @property
    def beside_bytes(self) -> int:
        """What is there beside what our ledger knows of."""
        return self.resident_bytes - self.ledger_bytes


def read(step: int, placement: str, ledger_bytes: int) -> Reading:
    """Look, after what is garbage has gone back to the system.

    Python's cache of methods is emptied, too. Native code that asks for an attribute by its name makes a new string
    each time, and the cache keeps up to 4,096 of them: some a step until it is full.
    """
    for _ in range(3):
        gc.collect()
    sys._clear_type_cache()
    malloc = ctypes.CDLL(None)
    malloc.malloc_trim(0)
    malloc.mallinfo2.restype = _MallocInfo
    used = malloc.mallinfo2()
    text = Path("/proc/self/status").read_text()
    found = {line.split(":", 1)[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 1}
    return Reading(
        step,
        placement,
        (int(found["RssAnon"]) + int(found["RssShmem"])) << 10,
        int(found["VmData"]) << 10,
        len(os.listdir("/proc/self/fd")) - 1,  # the listing's own
        int(found["Threads"]),
        ledger_bytes,
        used.uordblks + used.hblkhd,
        sys.getallocatedblocks(),
    )


def slope(series: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The median of the slopes between each two points of the same series (Theil and Sen).

    A few outliers do not change it, nor what one series has more of than another.
    """
    slopes = [
        (y - before_y) / (x - before_x)
        for points in series
        for number, (x, y) in enumerate(points)
        for before_x, before_y in points[:number]
        if x != before_x
    ]
    return statistics.median(slopes) if slopes else 0.0


def interval(series: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Where `slope` is with 95 % confidence: a bootstrap that draws blocks of neighbours in time.

    Neighbours are alike, as what is resident changes in jumps. Single points drawn would give too narrow an interval.
    """
    points = sorted((x, number, y) for number, each in enumerate(series) for x, y in each)
    length = max(1, len(points) // _BLOCKS)
    rng = random.Random(0)
    slopes = []
    for _ in range(_DRAWS if len(points) > length else 0):
        drawn: list[list[tuple[float, float]]] = [[] for _ in series]
        for _ in range(len(points) // length):
            start = rng.randrange(len(points) - length + 1)
            for x, number, y in points[start : start + length]:
                drawn[number].append((x, y))
        slopes.append(slope([sorted(each) for each in drawn]))
    if not slopes:
        return 0.0, 0.0
    slopes.sort()
    return slopes[len(slopes) // 40], slopes[-1 - len(slopes) // 40]


def thread_names() -> list[str]:
    """For a report: who is there."""
    return sorted(thread.name for thread in threading.enumerate())
