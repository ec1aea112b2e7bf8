"""Guards in the parts of a boosted model: ``model.head.double()`` is refused, what changes nothing is let through.

All of ``.to()``, ``.half()``, ``.cuda()``, ``.to_empty()``, ``.share_memory()`` come to ``nn.Module._apply``, which
would point parameters at other memory behind the chunks' back. The model itself has a class of ours (`mixing`); a part
keeps its own, which libraries compare (``type(m) is nn.Linear``), and gets the guard as an attribute of the object.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..chunk import ChunkManager
from ..torch_private import APPLY, version_of

Convert = Callable[[Tensor], Tensor]
"""What ``nn.Module._apply`` gets: from a tensor to what takes its place."""


class PartGuard:
    """Takes the place of ``_apply`` in one module below a boosted model.

    Parameters
    ----------
    module, name
        The part, and where it is in the model.
    manager
        Of the model.
    """

    def __init__(self, module: nn.Module, name: str, manager: ChunkManager) -> None:
        # Weak: the guard lies in the module, and a cycle would keep a dropped model until the next collection.
        self._module = weakref.ref(module)
        self._name = name
        self._manager = weakref.ref(manager)

    def __call__(self, fn: Convert, recurse: bool = True) -> nn.Module:
        module, manager = self._module(), self._manager()
        assert module is not None, "a module's attribute was called without the module"
        if manager is None or not any(manager.find(p) is not None for p in module.parameters(recurse)):
            converted: nn.Module = getattr(type(module), APPLY)(module, fn, recurse)  # nothing of it is in chunks
            return converted
        refuse_conversion(module, fn, recurse, f"{self._name}, a part of a boosted model,")
        return module

    def __reduce__(self) -> Any:
        """A copy of the module, deep or pickled, has its class's own ``_apply``."""
        return getattr, (self._module(), APPLY)


def guard_parts(model: nn.Module, manager: ChunkManager) -> None:
    """Put a guard into each module below the model."""
    for name, module in model.named_modules():
        if module is not model:
            module.__dict__[APPLY] = PartGuard(module, name, manager)


def unguard_parts(model: nn.Module) -> None:
    """Take the guards out again."""
    for module in model.modules():
        if is_part(module):
            del module.__dict__[APPLY]


def is_part(module: nn.Module) -> bool:
    """True for a module below a model that has been boosted."""
    return isinstance(vars(module).get(APPLY), PartGuard)


def refuse_conversion(module: nn.Module, fn: Convert, recurse: bool, what: str) -> None:
    """Raise if ``fn`` would change a parameter or a buffer of the module.

    Raises
    ------
    RuntimeError
        Nothing has been changed. Also what ``fn`` itself raises.
    """
    for name, tensor in _each_kind(module, recurse):
        if _changes(fn, tensor):
            raise RuntimeError(
                f"{what} cannot be moved or converted with .to(), .cuda(), .half() and the like, which would change "
                f"{name} ({tensor.dtype} on {tensor.device}): its chunks decide where parameters are. Convert before "
                "booster.boost, or choose GeminiPlugin(precision=...); for other values assign to p.data, and for a "
                "converted copy load model.state_dict() into a second model. In accelerate, use "
                "gemini.integrations.accelerator.ManagedAccelerator, or prepare it with device_placement=[False, ...]"
            )


def _each_kind(module: nn.Module, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    """One tensor of each dtype, device and layout of dimensions: ``fn`` sees no other difference."""
    seen = set()
    # The class's own: the boosted model's brings values.
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        for name, tensor in tensors(module, recurse=recurse):
            kind = (tensor.dtype, tensor.device, _order(tensor))
            if kind not in seen:
                seen.add(kind)
                yield name, tensor


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions, from the slowest in memory to the fastest (channels_last or not)."""
    stride = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-stride[dim], dim)))


def _changes(fn: Convert, tensor: Tensor) -> bool:
    """Whether ``fn`` gives back anything but what it was given, tried on a small tensor of the same kind."""
    order = _order(tensor)
    small = torch.zeros((2,) * tensor.dim(), dtype=tensor.dtype, device=tensor.device)
    small = small.permute(tuple(order.index(dim) for dim in range(len(order))))
    before = (version_of(small), small.data_ptr(), small.is_shared())
    with torch.no_grad():
        result = fn(small)
    return result is not small or before != (version_of(small), small.data_ptr(), small.is_shared())
