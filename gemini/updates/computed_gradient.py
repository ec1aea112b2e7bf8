"""A tensor in ``p.grad`` for a gradient that is elsewhere and that is computed with all the same, one at a time.

``torch.nn.utils.clip_grad_norm_`` and code like it asks for all gradients before it looks at the first. Copies of all
may need more memory than there is; one at a time does not. So reductions read the gradient for that one operation, and
what changes it in place also writes it back. All else needs a copy that lasts, and is refused.
"""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..chunk import QUIET, Chunk, Gradient
from ..torch_private import FOREACH
from .absent_gradient import CLIP, AbsentGradient, without_memory

_READING: frozenset[Any] = frozenset(
    {
        *(torch.linalg.vector_norm, torch.norm, torch.isfinite, torch.isnan, torch.isinf, torch.sum, torch.mean),
        *(getattr(Tensor, name) for name in ("norm", "isfinite", "isnan", "isinf", "sum", "mean", "max", "min", "abs")),
    }
)
_CHANGING: frozenset[Any] = frozenset(
    getattr(Tensor, name)
    for name in ("mul_", "div_", "clamp_", "clamp_min_", "clamp_max_", "neg_", "nan_to_num_", "zero_", "__imul__")
)
_OF_EACH: dict[Any, Callable[..., Any]] = {
    FOREACH["norm"]: torch.linalg.vector_norm,
    **{FOREACH[name]: getattr(Tensor, name) for name in ("mul_", "clamp_min_", "clamp_max_")},
}
"""Operations on lists of gradients, and what they do to each."""
_ITSELF: frozenset[Any] = frozenset({Tensor.detach, Tensor.data.__get__})  # type: ignore[attr-defined]


class ComputedGradient(AbsentGradient):
    """Stands for a gradient in a chunk, as long as it is in ``p.grad``: it is computed with where it is."""

    place: "Callable[[], tuple[Chunk, int, Tensor] | None]"
    """Where the gradient is, and of which parameter. Weak: the parameter has this tensor in ``p.grad``."""

    @classmethod
    def at(cls, chunk: Chunk, position: int, parameter: Tensor, reason: str) -> "ComputedGradient":
        """A stand-in for the gradient of ``parameter``; ``reason`` says where that is."""
        stand_in = without_memory(parameter).as_subclass(cls)
        stand_in.reason, stand_in.remedy = reason, CLIP
        of_chunk, of_parameter = ref(chunk), ref(parameter)

        def place() -> tuple[Chunk, int, Tensor] | None:
            there, trained = of_chunk(), of_parameter()
            return None if there is None or trained is None else (there, position, trained)

        stand_in.place = place
        return stand_in

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_EACH:
            found = [_OF_EACH[func](each, *args[1:], **kwargs) for each in args[0]]
            return found if func is FOREACH["norm"] else None
        first = args[0] if args else None
        others = [*args[1:], *kwargs.values()]
        if isinstance(first, ComputedGradient) and not any(isinstance(each, AbsentGradient) for each in others):
            if func in _ITSELF:
                return first
            if func in _READING:
                return func(first.read(), *args[1:], **kwargs)
            if func in _CHANGING:
                value = first.read()
                func(value, *args[1:], **kwargs)
                first.write(value)
                return first
        return super().__torch_function__(func, types, args, kwargs)

    def read(self) -> Tensor:
        """A copy of the gradient on the parameter's device."""
        gradient, position, device = self._found()
        return gradient.read(position).to(device)

    def write(self, value: Tensor) -> None:
        """Replace the gradient."""
        gradient, position, _ = self._found()
        gradient.write(position, value)

    def _found(self) -> tuple[Gradient, int, torch.device]:
        """The chunk's gradients, which of them it is, and where the parameter is."""
        if (place := self.place()) is not None:
            chunk, position, parameter = place
            chunk.settle()
            with QUIET():
                is_shown, device = parameter.grad is self, parameter.device
            if is_shown and chunk.gradient is not None and position in chunk.gradient.present:
                return chunk.gradient, position, device
        raise RuntimeError(
            "this gradient has been forgotten: it was in p.grad, where it stood for one in a chunk, and it is there no "
            "more. Clone a gradient that is to outlive zero_grad()"
        )


def renewed(stand_in: AbsentGradient) -> AbsentGradient:
    """A stand-in for the next gradient, which those who hold this one do not find."""
    if not isinstance(stand_in, ComputedGradient) or (place := stand_in.place()) is None:
        return stand_in
    return ComputedGradient.at(*place, stand_in.reason)
