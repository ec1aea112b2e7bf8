"""How fast the disk of a folder is for training: reading, writing, and both at once."""

import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemini.chunk import Requests
from gemini.chunk.disk_memory import DiskMemory
from gemini.chunk.disk_probe import LEAST_SPAN_BYTES, Probe, Traffic
from gemini.chunk.disk_tuning import measure
from gemini.sizes import format_bytes

DEFAULT_BYTES = 2 << 30
LANES = 2
"""Blocks on their way at once: the stream of updates reads one and writes one."""
BLOCK_BYTES = 4 << 20
ROUNDS = 3
SECONDS = 2.0
"""Of one measurement at most: 18 seconds for all of them, beside the first writing of the file and the tuning."""
TUNING_SECONDS = 6.0
LINKS = {Traffic.READ: "disk_to_host", Traffic.WRITE: "host_to_disk", Traffic.MIXED: "disk_mixed"}
IN_RAM = ("tmpfs", "ramfs", "rootfs")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFound:
    """What was measured of one disk."""

    rates: Mapping[str, tuple[float, ...]]
    """Bytes a second by link, of each round."""
    requests: Requests
    is_direct: bool
    file_system: str
    file_bytes: int
    remembered_in: Path

    @property
    def bytes_per_second(self) -> dict[str, float]:
        return {link: statistics.median(found) for link, found in self.rates.items()}

    @property
    def remarks(self) -> list[str]:
        """What the user should know of these numbers."""
        found = []
        if self.file_system in IN_RAM:
            found.append(f"{self.file_system} is RAM: a disk tier in it takes the memory that it is to save")
        elif not self.is_direct:
            found.append(
                f"{self.file_system} has no O_DIRECT: the disk tier goes through the page cache, which is as fast as "
                "RAM while there is room, and as measured here (until all is on the disk) when there is none"
            )
        return found


def measure_disk(folder: Path, nbytes: int, memory: Path) -> DiskFound:
    """Tune requests, then read and write with them by turns, by the disk tier's own code.

    What is found is remembered for trainings on the same file system.

    Parameters
    ----------
    nbytes
        Of the scratch file: more than what a cache on the way to the disk holds. At most half of the room that is free.
    memory
        Folder that remembers how disks are best asked.

    Raises
    ------
    OffloadError
        If the folder cannot be written to, or has no room.
    """
    folder.mkdir(0o700, parents=True, exist_ok=True)
    free = os.statvfs(folder)
    nbytes = max(min(nbytes, free.f_bavail * free.f_frsize // 2), LEAST_SPAN_BYTES)
    known = DiskMemory(folder, memory)
    with known.alone():
        requests = known.store(measure(folder, min(nbytes, 1 << 30), seconds=TUNING_SECONDS))
        rates: dict[Traffic, list[float]] = {traffic: [] for traffic in Traffic}
        with Probe(folder, nbytes, LANES, BLOCK_BYTES, fill_seconds=2 * SECONDS, requests=requests) as probe:
            for _ in range(ROUNDS):
                for traffic in Traffic:
                    rates[traffic].append(probe.rate(traffic, LANES, BLOCK_BYTES, probe.span_bytes // 2, SECONDS))
            return DiskFound(
                rates={LINKS[traffic]: tuple(found) for traffic, found in rates.items()},
                requests=requests,
                is_direct=probe.is_direct,
                file_system=file_system(folder),
                file_bytes=probe.span_bytes,
                remembered_in=known.path,
            )


def file_system(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that a folder is on, such as ext4; ``unknown`` where the system does not say."""
    found, longest = "unknown", -1
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), fields.split()[4]))
        # Of two mounted at one point the later one is seen.
        if folder.resolve().is_relative_to(point) and len(point.parts) >= longest:
            found, longest = rest.split()[0], len(point.parts)
    return found


def as_lines(folder: Path, found: DiskFound) -> list[str]:
    """What a person wants to know beside the rates."""
    requests = found.requests
    at_once = f"{requests.depth} requests of {format_bytes(requests.nbytes)} at once"
    way = "around the page cache" if found.is_direct else "through the page cache"
    return [
        f"{folder} ({found.file_system}): {way}, a file of {format_bytes(found.file_bytes)}, {at_once}",
        f"trainings on this file system ask it so from now on: {found.remembered_in}",
        *found.remarks,
    ]
