"""The gradient of one chunk: written slot by slot as backward produces it, read by the update."""

import sys
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from gemini.torch_private import version_of

from .buffer import Buffer
from .layout import ChunkLayout, Slot
from .memory import DeviceBackend

_OWN_REFERENCES = 3
"""References to a view of a gradient that code elsewhere does not hold: the list, a loop's name, and the argument."""


class GradientBuffer:
    """Gradients in the layout of their chunk, and which slots have one.

    Adding is additive and keeps the order of arrival, as ``p.grad`` does: reentrant checkpointing delivers the
    gradient of one parameter once per segment, and accumulation once per micro-batch. A slot without a gradient
    is not read by anyone, so it needs no zeros; the step leaves its parameter alone, as torch does.

    Parameters
    ----------
    buffer
        Where it lives; None where memory is borrowed for each gradient anew.
    borrow
        Lends that memory, when the first slot's gradient comes.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        buffer: Buffer | None,
        backend: DeviceBackend,
        borrow: Callable[[], Buffer] | None = None,
    ) -> None:
        self.layout = layout
        self.buffer = buffer
        self.present: set[int] = set()
        self.changes = 0
        """How often one of the gradients was set, added to or forgotten, by what this class was told."""
        self._backend = backend
        self._borrow = borrow
        self._is_given_up = False
        self._norms: dict[int, Tensor] = {}
        self._norm_wanted = False
        """Whether 2-norms have been asked for: if gradients are clipped, they are in every step."""
        self._views = _views(layout, buffer)
        self._addresses = [view.data_ptr() for view in self._views]

    def _attach(self) -> Buffer:
        """The buffer, borrowed if there is none that is ours still."""
        if self.buffer is None or self._is_given_up:
            self._is_given_up = False
            assert self._borrow is not None
            self.buffer = self._borrow()
            self._views = _views(self.layout, self.buffer)
            self._addresses = [view.data_ptr() for view in self._views]
            if self.buffer.tensor is not None:  # the update runs over the gaps between slots, which nobody writes
                ends = [(slot.offset, slot.stop) for slot in self.layout.slots]
                for (_, stop), (start, _) in pairwise([(0, 0), *ends, (self.layout.numel, self.layout.numel)]):
                    self.buffer.tensor[stop:start].zero_()
        return self.buffer

    @property
    def is_file(self) -> bool:
        """True if it is on disk."""
        return self.buffer is not None and self.buffer.tensor is None

    @property
    def is_borrowed(self) -> bool:
        """True if it has memory that is to be given back; a file, it keeps."""
        return self.buffer is not None and self.buffer.tensor is not None and self._borrow is not None

    def give_up(self) -> Buffer | None:
        """What has been borrowed is no longer ours once the update that reads it is over."""
        self._is_given_up = True
        return self.buffer

    def detach(self, buffer: Buffer) -> None:
        """Let go what was borrowed, if it is not another buffer since."""
        if self.buffer is buffer:
            self.buffer = None
            self._views = []

    def relocate(self, buffer: Buffer) -> None:
        """Lie in another buffer from now on, which has the same gradients. Nobody holds what `view` gave out."""
        views = _views(self.layout, buffer)
        addresses = [view.data_ptr() for view in views]
        self.changes += 1  # what reads the former one reads another's
        self.buffer, self._views, self._addresses = buffer, views, addresses

    def add(self, position: int, gradient: Tensor) -> None:
        """Put or add the gradient of the slot at ``position``.

        Raises
        ------
        TypeError
            If the gradient is sparse.
        """
        gradient = dense(gradient, self.layout.slots[position])
        accumulate = position in self.present
        self.changes += 1
        buffer = self._attach()
        if self._views:
            self._backend.download(gradient, self._views[position], accumulate)
        else:
            self._add_on_disk(buffer, position, gradient, accumulate)
        self.present.add(position)

    def _add_on_disk(self, buffer: Buffer, position: int, gradient: Tensor, accumulate: bool) -> None:
        slot = self.layout.slots[position]
        if not accumulate and gradient.stride() == slot.stride:
            flat = gradient.as_strided((slot.numel,), (1,))
        else:
            flat = torch.empty(slot.numel, dtype=gradient.dtype, device="cpu")
            shaped = flat.as_strided(slot.shape, slot.stride)
            if accumulate:
                self._backend.synchronize()
                buffer.read(slot.offset, flat)
                shaped.add_(gradient.to(flat.device))
            else:
                shaped.copy_(gradient)
        self._backend.store(flat, buffer, slot.offset)
        if self._norm_wanted:
            self._norms[position] = norm_of(flat.as_strided(slot.shape, slot.stride), 2.0)  # while it is in RAM

    @property
    def is_held(self) -> bool:
        """True if code outside of the manager holds a gradient that `view` gave out (torch, in ``p.grad``, counts)."""
        return any(sys.getrefcount(view) > _OWN_REFERENCES for view in self._views)

    @property
    def version(self) -> tuple[int, int]:
        """Differs from what it was if a gradient has changed since, as far as torch or this class were told."""
        return self.changes, sum(map(version_of, self._views))

    def part_with(self, position: int) -> None:
        """Leave a copy to the holders of the gradient of a slot: another gradient is about to take its place."""
        if self._views and sys.getrefcount(self._views[position]) > _OWN_REFERENCES - 1:  # no name of ours for it
            held = self.renew(position)
            held.data = held.clone(memory_format=torch.preserve_format)

    def has_moved(self, position: int) -> bool:
        """True if the gradient that `view` gave out has been given other memory."""
        return bool(self._views) and self._views[position].data_ptr() != self._addresses[position]

    def renew(self, position: int) -> Tensor:
        """Give out another tensor for a slot from now on. Returns the one until now."""
        assert self.buffer is not None and self.buffer.tensor is not None
        before = self._views[position]
        self.changes += 1
        slot = self.layout.slots[position]
        self._views[position] = _shaped(self.buffer.tensor, slot, slot.offset)
        return before

    def can_show(self, parameter: Tensor) -> bool:
        """True if a gradient itself can be ``parameter.grad``."""
        view = self.view(0)
        return view is not None and (view.dtype, view.device) == (parameter.dtype, parameter.device)

    def continues(self, position: int) -> bool:
        """True if the memory of a slot follows that of the slot before, with the same gap between them: it does."""
        return True

    def memory(self, start: int, stop: int) -> None:
        """Gradients in other memory than the buffer: there are none."""

    def view(self, position: int) -> Tensor | None:
        """The gradient of a slot itself, in its parameter's shape; None where it is a file, or where there is none."""
        return self._views[position] if self._views else None

    def norm(self, position: int, order: float = 2.0) -> Tensor:
        """The norm of a gradient that is present, an fp32 scalar on CPU."""
        self._norm_wanted = self._norm_wanted or order == 2.0
        if self._views:
            return norm_of(self._views[position], order)
        if order == 2.0 and position in self._norms:
            return self._norms[position]
        return norm_of(self.read(position), order)

    def read(self, position: int) -> Tensor:
        """A copy of one gradient, in its parameter's shape."""
        slot, buffer = self.layout.slots[position], self._attach()
        self._backend.synchronize()
        flat = torch.empty(slot.numel, dtype=buffer.dtype, device="cpu")
        buffer.read(slot.offset, flat)
        return _shaped(flat, slot, 0)

    def write(self, position: int, gradient: Tensor) -> None:
        """Replace one gradient (clipping by value)."""
        self.forget(position)
        self.add(position, gradient)

    def forget(self, position: int) -> None:
        """Forget one gradient."""
        self.changes += 1
        self.present.discard(position)
        self._norms.pop(position, None)

    def clear(self) -> None:
        """Forget all gradients."""
        self.changes += 1
        self.present = set()
        self._norms = {}


def _views(layout: ChunkLayout, buffer: Buffer | None) -> list[Tensor]:
    if buffer is None or buffer.tensor is None:
        return []
    return [_shaped(buffer.tensor, slot, slot.offset) for slot in layout.slots]


def _shaped(flat: Tensor, slot: Slot, offset: int) -> Tensor:
    # Through `data`, since torch detaches gradients in place (``zero_grad(set_to_none=False)``), and refuses for views.
    return flat.as_strided(slot.shape, slot.stride, flat.storage_offset() + offset).data


def dense(gradient: Tensor, slot: Slot) -> Tensor:
    """A gradient without its graph, which one of ``backward(create_graph=True)`` would keep alive in the chunk.

    Raises
    ------
    TypeError
        If it is sparse.
    """
    if gradient.layout is not torch.strided:
        raise TypeError(
            f"{slot.name}: got a {gradient.layout} gradient, expected a dense one; "
            "build the embedding with sparse=False"
        )
    return gradient.detach()


def norm_of(tensor: Tensor, order: float) -> Tensor:
    """A norm, an fp32 scalar on CPU."""
    norm: Tensor = torch.linalg.vector_norm(tensor, order, dtype=torch.float32)
    return norm.cpu()
