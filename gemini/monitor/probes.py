"""What the telemetry thread looks at once a second, whatever training does meanwhile."""

import os
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from msgspec import UNSET

from ..chunk import Chunk, ChunkManager, ChunkState, Tier, accelerator_in_use, memory_of
from ..memory.tracker import host_headroom
from ..telemetry.records import ChunkMap, Process

HOME_LETTERS = {Tier.DEVICE: "d", Tier.HOST: "h", Tier.DISK: "k"}
STATE_LETTERS = {ChunkState.FETCHING: ">", ChunkState.IN_USE: "*", ChunkState.IN_USE_UPDATING: "*"}
"""In a chunk map; a chunk at home is its home's letter, one whose full copy is there that letter in upper case."""


def probes(manager: ChunkManager) -> dict[str, Any]:
    """What the telemetry thread looks at once a second."""
    return {"chunks": partial(_chunk_probe, weakref.ref(manager)), "process": process_memory}


def _chunk_probe(reference: "weakref.ref[ChunkManager]") -> ChunkMap | None:
    manager = reference()
    return None if manager is None else ChunkMap(chunk_map(manager.chunks))


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


def process_memory() -> Process:
    """RAM of this process, and how much more the tightest limit on it allows."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    free, name = host_headroom()
    device = accelerator_in_use()
    memory = None if device is None else memory_of(device)
    there = None if memory is None else memory.free()
    # Rounded, so that a process at rest says the same again and nothing is written.
    return Process(
        rss_bytes=resident >> 20 << 20,
        free_bytes=free >> 24 << 24,
        limit=name,
        device_free_bytes=UNSET if there is None else there.free >> 20 << 20,
        device_total_bytes=UNSET if there is None else there.total,
        device_reserved_bytes=UNSET if memory is None else memory.reserved_bytes,
    )
