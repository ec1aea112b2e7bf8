"""How gradients get from autograd into chunks, and what ``p.grad`` of a managed parameter shows.

A gradient lives in its chunk's buffer. Between backward and step ``p.grad`` is a view of it where parameter and buffer
agree in dtype and device, so whatever reads or changes gradients there (``torch.nn.utils.clip_grad_norm_``, a
``GradScaler``, a logger) does to training what it does in plain PyTorch. Where that cannot be, ``p.grad`` is an
`AbsentGradient`, which says so when it is read. It is never None there: ``clip_grad_norm_`` skips such parameters,
and clips nothing without a word.

What the user does to ``p.grad`` counts, as in PyTorch: None forgets the gradient, a tensor replaces it. After a step
the gradient is still there until somebody clears it, but the update may be reading it in the background: it is
withdrawn (torch finds None), and shown again when it is asked for, which waits for the update. Where a gradient has its
home elsewhere, reading ``p.grad`` gives a copy, if the system has the memory; that is then the gradient, as if the user
had put it there. So is one that has a graph of its own (``create_graph=True``), until the step takes it.

`GradientSlot` has the states of one parameter.
"""

from collections.abc import Container, Iterable, Sequence, Set

from torch import Tensor

from ..chunk import QUIET, Chunk, ChunkManager, GradientTensors, Room
from ..tensor_parallel import is_sharded
from .absent_gradient import BOOST_WITHOUT, AbsentGradient
from .computed_gradient import ComputedGradient
from .gradient_slot import GradientSlot

_USED_UP = "with update_in_backward=True the optimizer uses it up within backward"


