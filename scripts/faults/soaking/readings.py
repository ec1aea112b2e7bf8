"""What the system says of this process at rest, and whether it stays so."""

import ctypes
import gc
import os
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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

    @property
    def beside_bytes(self) -> int:
        """What is there beside what our ledger knows of."""
        return self.resident_bytes - self.ledger_bytes


def read(step: int, placement: str, ledger_bytes: int) -> Reading:
    """Look, after what is garbage has gone back to the system."""
    for _ in range(3):
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
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


def thread_names() -> list[str]:
    """For a report: who is there."""
    return sorted(thread.name for thread in threading.enumerate())
