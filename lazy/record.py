"""One aten call on lazy tensors: its result on the meta device, and its record on the tape.

What is recorded, what is run at once and what is refused:

* inside a context every call that creates a tensor, draws, or takes a lazy tensor is recorded; a call on real tensors
  only runs as usual;
* a call whose result decides what Python does next (``item``, ``nonzero``) gets its inputs replayed and runs at once,
  inside a context; outside it is refused;
* outside a context (after it), in-place ops, views, copies and casts of lazy tensors are recorded, because that is what
  initialisation consists of (``model.half()``, ``nn.init``, ``load_state_dict``). Refused are value reads, functional
  ops that mix a lazy with a real non-scalar tensor, and matrix products and other layers: those mean that somebody runs
  a forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemini.errors import LazyInitError
from gemini.torch_private import (
    arguments_of,
    is_composite,
    name_of,
    storage_key,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from .device import check_device
from .replay import generator_state, read_values
from .rng import SeedPoint, default_generator
from .session import active_tape
from .tape import Constant, Kind, Record, Storage, Tape, Value, describe
from .tensor import REMEDY, LazyState, LazyTensor, assign_data

aten = torch.ops.aten

# Draws that fill their target and read nothing else: dead ones run on a scratch tensor.
_DRAWS = frozenset((
    aten.normal_.default, aten.uniform_.default, aten.random_.default, aten.random_.to,
    getattr(aten.random_, "from"), aten.exponential_.default, aten.log_normal_.default, aten.cauchy_.default,
    aten.geometric_.default, aten.bernoulli_.float,
))  # fmt: skip
_OVERWRITES = _DRAWS | {
    aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.copy_.default, aten.bernoulli_.Tensor,
}  # fmt: skip
# Functions that look at the geometry of their input, not at its content.
_LIKE = frozenset((
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
))  # fmt: skip
_LAYERS = frozenset((
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "embedding", "native_layer_norm",
    "native_batch_norm", "native_group_norm", "_softmax", "_log_softmax",
))  # fmt: skip
_NOT_ON_META = (
    "nested",
    "quantize_per_",
    "affine_quantized",
)  # the meta device fails on them, or forgets what they are
_WRITTEN_SILENTLY = ("running_mean", "running_var")
"""Arguments of ``native_batch_norm`` and its like, whose schemas do not say that training writes them."""
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

RECORDING = threading.RLock()
"""Held while a call is recorded. Tensors of one tape may be used by several threads (``from_pretrained`` casts weights
on a thread pool), and a call may touch several tapes; Python runs one thread at a time anyway."""


def dispatch(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, inside: bool) -> Any:
    """Run, record or refuse one aten call; `inside` says whether a context is active."""
    if not tape.is_paused:
        with RECORDING:
            return _dispatch(tape, func, args, kwargs, inside)
    if any(isinstance(leaf, LazyTensor) for leaf in tree_leaves((args, kwargs))):
        raise LazyInitError(f"{func} was called on a tensor that is being materialised; use the value instead")
    return func(*args, **kwargs)


def _dispatch(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inside: bool) -> Any:
    if is_composite(func):
        return func.decompose(*args, **kwargs)
    leaves = tree_leaves((args, kwargs))
    lazies = [leaf for leaf in leaves if isinstance(leaf, LazyTensor)]
    reals = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, LazyTensor)]
    draws = torch.Tag.nondeterministic_seeded in func.tags
    target = _device_argument(kwargs)
    written = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
    mutated = [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]

    if func is aten.empty_like.default and reals and reals[0].is_meta and target is not None and target.type != "meta":
        shape = func(*args, **{**kwargs, "device": torch.device("meta")})  # to_empty(), skip_init()
        func, args = aten.empty_strided.default, (shape.shape, shape.stride())
        kwargs, lazies, reals = {"dtype": shape.dtype, "device": target}, [], []
    if not lazies and (any(real.is_meta for real in reals) or (target is not None and target.type == "meta")):
        return func(*args, **kwargs)  # the user asked for meta tensors
    if not lazies and reals and not draws:
        return as_lazy(tape, args[0]) if func is aten.lift_fresh.default else func(*args, **kwargs)
    if target is not None and target.type == "meta":
        args, kwargs = tree_map(lambda leaf: leaf._lazy.meta if isinstance(leaf, LazyTensor) else leaf, (args, kwargs))
        return func(*args, **kwargs)
    if target is not None:
        check_device(target)
    if not inside:
        _refuse_compute(func, lazies, reals, mutated)
    tape = _tape_for(tape, lazies, mutated)
    if any(not isinstance(tensor, LazyTensor) for tensor in mutated) or any(tag in func.tags for tag in _READS):
        return _run_now(tape, func, args, kwargs, mutated, draws, inside)
    if func is aten.set_.source_Tensor:
        assign_data(args[0], args[1])
        return args[0]
    return _record(tape, func, args, kwargs, mutated, draws, inside)


def as_lazy(tape: Tape, real: Tensor) -> LazyTensor:
    """Return a lazy tensor that will have the present content of `real`."""
    snapshot = real.detach().clone()  # the user may change `real` before the replay
    meta = torch.empty_strided(snapshot.shape, snapshot.stride(), dtype=snapshot.dtype, device="meta")
    return from_source(tape, Constant(snapshot), meta, snapshot.device)


def from_source(tape: Tape, call: Callable[[], Tensor], meta: Tensor, device: torch.device) -> LazyTensor:
    """Return a lazy tensor that will be what `call` returns: memory of its own, with the geometry of `meta`."""
    with RECORDING:
        return LazyTensor.make(LazyState(tape, tape.append_source(call, meta, device), meta))


def read(lazy: LazyTensor) -> Tensor:
    """Return the present value of `lazy`, by replaying what it depends on. Needs an active context."""
    tape, value = lazy._lazy.tape, lazy._lazy.value
    if not recording(tape):
        raise LazyInitError(f"the value of {lazy!r} was asked for before the model was materialised; {REMEDY}")
    return read_values(tape, [value])[0]


def recording(tape: Tape) -> bool:
    """Whether a context that records on `tape` is active in this thread."""
    return active_tape() is not None


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(arguments_of(func))
    return tuple((i, a.name) for i, a in arguments if a.name in _WRITTEN_SILENTLY or _is_written(a))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _device_argument(kwargs: dict[str, Any]) -> torch.device | None:
    device = kwargs.get("device")
    return torch.device(device) if device is not None else None


def _refuse_compute(func: Any, lazies: list[LazyTensor], reals: list[Tensor], mutated: list[Tensor]) -> None:
    mixes = not mutated and any(real.dim() > 0 for real in reals)
    reads = any(tag in func.tags for tag in _READS) or any(not isinstance(tensor, LazyTensor) for tensor in mutated)
    if mixes or reads or name_of(func) in _LAYERS:
        raise LazyInitError(f"{func} was called on {lazies[0]!r}, which has no value yet; {REMEDY}")


def _tape_for(tape: Tape, lazies: list[LazyTensor], mutated: list[Tensor]) -> Tape:
    """A write belongs on the tape of what is written; anything else where its inputs are, if they agree."""
    owners = [tensor for tensor in mutated if isinstance(tensor, LazyTensor)] or lazies
    tapes = {id(lazy._lazy.tape): lazy._lazy.tape for lazy in owners}
    return next(iter(tapes.values())) if len(tapes) == 1 else tape


def _run_now(tape: Tape, func: Any, args: Any, kwargs: Any, mutated: list[Tensor], draws: bool, inside: bool) -> Any:
    """Run a call on the real values of its inputs, and take what it returns as constants."""
    if not inside:
        raise LazyInitError(f"{func} needs values of lazy tensors; {REMEDY}")
    if any(isinstance(tensor, LazyTensor) for tensor in mutated):
        raise LazyInitError(f"{func} writes into a lazy tensor in a way that cannot be recorded")
    flat, spec = tree_flatten((args, kwargs))
    flat = [read(leaf) if isinstance(leaf, LazyTensor) else leaf for leaf in flat]
    args, kwargs = tree_unflatten(flat, spec)
    if draws:
        result = _draw_now(tape, func, args, kwargs)
    else:
        result = func(*args, **kwargs)
    kept = {id(tensor) for tensor in mutated}

    def take(leaf: Any) -> Any:
        fresh = isinstance(leaf, Tensor) and id(leaf) not in kept and _is_plain(leaf)
        return as_lazy(tape, leaf) if fresh else leaf

    return tree_map(take, result)


def _is_plain(tensor: Tensor) -> bool:
    """Whether shape and strides say all about it; sparse, nested and quantised tensors are left to be real."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def _draw_now(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    generator = _generator(args, kwargs, _result_device([], args, kwargs))
    tape.note_seed(generator)
    generator.set_state(generator_state(tape, generator))
    result = func(*args, **kwargs)
    state = generator.get_state()
    tape.records.append(Record(kind=Kind.SEED, generator=generator, seed=SeedPoint(generator, state, None)))
    tape.generators.rebase(generator, state)
    tape.generators.tag(generator, len(tape.records) - 1)
    return result


