"""What a model holds under which name, one tensor at a time: boosted, plain, or a boosted model inside a plain one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from gemini.boosted import boosted, is_boosted
from gemini.chunk import MASTER, ChunkManager, can_write_own_part
from gemini.errors import CheckpointError
from gemini.lazy import is_lazy
from gemini.updates.values import Values

from ..formats import listed, shown
from ..tensor_parallel import is_sharded
from ..torch_private import COMPILED_PREFIX, compiled_in, metadata_of, own_parameters, persistent_buffers
from .flat_values import FlatValues, TensorValues
from .tensor_parallel import cut, gathered, whole_numel, whole_shape

EXTRA_STATE = "_extra_state"
_wants_objects: ContextVar[bool] = ContextVar("gemini_memory_wants_objects", default=False)
"""Tells our hooks, which the user's ``state_dict`` calls, who has called it; nothing can be handed through it."""


class InChunk(NamedTuple):
    """Values of one parameter in a chunk: its masters, or a state."""

    manager: ChunkManager
    parameter: Tensor
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One distinct parameter or persistent buffer."""

    names: tuple[str, ...]
    """In the order of ``state_dict()``; more than one where it is tied."""
    tensor: Tensor
    """The object in the model. A managed parameter may read as NaN: use `read`."""
    values: Values | None
    """Who holds the values; None: the object itself."""
    rounded_to: torch.dtype | None = None
    """What it is saved in if it is floating-point; None: the dtype of the values."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return whole_shape(self.tensor)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored value: fp32 where there is a master."""
        if self.values is None:
            return self.tensor.dtype
        place = self.values.manager.find(self.tensor)
        assert place is not None
        return place[0].plan.codec.dtype

    @property
    def saved_dtype(self) -> torch.dtype:
        """Of the value in a file."""
        return self.rounded_to if self.rounded_to is not None and self.dtype.is_floating_point else self.dtype

    @property
    def numel(self) -> int:
        return whole_numel(self.tensor)

    @property
    def nbytes(self) -> int:
        return self.numel * self.saved_dtype.itemsize

    @property
    def in_chunks(self) -> tuple[InChunk, ...]:
        """What of chunks is read."""
        return () if self.values is None else (InChunk(self.values.manager, self.tensor, MASTER),)

    def read(self) -> Tensor:
        """A copy of the value, on CPU. Of a sharded tensor all ranks of its group read at once."""
        if self.values is None:
            return self.tensor.detach().to("cpu", copy=True)
        return gathered(self.name, self.tensor, self.values.read(self.tensor, MASTER))

    def open(self) -> FlatValues | None:
        """The values where they are, for reading in parts; None where only `read` can have them."""
        if self.values is None:
            return TensorValues(self.tensor) if _is_flat(self.tensor) else None
        return None if is_sharded(self.tensor) else self.values.open(self.tensor, MASTER)

    def open_to_replace(self) -> FlatValues | None:
        """The values where they are, all of which are going to be replaced; None where only `write` can do that.

        `replaced` has to be called afterwards.
        """
        if self.values is None:
            return TensorValues(self.tensor) if _is_flat(self.tensor) else None
        return None if is_sharded(self.tensor) else self.values.open_to_replace(self.tensor, MASTER)

    def replaced(self) -> None:
        """Values have been replaced by means of `open_to_replace`."""
        if self.values is None:
            increment_version(self.tensor)
        else:
            self.values.replaced(self.tensor, MASTER)

    def own_elements(self) -> range | None:
        """With several ranks, the elements that are at home here and can be replaced alone; None: only all can be."""
        if self.values is None or is_sharded(self.tensor):
            return None
        found = self.values.manager.find(self.tensor)
        assert found is not None
        chunk, position = found
        place = chunk.place(position, MASTER)
        is_in_rows = place.stride == torch.empty(place.shape, device="meta").stride()
        is_plain = chunk.is_shared and place.shape == self.shape and is_in_rows
        return place.own if is_plain and can_write_own_part(self.values.manager, self.tensor) else None

    def write_own(self, values: Tensor) -> None:
        """Replace the elements that are at home here (flat, any dtype)."""
        assert self.values is not None
        self.values.write_own(self.tensor, MASTER, values)

    def write(self, value: Tensor) -> None:
        """Replace the value; ``value`` has its shape and any dtype."""
        if self.values is None:
            with torch.no_grad():
                self.tensor.copy_(value)
        else:
            self.values.write(self.tensor, MASTER, cut(self.tensor, value))


