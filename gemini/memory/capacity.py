"""Bytes that each tier may hold: those that the user gave, or that the tracker found."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..chunk import MemoryMap, Tier, find_accelerator
from ..config import GeminiConfig
from ..lease.room import NON_MODEL_HOST_BYTES
from ..sizes import format_bytes
from .tracker import Budget, device_budget, disk_budget, host_budget, host_headroom


@dataclass(frozen=True, slots=True)
class Capacities:
    """Bytes per tier, and where each number comes from."""

    device: torch.device
    """The device that computes."""
    memory: MemoryMap
    budgets: Mapping[Tier, Budget]
    device_limit_bytes: int | None
    """Bytes for model and non-model data on DEVICE together, if its budget is a guess until the warm-up has measured
    non-model data; None if the user gave the budget."""
    ram_bytes: int = 0
    """RAM that the tightest limit left to this rank when nothing of the training was there; 0: unknown."""

    @property
    def nbytes(self) -> dict[Tier, int]:
        return {tier: budget.bytes for tier, budget in self.budgets.items()}


def find_capacities(config: GeminiConfig) -> Capacities:
    """Resolve the capacities of all tiers on this machine."""
    accelerator = find_accelerator()
    device = torch.device("cpu") if accelerator is None else accelerator
    in_ram = MemoryMap.UNIFIED if config.device_memory is None else MemoryMap.EMULATED
    memory = in_ram if accelerator is None else MemoryMap.ACCELERATOR
    host = _said("host_memory", config.host_memory) or host_budget(spare_bytes=NON_MODEL_HOST_BYTES)
    if accelerator is None and config.device_memory is not None and config.host_memory is None:
        # The emulated device is in the same RAM, which must not be given away twice.
        less = f"{host.source}, less {format_bytes(config.device_memory)} for the emulated device"
        host = Budget(max(host.bytes - config.device_memory, 0), less)
    if config.offload_dir is None:
        disk = Budget(0, "no offload_dir")
    else:
        disk = _said("disk_memory", config.disk_memory) or _free_disk(config)
    limit = None
    if memory is MemoryMap.UNIFIED:
        on_device = Budget(host.bytes, f"the same RAM as host: {host.source}")
    elif config.device_memory is not None:
        on_device = Budget(config.device_memory, "argument device_memory")
    else:
        on_device = device_budget(device, config.steady_device_ratio * (1.0 - config.warmup_non_model_ratio))
        limit = device_budget(device, config.steady_device_ratio).bytes
    return Capacities(
        device, memory, {Tier.DEVICE: on_device, Tier.HOST: host, Tier.DISK: disk}, limit, host_budget(1.0).bytes
    )


def _said(name: str, nbytes: int | None) -> Budget | None:
    return None if nbytes is None else Budget(nbytes, f"argument {name}")


def _free_disk(config: GeminiConfig) -> Budget:
    assert config.offload_dir is not None
    return disk_budget(config.offload_dir)


def device_headroom(device: torch.device) -> int:
    """Bytes that this process may still take where ``device`` computes, whatever the capacities say."""
    if device.type == "cpu":
        return host_headroom()[0]
    return device_budget(device, 1.0).bytes
