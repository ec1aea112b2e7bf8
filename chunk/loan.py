"""Memory of a chunk that code outside of the manager holds.

[Note: Loans]
``p.data``, ``p.detach()``, ``p.numpy()`` give out memory, in plain PyTorch and here. It is the full copy's, under
another storage object: whether anyone holds a part of it still is then a matter of that storage's use count. (The full
copy's own says nothing: graphs save views of it.) While a loan is alive

- its chunk is not evicted, and updates are waited for within ``optimizer.step()``, so that the holder sees what plain
  PyTorch shows;
- the positions that were lent are compared with home before each update, eviction and reading, bit by bit, and what has
  changed goes home. Nothing else tells of a change: ``p.data.add_(1)`` has no version counter in common with ``p``.

When it is dead they are compared once more. Where masters are in two halves the upper one *is* the full copy, so there
is nothing to compare with: a copy of what was lent is kept beside it. So it is where several owners keep the chunk, of
whom each has a part of home: they bring changes home together, at the next step. Until then the full copy stays, and
who reads masters looks at it as well.

Assigning to ``p.data`` makes the parameter lie in the memory of the value, in plain PyTorch. Here it keeps its place,
and the memory changes hands instead: holders of what the parameter had until now are left a copy, and the value, if it
has a storage of its own, from then on lies in the chunk.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage

from gemini.torch_private import alias_of, storage_key, storage_uses, swap_memory

from .bits import differing


@dataclass(frozen=True, slots=True)
class _Part:
    """One parameter's memory, under a storage object of its own."""

    view: Tensor
    storage: UntypedStorage
    own_uses: int
    own_references: int

    @staticmethod
    def of(view: Tensor) -> "_Part":
        alias = alias_of(view)
        storage = alias.untyped_storage()
        return _Part(alias, storage, storage_uses(storage), sys.getrefcount(storage))

    def adopted_by(self, value: Tensor) -> "_Part":
        """Give this memory to the storage of ``value``, in exchange for its own."""
        storage = value.untyped_storage()
        swap_memory(self.storage, storage)
        return _Part(value.detach(), storage, self.own_uses, self.own_references)

    def leave_a_copy(self) -> None:
        """Give a copy of this memory to its holders, in exchange for it."""
        copied = self.view.clone(memory_format=torch.preserve_format)
        swap_memory(self.storage, copied.untyped_storage())

    def is_held(self) -> bool:
        uses, references = storage_uses(self.storage), sys.getrefcount(self.storage)
        return uses > self.own_uses or references > self.own_references


class Loan:
    """What one chunk has lent.

    Parameters
    ----------
    views
        The chunk's slots in its full copy, which has its memory for as long as the loan lives.
    remembers
        Keep copies of what is lent.
    """

    def __init__(self, views: tuple[Tensor, ...], remembers: bool) -> None:
        self._views = views
        self._parts: dict[int, _Part] = {}
        self._remembers = remembers
        self._before: dict[int, Tensor] = {}
        self._is_addressed = False

    @property
    def positions(self) -> list[int]:
        """Positions in the chunk whose memory has been lent."""
        return list(self._parts)

    @property
    def is_addressed(self) -> bool:
        """True if somebody has asked for an address, which is good until the next forward."""
        return self._is_addressed

    @property
    def held_positions(self) -> list[int]:
        """Those of memory that somebody holds."""
        return [position for position, part in self._parts.items() if part.is_held()]

    def view(self, position: int) -> Tensor:
        """The memory of one parameter. Not to be given out itself, but what torch makes of it."""
        if position not in self._parts:
            self._parts[position] = _Part.of(self._views[position])
            self.remember(position)
        return self._parts[position].view

    def before(self, position: int) -> Tensor:
        """What was lent, as it was when home was last known to have the same values."""
        return self._before[position]

    def has_changed(self) -> bool:
        """True if what was lent is not as it was. Of loans that remember that."""
        return any(bool(differing(self._views[at], self._before[at]).any()) for at in self._parts)

    def remember(self, position: int) -> None:
        """Home has the same values now, if this position has been lent."""
        if self._remembers and position in self._parts:
            self._before[position] = self._views[position].detach().clone(memory_format=torch.preserve_format)

    def remember_all(self) -> None:
        """Home and all that was lent have the same values now: an update is over."""
        for position in self._parts:
            self.remember(position)

    def part_with(self, position: int) -> None:
        """The memory of one parameter is about to get other values, of which its holders are to see nothing."""
        part = self._parts.pop(position, None)
        if part is not None and part.is_held():
            part.leave_a_copy()

    def adopt(self, position: int, value: Tensor) -> None:
        """Have ``value`` lie in the memory of one parameter from now on, which has its values."""
        view = self._views[position]
        is_whole = value.untyped_storage().nbytes() == view.nbytes and value.storage_offset() == 0
        if is_whole and value.stride() == view.stride():
            self._parts[position] = _Part.of(view).adopted_by(value)
            self.remember(position)

    def has(self, value: Tensor) -> bool:
        """True if ``value`` lies in memory that has been lent."""
        storage = storage_key(value.untyped_storage())
        return any(storage_key(part.storage) == storage for part in self._parts.values())

    def keep_address(self) -> None:
        """An address was given out, whose holder cannot be seen: stay alive until `forget_address`."""
        self._is_addressed = True

    def forget_address(self) -> None:
        """The addresses that were given out are not valid any more."""
        self._is_addressed = False

    def is_alive(self) -> bool:
        """True if somebody holds a part of the memory."""
        return self._is_addressed or any(part.is_held() for part in self._parts.values())
