"""From what the user asked for to what becomes of saved tensors."""

from functools import partial

from torch import nn

from ..chunk import ChunkManager, MemoryMap, Tier, driver_of, tuned
from ..config import GeminiConfig
from ..memory.capacity import Capacities
from ..planning.activation_choice import Choice, Link
from ..telemetry.layout import disks_folder
from .advice import Always, Auto
from .blocks import blocks_of
from .by_block import ByBlock
from .disk import ActivationFile
from .host import HostPlace
from .leavers import Leavers
from .place import Place
from .room import disk_link, room_bytes
from .saving import KeepAll, Offload, Saving
from .store import ActivationStore

LIMIT_BYTES = 32 << 20
"""What may be on its way, in each direction."""
HOST_SHARE = 3
"""Quarters of the RAM that homes leave, for what leaves a device."""
EXPECTED_BYTES = 1 << 30
"""For the choice of the disk's requests: how much will be stored is not known yet."""


def check_place(config: GeminiConfig, capacities: Capacities) -> None:
    """Refuse a policy that has no tier to move tensors to.

    Raises
    ------
    ValueError
        If the memory that computes is RAM and there is no disk tier.
    """
    if config.activation_policy == "offload" and not _has_place(config, capacities):
        raise ValueError(
            "activation_policy='offload' moves saved tensors from the memory that computes to a tier below; here that "
            "memory is RAM, and there is no disk tier. Set offload_dir to a folder, or use activation_policy='keep'"
        )


def make_saving(config: GeminiConfig, capacities: Capacities, manager: ChunkManager, model: nn.Module) -> Saving:
    """What the policy says.

    Raises
    ------
    OffloadError, OutOfMemory
        If a file or a thread for it cannot be had.
    """
    policy, device = config.activation_policy, capacities.device
    if policy == "keep":
        return KeepAll()
    leavers = Leavers(device, (chunk.full for chunk in manager.chunks))
    if policy == "offload":
        return Offload(_store(config, capacities, manager), leavers)
    blocks = blocks_of(model)
    if policy == "recompute":
        return ByBlock(model, blocks, policy, Always(Choice.RECOMPUTE, len(blocks)), leavers, None)
    has_place = _has_place(config, capacities)
    offload = Offload(_store(config, capacities, manager), leavers) if has_place else None
    advice = Auto(len(blocks), partial(room_bytes, manager, device), partial(_link, config))
    return ByBlock(model, blocks, policy, advice, leavers, offload)


def _has_place(config: GeminiConfig, capacities: Capacities) -> bool:
    return config.offload_dir is not None or capacities.memory is MemoryMap.ACCELERATOR


def _store(config: GeminiConfig, capacities: Capacities, manager: ChunkManager) -> ActivationStore:
    places: list[Place] = []
    if capacities.memory is MemoryMap.ACCELERATOR:
        share = manager.ledger.free(Tier.HOST) * HOST_SHARE // 4
        places.append(HostPlace(driver_of(capacities.device), manager.ledger, share, config.pin_memory))
    elif config.offload_dir is not None:
        requests = tuned(config.offload_dir, EXPECTED_BYTES, disks_folder())
        places.append(ActivationFile(config.offload_dir, manager.ledger, requests, config.disk_checksums))
    return ActivationStore(places, LIMIT_BYTES)


def _link(config: GeminiConfig) -> Link | None:
    return None if config.offload_dir is None else disk_link(config.offload_dir, LIMIT_BYTES)
