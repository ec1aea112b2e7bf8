"""The gradient of one chunk: written slot by slot as backward produces it, read by the update."""

import torch
from torch import Tensor

from .buffer import Buffer
from .layout import ChunkLayout, Slot
from .memory import DeviceBackend


class GradientBuffer:
    """Gradients in the layout of their chunk, and which slots have one.

    Adding is additive and keeps the order of arrival, as ``p.grad`` does: reentrant checkpointing delivers the
    gradient of one parameter once per segment, and accumulation once per micro-batch. A slot without a gradient
    is not read by anyone, so it needs no zeros; the step leaves its parameter alone, as torch does.
    """

    def __init__(self, layout: ChunkLayout, buffer: Buffer, backend: DeviceBackend) -> None:
        self.layout = layout
        self.buffer = buffer
        self.present: set[int] = set()
        self._backend = backend
        self._norms: dict[int, Tensor] = {}
        self._norm_wanted = False
        """Whether anyone has asked for 2-norms yet: who clips does so in every step, who does not never."""
        tensor = buffer.tensor
        self._views = [] if tensor is None else [_shaped(tensor, slot) for slot in layout.slots]

    def add(self, position: int, gradient: Tensor) -> None:
        """Put or add the gradient of the slot at ``position``.

        Raises
        ------
        TypeError
            If the gradient is sparse.
        """
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"{self.layout.slots[position].name}: got a {gradient.layout} gradient, expected a dense one; "
                "build the embedding with sparse=False"
            )
        gradient = gradient.detach()  # one of backward(create_graph=True) would keep its graph alive in the buffer
        accumulate = position in self.present
        if self._views:
            self._backend.download(gradient, self._views[position], accumulate)
        else:
            self._add_on_disk(position, gradient, accumulate)
        self.present.add(position)

    def _add_on_disk(self, position: int, gradient: Tensor, accumulate: bool) -> None:
        slot = self.layout.slots[position]
        if not accumulate and gradient.stride() == slot.stride:
            flat = gradient.as_strided((slot.numel,), (1,))
        else:
            flat = torch.empty(slot.numel, dtype=gradient.dtype)
            shaped = flat.as_strided(slot.shape, slot.stride)
            if accumulate:
                self._backend.synchronize()
                self.buffer.read(slot.offset, flat)
                shaped.add_(gradient.to(flat.device))
            else:
                shaped.copy_(gradient)
        self._backend.store(flat, self.buffer, slot.offset)
        if self._norm_wanted:
            self._norms[position] = _norm(flat.as_strided(slot.shape, slot.stride), 2.0)  # while it is in RAM

    def view(self, position: int) -> Tensor | None:
        """The gradient of a slot itself, in its parameter's shape; None where it is a file."""
        return self._views[position] if self._views else None

    def norms(self, order: float = 2.0) -> list[Tensor]:
        """The norm of each gradient present, fp32 scalars on CPU, in slot order."""
        self._norm_wanted = self._norm_wanted or order == 2.0
        return [self._norm_of(position, order) for position in sorted(self.present)]

    def _norm_of(self, position: int, order: float) -> Tensor:
        if self._views:
            return _norm(self._views[position], order)
        if order == 2.0 and position in self._norms:
            return self._norms[position]
        return _norm(self.read(position), order)

    def read(self, position: int) -> Tensor:
        """A copy of one gradient, in its parameter's shape."""
        slot = self.layout.slots[position]
        if not self._views:
            self._backend.synchronize()
        flat = torch.empty(slot.numel, dtype=self.buffer.dtype)
        self.buffer.read(slot.offset, flat)
        return flat.as_strided(slot.shape, slot.stride)

    def write(self, position: int, gradient: Tensor) -> None:
        """Replace one gradient (clipping by value)."""
        self.present.discard(position)
        self._norms.pop(position, None)
        self.add(position, gradient)

    def clear(self) -> None:
        """Forget all gradients."""
        self.present = set()
        self._norms = {}


def _shaped(flat: Tensor, slot: Slot) -> Tensor:
    return flat.as_strided(slot.shape, slot.stride, flat.storage_offset() + slot.offset)


def _norm(tensor: Tensor, order: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, order, dtype=torch.float32)
    return norm.cpu()
