"""State dicts whose tensors are read when somebody looks at them, or when they are written."""

from collections import OrderedDict
from collections.abc import ItemsView, Iterator, ValuesView
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gemini.nn.optimizer.managed import ManagedOptimizer

from .contents import UnreadTensor
from .names import entries, named_objects
from .optimizer_contents import unread_state
from .safetensors_stream import TensorRecord


class UnreadDict(dict[Any, Any]):
    """A dict in which `UnreadTensor` stand for tensors: each is read when it is taken out.

    So users' hooks may delete, replace and look at what is going to be saved, as in any state dict.
    """

    def __getitem__(self, key: Any) -> Any:
        return read_all(super().__getitem__(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def pop(self, key: Any, *default: Any) -> Any:
        return read_all(super().pop(key, *default))

    def popitem(self) -> tuple[Any, Any]:
        key, value = super().popitem()
        return key, read_all(value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        return read_all(super().setdefault(key, default))

    def values(self) -> ValuesView[Any]:  # type: ignore[override]  # dict's own views cannot be made
        return ValuesView(self)

    def items(self) -> ItemsView[Any, Any]:  # type: ignore[override]
        return ItemsView(self)

    def copy(self) -> "UnreadDict":
        return UnreadDict(self.stored())

    def stored(self) -> Iterator[tuple[Any, Any]]:
        """What is in it, unread."""
        return iter(super().items())


def unread_state_dict(module: nn.Module) -> UnreadDict:
    """``module.state_dict()``, of a boosted model or of a module around one; reads nothing."""
    held = {id(entry.tensor): entry for entry in entries(module)}
    unread = {
        key: UnreadTensor(TensorRecord(entry.name, entry.dtype, entry.shape), entry.read, entry.in_chunks)
        for key, entry in held.items()
    }
    return UnreadDict({name: unread.get(id(value), value) for name, value in named_objects(module).items()})


def unread_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``; reads nothing of what is in chunks, unless hooks are to see the state dict."""
    if not isinstance(optimizer, ManagedOptimizer) or optimizer.has_state_dict_post_hooks:
        return optimizer.state_dict()
    state_dict = unread_state(optimizer)
    return {**state_dict, "state": UnreadDict({i: UnreadDict(s) for i, s in state_dict["state"].items()})}


def read_all(value: Any) -> Any:
    """The same value with all tensors read."""
    if isinstance(value, UnreadTensor):
        return value.read()
    if isinstance(value, UnreadDict):
        return {key: read_all(each) for key, each in value.stored()}
    if type(value) in (dict, OrderedDict):
        return type(value)((key, read_all(each)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(read_all(each) for each in value)
    return value


def as_stored(value: Any) -> Any:
    """The same value with plain dicts in the place of `UnreadDict`, and tensors unread."""
    if isinstance(value, UnreadDict):
        return {key: as_stored(each) for key, each in value.stored()}
    if type(value) in (dict, OrderedDict):
        return type(value)((key, as_stored(each)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(as_stored(each) for each in value)
    if isinstance(value, Tensor):
        return value.detach() if isinstance(value, nn.Parameter) else value
    return value
