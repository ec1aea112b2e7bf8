"""The gradient of a chunk that several owners keep: each has collected all of it, and keeps the sum of its extent.

::

    backward --add--> collected, whole, in borrowed memory --all slots are there--> sent to the owners of its extents
                                                                                              |
    update, norm <--------------- home of the extent <--sum, in the order of the owners-------'
"""

from collections.abc import Callable, Set
from threading import Lock

import torch
from torch import Tensor

from gemini.errors import RankError

from .buffer import Buffer
from .communicator import Communicator, Contribution, Delivery, Span
from .gradient import GradientBuffer, norm_of
from .gradient_tensors import GradientTensors
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
        Takes that memory back once it has been delivered.
    """

    is_borrowed = False
    is_held = False

    def __init__(
        self,
        plan: ChunkPlan,
        buffer: Buffer,
        backend: DeviceBackend,
        collected: GradientBuffer,
        give_back: Callable[[GradientBuffer, Delivery | None], None],
        communicator: Communicator,
    ) -> None:
        self.layout = plan.layout
        self._plan = plan
        self.buffer = buffer
        self._backend = backend
        self._collected = collected
        self._give_back = give_back
        self._communicator = communicator
        self._summed: set[int] = set()
        """Positions of which there is a sum at home."""
        self._sent: set[int] = set()
        """Positions of which we have sent something: there is one, or will be."""
        self._arrived: set[int] = set()
        """Positions of which the backward under way has brought a gradient."""
        self._bases: dict[int, Tensor | None] = {}
        """What slots begin with in place of their sums so far, until the next backward has been sent."""
        self._adding = Lock()

    @property
    def present(self) -> Set[int]:
        """Positions that have a gradient, ours or as far as others' have come: all once they have been collected."""
        gone = {position for position, base in self._bases.items() if base is None}
        return ((self._summed | self._sent) - gone) | (self._bases.keys() - gone) | self._collected.present

    def add(self, position: int, gradient: Tensor) -> None:
        """Put or add the gradient of the slot at ``position``, of the backward under way.

        Raises
        ------
        RankError
            If there is one of this backward already: one process adds each of the two to what is there, and it cannot
            be told whether a third will come before those of the other owners.
        """
        if position in self._arrived and not self._communicator.is_silent:
            raise RankError(
                f"the gradient of {self.layout.slots[position].name} comes in several parts in one backward, as where "
                "checkpoints with use_reentrant=True share a parameter. With several ranks it has to come at once: "
                "checkpoint with use_reentrant=False"
            )
        self._collected.add(position, gradient)
        self._arrived.add(position)
        if len(self._arrived) == len(self.layout.slots):
            self._send()

    def begin_with(self, position: int, gradient: Tensor | None) -> None:
        """Have this in place of what there is of a slot, with all owners, and the backwards to come add to it.

        It is the same with all of them, between the same backwards. So the first one contributes it.
        """
        self._collected.forget(position)
        self._bases[position] = gradient
        if gradient is not None and self._is_first:
            self._collected.add(position, gradient)

    @property
    def _is_first(self) -> bool:
        return self._communicator.rank == 0

    @property
    def is_unsent(self) -> bool:
        """True if something of a backward, or of several, has not been sent."""
        return bool(self._collected.present) or (self._is_first and bool(self._bases))

    def complete(self) -> None:
        """The backward under way is over: send what has been collected, unless that is to wait."""
        self._arrived.clear()
        self._send()

    def _send(self) -> None:
        if self._communicator.is_silent:
            return
        bases, self._bases = self._bases, {}
        present, anew = frozenset(self._collected.present), frozenset(bases if self._is_first else ())
        if not present and not anew:
            return
        self._backend.synchronize()
        buffer = self._collected.buffer
        gradient = self._on_cpu(buffer) if buffer is not None and present else self._nothing()
        if (factor := self._communicator.gradient_factor) != 1.0:
            gradient.mul_(factor)
        sent = Contribution(present, gradient, anew)
        delivery = self._communicator.send(self.layout.index, sent, self._plan.extents)
        self._sent |= present
        if present:
            self._collected.clear()
            self._give_back(self._collected, delivery)

    def _nothing(self) -> Tensor:
        return torch.empty(self.layout.numel, dtype=self.buffer.dtype, device="cpu")

    @staticmethod
    def _on_cpu(buffer: Buffer) -> Tensor:
        if buffer.tensor is not None:
            return buffer.tensor.cpu()
        flat = torch.empty(buffer.numel, dtype=buffer.dtype, device="cpu")
        buffer.read(0, flat)
        return flat

    def sum(self, contribution: Contribution) -> None:
        """Add what an owner has sent, to the extent that is at home here. By one thread, beside the training."""
        with self._adding:
            gradient = contribution.gradient
            self._summed -= contribution.anew
            is_whole = len(contribution.present) == len(self.layout.slots)
            if is_whole and self.buffer.tensor is not None and self._are_alike():
                self._backend.download(gradient, self.buffer.tensor, bool(self._summed))
                self._summed.update(contribution.present)
                return
            for position in sorted(contribution.present):
                place = self._plan.place(position)
                self._put(position, gradient[place.index : place.index + len(place.own)])

    def _are_alike(self) -> bool:
        """True if there is a sum of every slot, or of none."""
        return not self._summed or len(self._summed) == len(self.layout.slots)

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
        if (base := self._bases.get(position)) is not None:
            place = self._plan.place(position)
            return self._nothing()[: place.numel].as_strided(place.shape, place.stride).copy_(base)
        if position in self._collected.present:
            raise RankError(
                f"the gradient of {self.layout.slots[position].name} is on this rank only, as within no_sync: it can "
                "be read after the first backward that is not within it"
            )
        self._communicator.wait_for_sums(self.layout.index)
        self._backend.synchronize()
        place = self._plan.place(position)
        flat = torch.empty(place.numel, dtype=self.buffer.dtype, device="cpu")
        if place.own:
            self.buffer.read(place.index, flat[place.own.start : place.own.stop])
        self._communicator.gather(Span(self.layout.index, GRADIENT, place.start), flat, place.parts).wait()
        return flat.as_strided(place.shape, place.stride)

    def own(self, start: int, numel: int) -> Tensor:
        """What is at home here of the sums, from this element of the layout on (flat, a copy, on CPU)."""
        self._backend.synchronize()
        flat = torch.empty(numel, dtype=self.buffer.dtype, device="cpu")
        self.buffer.read(start - self._plan.extent.start, flat)
        return flat

    def norm(self, position: int, order: float = 2.0) -> Tensor:
        """The norm of a gradient that is present, an fp32 scalar on CPU: of the whole, as one process takes it."""
        return norm_of(self.read(position), order)

    def write(self, position: int, gradient: Tensor) -> None:
        """Replace one gradient, the sum over all owners. All of them do so together."""
        self._bases.pop(position, None)
        place = self._plan.place(position)
        flat = torch.empty(place.numel, dtype=self.buffer.dtype, device=gradient.device)
        flat.as_strided(place.shape, place.stride).copy_(gradient)
        with self._adding:
            self._summed.discard(position)
            self._put(position, flat[place.own.start : place.own.stop].cpu())

    def forget(self, position: int) -> None:
        """Forget one gradient, with all owners."""
        self.begin_with(position, None)

    def clear(self) -> None:
        """Forget all gradients; the communicator has been told."""
        with self._adding:
            self._summed = set()
        self._sent = set()
        self._bases = {}
        self._arrived.clear()
        if self._collected.present:
            self._collected.clear()
            self._give_back(self._collected, None)

    # -- for the update

    @property
    def is_file(self) -> bool:
        """True if its home is on disk."""
        return self.buffer.tensor is None

    def continues(self, position: int) -> bool:
        """True if the memory of a slot follows that of the slot before: it does, in the home."""
        return True

    def memory(self, start: int, stop: int) -> None:
        """Gradients in other memory than the home: there are none."""

    # -- what is shown in ``p.grad``: nothing, since no owner has all of it

    def can_show(self, parameter: Tensor) -> bool:
        """True if a gradient itself can be ``parameter.grad``."""
        return False

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


Gradient = GradientBuffer | GradientTensors | SharedGradient
"""The gradient of a chunk."""
