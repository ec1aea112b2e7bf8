"""What states parameters in chunks have: the questions that change and read nothing."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..chunk import BufferSpec, Chunk, Together
from ..nn.optimizer.rules.rules import Rules
from ..updates.updater import Updater
from ..updates.values import Values
from .saved_states import codec_of
from .shown_states import ShownStates
from .side_states import SideStates
from .state_checks import STEP
from .state_home import StateHome


class StateQuestions:
    """Says which parameters have a state, and what is in it. See `KeptStates`, which has the rest.

    Parameters
    ----------
    values, updater
        Has the values, and counts the steps.
    rules
        The optimizer's arithmetic.
    """

    def __init__(self, values: Values, rules: Rules, updater: Updater) -> None:
        self._values = values
        self._manager = values.manager
        self._rules = rules
        self._updater = updater
        self._sides = SideStates(values.manager, rules, updater)
        self._notes: dict[int, dict[Any, Any]] = {}
        """By the id of a parameter."""
        self.shown = ShownStates()

    @property
    def together(self) -> Together:
        """What the ranks that keep the states do together."""
        return self._manager.together

    def keeps(self, parameter: Any) -> bool:
        """True if the states of this parameter are in its chunk. Those of others, frozen ones too, are elsewhere."""
        place = self._manager.find(parameter)
        return place is not None and place[0].is_trainable

    def has(self, parameter: Tensor) -> bool:
        """Whether there is anything in the state of a parameter; before its first step there mostly is not."""
        return self._is_begun(parameter) or bool(self._notes.get(id(parameter)))

    def room(self, optimizer: Optimizer) -> dict[int, tuple[BufferSpec, ...]]:
        """By the index of a group: the states that all chunks with parameters of it have room for."""
        room: dict[int, tuple[BufferSpec, ...]] = {}
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                place = self._manager.find(parameter)
                if place is not None and place[0].is_trainable:
                    states = place[0].states
                    room[index] = tuple(spec for spec in room.get(index, states) if spec in states)
        return room

    def count(self, parameter: Tensor) -> int:
        """How many steps it has taken."""
        return self._updater.steps.get(id(parameter), 0)

    def names(self, parameter: Tensor) -> list[Any]:
        """The keys of its state."""
        known = self._known(parameter) if self._is_begun(parameter) else []
        return [*known, *self._notes.get(id(parameter), ())]

    def form(self, parameter: Tensor, name: str) -> Tensor:
        """A meta tensor with the shape, the strides and the dtype of a state, as state dicts have it."""
        if name == STEP:
            return torch.empty((), dtype=torch.float32, device="meta")
        if name in self._sides.shapes(parameter):
            return self._sides.get(parameter, name).to("meta")
        dtype, slot = (
            codec_of(self._manager, self._rules.of(parameter), parameter, name).dtype,
            self._manager.slot(parameter),
        )
        return torch.empty_strided(slot.shape, slot.stride, dtype=dtype, device="meta")

    def device(self, parameter: Tensor, name: str) -> torch.device:
        """Where a state is shown to be: numbers are on the CPU, as torch has them."""
        is_number = name == STEP or (not self._rules.of(parameter).is_whole and name in self._sides.shapes(parameter))
        return torch.device("cpu") if is_number else parameter.device

    def _is_begun(self, parameter: Tensor) -> bool:
        return id(parameter) in self._updater.steps or self._rules.of(parameter).has_initial_state

    def _known(self, parameter: Tensor) -> list[str]:
        counted = [STEP] if self._rules.of(parameter).takes_step else []
        in_chunk, sides = self._rules.of(parameter).codecs(self._chunk(parameter).states), self._sides.shapes(parameter)
        return (
            [*counted, *in_chunk, *sides] if self._rules.of(parameter).is_whole else [*counted, *sides, *in_chunk]
        )  # as torch has them

    def _chunk(self, parameter: Tensor) -> Chunk:
        place = self._manager.find(parameter)
        assert place is not None
        return place[0]

    def values_of(self, parameter: Tensor, name: Any) -> tuple[str, ...]:
        """The values of its chunk that an entry of its state is read from; none for a note or a number of steps."""
        if name == STEP or name in self._sides.shapes(parameter) or name in self._notes.get(id(parameter), ()):
            return ()
        return tuple(spec.name for spec in codec_of(self._manager, self._rules.of(parameter), parameter, name).specs)

    def home(self, parameter: Tensor, name: str) -> StateHome:
        """Where an entry of a state is."""
        return StateHome(self._values, self._rules.of(parameter), self.shown, parameter, name)
