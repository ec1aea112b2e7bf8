"""A tensor that stands in ``p.grad`` for a gradient that cannot be there."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..chunk import QUIET

_METADATA: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "requires_grad", "ndim")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_sparse", "is_leaf", "grad_fn")),
        *(getattr(Tensor, name) for name in ("size", "numel", "dim", "stride", "is_floating_point", "is_complex")),
        *(getattr(Tensor, name) for name in ("element_size", "__len__", "__hash__")),
    }
)

CLIP = (
    "Clip with optimizer.clip_grad_by_norm(max_norm) or GeminiPlugin(max_norm=...), which see all gradients; forget "
    "them with optimizer.zero_grad()"
)
BOOST_WITHOUT = "To clip, scale or look at gradients boost without it"
"""The remedy where gradients are used up within backward."""


class AbsentGradient(Tensor):
    """Stands for a gradient that is not in ``p.grad``: has its shape, dtype and device, and refuses to be read."""

    reason: str
    remedy: str

    @classmethod
    def of(cls, parameter: Tensor, reason: str, remedy: str = CLIP) -> "AbsentGradient":
        """A stand-in (no memory) for the gradient of ``parameter``; ``reason`` says where that is."""
        stand_in = without_memory(parameter).as_subclass(cls)
        stand_in.reason = reason
        stand_in.remedy = remedy
        return stand_in

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<a gradient that is not here: {self.reason}>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with QUIET():
                return func(*args, **(kwargs or {}))
        told = next(((a.reason, a.remedy) for a in _flat(args) if isinstance(a, AbsentGradient)), None)
        reason, remedy = told or ("it is in a chunk", CLIP)
        raise RuntimeError(f"this gradient cannot be read through p.grad: {reason}. {remedy}")


def without_memory(parameter: Tensor) -> Tensor:
    """A tensor like a parameter, without memory."""
    return torch.full((), float("nan"), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