def _generator(args: Any, kwargs: Any, device: torch.device) -> torch.Generator:
    explicit = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    return explicit[0] if explicit else default_generator(device)


def _result_device(lazies: list[LazyTensor], args: Any, kwargs: Any) -> torch.device:
    explicit = _device_argument(kwargs)
    if explicit is not None:
        return explicit
    tensors: list[Tensor] = [*lazies, *(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))]
    for tensor in tensors:
        if tensor.dim() > 0:
            return tensor.device
    return tensors[0].device if tensors else torch.device("cpu")


def _record(tape: Tape, func: Any, args: Any, kwargs: Any, mutated: list[Tensor], draws: bool, inside: bool) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    for i, leaf in enumerate(flat):
        if isinstance(leaf, LazyTensor) and leaf._lazy.tape is not tape:
            flat[i] = as_lazy(tape, read(leaf))  # made in another context: joins as a constant
        elif isinstance(leaf, Tensor) and not isinstance(leaf, LazyTensor):
            flat[i] = as_lazy(tape, leaf)
    lazies = [leaf for leaf in flat if isinstance(leaf, LazyTensor)]
    meta_args, meta_kwargs = tree_unflatten([_to_meta(leaf) for leaf in flat], spec)
    if meta_kwargs.get("pin_memory"):
        meta_kwargs["pin_memory"] = False
    if any(word in func.name() for word in _NOT_ON_META):
        return _run_now(tape, func, args, kwargs, mutated, draws, inside)
    try:
        result = func(*meta_args, **meta_kwargs)
    except NotImplementedError:
        return _run_now(tape, func, args, kwargs, mutated, draws, inside)
    if any(isinstance(leaf, Tensor) and not _is_plain(leaf) for leaf in tree_leaves(result)):
        return _run_now(tape, func, args, kwargs, mutated, draws, inside)
    device = _result_device(lazies, (), kwargs)
    entry = _Entry(tape, func, spec, flat, lazies, device)
    generator = _generator(args, kwargs, device) if draws else None
    return entry.add(result, [tensor for tensor in mutated if isinstance(tensor, LazyTensor)], generator)


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, LazyTensor):
        return leaf._lazy.meta
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return None if isinstance(leaf, torch.Generator) else leaf


