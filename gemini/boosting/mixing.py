"""The class of a boosted model: the user's, with `GeminiModule` mixed in for one object."""

import inspect
from contextlib import suppress
from typing import Any

from torch import nn

from .module import GeminiModule

_set_class = object.__dict__["__class__"].__set__
"""Past the property of a boosted model's class, and past modules that hand attributes on to what they wrap."""


def take_out(model: nn.Module, original: type[nn.Module]) -> None:
    """Make a boosted model a plain one again, of the class that it had before."""
    _set_class(model, original)
    del vars(model)["_gemini"]


def mix_in(model: nn.Module) -> None:
    """Make ``model`` a `GeminiModule` in place, keeping the name of its class (it is written into checkpoints).

    ``type(model)(...)`` goes on making objects of the user's own class, which are not boosted.
    """
    original = type(model)

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is not mixed:
            raise TypeError(
                f"{cls.__name__} derives from the class of one boosted model; derive it from {original.__qualname__} "
                f"of {original.__module__}, the class that the model had before boost"
            )
        return original(*args, **kwargs)  # no object of the class asked for, so Python calls no __init__ on it

    def replace(self: nn.Module, new: type) -> None:
        if not issubclass(new, GeminiModule):
            raise TypeError(
                f"the class of a boosted model cannot be replaced by {new.__name__}: it leads to its chunks. Replace "
                "it before booster.boost"
            )
        object.__setattr__(self, "__class__", new)

    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__new__": make,
        "__class__": property(type, replace),
    }
    with suppress(TypeError, ValueError):  # a class that has none to show
        members["__signature__"] = inspect.signature(original)
    mixed = type(original.__name__, (GeminiModule, original), members)
    object.__setattr__(model, "__class__", mixed)  # what torch.compile returns hands attributes on to what it wraps
