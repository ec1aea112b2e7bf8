"""What the telemetry thread looks at once a second, whatever training does meanwhile."""

import os
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..chunk import Chunk, ChunkManager, ChunkState, Tier, accelerator_in_use, memory_of
from ..memory.tracker import host_headroom

HOME_LETTERS = {Tier.DEVICE: "d", Tier.HOST: "h", Tier.DISK: "k"}
STATE_LETTERS = {ChunkState.FETCHING: ">", ChunkState.IN_USE: "*", ChunkState.IN_USE_UPDATING: "*"}
"""In a chunk map; a chunk at home is its home's letter, one whose full copy is there that letter in upper case."""


def probes(manager: ChunkManager) -> dict[str, Any]:
    """What the telemetry thread looks at once a second."""
    return {"chunks": partial(_chunk_probe, weakref.ref(manager)), "process": process_memory}


def _chunk_probe(reference: "weakref.ref[ChunkManager]") -> dict[str, Any] | None:
    manager = reference()
    return None if manager is None else {"states": chunk_map(manager.chunks)}


def chunk_map(chunks: Sequence[Chunk]) -> str:
    """The chunks in order, run-length encoded: ``"12h3H1*"``."""
    runs: list[tuple[str, int]] = []
    for chunk in chunks:
        home = HOME_LETTERS[chunk.tier]
        letter = STATE_LETTERS.get(chunk.state) or (home.upper() if chunk.is_resident else home)
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return "".join(f"{count}{letter}" for letter, count in runs)


def process_memory() -> dict[str, Any]:
    """RAM of this process, and how much more the tightest limit on it allows."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    free, name = host_headroom()
    # Rounded, so that a process at rest says the same again and nothing is written.
    found: dict[str, Any] = {"rss_bytes": resident >> 20 << 20, "free_bytes": free >> 24 << 24, "limit": name}
    if (device := accelerator_in_use()) is not None:
        memory = memory_of(device)
        there = memory.free()
        found |= {"device_free_bytes": there.free >> 20 << 20, "device_total_bytes": there.total}
        found["device_reserved_bytes"] = memory.reserved_bytes
    return found
