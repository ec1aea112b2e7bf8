"""Values of one tensor as a file has them: one after the other, in the order of the tensor's elements."""

from typing import Protocol

import torch
from torch import Tensor


class FlatValues(Protocol):
    """Values that any thread reads or replaces in parts. See `gemini.chunk.SlotValues`, which are those of chunks.

    Attributes
    ----------
    memory
        The values themselves (flat), where RAM has them in this form; else None.
    """

    dtype: torch.dtype
    numel: int
    memory: Tensor | None

    def offset_in_page(self, start: int) -> int:
        """Where in a page of RAM it is best to have the element that is read or written."""

    def read(self, start: int, out: Tensor) -> None:
        """Copy values ``[start, start + out.numel())`` into ``out`` (flat, on CPU, of their dtype)."""

    def write(self, start: int, values: Tensor) -> None:
        """Replace values from ``start`` on (flat, on CPU, any dtype)."""


class TensorValues:
    """The values of a contiguous tensor on CPU (`FlatValues`)."""

    def __init__(self, tensor: Tensor) -> None:
        self.memory: Tensor | None = tensor.detach().view(-1)
        self.dtype = tensor.dtype
        self.numel = tensor.numel()

    def offset_in_page(self, start: int) -> int:
        return 0

    def read(self, start: int, out: Tensor) -> None:
        assert self.memory is not None
        out.copy_(self.memory.narrow(0, start, out.numel()))

    def write(self, start: int, values: Tensor) -> None:
        assert self.memory is not None
        self.memory.narrow(0, start, values.numel()).copy_(values)
