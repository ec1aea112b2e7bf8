"""What a graph holds in place of a tensor that it has saved, and how it gets the tensor again.

torch holds the tensor itself, and of a node's own result another one over its memory. The program may give the tensor
other memory (``x.data = y``), and then backward computes with that. So the tensor itself is held here, too: for good if
it stays, else as long as somebody else has it.

A graph refuses a tensor that was changed in place after it was saved; where hooks have packed it, torch leaves that to
them. So both kinds here remember the version that was saved, and raise what torch raises.
"""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, UntypedStorage

from ..signals import uninterrupted
from ..torch_private import is_result_of_new_node, version_of, without_torch_function
from .original import Form, Original, form_of
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

    def is_that_of(self, tensor: Tensor) -> bool:
        """True if a tensor that counts versions with the saved one is at the same one."""
        return version_of(tensor) == self._number

    def check(self, tensor: Tensor, shape: Sequence[int] | None = None) -> None:
        """Raise if a tensor that counts versions with the saved one is at another one; its shape is for the message."""
        if not self.is_that_of(tensor):
            now = version_of(tensor)
            shape = tuple(tensor.shape) if shape is None else shape
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(shape)}]{self._made_by} is at version {now}; expected version {self._number} "
                "instead. Hint: enable anomaly detection to find the operation that failed to compute its gradient, "
                "with torch.autograd.set_detect_anomaly(True)."
            )


class KeptTensor:
    """A saved tensor that stays where it is."""

    __slots__ = ("_form", "_saved_at", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._saved_at = _Version(tensor)
        # A node that holds its own result holds itself.
        self._tensor = tensor.detach() if is_result_of_new_node(tensor) else tensor
        self._form: Form | None = None if tensor.is_leaf else form_of(self._tensor)

    @property
    def is_changed(self) -> bool:
        """True if it was changed in place, or was given other memory, as far as torch tells. Not asked of leaves."""
        with without_torch_function():
            return self._form is not None and not (
                self._saved_at.is_that_of(self._tensor) and form_of(self._tensor) == self._form
            )

    def unpack(self) -> Tensor:
        with without_torch_function():
            self._saved_at.check(self._tensor)
        return self._tensor


class MovedTensor:
    """A saved tensor whose memory may leave: where it lies in which storage.

    Parameters
    ----------
    tensor
        The tensor, which is held while somebody else has it.
    saved, bringer
        Its storage, and what has that come back.
    """

    __slots__ = ("_bringer", "_offset", "_original", "_saved", "_saved_at", "_shape", "_stride", "_witness")

    def __init__(self, tensor: Tensor, saved: SavedStorage, bringer: Bringer) -> None:
        self._saved_at = _Version(tensor)
        self._offset, self._shape, self._stride = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._saved = saved
        self._bringer = bringer
        self._original: Original | None = None if is_result_of_new_node(tensor) else saved.original(tensor)
        # Counts versions together with the tensor and all of its views, and holds no memory of it.
        self._witness = tensor.detach()
        self._witness.data = _nothing(tensor.dtype, tensor.device)

    @uninterrupted
    def unpack(self) -> Tensor:
        with without_torch_function(), torch.no_grad():
            self._saved_at.check(self._witness, self._shape)
            if self._original is not None and (moved := self._original.moved) is not None:
                return moved
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