def entries(model: nn.Module) -> tuple[Entry, ...]:
    """Every distinct parameter and persistent buffer, in the order of ``state_dict()``. Reads no values.

    Names are those that it has there, without what ``torch.compile`` puts into them.

    Raises
    ------
    CheckpointError
        If a ``state_dict`` hook puts a tensor of its own there, which could be neither read nor written through the
        chunks.
    ValueError
        If the model has no values yet.
    """
    known = {id(t) for t in (*_all_parameters(model), *model.buffers())}
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for name, value in named_objects(model).items():
        if not isinstance(value, Tensor) or is_extra_state(name):
            continue
        if is_lazy(value) or value.is_meta:
            raise ValueError(
                f"{name} has no value yet: booster.boost the model first, or make it real with "
                "LazyInitContext.materialize(model)"
            )
        if id(value) not in known:
            raise CheckpointError(f"{name} is made by a state_dict hook of the model and has no place in it")
        _add(names, id(value), plain_name(name))
        found[id(value)] = value
    return _entries(model, names, found)


def left_out(model: nn.Module) -> tuple[Entry, ...]:
    """Parameters and persistent buffers that ``state_dict()`` gives under no name, because a hook or an override of it
    leaves them out. ``load_state_dict`` of torch wants them all the same."""
    given = {id(value) for value in named_objects(model).values()}
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for name, value in {**own_parameters(module), **persistent_buffers(module)}.items():
            if value is not None and id(value) not in given:
                _add(names, id(value), plain_name(f"{path}.{name}" if path else name))
                found[id(value)] = value
    return _entries(model, names, found)


def refuse_left_out(model: nn.Module) -> None:
    """Refuse to save what is to be resumed if ``state_dict()`` does not give all of it.

    Raises
    ------
    CheckpointError
        If it leaves something out.
    """
    if names := [entry.name for entry in left_out(model)]:
        raise CheckpointError(
            f"booster.save resumes bit for bit, for which state_dict() of {type(model).__name__} has to give every "
            f"parameter and persistent buffer; a state_dict hook or override leaves out ({len(names)}): "
            f"{listed(names)}. Keep them there, register buffers with persistent=False, or write what state_dict() "
            "gives with booster.save_model and the rest yourself"
        )


def _add(names: dict[int, list[str]], key: int, name: str) -> None:
    if name not in names.setdefault(key, []):
        names[key].append(name)


def _entries(model: nn.Module, names: Mapping[int, Sequence[str]], tensors: Mapping[int, Tensor]) -> tuple[Entry, ...]:
    values = [boosted(module).values for module in model.modules() if is_boosted(module)]
    return tuple(
        Entry(tuple(names[key]), tensor, next((v for v in values if v.manager.find(tensor) is not None), None))
        for key, tensor in tensors.items()
    )


def extra_states(model: nn.Module) -> dict[str, Any]:
    """What modules with ``get_extra_state`` want to be saved, by name."""
    return {plain_name(name): value for name, value in named_objects(model).items() if is_extra_state(name)}


def extra_state_owner(model: nn.Module, name: str) -> nn.Module:
    """The module that has an extra state of `extra_states`."""
    path = name.removesuffix(EXTRA_STATE)
    return next(
        (m for p, m in model.named_modules() if plain_name(f"{p}." if p else "") == path and compiled_in(m) is m), model
    )


