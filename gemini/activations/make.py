"""From what the user asked for to what becomes of saved tensors."""

from dataclasses import replace
from functools import partial
from weakref import ref

from torch import nn

from ..chunk import ChunkManager, MemoryMap, Tier, driver_of, tuned
from ..config import GeminiConfig
from ..memory.capacity import Capacities
from ..planning.activation_choice import Choice, Link
from ..telemetry.layout import disks_folder
from .advice import Always, Auto
from .blocks import blocks_of
from .by_block import ByBlock
from .counts import ActivationCounts
from .disk import ActivationFile
from .disk_through_host import DiskThroughHost
from .host import HostPlace
from .leavers import Leavers
from .place import Place
from .room import disk_link, room_bytes
from .saving import KeepAll, Offload, Saving
from .store import ActivationStore
from .until_short import KeepUntilShort

LIMIT_BYTES = 32 << 20
"""What may be on its way, in each direction."""
MOVING = ("offload", "auto")
LEAST_PART = 8
"""One eighth of the RAM for homes, at most, is left for tensors that pass through it."""
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
    policy = config.activation_policy
    if policy is None and (_has_place(config, capacities) or blocks_of(model)):  # else nothing could be kept less
        return KeepUntilShort(partial(_auto, config, capacities, manager, ref(model)))
    if policy in (None, "keep"):
        return KeepAll()
    if policy == "auto":
        return _auto(config, capacities, manager, ref(model), ActivationCounts())
    leavers = _leavers(manager, capacities)
    if policy == "offload":
        return Offload(_store(config, capacities, manager, ActivationCounts()), leavers)
    blocks = blocks_of(model)
    return ByBlock(model, blocks, policy, Always(Choice.RECOMPUTE, len(blocks)), leavers, None)


def _auto(
    config: GeminiConfig,
    capacities: Capacities,
    manager: ChunkManager,
    of_model: "ref[nn.Module]",
    counts: ActivationCounts,
) -> ByBlock:
    """The policy ``"auto"`` for a model that is there."""
    model = of_model()
    assert model is not None
    leavers, blocks = _leavers(manager, capacities), blocks_of(model)
    has_place = _has_place(config, capacities)
    offload = Offload(_store(config, capacities, manager, counts), leavers) if has_place else None
    advice = Auto(len(blocks), partial(room_bytes, manager, capacities.device), partial(_link, config))
    return ByBlock(model, blocks, "auto", advice, leavers, offload, counts)


def _leavers(manager: ChunkManager, capacities: Capacities) -> Leavers:
    return Leavers(capacities.device, (chunk.full for chunk in manager.chunks))


def beside_activations(config: GeminiConfig, capacities: Capacities) -> Capacities:
    """The capacities that leave RAM for saved tensors to pass through, on their way from a device to the disk."""
    passes = capacities.memory is MemoryMap.ACCELERATOR and config.offload_dir is not None
    if not passes or config.activation_policy not in MOVING:
        return capacities
    host = capacities.budgets[Tier.HOST]
    less = replace(host, bytes=host.bytes - passing_bytes(host.bytes))
    return replace(capacities, budgets={**capacities.budgets, Tier.HOST: less})


def passing_bytes(host_bytes: int) -> int:
    """Of the RAM for homes, what is left for saved tensors that pass through it on their way to the disk."""
    return min(4 * LIMIT_BYTES, host_bytes // LEAST_PART)


def _has_place(config: GeminiConfig, capacities: Capacities) -> bool:
    return config.offload_dir is not None or capacities.memory is MemoryMap.ACCELERATOR


def _store(
    config: GeminiConfig, capacities: Capacities, manager: ChunkManager, counts: ActivationCounts
) -> ActivationStore:
    ledger, places, file = manager.ledger, list[Place](), None
    if config.offload_dir is not None:
        requests = tuned(config.offload_dir, EXPECTED_BYTES, disks_folder())
        file = ActivationFile(config.offload_dir, ledger, requests, config.disk_checksums)
    if capacities.memory is MemoryMap.ACCELERATOR:
        driver, pin, share = driver_of(capacities.device), config.pin_memory, ledger.free(Tier.HOST) * HOST_SHARE // 4
        passing = min(2 * LIMIT_BYTES, share // 2) if file is not None else 0
        places.append(HostPlace(driver, ledger, share - passing, pin))
        if file is not None:
            places.append(DiskThroughHost(HostPlace(driver, ledger, passing, pin), file))
    elif file is not None:
        places.append(file)
    return ActivationStore(places, LIMIT_BYTES, counts)


def _link(config: GeminiConfig) -> Link | None:
    return None if config.offload_dir is None else disk_link(config.offload_dir, LIMIT_BYTES)
