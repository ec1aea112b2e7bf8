"""The hooks for tensors that a model's forward saves for backward: which may leave, and which stay."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..torch_private import is_transformed, saving_is_taken, storage_key, without_torch_function
from .counts import ActivationCounts
from .store import ActivationStore
from .tensors import KeptTensor, MovedTensor, Packed, unpack

LEAST_BYTES = 1 << 16
"""Smaller storages stay: a transfer's latency costs more than they take."""


class Saving(Protocol):
    """What becomes of the tensors that one model saves for backward."""

    counts: ActivationCounts

    def of_call(self) -> AbstractContextManager[object]:
        """A context for a call of the model."""

    def moving(self, may_move: bool) -> AbstractContextManager[None]:
        """A context within a call: what is saved in it may leave, or stays. The innermost one counts."""

    def rest(self, seconds: float = 0.0) -> None:
        """Between two steps: see `ActivationStore.rest`."""

    def close(self) -> None:
        """End threads."""


class KeepAll:
    """Nothing moves, and no hook is there."""

    def __init__(self) -> None:
        self.counts = ActivationCounts()
        self._nothing = nullcontext()

    def of_call(self) -> AbstractContextManager[object]:
        return self._nothing

    def moving(self, may_move: bool) -> AbstractContextManager[None]:
        return self._nothing

    def rest(self, seconds: float = 0.0) -> None:
        pass

    def close(self) -> None:
        pass


class Offload:
    """Tensors leave for a tier below where that frees memory.

    Parameters
    ----------
    store
        Moves them.
    device
        Tensors of this device leave, others stay.
    full_copies
        The storages of parameters in use: they come and go by themselves.
    """

    def __init__(self, store: ActivationStore, device: torch.device, full_copies: Iterable[Tensor]) -> None:
        self.counts = store.counts
        self._store = store
        self._device = device
        self._full_copies = frozenset(storage_key(full.untyped_storage()) for full in full_copies)
        self._may_move = True

    @contextmanager
    def of_call(self) -> Iterator[None]:
        if saving_is_taken():  # by hooks of the user's around the model, which are to see what it saves
            yield
            return
        with saved_tensors_hooks(self._pack, unpack):
            yield
        self._store.settle()

    @contextmanager
    def moving(self, may_move: bool) -> Iterator[None]:
        before, self._may_move = self._may_move, may_move
        try:
            yield
        finally:
            self._may_move = before

    def rest(self, seconds: float = 0.0) -> None:
        self._store.rest(seconds)

    def close(self) -> None:
        self._store.close()

    def _pack(self, tensor: Tensor) -> Packed:
        with without_torch_function():  # none of this is an operation of the model's
            if self._may_move and self._is_plain(tensor):
                memory = tensor.untyped_storage()
                is_own = memory.resizable() and not memory.is_shared()  # else others, such as numpy, may have it
                if is_own and memory.nbytes() >= LEAST_BYTES and storage_key(memory) not in self._full_copies:
                    return MovedTensor(tensor, self._store.save(memory), self._store)
            return KeptTensor(tensor)

    def _is_plain(self, tensor: Tensor) -> bool:
        return (
            type(tensor) is Tensor
            and tensor.layout is torch.strided
            and tensor.device == self._device
            and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or is_transformed())
        )
