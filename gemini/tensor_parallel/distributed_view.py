"""Modules whose parameters are parts, and whose attributes show them as `DTensor`."""

from collections.abc import Callable, Iterable
from inspect import getclosurevars
from typing import Any

from torch import nn

from ..torch_private import own_parameters
from .local_part import LocalPart


class DistributedView(nn.Module):
    """Mixed into the class of a module: ``module.weight`` is a `DTensor`, ``module.parameters()`` has the part."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Not the user's own hook, which may want options and keeps lists of the classes that the user writes."""


def show_distributed(module: nn.Module, names: Iterable[str]) -> None:
    """Have a module show these parameters as `DTensor`. Its class gets a subclass of the same name."""
    original, wants_parts = type(module), _asks_for_parts(module)
    members: dict[str, Any] = {name: _attribute(name, wants_parts) for name in names}
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    object.__setattr__(module, "__class__", type(original.__name__, (DistributedView, original), members))


def show_as_before(module: nn.Module) -> None:
    """Undo `show_distributed`."""
    object.__setattr__(module, "__class__", type(module).__mro__[2])


def _attribute(name: str, wants_parts: Callable[[nn.Module], bool]) -> property:
    def get(module: nn.Module) -> Any:
        parameter = own_parameters(module)[name]
        if not isinstance(parameter, LocalPart):
            return parameter
        return parameter.view_as(parameter) if wants_parts(module) else parameter.distributed()

    return property(get)


def _asks_for_parts(module: nn.Module) -> Callable[[nn.Module], bool]:
    """Whether forward is to find the parts instead, for example without gradients.

    What transformers' ``tp_plan`` puts around forward then exchanges the DTensors that it finds among the parameters;
    it finds none, but knows whether it wanted to.
    """
    forward: Any = vars(module).get("forward")
    if getattr(forward, "__module__", None) == "transformers.distributed.tensor_parallel":
        style = getclosurevars(forward).nonlocals.get("self")
        if (asks := getattr(style, "should_use_local_tensors", None)) is not None:
            return asks  # type: ignore[no-any-return]
    return _never


def _never(module: nn.Module) -> bool:
    return False
