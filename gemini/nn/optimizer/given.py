"""The optimizer that was given to ``boost``, where another one came back: it does what that one does.

Code from before still has it: schedulers, loggers, a trainer that made it. Its parameters are in chunks now, and its
own step would run beside the managed one, so its class becomes one that asks the optimizer that came back.
"""

from collections.abc import Callable
from typing import Any
from weakref import ref

from torch.optim import Optimizer


class GivenOptimizer:
    """Mixed into the class of a given optimizer."""

    _returned: "ref[Any]"
    """Weak: what came back has the states, and its model keeps it."""

    @property
    def state(self) -> Any:
        returned = self._returned()
        return {} if returned is None else returned.state

    @state.setter
    def state(self, states: Any) -> None:
        self._ask().state = states

    @property
    def param_groups(self) -> Any:
        returned = self._returned()
        return self.__dict__["param_groups"] if returned is None else returned.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self._ask().param_groups = groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._ask().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._ask().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self._ask().state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ask().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._ask().add_param_group(param_group)

    def __getstate__(self) -> Any:
        return self._ask().__getstate__()

    def __getattr__(self, name: str) -> Any:
        returned = self.__dict__["_returned"]()
        if returned is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(returned, name)

    def _ask(self) -> Any:
        returned = self._returned()
        if returned is None:
            raise RuntimeError(
                f"this {type(self).__name__} was given to booster.boost, and the optimizer that boost returned in its "
                "place is gone with its model: build a new one"
            )
        return returned


def let_ask(given: Optimizer, returned: Optimizer) -> None:
    """Have an optimizer whose place another one has taken do what that one does."""
    cls = type(given)
    step = given.__dict__.pop("step", None)
    given.__dict__["_returned"] = ref(returned)
    # Behind its own class, since Python finds another layout in that of an abstract one; so what it does is copied.
    names = ("__dict__", "__weakref__", "__doc__", "__module__")
    does = {name: value for name, value in vars(GivenOptimizer).items() if name not in names}
    told = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    given.__class__ = type(cls.__name__, (cls, GivenOptimizer), {**does, **told})
    if step is not None:  # a scheduler has put it there, and warns if what it finds is not marked
        forwarded = _forwarding(ref(given))
        forwarded.__dict__.update(getattr(step, "__dict__", {}))
        given.__dict__["step"] = forwarded


def _forwarding(given: "ref[Any]") -> Callable[..., Any]:
    def step(closure: Callable[[], Any] | None = None) -> Any:
        optimizer = given()
        return None if optimizer is None else GivenOptimizer.step(optimizer, closure)

    return step