class Gradients:
    """Moves each gradient into its chunk as soon as it is complete, and shows it.

    Parameters
    ----------
    manager
        Has the chunks.
    """

    leaves_theirs = True
    """What lies in tensors of the user's, or has a graph, stays there until the step: see `GradientSlot.take`."""
    may_be_copied = True
    """A gradient that has its home elsewhere is shown as a copy when it is asked for."""

    def __init__(self, manager: ChunkManager) -> None:
        self.reads = 0
        """How often somebody has asked for ``p.grad`` of a parameter that is away."""
        self._manager = manager
        self._slots: dict[int, GradientSlot] = {}
        """By the id of a parameter."""
        self._of_chunk: dict[Chunk, list[GradientSlot]] = {}
        self._withdrawn: set[Chunk] = set()
        """Chunks whose gradients an update has taken, and that nobody has cleared or asked for since."""
        self._unseen: set[Chunk] = set()
        """Chunks that are watched, and whose gradients nobody can have seen since."""

    def follow(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Take gradients of those that are in chunks with room for them. Returns those that are new."""
        new = []
        for parameter in parameters:
            place = self._manager.find(parameter)
            if place is None or place[0].gradient is None or id(parameter) in self._slots:
                continue
            slot = GradientSlot(*place, parameter, self._stand_in(*place, parameter))
            self._slots[id(parameter)] = slot
            self._of_chunk.setdefault(slot.chunk, []).append(slot)
            new.append(parameter)
        return new

    def follows(self, parameter: Tensor) -> bool:
        """True if gradients of this parameter go into its chunk."""
        return id(parameter) in self._slots

    def slot(self, parameter: Tensor) -> GradientSlot:
        """The gradient of a parameter that is followed."""
        return self._slots[id(parameter)]

    def _stand_in(self, chunk: Chunk, position: int, parameter: Tensor) -> AbsentGradient | None:
        """What is shown in the place of a gradient; None where it can be shown itself."""
        assert chunk.gradient is not None
        if is_sharded(parameter):
            return AbsentGradient.of(parameter, "it is this rank's part of the gradient of a DTensor")
        if chunk.gradient.can_show(parameter):
            return None
        buffer = chunk.gradient.buffer
        assert buffer is not None
        if chunk.is_shared:
            return AbsentGradient.of(parameter, "it is summed over the processes that train the model together")
        where = buffer.tier.value if isinstance(buffer, Room) or buffer.tensor is None else str(buffer.tensor.device)
        reason = f"it is kept on {where}, and the parameter is on {parameter.device}"
        return ComputedGradient.at(chunk, position, parameter, reason)

    # -- updates ahead of the step

    def watch(self, chunk: Chunk) -> None:
        """From now on note whether somebody sees the gradients of a chunk, and may change them."""
        self._unseen.add(chunk)

    def were_seen(self, chunk: Chunk) -> bool:
        """True if somebody may have seen, changed or replaced a gradient of a chunk since it was watched."""
        with QUIET():
            return chunk not in self._unseen or any(slot.may_differ for slot in self._of_chunk.get(chunk, ()))

    # -- during backward

    def before_backward(self) -> None:
        """Raise if a backward would add to a gradient that is used up."""

    # -- between backward and step

    @property
    def have_changed(self) -> bool:
        """True if the user has put something into ``p.grad`` that is to be taken over."""
        with QUIET():
            return any(slot.may_differ for slots in self._of_chunk.values() for slot in slots)

    def collect(self, consumed: Container[Chunk]) -> None:
        """Take over what the user has done to ``p.grad`` since.

        Parameters
        ----------
        consumed
            Chunks whose gradients the step under way has used up.

        Raises
        ------
        TypeError
            If a gradient that the user has put there is sparse.
        ValueError
            If one that was used up within backward has been replaced since.
        """
        with QUIET():
            changed = [slot for slots in self._of_chunk.values() for slot in slots if slot.may_differ]
        for slot in changed:
            if slot.is_set_aside:  # its holder may have changed it since it was read
                slot.chunk.settle()
                slot.reveal()
        self._collect(changed, consumed)

    def collect_ours(self, consumed: Container[Chunk]) -> None:
        """As `collect`, but what the user has put into ``p.grad`` or holds stays there."""
        with QUIET():
            replaced = [slot for slots in self._of_chunk.values() for slot in slots if slot.is_replaced]
        left = {slot for slot in replaced if self.leaves_theirs and slot.is_theirs and slot.content is not None}
        self._collect([slot for slot in replaced if slot not in left], consumed)

    @staticmethod
    def _collect(replaced: Iterable[GradientSlot], consumed: Container[Chunk]) -> None:
        for slot in replaced:
            if slot.chunk in consumed and slot.is_used_up:
                raise ValueError(
                    f"the gradient of {slot.name} was changed between backward and step(), but {_USED_UP}; boost "
                    "without it"
                )
            slot.collect()

    def zero(self, parameters: Set[int] | None) -> None:
        """Fill gradients with zeros (of all parameters, or of these, by id); the step then moves and decays them."""
        for chunk in self._of_chunk:
            self.reveal(chunk)
        for key, slot in self._slots.items():
            if parameters is None or key in parameters:
                slot.zero()

    def drop(self, chunk: Chunk, parameters: Set[int] | None = None) -> None:
        """Show gradients of a chunk no more. Those of some parameters (ids) are forgotten; the caller forgets all."""
        if parameters is None:
            self._withdrawn.discard(chunk)
        for slot in self._of_chunk.get(chunk, ()):
            if parameters is None or id(slot.parameter) in parameters:
                slot.clear()
            if parameters is not None and id(slot.parameter) in parameters:
                slot.forget()

    def replace(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """The user is about to set ``p.grad``, which may be withdrawn."""
        if self.follows(parameter):
            self._slots[id(parameter)].replace(gradient)

    # -- homes that move

    def give_way(self, chunk: Chunk) -> bool:
        """Show gradients of a chunk no more, as they are about to move; False if somebody holds one, so they stay.

        `moved` shows them again.
        """
        gradient, slots = chunk.gradient, self._of_chunk.get(chunk, ())
        if gradient is None or not gradient.present:
            return True
        with QUIET():
            is_theirs = any(s.is_theirs or s.is_replaced or s.is_kept for s in slots if not s.is_withdrawn)
        if gradient.is_borrowed or chunk.is_shared or is_theirs or isinstance(gradient, GradientTensors):
            return False
        self._withdraw(chunk)
        if gradient.is_held:
            self.reveal(chunk)
            return False
        return True

    def staying(self, chunk: Chunk) -> tuple[list[str], list[str]]:
        """Of the gradients that cannot move: the parameters whose gradient somebody holds, and those of the others."""
        slots = [slot for slot in self._of_chunk.get(chunk, ()) if slot.is_present or slot.is_theirs]
        is_held = chunk.gradient is not None and chunk.gradient.is_held
        with QUIET():
            held = {
                s for s in slots if is_held or s.is_theirs or s.is_kept or (s.is_replaced and s.content is not None)
            }
        return [s.name for s in slots if s in held], [s.name for s in slots if s not in held]

    def moved(self, chunks: Iterable[Chunk]) -> None:
        """Gradients of these chunks may be elsewhere since `give_way`."""
        for chunk in chunks:
            for slot in self._of_chunk.get(chunk, ()):
                slot.stand_in_with(self._stand_in(chunk, slot.position, slot.parameter))
            self.reveal(chunk)

    def show(self, parameter: Tensor) -> None:
        """The user asks for ``p.grad``: have it there, as a copy if need be, for which there must be memory."""
        slot = self._slots.get(id(parameter))
        if slot is None:
            return
        self.reads += 1
        self.reveal(slot.chunk)
        is_elsewhere = self.may_be_copied and isinstance(slot.content, AbsentGradient) and not is_sharded(parameter)
        if is_elsewhere and slot.is_present:
            if self._manager.eviction.headroom() >= slot.parameter.nbytes:
                slot.copy_in_reach()

    # -- the step and after

    def hand_over(self, chunk: Chunk) -> None:
        """From now on the chunk's gradients are the optimizer's."""
        self._withdraw(chunk)

    def _withdraw(self, chunk: Chunk) -> None:
        for slot in self._of_chunk.get(chunk, ()):
            slot.withdraw()
        self._withdrawn.add(chunk)

    def reveal(self, chunk: Chunk) -> None:
        """Show gradients that an update has taken, when it is over."""
        self._unseen.discard(chunk)
        if chunk in self._withdrawn:
            chunk.settle()
            self._withdrawn.discard(chunk)
            for slot in self._of_chunk.get(chunk, ()):
                if slot.is_present:
                    slot.reveal()


class ScaledGradients(Gradients):
    """Gradients of a scaled loss: they are not those that a user expects, and are never shown."""

    may_be_copied = False

    def _stand_in(self, chunk: Chunk, position: int, parameter: Tensor) -> AbsentGradient | None:
        return AbsentGradient.of(parameter, "it is multiplied by the loss scale of fp16")


class ConsumedGradients(Gradients):
    """Gradients that the optimizer uses up within backward: they are never shown, nor can one be taken back.

    From its update until ``zero_grad`` the gradient of a parameter is an `AbsentGradient`.
    """

    leaves_theirs = may_be_copied = False

    def _stand_in(self, chunk: Chunk, position: int, parameter: Tensor) -> AbsentGradient | None:
        return AbsentGradient.of(parameter, _USED_UP, BOOST_WITHOUT)

    def before_backward(self) -> None:
        for slot in self._slots.values():
            if not slot.is_used_up:
                continue
            if isinstance(slot.content, AbsentGradient):
                raise ValueError(
                    f"the gradient of {slot.name} was not zeroed since the last step. Plain PyTorch would add to it, "
                    "but with update_in_backward=True it is used up: call optimizer.zero_grad() before each backward"
                )
            slot.lose_sight()

    def hand_over(self, chunk: Chunk) -> None:
        assert chunk.gradient is not None
        chunk.gradient.clear()
