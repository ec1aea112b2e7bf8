"""LazyTensor: the object a user holds until its value is known."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gemini.errors import LazyInitError
from gemini.torch_private import (
    below_autograd,
    make_wrapper,
    parameter_class_wanted_by,
    tree_leaves,
    without_subclasses,
)

from .device import check_requested_device
from .tape import Tape, Value

REMEDY = "make the model real first with LazyInitContext.materialize(model) or booster.boost(model, ...)"

_set_data = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class LazyState:
    """The tape, value and geometry of a lazy tensor."""

    __slots__ = ("meta", "tape", "value")

    def __init__(self, tape: Tape, value: Value, meta: Tensor) -> None:
        self.tape = tape
        self.value = value
        self.meta = meta


class LazyTensor(torch.Tensor):
    """A tensor without memory that reports the geometry and device it will have.

    It runs below autograd: a graph or a view relation would hold C++ references to the tensor, and then the object
    could not become real in place. Initialisation needs neither.
    """

    _lazy: LazyState
    _parameter_class: type[nn.Parameter] | None = None

    @property
    def _is_param(self) -> bool:
        """True if ``isinstance(tensor, nn.Parameter)`` is to be true."""
        return self._parameter_class is not None

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # Set by nn.Parameter.__new__, which says nowhere else of which subclass it was asked for an object.
        wanted = parameter_class_wanted_by(sys._getframe(1))
        self._parameter_class = (wanted or nn.Parameter) if value else None

    @staticmethod
    def make(state: LazyState) -> LazyTensor:
        meta, value = state.meta, state.value
        lazy: LazyTensor = make_wrapper(
            LazyTensor, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(),
            dtype=meta.dtype, device=value.device, requires_grad=False,
        )  # fmt: skip
        lazy._lazy = state
        return lazy

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _set_data:
            return assign_data(*args)
        check_requested_device(func, args, kwargs or {})
        with without_subclasses(), below_autograd():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .record import dispatch  # record.py makes lazy tensors; this is the one upward step

        return dispatch(_tape_of(args, kwargs), func, args, kwargs or {}, inside=False)

    def rebind(self, value: Value, meta: Tensor) -> None:
        """Point the object at another value, as ``p.data = q`` and ``t_()`` do."""
        self._lazy = LazyState(self._lazy.tape, value, meta)
        with without_subclasses():
            _set_data(self, LazyTensor.make(self._lazy))

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return a storage without memory; lazy tensors that will share memory share it."""
        return self._lazy.meta.untyped_storage()

    def share_memory_(self) -> NoReturn:
        raise LazyInitError(f"{self!r} has no memory to share; {REMEDY}")

    def data_ptr(self) -> int:
        """Return 0: there is no memory yet."""
        return 0

    def tolist(self) -> Any:
        return self._read().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        array = self._read().numpy(force=force)
        array.flags.writeable = False  # it is a copy; a silent write into it would be lost
        return array

    def __array__(self, dtype: Any = None) -> Any:
        return self._read().numpy().astype(dtype) if dtype is not None else self._read().numpy()

    def _read(self) -> Tensor:
        from .record import read

        return read(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "Parameter" if self._is_param else "Tensor"
        return f"Lazy{kind}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LazyInitError(f"{self!r} has no value to save or pickle; {REMEDY}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if self._parameter_class is not None:  # as nn.Parameter does it: other attributes are not copied
            copied = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = parameter = self._parameter_class(copied, self.requires_grad)
            return parameter
        new = self._deepcopy_storage(memo)
        new.requires_grad_(self.requires_grad)
        memo[id(self)] = new
        for name, attribute in vars(self).items():
            if name != "_lazy":
                setattr(new, name, copy.deepcopy(attribute, memo))
        return new

    def _deepcopy_storage(self, memo: dict[int, Any]) -> Tensor:
        """Copy the whole storage once, as torch does for plain tensors, so that views stay views of the copy."""
        storage = self._lazy.value.storage
        if id(storage) not in memo:
            memo[id(storage)] = self.detach().as_strided((storage.nbytes // self.element_size(),), (1,), 0).clone()
        whole: Tensor = memo[id(storage)]
        if whole.dtype != self.dtype:
            whole = whole.view(self.dtype)
        return whole.as_strided(self.shape, self.stride(), self.storage_offset())


def is_lazy(tensor: object) -> bool:
    """Whether `tensor` is a lazy tensor, that is, has no memory yet.

    Parameters
    ----------
    tensor : object
        Anything.
    """
    return isinstance(tensor, LazyTensor)


def memory_of(tensor: Tensor) -> tuple[object, int]:
    """Where a tensor lies, or will lie: two with the same first part share memory if their bytes meet.

    Returns
    -------
    tuple
        What its memory is part of, and the byte at which it begins there.
    """
    if isinstance(tensor, LazyTensor):
        return tensor._lazy.value.storage, int(tensor._lazy.meta.storage_offset()) * tensor.element_size()
    return tensor.device, tensor.data_ptr()


def assign_data(target: Tensor, source: Tensor) -> None:
    """``target.data = source`` where at least one of them is lazy."""
    from .record import as_lazy

    if not isinstance(target, LazyTensor):
        raise LazyInitError(f"the .data of a real tensor cannot be {source!r}; {REMEDY}")
    lazy = source if isinstance(source, LazyTensor) else as_lazy(target._lazy.tape, source)
    if lazy._lazy.tape is not target._lazy.tape:
        raise LazyInitError("tensors made in separate LazyInitContexts cannot share memory; build both in one context")
    with below_autograd():
        target.rebind(lazy._lazy.value, lazy._lazy.meta.detach())


def _tape_of(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Tape:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, LazyTensor):
            return leaf._lazy.tape
    raise AssertionError("dispatched to LazyTensor without one")
