"""The gradient of a chunk that several owners keep: each has collected all of it, and keeps the sum of its extent.

::

    backward --add--> collected, whole, in borrowed memory --complete--> sent to the owners of its extents
                                                                              |
    update, norm <--------- home of the extent <--sum, in the order of the owners--'
"""

from collections import deque
from collections.abc import Callable, Set

import torch
from torch import Tensor

from .buffer import Buffer
from .communicator import Arriving, Communicator, Contribution, Span
from .gradient import GradientBuffer, norm_of
from .memory import DeviceBackend
from .names import GRADIENT
from .plan import ChunkPlan


class SharedGradient:
    """As `GradientBuffer`, for a chunk of which an extent is at home here.

    What several backwards add is summed as one process would that runs them one after the other: each backward of all
    owners, in their order, before the next.

    Parameters
    ----------
    buffer
        The home of the extent's gradient.
    collected
        Takes the gradients of the backward under way; it borrows its memory.
    give_back
        Takes that memory back.
    """

    is_borrowed = False
    is_held = False

    def __init__(
        self,
        plan: ChunkPlan,
        buffer: Buffer,
        backend: DeviceBackend,
        collected: GradientBuffer,
        give_back: Callable[[GradientBuffer], None],
        communicator: Communicator,
    ) -> None:
        self.layout = plan.layout
        self._plan = plan
        self.buffer = buffer
        self._backend = backend
        self._collected = collected
        self._give_back = give_back
        self._communicator = communicator
        self._arriving: deque[Arriving] = deque()
        self._summed: set[int] = set()
        """Positions of which there is a sum at home."""

    @property
    def present(self) -> Set[int]:
        """Positions that have a gradient, from whichever owner. Waits for what the others have sent."""
        self._sum()
        return self._summed | self._collected.present

    def add(self, position: int, gradient: Tensor) -> None:
        """Put or add the gradient of the slot at ``position``, of the backward under way."""
        self._collected.add(position, gradient)

    def complete(self) -> None:
        """The backward under way has come to its end: send what it has collected. All owners say so."""
        present = frozenset(self._collected.present)
        self._backend.synchronize()
        buffer = self._collected.buffer if present else None
        sent = Contribution(present, None if buffer is None else buffer.tensor)
        self._arriving.append(self._communicator.exchange(self.layout.index, sent, self._plan.extents))
        self._forget_collected()

    def _sum(self) -> None:
        while self._arriving:
            for contribution in self._arriving[0].wait():
                for position in sorted(contribution.present):
                    assert contribution.gradient is not None
                    place = self._plan.place(position)
                    self._put(position, contribution.gradient[place.index : place.index + len(place.own)])
            self._arriving.popleft()

    def _put(self, position: int, part: Tensor) -> None:
        """Put or add to the home what is at home here of a slot (flat)."""
        accumulate, start = position in self._summed, self._plan.place(position).index
        self._summed.add(position)
        if not part.numel():
            return
        if self.buffer.tensor is not None:
            self._backend.download(part, self.buffer.tensor[start : start + part.numel()], accumulate)
            return
        if accumulate:
            self._backend.synchronize()
            there = torch.empty(part.numel(), dtype=self.buffer.dtype, device="cpu")
            self.buffer.read(start, there)
            part = there.add_(part)
        self._backend.store(part, self.buffer, start)

    def read(self, position: int) -> Tensor:
        """A copy of one gradient, in its parameter's shape, gathered from all owners."""
        self._sum()
        self._backend.synchronize()
        place = self._plan.place(position)
        flat = torch.empty(place.numel, dtype=self.buffer.dtype, device="cpu")
        if place.own:
            self.buffer.read(place.index, flat[place.own.start : place.own.stop])
        self._communicator.gather(Span(self.layout.index, GRADIENT, place.start), flat, place.parts)
        return flat.as_strided(place.shape, place.stride)

    def norm(self, position: int, order: float = 2.0) -> Tensor:
        """The norm of a gradient that is present, an fp32 scalar on CPU: of the whole, as one process takes it."""
        return norm_of(self.read(position), order)

    def write(self, position: int, gradient: Tensor) -> None:
        """Replace one gradient, the sum over all owners. All of them do."""
        self.forget(position)
        place = self._plan.place(position)
        flat = torch.empty(place.numel, dtype=self.buffer.dtype, device=gradient.device)
        flat.as_strided(place.shape, place.stride).copy_(gradient)
        self._put(position, flat[place.own.start : place.own.stop])

    def forget(self, position: int) -> None:
        """Forget one gradient."""
        self._sum()
        self._summed.discard(position)
        self._collected.forget(position)

    def clear(self) -> None:
        """Forget all gradients."""
        self._arriving.clear()
        self._summed = set()
        self._forget_collected()

    def _forget_collected(self) -> None:
        self._collected.clear()
        self._give_back(self._collected)

    # -- what is shown in ``p.grad``: nothing, since no owner has all of it

    def view(self, position: int) -> None:
        """The gradient of a slot itself; None since it is with several owners."""

    def part_with(self, position: int) -> None:
        """Leave a copy to the holders of the gradient of a slot: there are none."""

    def has_moved(self, position: int) -> bool:
        """True if the gradient that `view` gave out has been given other memory."""
        return False

    def renew(self, position: int) -> Tensor:
        """Give out another tensor for a slot; none is given out."""
        raise NotImplementedError


Gradient = GradientBuffer | SharedGradient
"""The gradient of a chunk."""
