"""What a forward's numbers depend on beside its module and its inputs.

Random states, autocast, context variables, the gradient mode, defaults, and settings of torch (`settings`) are noted
and put back. Of a mode that sees operations (``TorchFunctionMode``, ``TorchDispatchMode``) nobody can tell what it does
the second time: forwards under one are not run again.
"""

import random
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..torch_private import modes, without_modes
from .settings import Settings


@dataclass(frozen=True, slots=True)
class _Autocast:
    device_type: str
    is_enabled: bool
    dtype: torch.dtype
    is_cached: bool

    @classmethod
    def now(cls, device_type: str) -> "_Autocast":
        dtype = torch.get_autocast_dtype(device_type)
        return cls(device_type, torch.is_autocast_enabled(device_type), dtype, torch.is_autocast_cache_enabled())

    def restored(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.dtype, self.is_enabled, self.is_cached)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The state of the process at one moment, as far as a module's forward depends on it.

    What code outside of torch, Python's ``random`` and numpy's global generator keeps is no part of it.
    """

    random: Tensor
    of_devices: Mapping[torch.device, Tensor]
    of_python: Any
    of_numpy: Any
    autocast: tuple[_Autocast, ...]
    settings: Settings
    default_device: torch.device
    is_grad_enabled: bool
    variables: Context
    unknown_mode: str
    """The class of a mode that sees operations; empty if there is none."""

    @classmethod
    def now(cls, devices: Collection[torch.device]) -> "Surroundings":
        """The state of this moment, with the random states of these devices beside the CPU's."""
        others = {device for device in devices if device.type not in ("cpu", "meta")}
        types = dict.fromkeys(("cpu", *(device.type for device in others)))
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            {device: torch.get_device_module(device).get_rng_state(device) for device in others},
            random.getstate(),
            numpy.random.get_state() if numpy is not None else None,
            tuple(_Autocast.now(kind) for kind in types if torch.amp.is_autocast_available(kind)),
            Settings.now(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            copy_context(),
            next((type(mode).__name__ for mode in modes() if not type(mode).__module__.startswith("gemini.")), ""),
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Have this state for as long as the context lasts, and after it the one before."""
        present = Surroundings.now(self.of_devices.keys())
        with ExitStack() as contexts:
            contexts.enter_context(without_modes())
            if self.default_device != torch.get_default_device():
                contexts.enter_context(torch.device(self.default_device))
            contexts.enter_context(torch.set_grad_enabled(self.is_grad_enabled))
            for autocast in self.autocast:
                contexts.enter_context(autocast.restored())
            contexts.callback(present._put_back)
            self._put_back()
            yield

    def _put_back(self) -> None:
        torch.set_rng_state(self.random)
        for device, state in self.of_devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.of_python)
        if self.of_numpy is not None:
            sys.modules["numpy"].random.set_state(self.of_numpy)
        self.settings.put_back()
