"""Memory of a chunk that code outside of the manager holds.

[Note: Loans]
``p.data``, ``p.detach()``, ``p.numpy()`` give out memory, in plain PyTorch and here. It is the full copy's, under another
storage object: whether anyone holds a part of it still is then a matter of that storage's use count. (The full copy's own
says nothing: graphs save views of it.) While a loan is alive

- its chunk is not evicted, and updates are waited for within ``optimizer.step()``, so that the holder sees what plain
  PyTorch shows;
- the positions that were lent are compared with home before each update, eviction and reading, bit by bit, and what has
  changed goes home. Nothing else tells of a change: ``p.data.add_(1)`` has no version counter in common with ``p``.

When it is dead they are compared once more.
"""

import sys

import torch
from torch import Tensor

from .layout import ChunkLayout


class Loan:
    """The memory of one chunk, lent.

    Parameters
    ----------
    full
        The chunk's full copy, flat.
    """

    def __init__(self, full: Tensor, layout: ChunkLayout) -> None:
        self._layout = layout
        with torch.no_grad():
            self._alias = torch.from_dlpack(full)
        self._storage = self._alias.untyped_storage()
        self._views: dict[int, Tensor] = {}
        self._is_addressed = False
        self._own_references = sys.getrefcount(self._storage)
        self._own_uses = torch._C._storage_Use_Count(self._storage._cdata)

    @property
    def positions(self) -> list[int]:
        """Positions in the chunk whose memory has been lent."""
        return list(self._views)

    def view(self, position: int) -> Tensor:
        """The memory of one parameter."""
        view = self._views.get(position)
        if view is None:
            slot = self._layout.slots[position]
            with torch.no_grad():
                view = self._alias.as_strided(slot.shape, slot.stride, self._alias.storage_offset() + slot.offset)
            self._views[position] = view
            self._own_uses += 1
        return view

    def keep_address(self) -> None:
        """An address was given out, whose holder cannot be seen: stay alive until `forget_address`."""
        self._is_addressed = True

    def forget_address(self) -> None:
        """The addresses that were given out are not valid any more."""
        self._is_addressed = False

    def is_alive(self) -> bool:
        """True if somebody holds a part of the memory."""
        return (
            self._is_addressed
            or torch._C._storage_Use_Count(self._storage._cdata) > self._own_uses
            or sys.getrefcount(self._storage) > self._own_references
        )