def plain_metadata(model: nn.Module) -> dict[str, Any]:
    """What ``state_dict()`` says of modules, under the names that files have for them."""
    metadata = metadata_of(named_objects(model)) or {}
    return {plain_name(f"{path}.").removesuffix("."): each for path, each in metadata.items()}


def plain_name(name: str) -> str:
    """A name without what ``torch.compile`` puts into it: files have the names of the model that is not compiled."""
    return name.replace(COMPILED_PREFIX, "")


def under_plain_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored, by `plain_name`.

    Raises
    ------
    CheckpointError
        If two values would have one name.
    """
    named: dict[str, Any] = {}
    for name, value in stored.items():
        if (plain := plain_name(name)) in named:
            raise CheckpointError(
                f"{shown(plain)} is stored with and without {COMPILED_PREFIX!r} in its name; take one of the two out"
            )
        named[plain] = value
    return named


def is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == EXTRA_STATE


def named_objects(model: nn.Module) -> Mapping[str, Any]:
    """``model.state_dict()`` with the model's own parameter and buffer objects in it: names, order and ties, no values.

    Asking the model itself keeps what its hooks do to names (an activation checkpoint wrapper strips its prefix).
    """
    with _objects_wanted():
        return model.state_dict(keep_vars=True)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and persistent buffer as a full tensor on CPU, one at a time.

    Nothing holds the whole model. The tensors are copies: training on does not change them.

    Parameters
    ----------
    model
        Boosted or plain.

    Yields
    ------
    tuple of str and Tensor
        In the order of ``model.state_dict()``, each tensor once, tied ones under their first name. Parameters that
        train are fp32 masters; frozen ones have the dtype they are kept in.
    """
    for entry in entries(model):
        yield entry.name, entry.read()


def full_state_dict(
    model: nn.Module,
    plain_state_dict: Callable[..., dict[str, Any]],
    *args: Any,
    destination: dict[str, Any] | None = None,
    prefix: str = "",
    keep_vars: bool = False,
) -> dict[str, Any]:
    """``state_dict`` of a boosted model, with the values gathered from the chunks.

    ``plain_state_dict`` is the one of the user's class; the rest is what ``nn.Module.state_dict`` takes. The values are
    copies; names of one tied tensor share one object. With ``keep_vars`` they are the parameters themselves.
    """
    if args:  # torch still takes them by position
        destination, prefix = (*args, prefix)[:2]
    if are_objects_wanted():
        return plain_state_dict(destination=destination, prefix=prefix, keep_vars=True)
    with _objects_wanted():
        gathered = plain_state_dict(prefix=prefix, keep_vars=True)
    if not keep_vars:
        _read_values(model, gathered)
    if destination is None:
        return gathered
    destination.update(gathered)
    if (metadata := metadata_of(destination)) is not None:
        metadata.update(metadata_of(gathered) or {})
    return destination


def _read_values(model: nn.Module, gathered: dict[str, Any]) -> None:
    """Put copies in place of the model's own objects."""
    held = {id(entry.tensor): entry for entry in entries(model)}
    values: dict[int, Tensor] = {}
    for name, value in gathered.items():
        if id(value) in held:
            if id(value) not in values:
                values[id(value)] = held[id(value)].read()
            gathered[name] = values[id(value)]


def _is_flat(tensor: Tensor) -> bool:
    """True if the memory of a tensor has its elements in their order."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
    return is_plain and tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg()


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    # Not model.parameters(): on a boosted model that waits for updates, and here no value is read.
    for module in model.modules():
        yield from (p for p in own_parameters(module).values() if p is not None)


def are_objects_wanted() -> bool:
    """True while `named_objects` asks: ``state_dict`` is to hold the model's own objects."""
    return _wants_objects.get()


@contextmanager
def _objects_wanted() -> Iterator[None]:
    token = _wants_objects.set(True)
    try:
        yield
    finally:
        _wants_objects.reset(token)
