"""The state of modules beside their parameters: buffers and attributes, as they were when a forward began.

A forward may count its calls, update running statistics, keep its last output, append to a list. When it runs again it
must find what it found then, and leave no trace: the modules' own dicts are exchanged for that time, so that it changes
copies. Running statistics are updated once, as without any recomputation.

That goes for values, tensors, generators of torch, and for lists, dicts, sets and deques of these. What is deeper in
attributes is noted, and must be the same after the forward (see `held_state`); should the program change it before
backward it is put back for the time of the second forward.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from ..torch_private import own_buffers, own_modules, own_parameters, storage_key, version_of, without_torch_function
from .held_state import HeldState, has_same_bits, is_small

_INTERNALS = frozenset((*vars(nn.Module()), "_gemini")) - {"training"}
"""Attributes that no forward changes by itself."""
_COPIED = (list, dict, set, deque, torch.Generator)
"""Kinds of attributes that are exchanged for a copy while a forward runs again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module has a tensor: one of its attributes or buffers."""

    module: ref[nn.Module]
    attribute: str

    @property
    def name(self) -> str:
        return f"{type(self.module()).__name__}.{self.attribute}"


class _Held(NamedTuple):
    """One attribute or buffer."""

    name: str
    value: Any
    is_changing: bool
    """The forward changes it in place."""


class ModuleState:
    """What some modules hold at this moment.

    Parameters
    ----------
    modules
        Those of one unit.
    changing
        Where they have tensors that the forward is known to change in place: their values are copied.
    """

    def __init__(self, modules: Iterable[nn.Module], changing: Collection[Place] = ()) -> None:
        self._versions: list[tuple[Place, Tensor, int]] = []
        self._values: list[tuple[Place, Tensor, Tensor]] = []
        """Small tensors with their values, until the forward is over: not every change raises a version."""
        self._changing: list[Tensor] = []
        self._parts: dict[str, int] = {}
        """Parameters, modules and methods at the end of the forward."""
        self._held: list[tuple[ref[nn.Module], list[_Held], list[_Held]]] = []
        modules = list(modules)
        self._deep = HeldState(modules)
        self._note_deep(modules)
        for module in modules:
            attributes = [self._noted(module, *item, changing) for item in _state(vars(module)).items()]
            is_changing = getattr(module, "track_running_stats", False) is True  # by an operation that does not say so
            buffers = [self._noted(module, *item, changing, is_changing) for item in own_buffers(module).items()]
            self._held.append((ref(module), attributes, buffers))
            for name, parameter in own_parameters(module).items():
                if parameter is not None:
                    self._watch(Place(ref(module), name), parameter)

    def _note_deep(self, modules: Iterable[nn.Module]) -> None:
        """Note what a copy of an attribute would share with it, and what two attributes share."""
        met: set[int] = set()
        for module in modules:
            for attribute, value in vars(module).items():
                if attribute in _INTERNALS or isinstance(value, torch.Tensor):
                    continue
                name = f"{type(module).__name__}.{attribute}"
                if type(value) not in _COPIED or id(value) in met:
                    self._deep.note(name, value)
                    continue
                met.add(id(value))
                if not isinstance(value, torch.Generator):
                    for each in tuple(value.values() if isinstance(value, dict) else value):
                        self._deep.note(name, each)

    def changed_deep(self) -> str:
        """What is not as it was and cannot be had back, in words; empty if there is nothing."""
        with without_torch_function():
            return self._deep.changed()

    def _noted(
        self, module: nn.Module, name: str, value: Any, changing: Collection[Place], is_changing: bool = False
    ) -> "_Held":
        if isinstance(value, torch.Tensor):
            place = Place(ref(module), name)
            is_changing = is_changing or place in changing
            if is_changing:
                self._changing.append(value.detach())
            elif not value.is_inference():
                watched = value if value.grad_fn is None else value.detach()  # without its graph
                self._watch(place, watched)
                if is_small(watched):
                    self._values.append((place, watched, watched.detach().clone()))
        return _Held(name, _copy(value, is_changing), is_changing)

    def _watch(self, place: Place, tensor: Tensor) -> None:
        with without_torch_function():  # parameters may be away
            self._versions.append((place, tensor, version_of(tensor)))

    def changed_in_place(self) -> list[Place]:
        """Tensors whose values of then are lost: they were changed in place since."""
        with without_torch_function():
            places = [place for place, tensor, version in self._versions if version_of(tensor) != version]
            places += [place for place, tensor, values in self._values if not has_same_bits(tensor, values)]
            return list(dict.fromkeys(places))

    def share_memory(self, places: Collection[Place]) -> bool:
        """True if two of these tensors, or of those that change anyway, are one: copies of them would be two."""
        tensors = self._changing + list(
            {place: tensor for place, tensor, _ in self._versions if place in places}.values()
        )
        with without_torch_function():
            keys = [storage_key(tensor.untyped_storage()) for tensor in tensors if tensor.layout is torch.strided]
        return len(set(keys)) < len(keys)

    def settle(self) -> None:
        """The forward is over: let values go that are not needed to run it again, and note what must be as it is."""
        self._values.clear()
        self._parts = self._parts_now()

    def replaced(self) -> list[str]:
        """Parameters, modules and methods that are other objects than at the end of the forward, by name."""
        now = self._parts_now()
        return [name for name in dict.fromkeys((*self._parts, *now)) if self._parts.get(name) != now.get(name)]

    def _parts_now(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for number, (reference, *_) in enumerate(self._held):
            module = reference()
            if module is None:
                continue
            methods = {name: each for name, each in vars(module).items() if name not in _INTERNALS and callable(each)}
            for name, each in (own_parameters(module) | own_modules(module) | methods).items():
                found[f"{type(module).__name__}.{name} (module {number})"] = id(each)
        return found

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Have the modules hold this state, in copies, and after it what they hold now."""
        before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for reference, *held in self._held:
                module = reference()
                assert module is not None
                for where, noted in zip((vars(module), own_buffers(module)), held, strict=True):
                    before.append((where, _state(where)))
                    _replace(where, {each.name: _copy(each.value, each.is_changing) for each in noted})
            with self._deep.restored():
                yield
        finally:
            for where, values in before:
                _replace(where, values)


def _state(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a module's dict that is its user's; methods and the like are no state, and refer to the module."""
    return {name: value for name, value in values.items() if name not in _INTERNALS and not callable(value)}


def _replace(where: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Have the user's part of a module's dict be ``values``."""
    for name in _state(where).keys() - values.keys():
        del where[name]
    where.update(values)


def _copy(value: Any, is_changing: bool) -> Any:
    """What stays as it is now, whatever the forward does to ``value``. A tensor with a graph begins one of its own."""
    if isinstance(value, torch.Tensor):
        if is_changing:
            return value.detach().clone().requires_grad_(value.requires_grad)
        return value.detach().requires_grad_() if value.grad_fn is not None else value
    if type(value) is dict:
        return {key: _copy(item, False) if isinstance(item, torch.Tensor) else item for key, item in value.items()}
    if type(value) in (list, set):
        return type(value)(_copy(item, False) if isinstance(item, torch.Tensor) else item for item in value)
    if type(value) is deque:
        return deque((_copy(v, False) if isinstance(v, torch.Tensor) else v for v in value), value.maxlen)
    if isinstance(value, torch.Generator):
        copy = torch.Generator(value.device)
        copy.set_state(value.get_state())
        return copy
    return value
