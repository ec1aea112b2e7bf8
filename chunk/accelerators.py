"""The device that computes, its driver and its memory. The only place that tells one kind of device from another."""

import torch

from .accelerator_driver import AcceleratorDriver
from .accelerator_memory import AcceleratorMemory
from .cuda_driver import CudaDriver
from .cuda_memory import CudaMemory


def find_accelerator() -> torch.device | None:
    """The current device of the accelerator of this machine, with its index; None where the CPU computes.

    Apple's MPS is none for us: it has no streams beside the one that computes, and its memory is the host's.
    """
    device = _accelerator()
    if device is None or device.type == "mps" or not torch.accelerator.is_available():
        return None
    return torch.device(device.type, torch.accelerator.current_device_index())


def accelerator_in_use() -> torch.device | None:
    """The same, or None if this process has done nothing with it yet: asking takes none of its memory."""
    device = _accelerator()
    if device is None or not getattr(torch.get_device_module(device), "is_initialized", lambda: True)():
        return None
    return find_accelerator()


def driver_of(device: torch.device) -> AcceleratorDriver:
    """The driver of a device."""
    return CudaDriver(device) if _is_cuda(device) else AcceleratorDriver(device)


def memory_of(device: torch.device) -> AcceleratorMemory:
    """How much memory a device has."""
    return CudaMemory(device) if _is_cuda(device) else AcceleratorMemory(device)


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"  # ROCm calls itself so, too


def _accelerator() -> torch.device | None:
    device = torch.accelerator.current_accelerator()
    return None if device is None or device.type == "cpu" else device  # the second is what older versions of torch say
