"""LazyInitContext: what a user enters to build a model without memory."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemini.arguments.checked import checked
from gemini.arguments.devices import Device
from gemini.arguments.rules import OrNone
from gemini.errors import LazyInitError
from gemini.torch_private import TorchDispatchMode, is_composite, without_torch_function

from .device import check_device, check_requested_device
from .interception import reading_lazily
from .materialize import materialize
from .record import dispatch, read
from .session import session
from .tape import Tape
from .tensor import LazyTensor, _set_data, assign_data

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .sharding import Layout

M = TypeVar("M", bound=nn.Module | Tensor)

_UNINITIALISED = {nn.UninitializedParameter.__new__.__code__, nn.UninitializedBuffer.__new__.__code__}


class LazyInitContext:
    """Build modules without allocating their parameters.

    Inside the context every op that creates or changes tensors is recorded instead of run. :func:`materialize` (or
    ``booster.boost``) makes the model real later, with the values that eager construction would have given at the same
    seed.

    Parameters
    ----------
    default_device : str or torch.device, optional
        Where tensors made without an explicit device will live; torch's current default device if not given.

    Raises
    ------
    ValueError
        If `default_device` is not usable on this machine.

    Notes
    -----
    Contexts may be nested, and several may follow each other: they share one tape as long as the
    random generator is not moved in between. While a lazy model waits, the state of the random generator differs from
    what it was in bits that no draw ever reads (see ``rng.py``); the numbers it gives are unchanged.

    Arrays from ``tensor.numpy()`` inside the context are read-only copies. Real tensors that are copied into lazy ones
    are cloned, so a ``load_state_dict`` into a lazy model holds a copy of the loaded tensors until it is materialised.
    A value that is read (``item``, ``trunc_normal_``'s rejection test) is computed at once, its draws included.

    Weights from files (``from_pretrained``, ``safetensors``, ``torch.load``) are read at materialisation; until then
    the files must not be written into. What ``torch.load`` reads without ``mmap=True`` is in memory at once.

    Uninitialised parameters (``nn.LazyLinear``) stay what they are; a first forward inside the context makes them real
    at once, with memory of their own. Subclasses of ``nn.Parameter`` get their class at
    materialisation. Sparse, nested and quantised tensors are computed at once and are real. Lazy tensors
    have no autograd graph, so an in-place op on a parameter outside of ``no_grad`` is recorded where eager would raise.

    Examples
    --------
    >>> with LazyInitContext():
    ...     model = nn.Linear(4, 4)
    >>> model = LazyInitContext.materialize(model)
    """

    @checked({"default_device": OrNone(Device())})
    def __init__(self, default_device: str | torch.device | None = None) -> None:
        self._device = None if default_device is None else torch.device(default_device)
        if self._device is not None:
            if self._device.type == "meta":
                raise ValueError("default_device='meta' has no memory to materialise into; leave default_device out")
            check_device(self._device)
        self._stack: ExitStack | None = None

    def __enter__(self) -> LazyInitContext:
        if self._stack is not None:
            raise RuntimeError("this LazyInitContext is already entered; nest a new one instead")
        with ExitStack() as stack:
            if session.tape is None:
                tape = _last_tape() or Tape()
                stack.callback(session.end)
                session.begin(tape)
                stack.enter_context(reading_lazily())
                stack.enter_context(_FunctionMode(tape))
                stack.enter_context(_RecordingMode(tape))
            if self._device is not None:
                stack.enter_context(self._device)
            self._stack = stack.pop_all()
        session.contexts.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stack is None:
            raise RuntimeError("this LazyInitContext is not entered")
        if self not in session.contexts:
            raise RuntimeError("leave a LazyInitContext in the thread that entered it; it is still entered there")
        if session.contexts[-1] is not self:
            raise RuntimeError("leave the inner LazyInitContext first; both are still entered")
        session.contexts.pop()
        stack, self._stack = self._stack, None
        stack.close()
        if isinstance(error, RuntimeError) and "python object of type LazyTensor" in str(error):
            raise LazyInitError(
                "a lazy tensor cannot be given another class (Tensor.as_subclass, Tensor._make_subclass); "
                "build this module outside of LazyInitContext, the rest of the model inside"
            ) from error

    @staticmethod
    def materialize(module: M, *, device_mesh: DeviceMesh | None = None, placements: Layout | None = None) -> M:
        """Make every lazy tensor of `module` real, in place; see :func:`gemini.lazy.materialize`.

        Parameters
        ----------
        module : nn.Module or Tensor
            Made inside a context.
        device_mesh, placements : optional
            Keep this rank's part of each parameter only, as a ``DTensor``.
        """
        return materialize(module, device_mesh=device_mesh, placements=placements)


def _last_tape() -> Tape | None:
    """Return the previous context's tape if the random numbers go on where it stopped: then it is the same program."""
    tape = session.last()
    if tape is None:
        return None
    tape.settle()
    return tape if tape.generators.untouched(torch.default_generator) else None


class _RecordingMode(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_composite(func):
            with self:  # a mode is off while it handles a call
                return func.decompose(*args, **kwargs or {})
        with without_torch_function():  # our own calls are not to be recorded, and run faster unseen
            return dispatch(self._tape, func, args, kwargs or {}, inside=True)


class _FunctionMode(TorchFunctionMode):
    """Sees what never reaches the dispatcher: devices torch would try to initialise, ``real.data = lazy``.

    Also the stand-in of an uninitialised parameter. It has no elements, and C++ would not give a lazy tensor its class.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check_requested_device(func, args, kwargs)
        if func is torch.empty and sys._getframe(1).f_code in _UNINITIALISED:
            with self._tape.paused():
                return func(*args, **kwargs)
        if func == _set_data and isinstance(args[1], LazyTensor):
            if isinstance(args[0], nn.UninitializedParameter | nn.UninitializedBuffer):
                return func(args[0], read(args[1]))  # a dry run gives it its shape; it stays the object that it is
            return assign_data(args[0], args[1])
        return func(*args, **kwargs)
