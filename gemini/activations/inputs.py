"""The inputs of a forward, kept so that it can run again with the same ones."""

from collections.abc import Callable, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..torch_private import tree_flatten, tree_unflatten, version_of

_UNCHANGING = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, slice, range, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, FunctionType, BuiltinFunctionType),
)
"""Kinds of inputs that a forward cannot change."""


class Packed(Protocol):
    """A tensor that is kept somewhere."""

    def unpack(self) -> Tensor:
        """The tensor."""


Pack = Callable[[Tensor], Packed]


class Kept:
    """A copy of one input. What refers to it keeps it."""

    __slots__ = ("__weakref__", "packed")

    def __init__(self, packed: Packed) -> None:
        self.packed = packed


class InputCopies:
    """Copies of inputs, one for all units that get the same tensor: a mask, or what an encoder has made.

    They are copies because plain PyTorch lets a program change a tensor in place that no operation has saved.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor, pack: Pack) -> Kept:
        """The copy of a tensor as it is now; ``pack`` keeps it if it is a new one."""
        version = version_of(tensor)
        known_version, known = self._known.get(tensor, (None, None))
        kept: Kept | None = known() if known is not None and known_version == version else None
        if kept is None:
            kept = Kept(pack(_copy(tensor)))
            self._known[tensor] = (version, ref(kept))
        return kept


class Inputs:
    """The arguments of one call of a module.

    Parameters
    ----------
    args, kwargs
        As the module was called.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._form = tree_flatten((args, kwargs))
        self._versions = [_version(leaf) for leaf in self._leaves]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among them."""
        return [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]

    def opaque(self) -> str | None:
        """The class of an argument that the forward may change without a trace; None if there is none."""
        for leaf in self._leaves:
            if isinstance(leaf, MethodType):
                if not isinstance(leaf.__self__, (type, nn.Module)):
                    return f"method of a {type(leaf.__self__).__name__}"
            elif not isinstance(leaf, (torch.Tensor, *_UNCHANGING)):
                return type(leaf).__name__
            elif isinstance(leaf, BuiltinFunctionType) and not isinstance(leaf.__self__, (ModuleType, type(None))):
                return f"method of a {type(leaf.__self__).__name__}"
        return None

    def are_changed(self) -> bool:
        """True if one of the tensors was changed in place since."""
        return any(_version(leaf) != version for leaf, version in zip(self._leaves, self._versions, strict=True))

    def is_alike(self, other: "Inputs") -> bool:
        """True if both consist of the same tensors and values."""
        pairs = zip(self._leaves, other._leaves, strict=False)
        return bool(self._form == other._form) and all(one is another for one, another in pairs)

    def keep(self, copies: InputCopies, pack: Pack) -> "KeptInputs":
        """Copies of them, from which the call can be made again."""
        leaves = [
            (copies.of(leaf, pack), leaf.requires_grad) if _is_copied(leaf) else (leaf, False) for leaf in self._leaves
        ]
        return KeptInputs(leaves, self._form)


class KeptInputs:
    """What `Inputs.keep` returns."""

    def __init__(self, leaves: Sequence[tuple[Any, bool]], form: Any) -> None:
        self._leaves = leaves
        self._form = form

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Args and kwargs as they were; what needed a gradient begins a graph of its own."""
        leaves = [
            leaf.packed.unpack().detach().requires_grad_(requires_grad) if isinstance(leaf, Kept) else leaf
            for leaf, requires_grad in self._leaves
        ]
        args, kwargs = tree_unflatten(leaves, self._form)
        return args, kwargs


def _is_copied(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter)


def _version(leaf: Any) -> int | None:
    return version_of(leaf) if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else None


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, also where elements share memory or leave some out: kernels are chosen by them."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or not tensor.numel():
        return tensor.detach().clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((span,), (1,), tensor.storage_offset())
    return flat.clone().as_strided(tensor.shape, tensor.stride(), 0)
