"""Tensors in what modules are given and give: nested tuples, dicts, dataclasses, objects."""

from collections import deque
from collections.abc import Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts, and in the attributes of dataclasses and objects of other classes.

    Attributes are followed to a depth of four: an output may refer to half of a program.
    """
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[Tensor] = []
    _collect(value, _DEPTH, found)
    return found


def needing_gradients(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors in the arguments of a call that need a gradient."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if not isinstance(value, torch.Tensor):
            found += [tensor for tensor in tensors_in(value) if tensor.requires_grad]
        elif value.requires_grad:
            found.append(value)
    return found


def _collect(value: Any, depth: int, found: list[Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, _COLLECTIONS):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, torch.Tensor):
                found.append(item)
            else:
                _collect(item, depth, found)
    elif depth and not isinstance(value, _WITHOUT_TENSORS):
        for name in _attributes(value):
            _collect(getattr(value, name, None), depth - 1, found)


_DEPTH = 4
_COLLECTIONS = (list, tuple, set, deque, dict)
_WITHOUT_TENSORS = (str, bytes, int, float, complex, type, nn.Module, FunctionType, MethodType, ModuleType, type(None))


def _attributes(value: Any) -> Iterable[str]:
    """Names of what the object itself holds."""
    return (*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ()))
