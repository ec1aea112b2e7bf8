"""What ColossalAI's wrappers of model and optimizer have. Here nothing is wrapped: boost returns the user's own."""

from contextlib import suppress
from typing import Any

from torch import Tensor, nn


class OptimizerNames:
    """Mixed into the optimizers that boost returns."""

    _managed: Any
    """What the optimizer hands its work to once boosted, else None."""

    @property
    def optim(self) -> Any:
        """The optimizer itself: nothing is wrapped."""
        return self

    def unwrap(self) -> Any:
        """The optimizer itself: nothing is wrapped."""
        return self

    def backward(self, loss: Tensor, inputs: Any = None, retain_graph: bool = False) -> None:
        """Run backward, with fp16 on the scaled loss: `Booster.backward`.

        Raises
        ------
        NotImplementedError
            If ``inputs`` or ``retain_graph`` is given.
        """
        if inputs is not None or retain_graph:
            raise NotImplementedError(
                "optimizer.backward takes the loss alone; for inputs= and retain_graph= call loss.backward(...), which "
                'needs precision="bf16" or "fp32", since the loss is not scaled then'
            )
        if self._managed is None:
            loss.backward()
        else:
            self._managed.backward(loss)

    def get_grad_norm(self, norm_type: float = 2.0) -> float | None:
        """The last norm of all gradients that was computed, before clipping and not scaled.

        ``GeminiPlugin(max_norm=...)`` and ``precision="fp16"`` have it computed in ``step()``, `clip_grad_by_norm` at
        once. None: nothing has.
        """
        return None if self._managed is None else self._managed.gradient_norm()


def give_names(model: nn.Module) -> None:
    """Give a boosted model ``unwrap()`` and ``module``, except where it has something of its own by that name."""
    cls = type(model)  # boost made it for this model alone
    for name, member in (("unwrap", _unwrap), ("module", _Inner(cls))):
        if not hasattr(model, name):
            setattr(cls, name, member)


def _unwrap(model: nn.Module, unwrap_peft: bool = True) -> nn.Module:
    """The model itself: nothing is wrapped."""
    return model


class _Inner:
    """``module`` of a boosted model: the model once more, but without a ``module``.

    Scripts of many libraries unwrap ``while hasattr(model, "module")``, which would never end if that were the model.
    The second object has the attributes, parameters and hooks of the first, and keeps it alive.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        members = {
            "__slots__": ("_outer",),  # beside the attributes, which are those of the model
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__call__": lambda inner, *args, **kwargs: inner._outer(*args, **kwargs),
            "module": property(_nothing),
        }
        self._cls = type(cls.__name__, (cls,), members)

    def __get__(self, model: nn.Module | None, owner: type[nn.Module]) -> Any:
        if model is None:
            return self
        with suppress(AttributeError):
            return nn.Module.__getattr__(model, "module")  # the user's, who put it there after boost
        inner: nn.Module = object.__new__(self._cls)
        object.__setattr__(inner, "__dict__", model.__dict__)
        object.__setattr__(inner, "_outer", model)
        return inner


def _nothing(inner: nn.Module) -> Any:
    raise AttributeError(f"{type(inner).__name__!r} object has no attribute 'module'")
