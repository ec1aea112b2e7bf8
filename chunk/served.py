"""What the other owners of a model's chunks may have of this one, and bring it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunk import Chunk
from .communicator import Contribution, Span
from .memory import DeviceBackend
from .names import GRADIENT, MASTER
from .shared_gradient import SharedGradient
from .values import read_part


class Served:
    """Reads homes and adds to gradients for others, on threads of the communicator (a `Source`).

    Homes change only in what all owners have agreed to, so reading needs no lock; only an update may be under way.

    Parameters
    ----------
    chunks, device
        The chunks of one model, and the memory that computes.
    """

    def __init__(self, chunks: Sequence[Chunk], device: DeviceBackend) -> None:
        self._chunks = chunks
        self._device = device

    def read(self, span: Span, numel: int, dtype: torch.dtype) -> Tensor:
        chunk = self._chunks[span.chunk]
        self._device.take_over()
        if span.name == GRADIENT:
            assert isinstance(chunk.gradient, SharedGradient)
            return chunk.gradient.own(span.start, numel)
        if (update := chunk.update) is not None:
            update.wait()
        index = span.start - chunk.extent.start // chunk.codecs[span.name].block_numel
        home = chunk.source if span.name == MASTER and chunk.source.dtype is dtype else chunk.homes[span.name]
        if home.tensor is not None and not chunk.codecs[span.name].computes:
            return home.tensor.narrow(0, index, numel).to("cpu", dtype)
        return read_part(chunk, span.name, index, numel).to(dtype)

    def add(self, chunk: int, contribution: Contribution) -> None:
        gradient = self._chunks[chunk].gradient
        assert isinstance(gradient, SharedGradient)
        gradient.sum(contribution)
