"""From a packing to memory: ledger, backends, chunks, and the queue that updates them."""

from functools import partial

from ..chunk import (
    FETCH_WORKERS,
    STORE_BLOCKS,
    AcceleratorBackend,
    ChunkManager,
    DeviceBackend,
    DiskBackend,
    Ledger,
    RamBackend,
    Staging,
    Tier,
    driver_of,
    tuned,
)
from ..config import GeminiConfig
from ..memory.capacity import Capacities, device_headroom
from ..packing.packing import Packing
from ..telemetry.layout import disks_folder
from ..updates.update_queue import UpdateQueue


def build(packing: Packing, config: GeminiConfig, capacities: Capacities) -> tuple[ChunkManager, UpdateQueue]:
    """Allocate homes and full copies, and start what moves and updates them.

    Raises
    ------
    OutOfMemory, OffloadError
        If a home gets no room.
    """
    ledger = Ledger(capacities.nbytes, capacities.memory)
    disk = fetch_staging = store_staging = update_staging = None
    if packing.staging_block_numel:
        assert config.offload_dir is not None
        requests = tuned(config.offload_dir, packing.placement.nbytes[Tier.DISK], disks_folder())
        disk = DiskBackend(config.offload_dir, ledger, requests, checksums=config.disk_checksums)
        pin = capacities.device.type != "cpu" and config.pin_memory
        fetch_staging = Staging(FETCH_WORKERS, packing.staging_block_numel, pin)
        store_staging = Staging(STORE_BLOCKS, packing.staging_block_numel, pin)
        update_staging = Staging(*packing.update_staging, pin)
        ledger.take(Tier.HOST, packing.staging_bytes, "staging for the disk tier")
    device: DeviceBackend
    if capacities.device.type == "cpu":
        device = RamBackend(fetch_staging, store_staging)
    else:
        device = AcceleratorBackend(driver_of(capacities.device), fetch_staging, config.pin_memory, store_staging)
    headroom, gradient_room = partial(device_headroom, capacities.device), packing.placement.gradient_room
    manager = ChunkManager(
        packing.plans, ledger, device, disk, gradient_room, headroom, config.communicator, config.snapshot_memory
    )
    if packing.full_copies_limit_bytes is not None:
        limit = ledger.used(Tier.DEVICE) + packing.full_copies_limit_bytes
        ledger.resize(Tier.DEVICE, min(limit, capacities.nbytes[Tier.DEVICE]))
    return manager, UpdateQueue(update_staging)
