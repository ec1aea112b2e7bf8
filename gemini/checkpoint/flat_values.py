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

    def page_offset(self, start: int) -> int:
        """Where in a page it is best to have the value at ``start`` that is written."""

    def read(self, start: int, numel: int, room: Tensor) -> Tensor:
        """Values from ``start`` on (flat, on CPU, not to be changed).

        Parameters
        ----------
        room
            Bytes, from the beginning of a page on: for the values and two pages more. They may be read into that.
        """

    def write(self, start: int, values: Tensor) -> None:
        """Replace values from ``start`` on (flat, on CPU, any dtype)."""


class TensorValues:
    """The values of a contiguous tensor on CPU (`FlatValues`)."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.detach().view(-1)
        self.memory: Tensor | None = self._values
        self.dtype = tensor.dtype
        self.numel = tensor.numel()

    def page_offset(self, start: int) -> int:
        return 0

    def read(self, start: int, numel: int, room: Tensor) -> Tensor:
        return self._values.narrow(0, start, numel)

    def write(self, start: int, values: Tensor) -> None:
        self._values.narrow(0, start, values.numel()).copy_(values)
