"""Storages of a forward and backward on fake tensors, counted while they live, and those that would have left."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary, finalize, ref

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

from gemini.activations.leavers import LEAST_BYTES

from ..torch_private import TorchDispatchMode, storage_key, tree_leaves


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """These are model data: neither they nor views of them count."""
        for tensor in tensors:
            self._sizes[storage_key(tensor.untyped_storage())] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result

    def is_model_data(self, tensor: Tensor) -> bool:
        """True for what was left out, and views of it."""
        return self._sizes.get(storage_key(tensor.untyped_storage())) == 0

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self._sizes:
            return
        nbytes = storage.nbytes()
        self._sizes[key] = nbytes
        self.nbytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.nbytes -= self._sizes.pop(key, 0)


class SavedAway:
    """Saved tensors that leave at once and come back one by one, as with ``activation_policy="offload"``.

    What is on its way is no part of it.
    """

    def __init__(self, meter: StorageMeter) -> None:
        self.nbytes = 0
        self.peak_bytes = 0
        self._meter = meter
        self._rooms: WeakValueDictionary[int, _Room] = WeakValueDictionary()
        """Of storages that are alive or away, by their keys."""

    def hooks(self) -> saved_tensors_hooks:
        """On for a forward and its backward."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Away":
        storage = tensor.untyped_storage()
        if self._meter.is_model_data(tensor) or storage.nbytes() < LEAST_BYTES:
            return tensor
        key = storage_key(storage)
        room = self._rooms.get(key)
        if room is None or room.storage() is not storage:
            self._rooms[key] = room = _Room(self, storage)
        return _Away(tensor, room)

    def taken(self, nbytes: int) -> None:
        """Bytes are taken below, or given back."""
        self.nbytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)


class _Room:
    """Where one storage is while it is away; gone with the last graph that has saved it."""

    def __init__(self, away: SavedAway, storage: UntypedStorage) -> None:
        self.storage = ref(storage)
        """Dead once it is away, by which a later storage with its key is told from it."""
        self._come: WeakValueDictionary[_Form, Tensor] = WeakValueDictionary()
        nbytes = storage.nbytes()
        away.taken(nbytes)
        finalize(self, away.taken, -nbytes)

    def tensor(self, form: "_Form", like: "_Away") -> Tensor:
        """A tensor that has come back; the same one if it is still there."""
        tensor = self._come.get(form)
        if tensor is None:
            _, shape, stride = form
            tensor = self._come[form] = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
        return tensor


_Form = tuple[int, torch.Size, tuple[int, ...]]
"""Offset, shape and stride."""


class _Away:
    """A saved tensor that has left."""

    def __init__(self, tensor: Tensor, room: _Room) -> None:
        self._room = room
        self.dtype, self.device = tensor.dtype, tensor.device
        self._form: _Form = (int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def tensor(self) -> Tensor:
        """The tensor again."""
        return self._room.tensor(self._form, self)


def _unpack(packed: "Tensor | _Away") -> Tensor:
    return packed.tensor() if isinstance(packed, _Away) else packed
