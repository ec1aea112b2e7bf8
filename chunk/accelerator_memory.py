"""How much memory a device has, and what torch's allocator has of it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes of a device that no process has."""

    free: int
    total: int
    reader: str
    """The name of the interface that was asked."""


class AcceleratorMemory:
    """The memory of one device, by torch's interface for any accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        """The same text for all processes that use this device, as far as that can be known."""
        return str(self.device)

    def free(self) -> FreeMemory:
        return FreeMemory(*torch.accelerator.get_memory_info(self.device), reader=self.device.type.upper())

    @property
    def allocated_bytes(self) -> int:
        """Bytes in tensors."""
        return int(torch.accelerator.memory_allocated(self.device))

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the allocator has, those kept for reuse included."""
        return int(torch.accelerator.memory_reserved(self.device))

    @property
    def peak_bytes(self) -> int:
        """The most in tensors since `reset_peak`."""
        return int(torch.accelerator.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self.device)
