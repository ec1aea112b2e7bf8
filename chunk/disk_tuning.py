"""How many requests of which size a folder's disk is fastest with: a short measurement, remembered per folder.

Network disks and arrays want many requests at once, one spinning disk wants few and large ones, and no table of ours
would know the next one. The measurement takes well under a second once per folder and machine; whatever goes wrong in
it, training goes on with numbers that are good enough for most.
"""

import hashlib
import json
import logging
import mmap
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .disk_file import DiskFile, Requests

DEFAULT = Requests(nbytes=1 << 20, depth=4)
LEAST_TIER_BYTES = 256 << 20
"""A smaller tier is over before a measurement pays."""
SIZES = (1 << 18, 1 << 20, 1 << 22)
DEPTHS = (2, 4, 8)
PROBE_BYTES = 32 << 20
BUDGET_SECONDS = 0.6
"""No measurement begins after that."""
GOOD_ENOUGH = 0.9
"""Of two that are as good, the one with fewer threads and larger requests is taken."""
VERSION = 1

logger = logging.getLogger(__name__)


def tuned(folder: Path, tier_bytes: int, cache: Path | None = None) -> Requests:
    """What to ask of the disk of ``folder`` for a tier of this size. Never fails.

    Parameters
    ----------
    cache
        Folder that remembers what was measured; by default ``gemini-memory/disk`` in the user's cache folder.
    """
    if tier_bytes < LEAST_TIER_BYTES:
        return Requests()
    try:
        entry = (cache or _cache_folder()) / f"{_key(folder)}.json"
        known = _load(entry)
        if known is not None:
            return known
        measured = measure(folder)
        logger.info("disk of %s: %d requests of %d bytes at once", folder, measured.depth, measured.nbytes)
    except Exception as error:  # a full or failing disk will say so itself, where it matters
        logger.info("the disk of %s cannot be measured (%s); using the default", folder, error)
        return DEFAULT
    try:
        _store(entry, measured)
    except OSError as error:
        logger.info("what was measured cannot be kept in %s: %s", entry.parent, error)
    return measured


def measure(folder: Path) -> Requests:
    """Read a scratch file with each combination until the time is up, and take the best.

    Reading alone: writes end in some cache of the disk, and what is good for reads is good for them.
    """
    deadline = time.monotonic() + BUDGET_SECONDS
    room = max(DEPTHS) * max(SIZES)
    memory = torch.frombuffer(mmap.mmap(-1, room), dtype=torch.uint8)
    file = DiskFile(folder)
    rates: dict[Requests, float] = {}
    try:
        file.reserve(0, PROBE_BYTES)
        for at in range(0, PROBE_BYTES, room):  # what was only reserved is not read from the disk
            file.write(at, memory.data_ptr(), min(room, PROBE_BYTES - at), "a measurement")
        with ThreadPoolExecutor(max(DEPTHS)) as pool:
            for nbytes in sorted(SIZES, key=lambda size: abs(size - DEFAULT.nbytes)):
                for depth in sorted(DEPTHS, key=lambda depth: abs(depth - DEFAULT.depth)):
                    if time.monotonic() < deadline:
                        rates[Requests(nbytes, depth)] = _rate(file, memory, pool, nbytes, depth)
    finally:
        file.close()
    return choose(rates)


def choose(rates: dict[Requests, float]) -> Requests:
    """The fewest requests, then the largest, among those that are nearly as fast as the best. Pure."""
    enough = GOOD_ENOUGH * max(rates.values(), default=0.0)
    good = [requests for requests, rate in rates.items() if rate >= enough]
    return min(good, key=lambda requests: (requests.depth, -requests.nbytes), default=DEFAULT)


def _rate(file: DiskFile, memory: torch.Tensor, pool: ThreadPoolExecutor, nbytes: int, depth: int) -> float:
    """Bytes a second."""

    def read(lane: int) -> None:
        for at in range(lane * nbytes, PROBE_BYTES, depth * nbytes):
            file.read(at, memory.data_ptr() + lane * nbytes, min(nbytes, PROBE_BYTES - at), "a measurement")

    begin = time.perf_counter()
    list(pool.map(read, range(depth)))
    return PROBE_BYTES / (time.perf_counter() - begin)


def _key(folder: Path) -> str:
    """Of the folder on this machine's file system: a home folder may be shared by many machines."""
    resolved = folder.resolve()
    while not resolved.exists():
        resolved = resolved.parent
    parts = (socket.gethostname(), str(resolved), str(resolved.stat().st_dev))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "gemini-memory" / "disk"


def _load(entry: Path) -> Requests | None:
    """What an earlier process wrote, if it is sound."""
    try:
        content = json.loads(entry.read_text())
        requests = Requests(nbytes=content["nbytes"], depth=content["depth"])
        is_sound = content["version"] == VERSION and requests.nbytes in SIZES and requests.depth in DEPTHS
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return requests if is_sound else None


def _store(entry: Path, measured: Requests) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    whole = entry.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps({"version": VERSION, "nbytes": measured.nbytes, "depth": measured.depth}))
    whole.replace(entry)
