"""The device of a part of `gpu.py`: an accelerator, the simulated one, or the CPU."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


class Device:
    """Where a part computes.

    Parameters
    ----------
    name
        ``auto``, ``sim`` or ``cpu``; the first is the accelerator of this machine, or the CPU where there is none.
    """

    def __init__(self, name: str) -> None:
        if name == "sim":
            _register_simulated()
        self.accelerator = None if name == "cpu" else torch.accelerator.current_accelerator(check_available=True)
        self.device = torch.device("cpu") if self.accelerator is None else self.accelerator

    @property
    def is_accelerator(self) -> bool:
        return self.accelerator is not None

    def synchronize(self) -> None:
        if self.is_accelerator:
            torch.accelerator.synchronize()

    def seconds(self, action: Callable[[], object], repeats: int = 5) -> float:
        """The best of some; the first is not counted."""
        took = []
        for _ in range(repeats + 1):
            self.synchronize()
            begin = time.perf_counter()
            action()
            self.synchronize()
            took.append(time.perf_counter() - begin)
        return min(took[1:])

    def forget_peak(self) -> None:
        if self.is_accelerator:
            torch.accelerator.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """What the allocator of the device had in use at most; None on a CPU, or if the device does not tell."""
        if not self.is_accelerator:
            return None
        found = torch.accelerator.memory_stats().get("allocated_bytes.all.peak")
        return None if found is None else int(found)

    def describe(self) -> dict[str, Any]:
        """Its kind, its name and its memory."""
        found: dict[str, Any] = {"device": str(self.device)}
        if self.is_accelerator:
            module: Any = torch.get_device_module(self.device)
            if hasattr(module, "get_device_properties"):
                properties = module.get_device_properties(0)
                found |= {"name": properties.name, "memory_bytes": properties.total_memory}
            found["runtime"] = str(torch.version.cuda or torch.version.hip or "")
        return found


def _register_simulated() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "sim"))
    from simulated import register  # type: ignore[import-not-found]

    register().seed(0)