class _Entry:
    """Turns the meta result of one call into lazy tensors and a record."""

    def __init__(
        self, tape: Tape, func: Any, spec: Any, flat: list[Any], lazies: list[LazyTensor], device: torch.device
    ) -> None:
        self.tape, self.func, self.device, self.lazies = tape, func, device, lazies
        self.args, self.kwargs = tree_unflatten(
            [leaf._lazy.value if isinstance(leaf, LazyTensor) else leaf for leaf in flat], spec
        )
        self.inputs = tuple(lazy._lazy.value for lazy in lazies)
        self.storages = {storage_key(lazy._lazy.meta.untyped_storage()): lazy._lazy.value.storage for lazy in lazies}
        self.own = {id(lazy._lazy.meta): lazy for lazy in lazies}
        self.fresh: dict[int, Storage] = {}

    def add(self, result: Any, mutated: list[LazyTensor], generator: torch.Generator | None) -> Any:
        before = self._geometry(mutated)
        if before != [(v.shape, v.stride, v.storage.nbytes) for v in (lazy._lazy.value for lazy in mutated)]:
            return self._change_geometry(result, mutated)
        if generator is not None:
            self.tape.note_seed(generator)
        index = len(self.tape.records)
        leaves, spec = tree_flatten(result)
        outputs = [self._output(leaf, index, i) for i, leaf in enumerate(leaves)]
        values = tuple(out._lazy.value if out is not leaf and id(leaf) not in self.own else None
                       for out, leaf in zip(outputs, leaves, strict=True))  # fmt: skip
        if not mutated and all(value is None for value in values):
            return tree_unflatten(outputs, spec)  # returned its input unchanged: nothing happened
        self.tape.records.append(self._make(values, mutated, generator))
        if generator is not None:
            self.tape.generators.tag(generator, index)
        return tree_unflatten(outputs, spec)

    def _make(
        self, values: tuple[Value | None, ...], mutated: list[LazyTensor], generator: torch.Generator | None
    ) -> Record:
        writes = frozenset(lazy._lazy.value.storage for lazy in mutated) | frozenset(self.fresh.values())
        kills = frozenset(self.fresh.values())
        if self.func in _OVERWRITES:
            written, *sources = self.inputs  # in all of them the target comes first
            if written.covers and all(source.storage is not written.storage for source in sources):
                kills |= {written.storage}
        like = name_of(self.func) in _LIKE
        return Record(
            kind=Kind.COMPUTE if writes or generator is not None else Kind.VIEW,
            call=self.func, args=self.args, kwargs=self.kwargs,
            inputs=self.inputs, outputs=values,
            reads=frozenset() if like else frozenset(v.storage for v in self.inputs) - kills,
            writes=writes, kills=kills, generator=generator,
            scratch=mutated[0]._lazy.value if self.func in _DRAWS else None,
            dtype=torch.get_default_dtype(),
        )  # fmt: skip

    def _output(self, leaf: Any, index: int, position: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.own:
            return self.own[id(leaf)]
        key = storage_key(leaf.untyped_storage())
        storage = self.storages.get(key)
        if storage is None:
            storage = self.fresh.setdefault(key, Storage(leaf.untyped_storage().nbytes()))
        value = describe(leaf, storage, self.device, index, position)
        return LazyTensor.make(LazyState(self.tape, value, leaf))

    @staticmethod
    def _geometry(mutated: list[LazyTensor]) -> list[Any]:
        metas = [lazy._lazy.meta for lazy in mutated]
        return [(tuple(m.shape), m.stride(), m.untyped_storage().nbytes()) for m in metas]

    def _change_geometry(self, result: Any, mutated: list[LazyTensor]) -> Any:
        """``t_()``, ``resize_()``: the object takes another value; replay never changes the geometry of a tensor."""
        if len(mutated) != 1:
            raise LazyInitError(f"{self.func} changes the geometry of several lazy tensors, which cannot be recorded")
        lazy, index = mutated[0], len(self.tape.records)
        meta, old = lazy._lazy.meta, lazy._lazy.value
        nbytes = meta.untyped_storage().nbytes()
        if nbytes == old.storage.nbytes:
            value = describe(meta, old.storage, old.device, index, 0)
            self.tape.records.append(Record(
                kind=Kind.VIEW, call=aten.as_strided.default,
                args=(old, value.shape, value.stride, meta.storage_offset()), inputs=(old,), outputs=(value,),
            ))  # fmt: skip
        elif old.storage.nbytes == 0:
            value = describe(meta, Storage(nbytes), old.device, index, 0)
            self.tape.records.append(Record(
                kind=Kind.COMPUTE, call=torch.empty_strided, args=(value.shape, value.stride),
                kwargs={"dtype": value.dtype, "device": value.device}, outputs=(value,),
                writes=frozenset((value.storage,)), kills=frozenset((value.storage,)),
            ))  # fmt: skip
        else:
            raise LazyInitError(f"{self.func} grows the storage of {lazy!r}, which cannot be recorded")
        lazy.rebind(value, meta)
        return tree_map(lambda leaf: lazy if isinstance(leaf, Tensor) else leaf, result)
