"""How gradients get from autograd into chunks, and what ``p.grad`` of a managed parameter shows.

A gradient lives in its chunk's buffer. Between backward and step ``p.grad`` is a view of it where parameter and buffer
agree in dtype and device, so whatever reads or changes gradients there (``torch.nn.utils.clip_grad_norm_``, a
``GradScaler``, a logger) does to training what it does in plain PyTorch. Where that cannot be, ``p.grad`` is an
`AbsentGradient`, which says so to whoever reads it. It is never None there: ``clip_grad_norm_`` skips such parameters,
and clips nothing without a word.

::

    p.grad    None --backward--> shown: a view or an AbsentGradient --step--> withdrawn --is asked for, pin--> shown
                ^-------- zero_grad, or the user's None -------------|--------------|

What the user does to ``p.grad`` counts, as in PyTorch: None forgets the gradient, a tensor replaces it. After a step
the gradient is still there until somebody clears it, but the update may be reading it in the background: it is
withdrawn (torch finds None), and shown again when it is asked for, which waits for the update. Where a gradient has its
home elsewhere, reading ``p.grad`` gives a copy, if the system has the memory; that is then the gradient, as if the user
had put it there. So is one that has a graph of its own (``create_graph=True``), until the step takes it.

Where the optimizer uses gradients up within backward, ``p.grad`` is an `AbsentGradient` from then until ``zero_grad``.
"""

import weakref
from collections.abc import Callable, Container, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chunk import QUIET, Chunk, ChunkManager

_METADATA: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "requires_grad", "ndim")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_sparse", "is_leaf", "grad_fn")),
        *(getattr(Tensor, name) for name in ("size", "numel", "dim", "stride", "is_floating_point", "is_complex")),
        *(getattr(Tensor, name) for name in ("element_size", "__len__", "__hash__")),
    }
)

_CLIP = (
    "Clip with optimizer.clip_grad_by_norm(max_norm) or GeminiPlugin(max_norm=...), which see all gradients; forget "
    "them with optimizer.zero_grad()"
)
_USED_UP = "with update_in_backward=True the optimizer uses it up within backward"
_BOOST_WITHOUT = "To clip, scale or look at gradients boost without it"


class AbsentGradient(Tensor):
    """Stands for a gradient that is not in ``p.grad``: has its shape, dtype and device, and refuses to be read."""

    reason: str
    remedy: str

    @staticmethod
    def of(parameter: Tensor, reason: str, remedy: str = _CLIP) -> "AbsentGradient":
        """A stand-in (no memory) for the gradient of ``parameter``; ``reason`` says where that is."""
        nan = torch.full((), float("nan"), dtype=parameter.dtype, device=parameter.device)
        stand_in: AbsentGradient = nan.expand(parameter.shape).as_subclass(AbsentGradient)
        stand_in.reason = reason
        stand_in.remedy = remedy
        return stand_in

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<a gradient that is not here: {self.reason}>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with QUIET():
                return func(*args, **(kwargs or {}))
        told = next(((a.reason, a.remedy) for a in _flat(args) if isinstance(a, AbsentGradient)), None)
        reason, remedy = told or ("it is in a chunk", _CLIP)
        raise RuntimeError(f"this gradient cannot be read through p.grad: {reason}. {remedy}")


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@dataclass(frozen=True, slots=True)
class Arrival:
    """A gradient on its way from ``p.grad`` into its chunk."""

    chunk: Chunk
    position: int
    parameter: Tensor
    gradient: Tensor
    is_whole: bool
    """It takes the place of what the chunk has: the user had replaced what was shown, and autograd added to that."""


