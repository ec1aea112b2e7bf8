"""Which devices a lazy tensor may be made for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=64)
def check_device(device: torch.device) -> None:
    """Raise ValueError unless tensors can live on `device`."""
    if device.type in ("cpu", "meta"):
        return
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} is not usable on this machine ({str(error).splitlines()[0]}); "
            "use default_device='cpu' or leave it out"
        ) from error


def check_requested_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check the device that a torch function is asked for, before torch tries to initialise it."""
    if func is torch.Tensor.cuda:
        check_device(torch.device("cuda"))
    requested = [kwargs.get("device"), *(args[1:2] if func is torch.Tensor.to else ())]
    for device in requested:
        if isinstance(device, torch.device) or (isinstance(device, str) and device):
            check_device(torch.device(device))
