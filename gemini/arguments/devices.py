"""The rule for devices of torch."""

from dataclasses import dataclass
from typing import Any

import torch

from .checked import NotAllowed


@dataclass(frozen=True, slots=True)
class Device:
    """What ``torch.device`` takes."""

    allowed: str = 'a torch.device or its name, such as "cpu" or "cuda:0"'

    def meant(self, value: Any) -> torch.device:
        if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
            raise NotAllowed(TypeError)
        try:
            return torch.device(value)
        except (RuntimeError, ValueError, OverflowError, TypeError) as error:
            raise NotAllowed(ValueError) from error
