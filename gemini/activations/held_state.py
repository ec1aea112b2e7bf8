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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import PurePath
from re import Pattern
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from ..torch_private import own_buffers, own_modules, own_parameters, version_of

SMALL_BYTES = 1 << 20
"""Up to this size the values of a tensor are copied: changes through ``.data`` leave no other trace."""
_MOST_VALUES = 20_000
_CONTAINERS: dict[type, Callable[[Any], Any]] = {
    list: list, dict: dict, OrderedDict: dict, defaultdict: dict, set: set, deque: list,
}  # fmt: skip
_STEADY = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, slice, range, type, PurePath, Pattern, frozenset),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, ReferenceType, ModuleType, logging.Logger),
    *(FunctionType, BuiltinFunctionType, BuiltinMethodType),
)
"""Kinds that a forward cannot change, or that are not its own."""
_INTERNALS = frozenset((*vars(nn.Module()), "_gemini")) - {"training"}
_MADE_BY_PYTHON = 1 << 9
"""The bit of a class that was made by a ``class`` statement."""


def is_small(tensor: Tensor) -> bool:
    """True if a tensor's values are copied, so that a change is seen which raises no version."""
    is_dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    return is_dense and not tensor.is_meta and tensor.nbytes <= SMALL_BYTES


class HeldState:
    """Values as they are when they are noted.

    Parameters
    ----------
    known
        Modules that are noted for themselves. Others, as in a plain list, are noted where they are found.
    """

    def __init__(self, known: Iterable[nn.Module] = ()) -> None:
        self._known = frozenset(map(id, known))
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Callable[[Any], Any], Any]] = []
        """Of random numbers, with what sets their states, and these."""
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
            if isinstance(each, _STEADY) or id(each) in self._seen or id(each) in self._known:
                continue
            self._seen.add(id(each))
            if len(self._seen) > _MOST_VALUES:
                self._unknown = f"attribute {name} of a module holds more than {_MOST_VALUES} values"
            elif isinstance(each, nn.Module):
                self._note_module(each, left)
            elif isinstance(each, tuple):
                left.extend(each)
            elif isinstance(each, MethodType):
                left.append(each.__self__)
            elif isinstance(each, partial):
                left += (each.func, each.args, each.keywords)
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
        if tensor.grad_fn is not None:
            tensor = tensor.detach()  # not to keep its graph
        self._versions.append((tensor, version_of(tensor)))
        if tensor.device.type == "cpu" and is_small(tensor):
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

    def changed(self) -> str:
        """What is not as it was any more, or may not be, in words; empty if all is.

        Containers and objects must hold the same objects, but numbers and strings may be others that are equal.
        """
        if obstacle := self.obstacle():
            return obstacle
        for container, content in self._containers:
            if not _is_alike(container, content):
                return "it has changed a container or an object that its modules hold in attributes"
        for generator, _, state in self._generators:
            if not _is_equal(_state_of(generator), state):
                return "it has drawn from a generator that its modules hold in attributes"
        return ""

    def restore(self) -> None:
        """Have all be as it was. There must be no `obstacle`."""
        for container, content in self._containers:
            container.clear()
            container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
        for _, set_state, state in self._generators:
            set_state(state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Have all be as it was, and after it as it is now."""
        present = HeldState()
        present._containers = [(container, type(content)(container)) for container, content in self._containers]
        present._generators = [(each, set_state, _state_of(each)) for each, set_state, _ in self._generators]
        self.restore()
        try:
            yield
        finally:
            present.restore()

    def _note_leaf(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            self.note_tensor(value)
        elif (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
            self._copies.append((value, value.copy()))
        else:
            return numpy is not None and isinstance(value, numpy.generic)
        return True

    def _note_generator(self, value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        set_state: Callable[[Any], Any]
        if isinstance(value, torch.Generator):
            set_state = value.set_state
        elif isinstance(value, random.Random):
            set_state = value.setstate
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            set_state = partial(setattr, value.bit_generator, "state")
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            set_state = value.set_state
        else:
            return False
        self._generators.append((value, set_state, _state_of(value)))
        return True

    def _note_module(self, module: nn.Module, left: list[Any]) -> None:
        if not self._known.isdisjoint(map(id, module.modules())):
            return  # one that these are a part of
        held = vars(module)
        self._containers.append((held, dict(held)))
        left += (value for name, value in held.items() if name not in _INTERNALS)
        left += (own_parameters(module), own_buffers(module), own_modules(module))

    def _note_object(self, name: str, value: Any, left: list[Any]) -> None:
        held = getattr(value, "__dict__", None)
        if type(held) is not dict or not _is_told_by_its_dict(type(value)):
            self._unknown = f"attribute {name} of a module holds a {type(value).__name__}, which it may have changed"
            return
        content = dict(held)
        self._containers.append((held, content))
        left.extend(content.values())


def _is_same(value: Any, then: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return has_same_bits(value, then)
    return bool(value.shape == then.shape and value.tobytes() == then.tobytes())


def has_same_bits(one: Tensor, other: Tensor) -> bool:
    """True if two dense tensors are alike in shape, dtype and every bit."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(_bytes_of(one), _bytes_of(other))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)


def _is_told_by_its_dict(kind: type) -> bool:
    """True if objects of a class have no state but their ``__dict__``: not what C code or slots hold."""
    own = [base for base in kind.__mro__ if base not in (object, SimpleNamespace)]
    return all(base.__flags__ & _MADE_BY_PYTHON and not base.__dict__.get("__slots__") for base in own)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = getattr(generator, "bit_generator", None)
    return generator.get_state() if bits is None else bits.state


def _is_alike(container: Any, content: Any) -> bool:
    """True if a container holds what it held; the same objects, or equal ones of a simple kind."""
    if len(container) != len(content):
        return False
    if isinstance(content, dict):
        return all(a is b for a, b in zip(container, content, strict=True)) and all(
            map(_is_one, container.values(), content.values())
        )
    if isinstance(content, set):
        return {id(each) for each in container} == {id(each) for each in content}
    return all(map(_is_one, container, content))


def _is_one(value: Any, then: Any) -> bool:
    return value is then or (
        type(value) is type(then) and isinstance(then, (bool, int, float, complex, str, bytes)) and value == then
    )


def _is_equal(state: Any, then: Any) -> bool:
    """True if two states of a generator are equal."""
    if isinstance(then, dict):
        return all(_is_equal(state[name], value) for name, value in then.items())
    if isinstance(then, tuple):
        return all(map(_is_equal, state, then))
    if isinstance(then, torch.Tensor):
        return torch.equal(state, then)
    return bool(state.tobytes() == then.tobytes()) if hasattr(then, "tobytes") else bool(state == then)
