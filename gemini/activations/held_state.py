"""What user's modules hold in attributes, as it was: values, containers, objects, and sources of random numbers.

=========================================  ===========================================================================
what                                       how
=========================================  ===========================================================================
lists, dicts, sets, deques, objects        what is in them, put back; whatever is in these in turn, likewise
generators of torch, NumPy and `random`    their state, put back
tensors, NumPy arrays                      not copied if large; one that has changed cannot be put back
anything else that may have a state        an iterator, a file: nobody can tell whether it has changed
=========================================  ===========================================================================
"""

import logging
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import PurePath
from re import Pattern
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from ..torch_private import version_of

SMALL_BYTES = 1 << 20
"""Up to this size the values of a tensor are copied: changes through ``.data`` leave no other trace."""
_MOST_VALUES = 20_000
_CONTAINERS: dict[type, Callable[[Any], Any]] = {
    list: list, dict: dict, OrderedDict: dict, defaultdict: dict, set: set, deque: list,
}  # fmt: skip
_STEADY = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, slice, range, type, PurePath, Pattern, frozenset),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, ReferenceType, ModuleType, logging.Logger),
    *(FunctionType, BuiltinFunctionType, BuiltinMethodType, MethodType, partial),
)
"""Kinds that a forward cannot change, or that are not its own."""


class HeldState:
    """Values as they are when they are noted."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Callable[[Any], Any], Any]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._copies: list[tuple[Any, Any]] = []
        """Small tensors and arrays, with their values."""
        self._unknown = ""
        """What may have a state that cannot be noted, in words."""

    def note(self, name: str, value: Any) -> None:
        """Note what an attribute holds."""
        left = [value]
        while left and not self._unknown:
            each = left.pop()
            if isinstance(each, _STEADY) or isinstance(each, nn.Module) or id(each) in self._seen:
                continue  # modules that are a part of the model are noted for themselves
            self._seen.add(id(each))
            if len(self._seen) > _MOST_VALUES:
                self._unknown = f"attribute {name} of a module holds more than {_MOST_VALUES} values"
            elif isinstance(each, tuple):
                left.extend(each)
            elif (copied := _CONTAINERS.get(type(each))) is not None:
                content = copied(each)
                self._containers.append((each, content))
                left.extend(content.values() if isinstance(content, dict) else content)
            elif not self._note_leaf(each) and not self._note_generator(each):
                self._note_object(name, each, left)

    def note_tensor(self, tensor: Tensor) -> None:
        """Note a tensor: its version, and the values of a small one."""
        if tensor.is_inference():
            return
        self._versions.append((tensor, version_of(tensor)))
        is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if is_plain and tensor.device.type == "cpu" and tensor.nbytes <= SMALL_BYTES:
            self._copies.append((tensor, tensor.detach().clone()))

    def obstacle(self) -> str:
        """Why not all can be as it was, in words; empty if it can."""
        if self._unknown:
            return self._unknown
        if any(version_of(tensor) != version for tensor, version in self._versions):
            return "it has changed a tensor of the model in place"
        if not all(_is_same(value, then) for value, then in self._copies):
            return "it has changed a tensor or an array of the model in place"
        return ""

    def restore(self) -> None:
        """Have all be as it was. There must be no `obstacle`."""
        for container, content in self._containers:
            container.clear()
            container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
        for set_state, state in self._generators:
            set_state(state)

    def _note_leaf(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            self.note_tensor(value)
        elif (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
            self._copies.append((value, value.copy()))
        else:
            return False
        return True

    def _note_generator(self, value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        if isinstance(value, torch.Generator):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._generators.append((value.setstate, value.getstate()))
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            self._generators.append((partial(setattr, value.bit_generator, "state"), value.bit_generator.state))
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            self._generators.append((value.set_state, value.get_state()))
        else:
            return False
        return True

    def _note_object(self, name: str, value: Any, left: list[Any]) -> None:
        held = getattr(value, "__dict__", None)
        if type(held) is not dict:
            self._unknown = f"attribute {name} of a module holds a {type(value).__name__}, which it may have changed"
            return
        content = dict(held)
        self._containers.append((held, content))
        left.extend(content.values())


def _is_same(value: Any, then: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.shape == then.shape and torch.equal(value.detach().view(torch.uint8), then.view(torch.uint8))
    return bool(value.shape == then.shape and value.tobytes() == then.tobytes())
