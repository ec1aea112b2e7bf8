"""What the class of a parameter is while nothing has its chunk pinned.

[Note: Away]
A parameter whose chunk a unit has pinned is a plain ``nn.Parameter`` over the full copy, and torch runs at full speed.
From the last unpin on its class is a subclass that torch asks before each operation (``__torch_function__``)::

    plain nn.Parameter  --last unpin-->  AwayParameter  --pin-->  plain nn.Parameter

- What only describes it (``shape``, ``dtype``) is answered at once; strides come from the chunk's view.
- What uses its values goes to its `Keeper`, which brings the chunk, runs the operation, and lets the chunk go.
- What hands out its memory (``data``, ``detach``, ``numpy``) gets a `Loan`.
- ``grad`` is the keeper's too: a gradient may be in use by an update that is not over.

Where the full copy is another memory than home, a pinned parameter is a `CopiedParameter`: a plain one to torch, which
notes that ``p.data`` was asked for.

Code in C++ that does not ask (``torch.jit.script`` functions, ``torch.tensor(p)``) finds NaN: reading a storage that
has been resized to 0 would end the process. ``torch.func`` transforms flatten their arguments with pytree, to which a
parameter that is away presents its values.

A class of its own, and not one swapped in for good: a ``__torch_function__`` around every operation of forward and
backward doubles the time of small models, and keeps them from being compiled.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto
from functools import cache
from typing import Protocol, SupportsIndex, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor, nn

from gemini.torch_private import (
    never_compiled,
    parameter_class_wanted_by,
    rebuild_parameter,
    rebuild_parameter_with_state,
    register_pytree_node,
    typed_storage,
    without_subclasses,
    without_transforms,
)

QUIET = without_subclasses
"""A context in which torch does not ask an `AwayParameter`: for our own reading of ``grad`` and ``_version``."""

Operation = Callable[..., object]
"""A function of torch, as ``__torch_function__`` gets it."""

_Result = TypeVar("_Result")
_LINK = "_gemini_link"
_AS_IT_IS = torch.preserve_format
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_LAYOUT = frozenset(
    "stride is_contiguous dim_order is_non_overlapping_and_dense new_empty new_zeros new_ones new_full "
    "new_tensor new_empty_strided empty_like zeros_like ones_like full_like rand_like randn_like randint_like".split()
)
_DESCRIBING = frozenset(
    "size dim ndimension storage_offset numel nelement element_size is_floating_point is_complex is_signed __len__ "
    "get_device has_names register_hook register_post_accumulate_grad_hook requires_grad_ is_pinned is_same_size "
    "is_inference __hash__ is_tensor is_distributed retain_grad result_type can_cast is_conj is_neg _is_view is_shared "
    "get_gradient_edge grad backward".split()
)
_LENDING = frozenset("detach numpy __array__ __dlpack__".split())
_ADDRESSES = frozenset("data_ptr const_data_ptr untyped_storage storage is_set_to".split()) | {typed_storage.__name__}
_REFUSED = {
    "share_memory_": "share a copy, p.detach().clone().share_memory_(), and bring it back with p.copy_(copy)",
    "resize_": "give it the shape before booster.boost, or work on a copy",
    "resize_as_": "give it the shape before booster.boost, or work on a copy",
    "detach_": "work on p.detach()",
    "set_": "assign with p.data = value, or copy with p.data.copy_(value)",
    "apply_": "work on a copy: p.data = p.detach().clone().apply_(function)",
    "map_": "work on a copy and assign it with p.data = value",
    "pin_memory": "pin a copy: p.detach().clone().pin_memory()",
    "__cuda_array_interface__": "work on p.detach()",
}


class Kind(Enum):
    """What an operation wants of a parameter."""

    DESCRIBE = auto()
    """Shape, dtype, hooks: no values."""
    LAYOUT = auto()
    """Also how it lies in memory."""
    GRADIENT = auto()
    """``grad`` is read, set or deleted."""
    USE = auto()
    """Its values, for as long as the operation runs."""
    LEND = auto()
    """Its memory, for as long as the result lives."""
    ADDRESS = auto()
    """Where its memory is: whether that is still used cannot be seen."""
    ASSIGN = auto()
    """``data`` is set."""
    REFUSE = auto()
    """What memory in a chunk cannot do."""


class Keeper(Protocol):
    """Answers for parameters that are away."""

    def view(self, parameter: Tensor) -> Tensor:
        """The parameter's slot in the full copy: its layout is right, its memory may be missing."""

    def use(self, run: Callable[[], _Result], parameters: list[Tensor], arguments: list[Tensor]) -> _Result:
        """Run an operation that uses the values of ``parameters``; ``arguments`` are all tensors that it takes."""

    def lend(self, run: Callable[[], _Result], parameters: list[Tensor], is_address: bool) -> _Result:
        """Run an operation whose result may be the memory of ``parameters``, or (``is_address``) say where it is."""

    def assign(self, parameter: Tensor, value: Tensor) -> None:
        """Take over what is assigned to ``parameter.data``."""

    def show_gradient(self, parameter: Tensor) -> None:
        """Have ``parameter.grad`` be what it is in plain PyTorch."""

    def replace_gradient(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """``parameter.grad`` is about to be set, or deleted."""


class _Link:
    """From a parameter to its keeper. Weak: a parameter that is kept does not keep its model."""

    __slots__ = ("is_reached", "keeper", "last_value")

    def __init__(self, keeper: Keeper, last_value: Callable[[], Tensor]) -> None:
        self.keeper: ref[Keeper] = ref(keeper)
        self.last_value = last_value
        self.is_reached = False
        """Somebody has asked for ``data`` while the chunk was pinned."""

    def reach(self) -> None:
        """Note that somebody asks for ``data``."""
        self.is_reached = True

    def was_reached(self) -> bool:
        """True if somebody has asked for ``data`` since this was called last."""
        was, self.is_reached = self.is_reached, False
        return was

    def __reduce__(self) -> tuple[object, ...]:
        return (_no_link, ())  # a pickled parameter is nobody's


def _no_link() -> None:
    return None


def link(parameter: Tensor, keeper: Keeper, last_value: Callable[[], Tensor]) -> None:
    """Have ``keeper`` answer for a parameter when it is away.

    ``last_value`` gives its values once the keeper is gone.
    """
    parameter.__dict__[_LINK] = _Link(keeper, last_value)


def unlink(parameter: Tensor) -> None:
    """Have nobody answer for a parameter, which is not away."""
    parameter.__dict__.pop(_LINK, None)


def is_linked(parameter: Tensor) -> bool:
    """True if somebody answers for a parameter."""
    return parameter.__dict__.get(_LINK) is not None


def reach(parameter: Tensor) -> None:
    """Note that the memory of a parameter may be written to in a way that nothing else tells of."""
    if (found := parameter.__dict__.get(_LINK)) is not None:
        found.reach()


def was_reached(parameter: Tensor) -> bool:
    """True if somebody has asked for the ``data`` of a pinned parameter since this was called last."""
    found = parameter.__dict__.get(_LINK)
    return found is not None and found.was_reached()


def _keeper_of(parameter: Tensor) -> Keeper | None:
    """The keeper of a parameter that is away; None if its model is gone."""
    found = parameter.__dict__.get(_LINK)
    return None if found is None else found.keeper()


def _come_back(parameter: Tensor) -> None:
    """Make a parameter that has outlived its model a plain one, with the values that it had.

    Raises
    ------
    RuntimeError
        If these were on disk, where nothing is left of them.
    """
    value = parameter.__dict__[_LINK].last_value()
    with QUIET():
        parameter.data = value
    parameter.__class__ = plain_class(type(parameter))
    del parameter.__dict__[_LINK]


class _Disguised:
    """Mixed into the class of a parameter for a while: what is made of it is of the class that it had before."""

    def detach(self) -> Tensor:
        """As ``Tensor.detach``. For ``nn.Parameter(p)`` it has to give what is made into a parameter."""
        assert isinstance(self, Tensor)
        detached = Tensor.detach(self)
        if parameter_class_wanted_by(sys._getframe(1)) is not None:
            # Of a class that it does not know it wants its own kind back, and says so by setting `_is_param`.
            return cast(Tensor, detached.as_subclass(type(self)))
        return detached

    @property
    def _is_param(self) -> bool:
        return True

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self.__class__ = plain_class(type(self))

    def __repr__(self) -> str:
        # Torch writes "tensor(...)" for parameters of exactly this class, and the name of any other.
        if plain_class(type(self)) is not nn.Parameter:
            return super().__repr__()
        assert isinstance(self, Tensor)
        return repr(nn.Parameter(self.detach(), self.requires_grad))

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Parameter:
        if id(self) not in memo:
            assert isinstance(self, Tensor)
            memo[id(self)] = plain_class(type(self))(self.detach().clone(memory_format=_AS_IT_IS), self.requires_grad)
        return cast(nn.Parameter, memo[id(self)])

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        assert isinstance(self, Tensor)
        rebuilt: tuple[object, ...] = (self.detach().clone(memory_format=_AS_IT_IS), self.requires_grad, OrderedDict())
        attributes = {name: value for name, value in self.__dict__.items() if name != _LINK}
        if attributes:
            return (rebuild_parameter_with_state, (*rebuilt, attributes))
        return (rebuild_parameter, rebuilt)


class AwayParameter(_Disguised):
    """Mixed into the class of a parameter while it is away. See [Note: Away]."""

    @classmethod
    def __torch_function__(
        cls, func: Operation, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        what = kind_of(func)
        if what is Kind.DESCRIBE:
            with QUIET():
                return func(*args, **kwargs)
        return _answer(func, what, args, kwargs)


class CopiedParameter(_Disguised):
    """Mixed into the class of a parameter while its chunk is pinned, if its home is not what it shows.

    What is written through ``p.data`` in a forward raises no version counter. So it is noted that somebody has asked
    for ``data``, and the full copy is compared with home before it goes. Operations do not look at this class.
    """

    @property
    def data(self) -> Tensor:
        """As ``Tensor.data``."""
        reach(cast(Tensor, self))
        return cast(Tensor, Tensor.data.__get__(self))  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


@cache
def away_class(plain: type) -> type:
    """The class of parameters of class ``plain`` while they are away."""
    away = _disguise(AwayParameter, plain)
    register_pytree_node(away, _flatten, _unflatten)
    return away


@cache
def copied_class(plain: type) -> type:
    """The class of parameters of class ``plain`` while they are pinned and show a copy of their home."""
    return _disguise(CopiedParameter, plain)


def _disguise(mixin: type, plain: type) -> type:
    assert not issubclass(plain, _Disguised)
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (mixin, plain), names)


def plain_class(cls: type) -> type:
    """The class that `away_class` or `copied_class` was made of; a plain class itself."""
    return cls.__bases__[1] if issubclass(cls, _Disguised) else cls


def _flatten(parameter: Tensor) -> tuple[list[Tensor], None]:
    with without_transforms():  # a transform wraps what it gets, and nothing that it has wrapped already
        return [parameter.view_as(parameter)], None


def _unflatten(values: Iterable[Tensor], context: None) -> Tensor:
    (value,) = values
    return value


@never_compiled
def _answer(func: Operation, what: Kind, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    away: dict[int, Tensor] = {}
    tensors: list[Tensor] = []
    for tensor in _tensors((args, kwargs)):
        tensors.append(tensor)
        if isinstance(tensor, AwayParameter):
            away[id(tensor)] = tensor
    parameters = list(away.values())
    if not parameters:  # a list of theirs has been emptied since
        with QUIET():
            return func(*args, **kwargs)
    orphans = [parameter for parameter in parameters if _keeper_of(parameter) is None]
    if orphans:
        for parameter in orphans:
            _come_back(parameter)
        return func(*args, **kwargs)
    first, keeper = parameters[0], _keeper_of(parameters[0])
    assert keeper is not None
    name = getattr(func, "__name__", "")
    if what is Kind.REFUSE:
        if first.requires_grad and name.startswith("resize"):
            with QUIET():
                return func(*args, **kwargs)  # torch refuses it
        raise RuntimeError(
            f"{name} cannot be called on a parameter of a boosted model (shape {tuple(first.shape)}): its memory is a "
            f"part of a chunk. Instead {_REFUSED[name]}"
        )
    if what is Kind.LAYOUT:
        with QUIET():
            return func(*map(_laid_out, args), **{key: _laid_out(value) for key, value in kwargs.items()})
    if what is Kind.GRADIENT:
        if name == "__get__":
            keeper.show_gradient(first)
        elif first is args[0]:
            keeper.replace_gradient(first, cast("Tensor | None", args[1] if len(args) > 1 else None))
        with QUIET():
            return func(*args, **kwargs)
    if what is Kind.ASSIGN and first is args[0]:
        keeper.assign(first, cast(Tensor, args[1]))
        return None
    ours = [
        parameter for parameter in parameters if _keeper_of(parameter) is keeper
    ]  # another model answers for others
    if what in (Kind.LEND, Kind.ADDRESS, Kind.ASSIGN):
        return keeper.lend(lambda: func(*args, **kwargs), ours, what is Kind.ADDRESS)
    return keeper.use(lambda: func(*args, **kwargs), ours, tensors)


@cache
def kind_of(func: Operation) -> Kind:
    """What an operation wants; of one that is not known, the values."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "grad":
            return Kind.GRADIENT
        if attribute == "data":
            return Kind.ASSIGN if name == "__set__" else Kind.LEND
        return Kind.USE if attribute in _VIEWS else Kind.DESCRIBE
    if name in _REFUSED:
        return Kind.REFUSE
    if name in _LENDING:
        return Kind.LEND
    if name in _ADDRESSES:
        return Kind.ADDRESS
    if name in _LAYOUT:
        return Kind.LAYOUT
    return Kind.DESCRIBE if name in _DESCRIBING else Kind.USE


def _laid_out(value: object) -> object:
    if isinstance(value, AwayParameter):
        assert isinstance(value, Tensor)
        keeper = _keeper_of(value)
        assert keeper is not None
        return keeper.view(value)
    if isinstance(value, list | tuple):
        return type(value)(_laid_out(item) for item in value)
    if isinstance(value, dict):
        return {key: _laid_out(item) for key, item in value.items()}
    return value


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
