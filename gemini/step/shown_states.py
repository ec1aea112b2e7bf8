"""The tensors and mappings by which states are shown, for as long as somebody has them."""

from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from .state_place import StatePlace, Values
from .state_tensor import StateTensor


class Holder(Protocol):
    """Shows the state of a parameter to somebody who may still have it when that is replaced."""

    def let_go(self) -> None:
        """Keep what is shown now."""


class ShownStates:
    """What shows the states of parameters. Weak: it is there while somebody has it."""

    def __init__(self) -> None:
        self._places: WeakValueDictionary[tuple[int, str], StatePlace] = WeakValueDictionary()
        self._holders: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def place(self, values: Values, parameter: Tensor, name: str) -> StatePlace:
        """Where one entry of a state is."""
        key = (id(parameter), name)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = StatePlace(values, parameter, name)
        return place

    def has(self, parameter: Tensor, name: Any, value: Any) -> bool:
        """True if a value that is assigned to an entry is the tensor that shows it."""
        place = self._places.get((id(parameter), name))
        return isinstance(value, StateTensor) and value.part is None and value.place is place

    def hold(self, parameter: Tensor, holder: Holder) -> None:
        """Tell ``holder`` when the state of a parameter is replaced."""
        self._holders[id(parameter)] = holder

    def holder(self, parameter: Tensor) -> Any:
        """The last object that was given to `hold`; None if it is gone."""
        return self._holders.get(id(parameter))

    def release(self, parameter: Tensor) -> None:
        """Have what shows the state of a parameter keep it: it is about to be another one."""
        holder = self._holders.pop(id(parameter), None)
        if holder is not None:
            holder.let_go()

    def let_go(self, parameter: Tensor, *names: str) -> None:
        """Have the tensors that show these entries keep them: they are about to be replaced."""
        for name in names:
            place = self._places.pop((id(parameter), name), None)
            if place is not None:
                place.let_go()