class Gradients:
    """Moves each gradient into its chunk as soon as it is complete, and shows it.

    Parameters
    ----------
    manager
        Has the chunks.
    are_scaled
        Backward runs on a scaled loss: then nobody is shown a gradient, since it is not the one expected.
    are_used_up
        The optimizer takes gradients within backward: nobody is shown one, nor can one be taken back.
    """

    def __init__(self, manager: ChunkManager, are_scaled: bool, are_used_up: bool = False) -> None:
        self._manager = manager
        self._are_scaled = are_scaled
        self._are_used_up = are_used_up
        self._shown: dict[int, Tensor] = {}
        """id of a parameter -> what ``p.grad`` was set to. Without an entry ``p.grad`` is autograd's or the user's."""
        self.withdrawn: set[Chunk] = set()
        """Chunks whose gradients an update has taken, and that nobody has cleared or asked for since."""
        self._theirs: set[int] = set()
        """ids of parameters whose ``p.grad`` the user has set: backward adds to that tensor, as in plain PyTorch."""
        self._put: dict[int, Callable[[], Tensor | None]] = {}
        """id of a parameter -> the tensor that was in ``p.grad`` when an update read it: one that the user has set, or
        another while somebody holds it."""
        self._stand_ins: dict[int, AbsentGradient] = {}
        self._followed: set[int] = set()
        """ids of the parameters whose gradients go into chunks."""

    def follow(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Take gradients of those that are in chunks with room for them. Returns these."""
        are_scaled, are_used_up = self._are_scaled, self._are_used_up
        followed = []
        for parameter in parameters:
            place = self._manager.find(parameter)
            if place is None or place[0].gradient is None:
                continue
            followed.append(parameter)
            self._followed.add(id(parameter))
            view = place[0].gradient.view(place[1])
            if are_used_up:
                self._stand_ins[id(parameter)] = AbsentGradient.of(parameter, _USED_UP, _BOOST_WITHOUT)
            elif are_scaled or view is None or (view.dtype, view.device) != (parameter.dtype, parameter.device):
                reason = _reason(place[0], parameter, are_scaled)
                self._stand_ins[id(parameter)] = AbsentGradient.of(parameter, reason)
        return followed

    def has_stand_in(self, parameter: Tensor) -> bool:
        """True if an `AbsentGradient` is shown for this parameter, to which autograd cannot add: see `make_way`."""
        return id(parameter) in self._stand_ins

    def follows(self, parameter: Tensor) -> bool:
        """True if gradients of this parameter go into its chunk."""
        return id(parameter) in self._followed

    # -- during backward

    def take(self, parameter: Tensor) -> Arrival | None:
        """Take what autograd left in ``p.grad``; None if it stays there, or the chunk has it already."""
        place = self._manager.find(parameter)
        with QUIET():
            gradient = parameter.grad
            if gradient is None or place is None or gradient is self._shown.get(id(parameter)):
                return None  # in the last case autograd added to the view, so the chunk has it
            if (gradient.requires_grad or id(parameter) in self._theirs) and not self._are_used_up:
                return None  # it will be differentiated, or lies in a buffer of the user's: `collect` takes it over
            parameter.grad = None  # first: if what follows fails, the next backward must not find it here
        is_whole = self._shown.pop(id(parameter), None) is not None
        return Arrival(*place, parameter, gradient, is_whole)

    def put(self, arrival: Arrival) -> None:
        """Put into its chunk what `take` returned, and show it."""
        chunk, position = arrival.chunk, arrival.position
        assert chunk.gradient is not None
        chunk.settle()  # the last step may still be reading the buffer (when gradients were not zeroed)
        if arrival.is_whole or position not in chunk.gradient.present:
            chunk.gradient.part_with(position)
        if arrival.is_whole:
            chunk.gradient.write(position, arrival.gradient)
        else:
            chunk.gradient.add(position, arrival.gradient)
        self._show(arrival.parameter, chunk, position)

    def make_way(self, parameter: Tensor) -> None:
        """Before autograd adds to ``p.grad``: a stand-in cannot be added to."""
        shown = self._shown.get(id(parameter))
        if shown is None or shown is not self._stand_ins.get(id(parameter)):
            return
        gradient = _grad_of(parameter)
        if gradient is shown:
            _set_grad(parameter, None)
        elif gradient is None:
            self._forget(parameter)
        else:
            return  # the user's tensor: autograd adds to it, and `take` has the whole
        self._shown.pop(id(parameter), None)

    # -- between backward and step

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
        for chunk in self._manager.chunks:
            if chunk.gradient is None:
                continue
            for position, gradient in self._changed(chunk):
                parameter = chunk.bindings[position].parameter
                was_shown = id(parameter) in self._shown
                if chunk in consumed and was_shown and position not in chunk.gradient.present:
                    raise ValueError(
                        f"the gradient of {chunk.layout.slots[position].name} was changed between backward and step(), "
                        f"but {_USED_UP}; boost without it"
                    )
                chunk.settle()
                self._shown.pop(id(parameter), None)
                if gradient is None:
                    self._forget(parameter)
                elif gradient is chunk.gradient.view(position):  # it has other memory now (``p.grad.data = ...``)
                    del gradient
                    chunk.gradient.write(position, chunk.gradient.renew(position))
                    self._show(parameter, chunk, position)
                else:
                    chunk.gradient.part_with(position)
                    chunk.gradient.write(position, gradient)
                    is_theirs = id(parameter) in self._theirs
                    self._put[id(parameter)] = partial(_same, gradient) if is_theirs else weakref.ref(gradient)
                    self._show(parameter, chunk, position)

    def _changed(self, chunk: Chunk) -> list[tuple[int, Tensor | None]]:
        """Positions whose ``p.grad`` is not what the chunk shows, and what it is."""
        assert chunk.gradient is not None
        found = []
        with QUIET():
            for position, binding in enumerate(chunk.bindings):
                key, gradient = id(binding.parameter), binding.parameter.grad
                is_shown = gradient is self._shown.get(key)
                if (not is_shown or chunk.gradient.has_moved(position)) and key in self._followed:
                    found.append((position, gradient))
        return found

    def refuse_not_zeroed(self) -> None:
        """Raise if a gradient has been used up within backward, and has not been zeroed since."""
        for chunk in self._manager.chunks:
            for position, binding in enumerate(chunk.bindings):
                shown = self._shown.get(id(binding.parameter))
                if shown is None or chunk.gradient is None or position in chunk.gradient.present:
                    continue
                if _grad_of(binding.parameter) is shown:
                    raise ValueError(
                        f"the gradient of {chunk.layout.slots[position].name} was not zeroed since the last step. "
                        "Plain PyTorch would add to it, but with update_in_backward=True it is used up: call "
                        "optimizer.zero_grad() before each backward"
                    )
                self._shown.pop(id(binding.parameter))

    def hand_over(self, chunk: Chunk) -> None:
        """From now on the chunk's gradients are the optimizer's."""
        assert chunk.gradient is not None
        if self._are_used_up:
            chunk.gradient.clear()
            return
        self._take_off(chunk)
        self.withdrawn.add(chunk)

    def hide(self, chunk: Chunk) -> None:
        """Show no gradient of a chunk any more."""
        self._take_off(chunk)
        self.withdrawn.discard(chunk)
        if self._put or self._theirs:
            for binding in chunk.bindings:
                self._disown(binding.parameter)

    def _disown(self, parameter: Tensor) -> None:
        """No tensor of the user's is the gradient of a parameter any more."""
        self._put.pop(id(parameter), None)
        self._theirs.discard(id(parameter))

    def drop(self, chunk: Chunk, parameters: Set[int]) -> None:
        """Forget the gradients of some parameters (ids) of a chunk, and show them no more."""
        for parameter in (binding.parameter for binding in chunk.bindings if id(binding.parameter) in parameters):
            if self._shown.pop(id(parameter), None) is not None:
                _set_grad(parameter, None)
            self._disown(parameter)
            self._forget(parameter)

    def _take_off(self, chunk: Chunk) -> None:
        with QUIET():
            for binding in chunk.bindings:
                if self._shown.pop(id(binding.parameter), None) is not None:
                    binding.parameter.grad = None

    def reveal(self, chunk: Chunk) -> None:
        """Show gradients that an update has taken, when it is over."""
        if chunk in self.withdrawn:
            chunk.settle()
            self.withdrawn.discard(chunk)
            assert chunk.gradient is not None
            for position in sorted(chunk.gradient.present):
                parameter = chunk.bindings[position].parameter
                put = self._put.pop(id(parameter), None)
                held = None if put is None else put()
                if _grad_of(parameter) is not None:
                    continue
                if held is None:
                    self._show(parameter, chunk, position)
                else:
                    _set_grad(parameter, held)

    def copy_in_reach(self, parameter: Tensor) -> None:
        """Put a copy in place of a stand-in that says where the gradient is, if there is memory for it."""
        stand_in, place = self._stand_ins.get(id(parameter)), self._manager.find(parameter)
        if stand_in is None or place is None or self._are_scaled or self._are_used_up:
            return
        chunk, position = place
        assert chunk.gradient is not None
        if _grad_of(parameter) is stand_in and position in chunk.gradient.present:
            if self._manager.headroom() < parameter.nbytes:
                return
            chunk.settle()
            _set_grad(parameter, chunk.gradient.read(position).to(parameter.device))

    def before_replacing(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """The user is about to set ``p.grad``, which may be withdrawn."""
        place = self._manager.find(parameter)
        if place is not None and place[0] in self.withdrawn:
            self._forget(parameter)
        self._put.pop(id(parameter), None)
        if gradient is None or gradient is self._shown.get(id(parameter)):
            self._theirs.discard(id(parameter))
        else:
            self._theirs.add(id(parameter))

    def zero(self, parameters: Set[int] | None) -> None:
        """Fill gradients with zeros, which stay gradients: the step then moves and decays as torch does.

        Parameters
        ----------
        parameters
            ids; None for all.
        """
        for chunk in self._manager.chunks:
            if chunk.gradient is None:
                continue
            self.reveal(chunk)
            for position, binding in enumerate(chunk.bindings):
                if parameters is not None and id(binding.parameter) not in parameters:
                    continue
                gradient = _grad_of(binding.parameter)
                if gradient is not None and gradient is not self._stand_ins.get(id(binding.parameter)):
                    (gradient if gradient.grad_fn is None else gradient.detach_()).zero_()
                elif position in chunk.gradient.present:
                    zero = torch.zeros((), dtype=binding.view.dtype)
                    chunk.gradient.write(position, zero.expand(binding.view.shape))

    def _show(self, parameter: Tensor, chunk: Chunk, position: int) -> None:
        assert chunk.gradient is not None
        shown = self._stand_ins.get(id(parameter), chunk.gradient.view(position))
        _set_grad(parameter, shown)
        assert shown is not None
        self._shown[id(parameter)] = shown

    def _forget(self, parameter: Tensor) -> None:
        place = self._manager.find(parameter)
        if place is not None and place[0].gradient is not None:
            place[0].gradient.forget(place[1])


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _grad_of(parameter: Tensor) -> Tensor | None:
    """What torch has in ``p.grad``, whatever the parameter would say while it is away."""
    with QUIET():
        return parameter.grad


def _set_grad(parameter: Tensor, gradient: Tensor | None) -> None:
    with QUIET():
        parameter.grad = gradient


def _reason(chunk: Chunk, parameter: Tensor, are_scaled: bool) -> str:
    assert chunk.gradient is not None and chunk.gradient.buffer is not None
    buffer = chunk.gradient.buffer
    if are_scaled:
        return "it is multiplied by the loss scale of fp16"
    if not chunk.is_whole:
        return "it is summed over the processes that train the model together"
    where = buffer.tier.value if buffer.tensor is None else str(buffer.tensor.device)
    return f"it is kept on {where}, and the parameter is on {parameter.device}"
