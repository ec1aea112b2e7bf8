"""A tensor of the optimizer's state whose values are elsewhere: each operation reads them, and writes what it changed.

``optimizer.state[p]["exp_avg"]`` is such a tensor. It has no memory of its own, so holding the whole state costs
nothing, and it never goes stale: what it shows is what the optimizer has now, as in plain PyTorch. Rejected: copies
that are compared with what was handed out before the next step. They are as large as the state, an edit is found only
when something looks for it (``state[p]["exp_avg"].mul_(0.5)`` drops its tensor at once), and a kept one shows old
numbers. Rejected, too: bare views of homes in RAM. Reading one races with updates in the background, and it is left
behind when homes move.

::

    t = optimizer.state[p]["exp_avg"]       on torch's meta device: shape, strides and dtype without memory
    t.mul_(0.5)                             open: wait for updates; a view of the home, or a copy on ``p.device``
                                            run: ``mul_`` on that
                                            close: write a copy home if its version has changed
    row = t[0]                              shares memory with what was opened, so it is such a tensor as well: the
    row.zero_()                             same place, and where in it

C++ code that does not ask the class (``torch.tensor(t)``) finds a meta tensor, which has no values that could be taken
for the state's.

What would let memory out of sight (``data_ptr``, ``untyped_storage``) is refused; ``numpy`` gives a read-only copy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..torch_private import typed_storage, version_of, without_subclasses

_METADATA: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "layout", "ndim", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_leaf", "grad", "grad_fn", "itemsize", "nbytes")),
        *(getattr(Tensor, name) for name in ("size", "stride", "numel", "dim", "is_floating_point", "is_complex")),
        *(getattr(Tensor, name) for name in ("element_size", "nelement", "__len__", "__hash__")),
    }
)
_OF_THE_DEVICE: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("device", "is_cpu", "is_cuda", "is_meta")),
        Tensor.get_device,
    }
)
_REFUSED: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
        *(getattr(Tensor, name) for name in ("data_ptr", "untyped_storage", "storage", "__dlpack__")),
        typed_storage,
        *(getattr(Tensor, name) for name in ("share_memory_", "resize_", "resize_as_", "set_", "requires_grad_")),
    }
)
_OF_A_COPY: frozenset[Any] = frozenset(getattr(Tensor, name) for name in ("__deepcopy__", "__reduce_ex__"))
"""They take the whole storage along, which may be that of a chunk."""
_TO_NUMPY: frozenset[Any] = frozenset(getattr(Tensor, name) for name in ("numpy", "__array__"))
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


class Place(Protocol):
    """Where the values of one state of one parameter are."""

    def open(self) -> Tensor:
        """The values: the home itself, or a copy."""

    def close(self, values: Tensor) -> None:
        """Bring home what was changed in what `open` returned."""


@dataclass(frozen=True, slots=True)
class Part:
    """A view of what a place opens."""

    offset_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, values: Tensor) -> Tensor:
        start = values.storage_offset() * values.element_size() + self.offset_bytes
        empty = torch.empty(0, dtype=self.dtype, device=values.device)
        return empty.set_(values.untyped_storage(), start // self.dtype.itemsize, self.shape, self.stride)


class StateTensor(Tensor):
    """See the module. Made by `stand_for`."""

    place: Place
    part: Part | None
    """None: all of it."""
    on: torch.device
    """The device on which the values are shown."""

    @classmethod
    def stand_for(cls, place: Place, form: Tensor, device: torch.device, part: Part | None = None) -> "StateTensor":
        """A tensor that stands for what a place has; it has the shape, the strides and the dtype of ``form``."""
        with without_subclasses(), torch.inference_mode(False):
            empty = torch.empty_strided(form.shape, form.stride(), dtype=form.dtype, device="meta")
            shown = empty.as_subclass(cls)
        shown.place, shown.part, shown.on = place, part, device
        return shown

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with without_subclasses():
                return func(*args, **(kwargs or {}))
        if func in _OF_THE_DEVICE:
            return func(torch.empty(0, device=args[0].on))
        if func in _REFUSED:
            raise RuntimeError(
                f"{_name(func)} is not for a tensor of a boosted optimizer's state, whose memory may be elsewhere: "
                "take a copy with clone(), change that, and assign it: optimizer.state[p][name] = copy"
            )
        if func == _SET_DATA:  # made anew each time
            return _set_data(*args)
        return _Operation().run(func, args, kwargs or {})


class _Operation:
    """One call of a torch function on states, and on whatever else it takes."""

    def __init__(self) -> None:
        self._bases: dict[int, tuple[Place, Tensor]] = {}
        self._opened: dict[int, tuple[StateTensor, Tensor, int]] = {}
        """By the id of what was given: it, what it stands for, and the version of that."""

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch.no_grad(), torch.inference_mode(False):
            args, kwargs = self._real(args), self._real(kwargs)
            if func in _OF_A_COPY or func in _TO_NUMPY:
                args = (args[0].clone(), *args[1:])
        result = func(*args, **kwargs)
        if func in _TO_NUMPY:
            result.flags.writeable = False
            return result
        self._close(func, args)
        return self._shown(result)

    def _real(self, value: Any) -> Any:
        if isinstance(value, StateTensor):
            return self._open(value)
        if type(value) in (list, tuple):
            return type(value)(map(self._real, value))
        if type(value) is dict:
            return {key: self._real(each) for key, each in value.items()}
        return value

    def _open(self, shown: StateTensor) -> Tensor:
        if id(shown) not in self._opened:
            place, part = shown.place, shown.part
            if id(place) not in self._bases:
                self._bases[id(place)] = (place, place.open())
            _, base = self._bases[id(place)]
            real = base if part is None else part.of(base)
            self._opened[id(shown)] = (shown, real, version_of(real))
        return self._opened[id(shown)][1]

    def _close(self, func: Any, args: Sequence[Any]) -> None:
        name = _name(func)
        # Some operations in place count no version: apply_, and fused ones on lists.
        written = list(_tensors(args)) if name.endswith("_") and not name.endswith("__") else []
        changed = {
            id(shown.place)
            for shown, real, version in self._opened.values()
            if version_of(real) != version or any(each is real for each in written)
        }
        for key, (place, base) in self._bases.items():
            if key in changed:
                place.close(base)

    def _shown(self, result: Any) -> Any:
        if type(result) in (list, tuple):
            return type(result)(map(self._shown, result))
        if type(result) is not Tensor or result.layout != torch.strided:
            return result
        for shown, real, _ in self._opened.values():
            if result is real:
                return shown
        for place, base in self._bases.values():
            first = base.data_ptr()
            if result.numel() and first <= result.data_ptr() < first + _extent(base):
                part = Part(result.data_ptr() - first, result.dtype, tuple(result.shape), result.stride())
                return StateTensor.stand_for(place, result, result.device, part)
        return result


def _tensors(args: Sequence[Any]) -> Iterator[Any]:
    """What an operation in place may write to: its first argument, and all lists."""
    for i, value in enumerate(args):
        if i == 0:
            yield value
        if isinstance(value, list | tuple):
            yield from value


def _set_data(shown: StateTensor, value: Tensor) -> None:
    if value is shown:
        return
    if value.shape != shown.shape:
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} was assigned to the data of a state whose shape is "
            f"{tuple(shown.shape)}: a state keeps its place in its chunk, and with it its shape"
        )
    with torch.no_grad():
        shown.copy_(value)


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to behind its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
