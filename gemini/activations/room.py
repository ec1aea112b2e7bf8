"""How many bytes saved tensors may take, and how fast they move."""

import time
from pathlib import Path

import torch
from torch import UntypedStorage

from ..chunk import ChunkManager, DiskFile, Tier
from ..errors import is_out_of_memory
from ..memory.capacity import device_headroom
from ..planning.activation_choice import Link
from .disk import aligned

PROBE_BYTES = 16 << 20
LEAST_PROBE_BYTES = 1 << 20
"""Where memory is short, which may be why the link is asked for."""


def room_bytes(manager: ChunkManager, device: torch.device) -> int:
    """Bytes that are free where units run, less what full copies may still take of them."""
    away = sum(chunk.full_nbytes for chunk in manager.chunks if not chunk.is_resident)
    return max(device_headroom(device) - min(manager.ledger.free(Tier.DEVICE), away), 0)


def disk_link(folder: Path, ahead_bytes: int) -> Link:
    """Write and read some bytes in the folder of the DISK tier, as saved tensors are.

    Raises
    ------
    OSError
        What the file system says.
    """
    memory = _probe()
    nbytes = memory.nbytes()
    file = DiskFile(folder)
    try:
        file.reserve(0, nbytes)
        begin = time.perf_counter()
        file.write(0, memory.data_ptr(), nbytes, "a measurement")
        written = time.perf_counter()
        file.read(0, memory.data_ptr(), nbytes, "a measurement")
        end = time.perf_counter()
    finally:
        file.close()
    return Link(
        down_bytes_per_second=nbytes / max(written - begin, 1e-9),
        up_bytes_per_second=nbytes / max(end - written, 1e-9),
        ahead_bytes=ahead_bytes,
    )


def _probe() -> UntypedStorage:
    """Memory at a page boundary, as the file: else the page cache is measured."""
    nbytes = PROBE_BYTES
    while True:
        try:
            return aligned(nbytes, 0)
        except (RuntimeError, MemoryError) as error:
            if nbytes <= LEAST_PROBE_BYTES or not is_out_of_memory(error):
                raise
            nbytes //= 2
