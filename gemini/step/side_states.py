"""Side states of parameters in chunks: what an optimizer keeps of a parameter beside its elements, in RAM."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..chunk import ChunkManager
from ..nn.optimizer.rules.rules import Rules
from ..updates.updater import Updater
from .state_checks import check_side


class SideStates:
    """Reads and replaces side states, never while an update changes them.

    Parameters
    ----------
    manager, rules, updater
        Knows which update is under way, which side states there are, and has them.
    """

    def __init__(self, manager: ChunkManager, rules: Rules, updater: Updater) -> None:
        self._manager = manager
        self._rules = rules
        self._updater = updater

    def shapes(self, parameter: Tensor) -> Mapping[str, tuple[int, ...]]:
        """The side states that a parameter has when it has been stepped, by name."""
        return self._rules.of(parameter).side(tuple(parameter.shape))

    def get(self, parameter: Tensor, name: str) -> Tensor:
        """One of them, itself."""
        return self._of(parameter)[name]

    def check(self, parameter: Tensor, name: str, value: Any) -> None:
        """Raise what is wrong with a value; see `check_side`."""
        check_side(name, self.shapes(parameter)[name], value)

    def load(self, parameter: Tensor, name: str, value: Any) -> None:
        """Replace one of them by a copy of a value."""
        self._of(parameter)[name] = torch.as_tensor(value).detach().to("cpu", torch.float32, copy=True)

    def forget(self, parameter: Tensor) -> None:
        """Have none, as before the first step."""
        self._updater.sides.pop(id(parameter), None)

    def _of(self, parameter: Tensor) -> dict[str, Tensor]:
        place = self._manager.find(parameter)
        assert place is not None
        place[0].settle()
        return self._updater.sides.setdefault(id(parameter), {})
