"""A tensor that a graph has saved, itself, for as long as somebody besides the graph has it.

While somebody has it, it may be given other memory (``x.data = y``), and plain PyTorch's backward computes with that.
"""

import sys

import torch
from torch import Tensor

from ..torch_private import storage_key, use_count

_OWN_REFERENCES = 2
"""References from Python to a tensor that nobody but its `Original` has: its attribute and an argument."""
Form = tuple[int, int | torch.SymInt, torch.Size, tuple[int, ...]]
"""Where a tensor lies in which storage."""


def form_of(tensor: Tensor) -> Form | None:
    """Where a tensor lies; None for layouts that have no strides."""
    if tensor.layout is not torch.strided:
        return None
    return storage_key(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride()


class Original:
    """All that graphs have saved of one tensor holds this.

    Parameters
    ----------
    tensor
        The tensor.
    """

    __slots__ = ("__weakref__", "_form", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor
        self._form = form_of(tensor)

    def let_go(self) -> bool:
        """Let the tensor go if nobody else has it and it lies where it lay. Returns True if that was done now."""
        if self._tensor is None or sys.getrefcount(self._tensor) > _OWN_REFERENCES or use_count(self._tensor) > 1:
            return False
        if self.moved is not None:
            return False
        self._tensor = None
        return True

    def is_of(self, tensor: Tensor) -> bool:
        """True if this holds a tensor, which lies where it lay."""
        return self._tensor is tensor and self.moved is None

    @property
    def moved(self) -> Tensor | None:
        """The tensor if it was given other memory."""
        tensor = self._tensor
        return tensor if tensor is not None and form_of(tensor) != self._form else None
