"""The states of all random number generators of this process: Python, numpy, torch on CPU and on accelerators.

A file of its own for each rank, ``rng-00000.pt``, of tensors and plain values. After restoring them a resumed run draws
what the interrupted one would have drawn (dropout, shuffling, augmentation), bit for bit.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemini.chunk import accelerator_in_use
from gemini.errors import CheckpointError


def random_states() -> dict[str, Any]:
    """Take the states; no generator is changed, and no accelerator is taken into use."""
    states = {"python": random.getstate(), "numpy": _numpy_state(), "torch": torch.get_rng_state()}
    if (device := accelerator_in_use()) is not None:
        states["accelerator"] = device.type
        states["devices"] = [torch.get_device_module(device).get_rng_state(index) for index in _indices(device)]
    return states


class Restored:
    """States that have been read, checked, and are ready to be set.

    Raises
    ------
    CheckpointError
        If they are not the states of the generators that are here. Nothing has been set.
    """

    def __init__(self, states: Any, what: str) -> None:
        try:
            self._python = states["python"]
            self._numpy = {**states["numpy"], "state": {**states["numpy"]["state"]}}
            if isinstance(key := self._numpy["state"].get("key"), Tensor):
                self._numpy["state"]["key"] = key.numpy().astype(np.uint32)
            self._torch: Tensor = states["torch"]
            random.Random().setstate(self._python)
            bit_generator = getattr(np.random, self._numpy["bit_generator"])
            if not issubclass(bit_generator, np.random.BitGenerator):
                raise ValueError(f"{self._numpy['bit_generator']!r} is no generator of numpy")
            np.random.RandomState(bit_generator()).set_state(self._numpy)
            torch.Generator().set_state(self._torch)
            device = accelerator_in_use()
            self._device = device if device is not None and device.type == states.get("accelerator") else None
            self._devices: list[Tensor] = list(states.get("devices", ()))
            for index, state in zip(_indices(self._device), self._devices, strict=False):
                present = torch.get_device_module(self._device).get_rng_state(index)
                if (state.dtype, state.shape) != (present.dtype, present.shape):
                    raise ValueError(f"the state of device {index} has shape {tuple(state.shape)}")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{what} does not hold the states of random number generators that are here: {error}"
            ) from error

    def set(self) -> None:
        """Set all generators."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._device is not None:
            for index, state in zip(_indices(self._device), self._devices, strict=False):
                torch.get_device_module(self._device).set_rng_state(state, index)


def _numpy_state() -> dict[str, Any]:
    state: dict[str, Any] = {**np.random.get_state(legacy=False)}
    if isinstance(key := state["state"].get("key"), np.ndarray):
        state["state"]["key"] = torch.from_numpy(key.astype(np.int64))
    return state


def _indices(device: torch.device | None) -> range:
    return range(torch.get_device_module(device).device_count() if device is not None else 0)
