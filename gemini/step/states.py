"""The states of an optimizer, of parameters in chunks and of others: as ``optimizer.state`` and in state dicts."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from ..chunk import all_or_none
from ..nn.optimizer.managed import ManagedOptimizer
from .kept_states import KeptStates
from .saved_groups import check_groups, load_options
from .state_mapping import OptimizerStates


class States:
    """Shows, saves and loads the states of a model's optimizer; then those of another that takes its place.

    Parameters
    ----------
    kept
        Has the states of parameters in chunks.
    """

    def __init__(self, kept: KeptStates) -> None:
        self.kept = kept
        self._shown = WeakKeyDictionary[ManagedOptimizer, ref[OptimizerStates]]()

    def shown(self, optimizer: ManagedOptimizer) -> OptimizerStates:
        """What ``optimizer.state`` is: the same object for as long as somebody has it."""
        shown = self._held(optimizer)
        if shown is None:
            of = ref(optimizer)  # weak: the optimizer leads here
            shown = OptimizerStates(self.kept, lambda: getattr(of(), "param_groups", []), optimizer.outside)
            self._shown[optimizer] = ref(shown)
        return shown

    def _held(self, optimizer: ManagedOptimizer) -> OptimizerStates | None:
        """What somebody has of `shown`."""
        found = self._shown.get(optimizer)
        return None if found is None else found()

    def replace(self, optimizer: ManagedOptimizer, states: Mapping[Any, Any]) -> None:
        """Take over what is assigned to ``optimizer.state``."""
        shown = self.shown(optimizer)
        if id(states) != id(shown):
            shown.replace(states)
            del self._shown[optimizer]  # what it was shows what there was

    def succeed(self, optimizer: ManagedOptimizer) -> None:
        """Have the states of another optimizer. They begin anew, or with those that it brings. All or nothing.

        Raises
        ------
        TypeError, ValueError
            If it brings what cannot be kept.
        """
        kept = self.kept.successor(optimizer.rules)
        brought = [p for p in optimizer.outside if isinstance(p, Tensor) and kept.keeps(p)]
        for parameter in brought:
            kept.check(parameter, optimizer.exported_state(parameter))
        for shown in [held for of in list(self._shown) if (held := self._held(of)) is not None]:
            shown.let_go()  # as in plain PyTorch: what the first optimizer had stays with those who have it
        kept.succeed(self.kept)
        self.kept = kept
        self._shown.clear()
        for parameter in brought:
            kept.replace(parameter, optimizer.exported_state(parameter))
            del optimizer.outside[parameter]

    def state_dict(self, optimizer: ManagedOptimizer) -> dict[str, Any]:
        """States and groups in torch's layout, on CPU."""
        groups, index = [], 0
        states: dict[Any, Any] = {}
        for group in optimizer.param_groups:
            packed = optimizer.saved_options(group)
            packed["params"] = list(range(index, index + len(group["params"])))
            groups.append(packed)
            for parameter in group["params"]:
                if self.kept.keeps(parameter):
                    state = {name: self.kept.copy(parameter, name) for name in self.kept.names(parameter)}
                else:
                    state = optimizer.exported_state(parameter)
                if state:
                    states[index] = state
                index += 1
        states.update({key: value for key, value in optimizer.outside.items() if not isinstance(key, Tensor)})
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, optimizer: ManagedOptimizer, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. Checked first: nothing has changed if it does not fit."""
        saved_groups, states = state_dict["param_groups"], state_dict["state"]
        together = self.kept.together
        with all_or_none(together.communicator, "the check of optimizer.load_state_dict"):
            check_groups(optimizer, optimizer.rules, saved_groups, states, self.kept.room(optimizer))
            for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
                for parameter, number in zip(group["params"], saved["params"], strict=True):
                    self.kept.check_signs(parameter, states.get(number, {}))
        with together.changing("optimizer.load_state_dict"):
            self._load(optimizer, saved_groups, states)

    def _load(self, optimizer: ManagedOptimizer, saved_groups: Any, states: Mapping[Any, Any]) -> None:
        numbers = [number for saved in saved_groups for number in saved["params"]]
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            load_options(group, saved)
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                is_kept = self.kept.keeps(parameter)
                if number in states and is_kept:
                    self.kept.replace(parameter, states[number])
                elif number in states:
                    optimizer.restore_state(parameter, states[number])
                elif is_kept:
                    self.kept.drop(parameter)
                else:
                    optimizer.state.pop(parameter, None)
        outside = optimizer.outside
        for key in [key for key in outside if not isinstance(key, Tensor)]:
            del outside[key]
        outside.update({key: value for key, value in states.items() if key not in numbers})
