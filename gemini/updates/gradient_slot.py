"""What ``p.grad`` of one parameter is, and what becomes of the gradient in its chunk.

::

             arrives, is collected         optimizer.step()
    ABSENT -----------------------> SHOWN ------------------> WITHDRAWN --asked for, pin--> SHOWN
       ^  '--------.                 |  ^--copied, collected--> COPIED <--the copy, if held--'
       |           |                 |  ^                       ^   |
       |           '--p.grad = g-->THEIRS--collected--> READ ---'   '--their tensor goes back--> THEIRS or ABSENT
       '-- zero_grad, p.grad = None, from each of them
"""

from enum import Enum, auto
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from ..chunk import QUIET, Chunk, Gradient, SharedGradient
from ..errors import StateError
from ..tensor_parallel import is_sharded
from ..torch_private import put_hook_last
from .absent_gradient import AbsentGradient
from .computed_gradient import renewed
from .held_gradient import KeptForHolders, is_held, is_shared_memory, references


class GradState(Enum):
    """What is in ``p.grad``, as far as we have put it there or have been told."""

    ABSENT = auto()
    """Nothing of ours: None, a tensor that autograd has made, or one that the user has put there unseen."""
    SHOWN = auto()
    """The chunk's gradient: a view of it, or an `AbsentGradient`."""
    THEIRS = auto()
    """A tensor that the user has put there: backward adds to it, as in plain PyTorch."""
    COPIED = auto()
    """A copy of the chunk's gradient, made for somebody who asked: as THEIRS, as long as somebody holds it."""
    READ = auto()
    """The chunk's gradient, which has been read from the user's tensor for a step to come."""
    WITHDRAWN = auto()
    """None: an update has the gradient, and may be reading it."""

    __hash__ = object.__hash__  # states are looked up for each gradient, and Enum's own is written in Python


_TRANSITIONS: dict[GradState, frozenset[GradState]] = {
    GradState.ABSENT: frozenset({GradState.SHOWN, GradState.THEIRS, GradState.WITHDRAWN}),
    GradState.SHOWN: frozenset({GradState.ABSENT, GradState.THEIRS, GradState.COPIED, GradState.WITHDRAWN}),
    GradState.COPIED: frozenset({GradState.ABSENT, GradState.SHOWN, GradState.THEIRS, GradState.WITHDRAWN}),
    GradState.THEIRS: frozenset({GradState.ABSENT, GradState.SHOWN, GradState.READ, GradState.WITHDRAWN}),
    GradState.READ: frozenset({GradState.ABSENT, GradState.SHOWN, GradState.THEIRS, GradState.WITHDRAWN}),
    GradState.WITHDRAWN: frozenset({GradState.ABSENT, GradState.SHOWN, GradState.THEIRS, GradState.COPIED}),
}


class Watching(partial[None]):
    """A hook of ours on a parameter. It holds weakly what it leads to: see `runtime.arrivals`."""


