"""What a graph holds in place of a tensor that it has saved, and how it gets the tensor again.

A graph refuses a tensor that was changed in place after it was saved; where hooks have packed it, torch leaves that to
them. So both kinds here remember the version that was saved, and raise what torch raises.
"""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, UntypedStorage

from ..torch_private import version_of, without_torch_function
from .storage import SavedStorage


class Packed(Protocol):
    """A saved tensor, as the graph holds it."""

    def unpack(self) -> Tensor:
        """The tensor.

        Raises
        ------
        RuntimeError
            If it was changed in place since.
        """


class Bringer(Protocol):
    """Has memory of a graph come back."""

    def bring(self, saved: SavedStorage) -> UntypedStorage:
        """The memory, with its values, for the calling thread."""


class _Version:
    """The version that was saved."""

    __slots__ = ("_made_by", "_number")

    def __init__(self, tensor: Tensor) -> None:
        self._number = version_of(tensor)
        node = tensor.grad_fn
        self._made_by = "" if node is None else f", which is output {tensor.output_nr} of {node.name()},"

    def check(self, tensor: Tensor, shape: Sequence[int] | None = None) -> None:
        """Raise if a tensor that counts versions with the saved one is at another one; its shape is for the message."""
        now = version_of(tensor)
        if now != self._number:
            shape = tuple(tensor.shape) if shape is None else shape
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(shape)}]{self._made_by} is at version {now}; expected version {self._number} "
                "instead. Hint: enable anomaly detection to find the operation that failed to compute its gradient, "
                "with torch.autograd.set_detect_anomaly(True)."
            )


class KeptTensor:
    """A saved tensor that stays where it is."""

    __slots__ = ("_saved_at", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._saved_at = _Version(tensor)
        # A node that holds its own result holds itself. Leaves are of no node, and may get other memory: parameters.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()

    def unpack(self) -> Tensor:
        with without_torch_function():
            self._saved_at.check(self._tensor)
        return self._tensor


class MovedTensor:
    """A saved tensor whose memory may leave: where it lies in which storage.

    Parameters
    ----------
    tensor
        The tensor, which is not held.
    saved, bringer
        Its storage, and what has that come back.
    """

    __slots__ = ("_bringer", "_offset", "_saved", "_saved_at", "_shape", "_stride", "_witness")

    def __init__(self, tensor: Tensor, saved: SavedStorage, bringer: Bringer) -> None:
        self._saved_at = _Version(tensor)
        self._offset, self._shape, self._stride = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._saved = saved
        self._bringer = bringer
        # Counts versions together with the tensor and all of its views, and holds no memory of it.
        self._witness = tensor.detach()
        self._witness.data = _nothing(tensor.dtype, tensor.device)

    def unpack(self) -> Tensor:
        with without_torch_function(), torch.no_grad():
            self._saved_at.check(self._witness, self._shape)
            memory = self._bringer.bring(self._saved)
            tensor = self._witness.detach()
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            tensor.data = empty.set_(memory, self._offset, self._shape, self._stride)
        return tensor


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def unpack(packed: Packed) -> Tensor:
    """The hook that autograd calls in backward. It holds nothing: graphs that outlive the model hold it."""
    return packed.unpack()
