"""Which saved tensors may leave the memory that computes."""

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage

from ..torch_private import is_transformed, storage_key

LEAST_BYTES = 1 << 16
"""Smaller storages stay: a transfer's latency costs more than they take."""


class Leavers:
    """Plain tensors of the device that computes, in memory that nothing else manages.

    Parameters
    ----------
    device
        Tensors of other devices stay.
    full_copies
        The storages of parameters in use: they come and go by themselves.
    """

    def __init__(self, device: torch.device, full_copies: Iterable[Tensor]) -> None:
        self._device = device
        self._full_copies = frozenset(storage_key(full.untyped_storage()) for full in full_copies)

    def is_model_data(self, tensor: Tensor) -> bool:
        """True for parameters in use and views of them."""
        return storage_key(tensor.untyped_storage()) in self._full_copies

    def may_leave(self, tensor: Tensor) -> bool:
        """True if the memory of a saved tensor may leave."""
        if not self._is_plain(tensor):
            return False
        memory = tensor.untyped_storage()
        is_large = memory.nbytes() >= LEAST_BYTES and storage_key(memory) not in self._full_copies
        return is_large and not _is_lent(memory)

    def _is_plain(self, tensor: Tensor) -> bool:
        return (
            type(tensor) is Tensor
            and tensor.layout is torch.strided
            and tensor.device == self._device
            and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or is_transformed())
        )


def _is_lent(memory: UntypedStorage) -> bool:
    """True if something besides torch, such as numpy, or another process may have it."""
    return not memory.resizable() or (memory.device.type == "cpu" and memory.is_shared())
