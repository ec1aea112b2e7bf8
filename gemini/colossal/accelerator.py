"""`get_accelerator`: the device that computes, as ColossalAI's scripts ask for it, over ``torch.accelerator``."""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .coordinator import DistCoordinator


class Accelerator:
    """The accelerator of this machine, or the CPU where there is none.

    What is not written here comes from torch's module of the device (``torch.cuda``, ``torch.xpu``, ``torch.cpu``):
    streams, events, random states, properties.
    """

    @property
    def name(self) -> str:
        """The type of its devices, for example ``"cuda"``; ``"cpu"`` without an accelerator."""
        return self.get_current_device().type

    @property
    def communication_backend(self) -> str:
        """What ``torch.distributed`` uses between its devices: ``"nccl"`` for CUDA, ``"gloo"`` for the CPU."""
        return dist.Backend.default_device_backend_map.get(self.name, "gloo")

    @property
    def support_set_device(self) -> bool:
        """Whether a process picks one of several devices."""
        return self.is_available()

    def is_available(self) -> bool:
        """Whether there is an accelerator; False on the CPU."""
        return torch.accelerator.is_available()

    def device_count(self) -> int:
        """How many devices there are; 0 without an accelerator."""
        return torch.accelerator.device_count()

    def get_current_device(self) -> torch.device:
        """The device that this process computes on."""
        accelerator = torch.accelerator.current_accelerator() if self.is_available() else None
        if accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, torch.accelerator.current_device_index())

    def current_device(self) -> int:
        """The index of that device; 0 without an accelerator."""
        return self.get_current_device().index or 0

    def set_device(self, device: torch.device | int | None = None) -> None:
        """Compute on this device from now on; None: on that of the local rank. Nothing happens on the CPU."""
        if self.is_available():
            index = DistCoordinator().local_rank % self.device_count() if device is None else device
            torch.accelerator.set_device_index(index)

    def set_to_device(self, models: Any) -> Any:
        """Move a module, or each of a list, to the current device. Models for `Booster.boost` need not be."""
        device = self.get_current_device()
        if isinstance(models, nn.Module):
            return models.to(device)
        moved = [model.to(device) for model in models]
        return moved[0] if len(moved) == 1 else moved  # as in ColossalAI

    def synchronize(self, device: torch.device | int | None = None) -> None:
        """Wait until the device has done all that was asked of it; the CPU always has."""
        if self.is_available():
            torch.accelerator.synchronize(device)

    def manual_seed(self, seed: int) -> None:
        """Seed torch's generators, that of the CPU too."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch's generators of all devices and of the CPU."""
        torch.manual_seed(seed)

    def empty_cache(self) -> None:
        """Give memory back to the device that no tensor uses."""
        if self.is_available():
            torch.accelerator.empty_cache()

    def memory_allocated(self, device: torch.device | int | None = None) -> int:
        """Bytes of the device that tensors take; 0 without an accelerator."""
        return torch.accelerator.memory_allocated(device) if self.is_available() else 0

    def max_memory_allocated(self, device: torch.device | int | None = None) -> int:
        """The most bytes that tensors took since `reset_peak_memory_stats`; 0 without an accelerator."""
        return torch.accelerator.max_memory_allocated(device) if self.is_available() else 0

    def memory_reserved(self, device: torch.device | int | None = None) -> int:
        """Bytes of the device that torch's allocator holds; 0 without an accelerator."""
        return torch.accelerator.memory_reserved(device) if self.is_available() else 0

    def max_memory_reserved(self, device: torch.device | int | None = None) -> int:
        """The most bytes that torch's allocator held since `reset_peak_memory_stats`; 0 without an accelerator."""
        return torch.accelerator.max_memory_reserved(device) if self.is_available() else 0

    def reset_peak_memory_stats(self, device: torch.device | int | None = None) -> None:
        """Begin to look for the most bytes anew."""
        if self.is_available():
            torch.accelerator.reset_peak_memory_stats(device)

    def autocast(
        self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True
    ) -> torch.autocast:
        """Torch's automatic mixed precision on this device."""
        return torch.autocast(self.name, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    def __getattr__(self, name: str) -> Any:
        module = torch.get_device_module(self.name)
        if name.startswith("_") or not hasattr(module, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}, and {module.__name__} neither")
        return getattr(module, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.communication_backend})"


@cache
def get_accelerator() -> Accelerator:
    """The accelerator of this machine, or the CPU. It keeps nothing, so all callers get the same."""
    return Accelerator()


def get_current_device() -> torch.device:
    """The device that this process computes on."""
    return get_accelerator().get_current_device()
