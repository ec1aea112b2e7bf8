"""The gradient of one chunk where units run in RAM: each large one in the tensor that autograd has made.

Nothing is copied, and there is memory for gradients only from their arrival until they are forgotten, as in plain
PyTorch: none in forward, where activations take most. Small ones lie side by side in one piece of memory that stays, so
that the update takes neighbours in one go::

    slots      | w0                   |b0|n0| w1              |b1|
               | autograd's tensor    |  .  | autograd's      |  .
    small ones                        |b0|n0|                 |b1|    -> | b0 | n0 | b1 |
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemini.torch_private import alias_of, storage_uses

from .buffer import Room
from .gradient import GradientBuffer, dense, norm_of
from .layout import ChunkLayout, Slot
from .memory import DeviceBackend

LARGE_NBYTES = 256 << 10
"""From this size on a gradient is not copied. Below, the copy takes less than an update of its own costs more."""
_USES_AT_ARRIVAL = 2
"""Of the memory of a gradient that nobody else has: the tensor, and the storage object that is asked."""
_OWN_USES = 3
"""Of the memory of an `_Own`: its two tensors, and the storage object that is asked."""
_OWN_REFERENCES = 2
"""References to the tensor of an `_Own`: its own, and the argument."""


@dataclass(slots=True, eq=False)
class _Own:
    """A gradient in a tensor of its own."""

    tensor: Tensor
    """In the shape of its parameter: what is shown."""
    flat: Tensor
    """The same memory for the update, under another storage: what the update does with it is no use of the first."""
    address: int

    @classmethod
    def of(cls, tensor: Tensor, slot: Slot) -> "_Own":
        return cls(tensor, alias_of(tensor.as_strided((slot.numel,), (1,))), tensor.data_ptr())

    @property
    def is_held(self) -> bool:
        """True if code elsewhere has the tensor, or another one over its memory."""
        return sys.getrefcount(self.tensor) > _OWN_REFERENCES or storage_uses(self.tensor.untyped_storage()) > _OWN_USES


class GradientTensors:
    """Gradients of a chunk, the large ones in tensors of their own. To its callers it is what a `GradientBuffer` is.

    Parameters
    ----------
    room
        What the ledger counts for all of them.
    """

    is_borrowed = False
    is_file = False

    def __init__(self, layout: ChunkLayout, room: Room, backend: DeviceBackend) -> None:
        self.layout = layout
        self.buffer = room
        self.present: set[int] = set()
        self._backend = backend
        self._own: dict[int, _Own] = {}
        small = [at for at, slot in enumerate(layout.slots) if not is_large(slot, room.dtype)]
        packed = _packed(layout, small)
        self._small = GradientBuffer(packed, backend.home(room.tier, packed.numel, room.dtype), backend)
        self._index = {at: index for index, at in enumerate(small)}
        """Which of the small ones a position is."""
        self._at = {slot.offset: at for at, slot in enumerate(layout.slots) if slot.numel}

    @property
    def held_nbytes(self) -> int:
        """Bytes of the tensors that are there now."""
        return sum(own.tensor.nbytes for own in self._own.values())

    def can_show(self, parameter: Tensor) -> bool:
        """True if a gradient itself can be ``parameter.grad``."""
        return (self.buffer.dtype, self._backend.device) == (parameter.dtype, parameter.device)

    # -- gradients

    def add(self, position: int, gradient: Tensor) -> None:
        """Put or add what autograd has made for the slot at ``position``, which is this object's from now on.

        Raises
        ------
        TypeError
            If the gradient is sparse.
        """
        if (index := self._index.get(position)) is not None:
            self._small.add(index, gradient)
        elif position in self.present:
            self._own[position].tensor.add_(dense(gradient, self.layout.slots[position]))
        else:
            self._own[position] = self._taken(gradient, self.layout.slots[position])
        self.present.add(position)

    def write(self, position: int, gradient: Tensor) -> None:
        """Replace one gradient, in place if it is there."""
        if (index := self._index.get(position)) is not None:
            self._small.write(index, gradient)
        elif (own := self._own.get(position)) is not None:
            own.tensor.copy_(dense(gradient, self.layout.slots[position]))
        else:
            self._own[position] = self._taken(gradient, self.layout.slots[position])
        self.present.add(position)

    def _taken(self, gradient: Tensor, slot: Slot) -> _Own:
        """The gradient itself where nobody else has its memory, else a copy."""
        if self._can_adopt(gradient, slot):
            return _Own.of(gradient.data, slot)
        gradient = dense(gradient, slot)
        tensor = torch.empty_strided(slot.shape, slot.stride, dtype=self.buffer.dtype, device=self._backend.device)
        return _Own.of(tensor.copy_(gradient), slot)

    def _can_adopt(self, gradient: Tensor, slot: Slot) -> bool:
        """True if it lies as the update reads it, in memory of its own that nobody else has."""
        if type(gradient) is not Tensor or gradient.layout is not torch.strided or gradient.requires_grad:
            return False
        is_alike = (gradient.dtype, gradient.device) == (self.buffer.dtype, self._backend.device)
        if not is_alike or gradient.stride() != slot.stride:
            return False
        storage = gradient.untyped_storage()
        is_whole = storage.nbytes() == gradient.nbytes and not gradient.is_neg()
        return is_whole and storage_uses(storage) == _USES_AT_ARRIVAL

    def read(self, position: int) -> Tensor:
        """A copy of one gradient, in its parameter's shape."""
        if (index := self._index.get(position)) is not None:
            return self._small.read(index)
        return self._own[position].tensor.clone(memory_format=torch.preserve_format)

    def norm(self, position: int, order: float = 2.0) -> Tensor:
        """The norm of a gradient that is present, an fp32 scalar on CPU."""
        if (index := self._index.get(position)) is not None:
            return self._small.norm(index, order)
        return norm_of(self._own[position].tensor, order)

    def forget(self, position: int) -> None:
        """Forget one gradient."""
        self.present.discard(position)
        if (index := self._index.get(position)) is not None:
            self._small.forget(index)
        self._own.pop(position, None)

    def clear(self) -> None:
        """Forget all gradients. Tensors that an update reads live until it has."""
        self.present = set()
        self._own = {}
        self._small.clear()

    # -- for the update

    def continues(self, position: int) -> bool:
        """True if the memory of a slot follows that of the slot before, with the same gap between them."""
        return position in self._index and position - 1 in self._index

    def memory(self, start: int, stop: int) -> Tensor:
        """The gradients of slots next to each other that lie so in memory, too: elements of the layout, flat."""
        position = self._at[start]
        if (index := self._index.get(position)) is None:
            return self._own[position].flat
        assert self._small.buffer is not None and self._small.buffer.tensor is not None
        return self._small.buffer.tensor.narrow(0, self._small.layout.slots[index].offset, stop - start)

    # -- what is shown in ``p.grad``

    @property
    def is_held(self) -> bool:
        """True if code outside of the manager holds a gradient that `view` gave out (torch, in ``p.grad``, counts)."""
        return self._small.is_held or any(own.is_held for own in self._own.values())

    def view(self, position: int) -> Tensor | None:
        """The gradient of a slot itself, in its parameter's shape; None where there is none."""
        if (index := self._index.get(position)) is not None:
            return self._small.view(index)
        own = self._own.get(position)
        return None if own is None else own.tensor

    def part_with(self, position: int) -> None:
        """Leave the gradient of a slot to its holders: another one is about to take its place."""
        if (index := self._index.get(position)) is not None:
            self._small.part_with(index)
        else:
            self._own.pop(position, None)

    def has_moved(self, position: int) -> bool:
        """True if the gradient that `view` gave out has been given other memory."""
        if (index := self._index.get(position)) is not None:
            return self._small.has_moved(index)
        own = self._own.get(position)
        return own is not None and own.tensor.data_ptr() != own.address

    def renew(self, position: int) -> Tensor:
        """Give out another tensor for a slot from now on. Returns the one until now."""
        if (index := self._index.get(position)) is not None:
            return self._small.renew(index)
        return self._own.pop(position).tensor


def is_large(slot: Slot, dtype: torch.dtype) -> bool:
    """True if the gradient of a slot is not copied."""
    return slot.numel * dtype.itemsize >= LARGE_NBYTES


def _packed(layout: ChunkLayout, positions: Sequence[int]) -> ChunkLayout:
    """A layout of these slots alone, each followed by the gap that follows it in this one."""
    starts = [*(slot.offset for slot in layout.slots), layout.numel]
    placed: list[Slot] = []
    end = 0
    for position in positions:
        placed.append(replace(layout.slots[position], offset=end))
        end += starts[position + 1] - starts[position]
    return ChunkLayout(layout.index, end, tuple(placed))