class GradientSlot:
    """The gradient of one parameter, in its chunk and in ``p.grad``.

    Parameters
    ----------
    chunk, position, parameter
        Where the gradient is in chunks, and of what.
    stand_in
        Shown in its place; None where it can be shown itself.
    """

    __slots__ = (
        *("__weakref__", "chunk", "parameter", "position", "stand_in", "state"),
        *("_kept", "_makes_way", "_shown", "_unheld"),
    )

    def __init__(self, chunk: Chunk, position: int, parameter: Tensor, stand_in: AbsentGradient | None) -> None:
        self.chunk = chunk
        self.position = position
        self.parameter = parameter
        self.stand_in: AbsentGradient | None = None
        self.state = GradState.ABSENT
        self._shown: Tensor | None = None
        """What ``p.grad`` was last set to; the user may have set it to another tensor since."""
        self._kept: KeptForHolders | None = None
        """The tensor that was in ``p.grad`` when a step read it."""
        self._unheld = 0
        """References to a copy in ``p.grad`` that nobody holds."""
        self._makes_way = False
        """Autograd tells before it adds to ``p.grad``."""
        self.stand_in_with(stand_in)

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.chunk.layout.slots[self.position].name

    @property
    def buffer(self) -> Gradient:
        """The chunk's gradients."""
        assert self.chunk.gradient is not None
        return self.chunk.gradient

    @property
    def is_present(self) -> bool:
        """True if the chunk has the gradient."""
        return self.position in self.buffer.present

    @property
    def content(self) -> Tensor | None:
        """What torch has in ``p.grad``, whatever the parameter would say while it is away."""
        with QUIET():
            return self.parameter.grad

    @property
    def is_replaced(self) -> bool:
        """True if ``p.grad`` is another tensor than was shown, or that one has been given other memory.

        To be asked within `QUIET`.
        """
        return self.parameter.grad is not self._shown or self.buffer.has_moved(self.position)

    @property
    def is_withdrawn(self) -> bool:
        """True if an update has the gradient, or it is about to move."""
        return self.state is GradState.WITHDRAWN

    @property
    def is_theirs(self) -> bool:
        """True if a tensor of the user's is in ``p.grad``, as far as we have been told, or a copy that is held."""
        if self.state is not GradState.COPIED:
            return self.state in (GradState.THEIRS, GradState.READ)
        return is_held(self.parameter, self._unheld)

    @property
    def is_kept(self) -> bool:
        """True if the chunk's gradient was read from a tensor that somebody holds, and may have changed since."""
        return self._kept is not None and self._kept.tensor is not None

    @property
    def is_set_aside(self) -> bool:
        """True if a step has read a tensor that somebody holds, and that is not in ``p.grad`` again yet."""
        return self.is_withdrawn and not self.chunk.is_shared and self.is_kept

    @property
    def may_differ(self) -> bool:
        """True if what counts may be another gradient than the chunk has. To be asked within `QUIET`."""
        return self.is_replaced or self.is_set_aside

    @property
    def is_used_up(self) -> bool:
        """True if a gradient was shown that the chunk has no more."""
        return self._shown is not None and not self.is_present

    # -- backward

    def take(self, leaves_theirs: bool) -> tuple[Tensor, bool] | None:
        """Take what autograd left in ``p.grad``; None if it stays there, or the chunk has it already.

        Parameters
        ----------
        leaves_theirs
            What is not ours alone stays until the step: it will be differentiated, or lies in a buffer of the user's.

        Returns
        -------
        tuple of Tensor and bool
            For `put`. It is whole if the user had replaced what was shown, and autograd added to that.
        """
        with QUIET():
            is_theirs = self.is_theirs  # before the gradient has a name here
            gradient = self.parameter.grad
            if gradient is None or gradient is self._shown:
                return None  # in the last case autograd added to the view, so the chunk has it
            if leaves_theirs and self.is_set_aside:
                self._add_to_kept(gradient)
                return None
            if leaves_theirs and (gradient.requires_grad or is_theirs):
                return None
            self.parameter.grad = None  # first: if what follows fails, the next backward must not find it here
        is_whole, self._shown = self._shown is not None, None
        return gradient, is_whole

    def _add_to_kept(self, gradient: Tensor) -> None:
        """Add to the tensor that was in ``p.grad`` before the last step, as autograd would have, had it been there."""
        self._set(None)
        self.chunk.settle()  # the last step may still be reading the chunk, which has no gradient from now on
        self.reveal()
        kept = self.content
        assert kept is not None
        self._set(kept + gradient if gradient.requires_grad else kept.add_(gradient))

    def put(self, gradient: Tensor, is_whole: bool, state: GradState = GradState.SHOWN) -> None:
        """Put a gradient into the chunk, and show it.

        Parameters
        ----------
        is_whole
            It replaces what the chunk has.
        state
            SHOWN or READ.
        """
        self.chunk.settle()  # the last step may still be reading the buffer (when gradients were not zeroed)
        buffer, position = self.buffer, self.position
        if is_whole or position not in buffer.present:
            buffer.part_with(position)
        put = buffer.write if is_whole else buffer.add
        put(position, gradient)
        self._kept = None
        self._show(state)

    def make_way(self, is_seen: bool) -> None:
        """Before autograd adds to ``p.grad``: a stand-in cannot be added to. The sum is there if it ``is_seen``."""
        if isinstance(self.buffer, SharedGradient):
            self._make_way_for_all(self.buffer)
            return
        if not isinstance(self._shown, AbsentGradient):
            return
        gradient = self.content
        if gradient is self._shown:
            is_whole = is_seen and self.is_present and not is_sharded(self.parameter)
            self._set(_copied(self) if is_whole else None)
        elif not (is_whole := gradient is not None):
            self.forget()
        if not is_whole:  # else autograd adds to what is there, and `take` has the whole
            self._end(GradState.ABSENT)

    def _make_way_for_all(self, shared: SharedGradient) -> None:
        """As `make_way` where several ranks add to what the user has put there."""
        gradient, shown = self.content, self._shown
        if gradient is None:
            if shown is not None:
                shared.forget(self.position)
        else:
            self._set(None)
            if gradient is not shown:
                shared.begin_with(self.position, gradient.detach())
        self._end(GradState.ABSENT)

    # -- between backward and step

    def collect(self) -> None:
        """Take over what the user has put into ``p.grad``."""
        gradient, was_copy = self.content, self.state is GradState.COPIED
        was_theirs = self.state in (GradState.THEIRS, GradState.READ)
        has_alias = was_copy and gradient is not None and is_shared_memory(gradient)  # before it is being written
        self.chunk.settle()
        self._kept = None
        self._end(GradState.ABSENT if gradient is None else self.state)
        if gradient is None:
            self.forget()
        elif gradient is self.buffer.view(self.position):  # it has other memory now (``p.grad.data = ...``)
            del gradient
            self.buffer.write(self.position, self.buffer.renew(self.position))
            self._show(GradState.SHOWN)
        else:
            # Detached: another tensor over its memory, by which the chunk knows that it has to copy.
            state = GradState.READ if was_theirs else GradState.SHOWN
            self.put(gradient.detach(), is_whole=True, state=state)
            self._kept = KeptForHolders(gradient, was_theirs, was_copy, has_alias)

    def replace(self, gradient: Tensor | None) -> None:
        """The user is about to set ``p.grad``."""
        if self.state is GradState.WITHDRAWN:
            self.forget()
        self._kept = None
        if gradient is None and self._shown is not None and self.stand_in is None:
            self.forget()  # at once: its memory is free then, as in plain PyTorch
            self._shown = None
        if gradient is not None and gradient is not self._shown:
            self._move_to(GradState.THEIRS)
        else:
            self._move_to(GradState.ABSENT if self._shown is None else GradState.SHOWN)

    def zero(self) -> None:
        """Fill the gradient with zeros."""
        if not self.chunk.is_shared and self.is_present and self.is_kept:
            self._set(None)
            self._restore()  # its holder finds zeros, too
        gradient = self.content
        if gradient is not None and not isinstance(gradient, AbsentGradient):
            (gradient if gradient.grad_fn is None else gradient.detach_()).zero_()
        elif self.is_present:
            write = self.buffer.begin_with if isinstance(self.buffer, SharedGradient) else self.buffer.write
            write(self.position, _zeros_like(self.chunk.bindings[self.position].view))

    def copy_in_reach(self) -> None:
        """Put a copy into ``p.grad`` in place of the stand-in; it counts as the user's own tensor would."""
        self._set(_copied(self))
        self._unheld = references(self.parameter)
        if self.state is GradState.SHOWN:
            self._move_to(GradState.COPIED)

    # -- the step and after

    def withdraw(self) -> None:
        """An update takes the gradient."""
        if self._shown is not None:
            self._set(None)
        self._end(GradState.WITHDRAWN if self.is_present else GradState.ABSENT)

    def reveal(self) -> None:
        """Show the gradient that an update has taken and read, or what was in ``p.grad`` before that update."""
        if self.content is None and not self._restore():
            self._show(GradState.SHOWN)
        self._kept = None

    def _restore(self) -> bool:
        """Have the tensor in ``p.grad`` again that was read, with what its holder does to it; False if it is gone."""
        kept, self._kept = self._kept, None
        if kept is None or (held := kept.tensor) is None:
            return False
        self._set(held)
        self.forget()  # what counts is that tensor, with what the user does to it
        self._end(GradState.THEIRS if kept.is_theirs else GradState.COPIED if kept.is_copy else GradState.ABSENT)
        return True

    def stand_in_with(self, stand_in: AbsentGradient | None) -> None:
        """Show this in the gradient's place from now on; None: itself."""
        self.stand_in = stand_in
        if stand_in is None or self._makes_way:
            return
        self._makes_way = True
        _watch(self.parameter, Watching(_arriving, ref(self)))

    def _show(self, state: GradState) -> None:
        shown = self.buffer.view(self.position) if self.stand_in is None else renewed(self.stand_in)
        assert shown is not None
        self._set(shown)
        self._shown = shown
        self._move_to(state)

    def clear(self) -> None:
        """Show no gradient any more; no tensor of the user's is it."""
        if self._shown is not None:
            self._set(None)
        self._kept = None
        self._end(GradState.ABSENT)

    def forget(self) -> None:
        """The chunk has no gradient of this parameter."""
        self.buffer.forget(self.position)

    def lose_sight(self) -> None:
        """What was shown is in ``p.grad`` no more."""
        self._end(GradState.ABSENT)

    def _end(self, state: GradState) -> None:
        self._shown = None
        self._move_to(state)

    def _set(self, gradient: Tensor | None) -> None:
        with QUIET():
            self.parameter.grad = gradient

    def _move_to(self, state: GradState) -> None:
        if state is not self.state and state not in _TRANSITIONS[self.state]:
            raise StateError(f"the gradient of {self.name}: {self.state.name} -> {state.name} is not a transition")
        self.state = state


def _copied(slot: GradientSlot) -> Tensor:
    slot.chunk.settle()
    return slot.buffer.read(slot.position).to(slot.parameter.device)


def _zeros_like(view: Tensor) -> Tensor:
    """Zeros that take no memory."""
    return torch.zeros((), dtype=view.dtype).expand(view.shape)


def _watch(parameter: Tensor, watching: Watching) -> None:
    is_trained = parameter.requires_grad
    parameter.requires_grad_(True)  # of one that is frozen just now autograd tells nothing
    parameter.register_hook(watching)
    parameter.requires_grad_(is_trained)


def _arriving(of: "ref[GradientSlot]", gradient: Tensor) -> None:
    """Autograd is about to add to ``p.grad``."""
    slot = of()
    if slot is not None:
        slot.make_way(is_seen=put_hook_last(slot.parameter, Watching))  # hooks of the user's run before ours
