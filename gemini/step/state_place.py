"""Where one state of one parameter is, for tensors that show it."""

from contextlib import suppress
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor

from ..errors import TornStep
from .state_tensor import StateTensor


class Values(Protocol):
    """The states of parameters in chunks, one value at a time."""

    def form(self, parameter: Tensor, name: str) -> Tensor:
        """A meta tensor with the shape, the strides and the dtype of a state, as it is shown."""

    def device(self, parameter: Tensor, name: str) -> torch.device:
        """Where a state is shown to be."""

    def open(self, parameter: Tensor, name: str) -> Tensor:
        """The values, for an operation on them: the home itself, or a copy."""

    def close(self, parameter: Tensor, name: str, values: Tensor) -> None:
        """Bring home what was changed in what `open` returned."""


class StatePlace:
    """One state of one parameter (a `Place`); once another one has taken its place, the values from before, in RAM.

    As in plain PyTorch: ``old = state[p]["exp_avg"]``, then ``state[p]["exp_avg"] = new``, and ``old`` is what it was.
    """

    def __init__(self, values: Values, parameter: Tensor, name: str) -> None:
        self._values = values
        self._parameter = parameter
        self._name = name
        self._left: Tensor | None = None
        self._shown: ref[StateTensor] | None = None

    def open(self) -> Tensor:
        return self._values.open(self._parameter, self._name) if self._left is None else self._left

    def close(self, values: Tensor) -> None:
        if self._left is None:
            self._values.close(self._parameter, self._name, values)

    def let_go(self) -> None:
        """Keep the values, which are about to be replaced. Where they are of no single step, those that come count."""
        if self._left is None:
            with suppress(TornStep, ValueError):  # half of a step: loading ends it, and must not fail because of us
                self._left = self.open().clone()

    def show(self) -> StateTensor:
        """The tensor that stands for it, the same one as long as somebody has it."""
        shown = self._shown() if self._shown is not None else None
        if shown is None:
            device = self._values.device(self._parameter, self._name)
            form = self._values.form(self._parameter, self._name)
            shown = StateTensor.stand_for(self, form, device)
            self._shown = ref(shown)
        return shown
