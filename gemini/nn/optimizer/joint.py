"""Several optimizers that train one model, each its own parameters: Muon for matrices and AdamW for the rest.

::

    JointOptimizer    what the model's step serves: the groups of all, one state dict, one step
    '-- parts         the optimizers, each with its groups, states and schedulers
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ...torch_private import mark_stepped
from .managed import ManagedOptimizer, Prepared
from .rules.rules import Rules, RulesOfParts


class JointOptimizer(ManagedOptimizer):
    """What `Booster.boost` makes of a list of optimizers: one, and a sequence of them in the order of the list.

    ``step()``, ``zero_grad()``, ``state_dict()`` and whatever is saved are of all. Each of the parts can be stepped,
    zeroed and saved by itself as well.

    Parameters
    ----------
    parts
        The optimizers.

    Raises
    ------
    ValueError
        If two of them have the same parameter.
    """

    def __init__(self, parts: Sequence[ManagedOptimizer]) -> None:
        self.parts = tuple(parts)
        _refuse_shared(self.parts)
        self._rules = RulesOfParts(self.parts)
        self._outside = _OfParts(self.parts)
        defaults = {name: value for part in reversed(self.parts) for name, value in part.defaults.items()}
        super().__init__(self.param_groups, defaults)
        for part in self.parts:
            part.join(self)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[ManagedOptimizer]:
        return iter(self.parts)

    def __getitem__(self, index: int) -> ManagedOptimizer:
        return self.parts[index]

    @property
    def rules(self) -> Rules:
        return self._rules

    @property
    def outside(self) -> MutableMapping[Any, Any]:
        return self._outside

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, in their order."""
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if groups:
            raise ValueError("these are the groups of several optimizers: assign to param_groups of one of them")

    def be_managed(self, step: Any) -> None:
        super().be_managed(step)
        for part in self.parts:
            part.be_managed(step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters of all parts that have a gradient, all or nothing; see `ManagedOptimizer.step`."""
        for part in self.parts:
            part.before_step()
        result = super().step(closure)
        for part in self.parts:
            mark_stepped(part)
            part.after_step()
        return result

    def register_param_group(self, group: dict[str, Any]) -> None:
        if not any(each is group for each in self.param_groups):
            raise ValueError(
                f"this optimizer is {len(self.parts)}: call add_param_group of the one that is to have the new "
                "parameters, such as optimizer[0].add_param_group(...)"
            )

    def prepare_parameters(
        self, group: Mapping[str, Any], params: Iterable[Tensor], grad_scale: float = 1.0
    ) -> Sequence[Prepared]:
        return self._with(group).prepare_parameters(group, params, grad_scale)

    def exported_state(self, param: Tensor) -> dict[str, Any]:
        part = self._outside.part(param)
        return {} if part is None else part.exported_state(param)

    def restore_state(self, param: Tensor, saved: Mapping[str, Any]) -> None:
        part = self._outside.part(param)
        assert part is not None
        part.restore_state(param, saved)

    def saved_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return self._with(group).saved_options(group)

    def _with(self, group: Mapping[str, Any]) -> ManagedOptimizer:
        return next(part for part in self.parts if any(each is group for each in part.param_groups))


class _OfParts(MutableMapping[Any, Any]):
    """The states of parameters in no chunk: each is where the part has it whose parameter it is."""

    def __init__(self, parts: Sequence[ManagedOptimizer]) -> None:
        self._parts = parts

    def part(self, key: Any) -> ManagedOptimizer | None:
        """The part that has this parameter; None if none has."""
        parts = self._parts if isinstance(key, Tensor) else ()
        return next((part for part in parts if any(key is each for each in _parameters(part))), None)

    def __getitem__(self, key: Any) -> Any:
        return self._map(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._map(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._map(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in part.outside for part in self._parts)  # asking a default dict for it would make it

    def __iter__(self) -> Iterator[Any]:
        return iter([key for part in self._parts for key in part.outside])

    def __len__(self) -> int:
        return sum(len(part.outside) for part in self._parts)

    def _map(self, key: Any) -> MutableMapping[Any, Any]:
        having = [part.outside for part in self._parts if key in part.outside]
        part = self.part(key)
        return having[0] if having else (self._parts[0] if part is None else part).outside


def whole_of(optimizers: Any) -> ManagedOptimizer | None:
    """What several optimizers are together, given as a list or tuple: all parts of one; None of anything else."""
    if not isinstance(optimizers, list | tuple) or not optimizers:
        return None
    parts = [getattr(each, "itself", None) for each in optimizers]
    whole = getattr(parts[0], "whole", None)
    if isinstance(whole, JointOptimizer) and {id(part) for part in parts} == {id(part) for part in whole.parts}:
        return whole
    return None


def _refuse_shared(parts: Sequence[ManagedOptimizer]) -> None:
    seen: dict[int, int] = {}
    for index, part in enumerate(parts):
        for parameter in _parameters(part):
            if (other := seen.setdefault(id(parameter), index)) != index:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is in two of the optimizers ({other} and {index}), "
                    "and each would update it: give each parameter to one of them"
                )


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
