"""From a lazy module to a real one: the same objects, now with memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from gemini.errors import LazyInitError
from gemini.torch_private import TENSOR_HOOKS, make_parameter, swap_content, use_count

from .liveness import plan_replay
from .replay import Replay, Resolve, undisturbed
from .rng import fingerprint
from .tape import Storage, Tape
from .tensor import LazyTensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .sharding import Layout

Sink = Callable[[nn.Parameter, Tensor], Tensor]
M = TypeVar("M", bound=nn.Module | Tensor)

_SEARCH_DEPTH = 4  # containers in containers in module attributes


def materialize(
    module: M,
    sink: Sink | None = None,
    *,
    device_mesh: DeviceMesh | None = None,
    placements: Layout | None = None,
) -> M:
    """Make every lazy parameter, buffer and tensor attribute of a module real, in place.

    The tensor objects stay the same, so whatever refers to them (optimizers, ties, ``nn.LSTM``'s weight lists) stays
    valid. Values are those of eager initialisation at the same seed. Memory streams: about the largest tensor and its
    temporaries at a time, besides what the module itself (or the sink) keeps.

    Parameters
    ----------
    module : nn.Module or Tensor
        Made inside a :class:`LazyInitContext`. Real tensors in it are left alone; without lazy ones nothing happens.
        A part of a model, or a single tensor, gets the values that it has in the whole; what shares memory goes on
        sharing it if it is materialised in one call.
    sink : callable, optional
        ``sink(parameter, value) -> data``. Called once for each distinct lazy parameter as soon as its value is final,
        in an order that is not that of ``named_parameters()``. `parameter` is the lazy parameter (the object that will
        become real), `value` its real content, which the sink copies where it wants and does not keep
        (returning `value` itself is fine, but it may lie in a private memory map that cannot be resized).
        ``parameter.data`` becomes `data`: a tensor of the same shape, of any dtype and strides. Parameters that share a
        storage are handed over one after the other with values that share a storage; the sink decides whether they go
        on sharing. Buffers are not handed over.
    device_mesh : torch.distributed.device_mesh.DeviceMesh, optional
        Make each parameter a ``DTensor`` of which this rank keeps its part only; needs `placements`. Call it on every
        rank of the mesh, with models built from the same random state. The parameters become new objects (in modules,
        and in lists and dicts in their attributes), so build optimizers afterwards. Buffers stay whole.
    placements : optional
        Where the parts go. One of

        - a ``Placement``, or a sequence with one for each dimension of the mesh: for every parameter;
        - a mapping from patterns of parameter names (as in ``fnmatch``) to such; the first that matches counts, and
          what no pattern matches is replicated;
        - a function ``(name, parameter) -> placements``.

        None in place of placements leaves a parameter whole, as a plain tensor. Of placements ``Shard`` and
        ``Replicate`` can be used.

    Returns
    -------
    nn.Module or Tensor
        `module` itself.

    Raises
    ------
    ValueError
        If `sink` returns a tensor of another shape; if placements do not fit the mesh, a parameter's shape or each
        other; if a pattern matches nothing; if a parameter is real already or lives on another device than the mesh;
        if the ranks built their models from different random states.
    TypeError
        If `module` is neither; if only one of `device_mesh` and `placements` is given, or they are given together with
        `sink`.

    Notes
    -----
    If anything raises (the sink included), tensors already handed over are real, the rest are still lazy, and the
    generators are as before the call: calling it again goes on with the rest.

    The global generator ends where eager initialisation would have left it, unless it was moved after the last recorded
    draw; then it is left alone.
    """
    if not isinstance(module, nn.Module | Tensor):
        raise TypeError(f"expected a module or a tensor to materialise, got {type(module).__name__}")
    replaced: dict[int, nn.Parameter] = {}
    if device_mesh is not None or placements is not None:
        if device_mesh is None or placements is None or sink is not None or not isinstance(module, nn.Module):
            raise TypeError("give device_mesh and placements together, for a module, and then no sink")
        from . import sharding  # a second of imports that few need

        decided = sharding.decide(module, device_mesh, placements)
        sharding.check_agreement([tape for tape, _ in _lazies_by_tape(module)], device_mesh)
        sink = sharding.sharding(device_mesh, decided)
    try:
        for tape, lazies in _lazies_by_tape(module):
            _materialize_tape(tape, lazies, sink, replaced)
    finally:
        if replaced and isinstance(module, nn.Module):
            sharding.replace_everywhere(module, replaced)
    return module


def seeds(module: nn.Module) -> list[str]:
    """What the random numbers in a lazy module's values come from: the same with equal models of different processes.

    Not what is drawn and then overwritten: a model that is read from a file needs no seed. Empty for a real module.
    """
    found = []
    for tape, lazies in _lazies_by_tape(module):
        plan = plan_replay(tape.records, [lazy._lazy.value for lazy in lazies])
        points = [tape.records[index].seed for index in plan.roles] if plan.draws else []
        found.append(fingerprint(point.state for point in points if point is not None and point.state is not None))
    return found


def _materialize_tape(
    tape: Tape, lazies: list[LazyTensor], sink: Sink | None, replaced: dict[int, nn.Parameter]
) -> None:
    by_storage: dict[Storage, list[LazyTensor]] = {}
    for lazy in lazies:
        by_storage.setdefault(lazy._lazy.value.storage, []).append(lazy)
    values = [lazy._lazy.value for lazy in lazies]
    lazies.clear()

    def deliver(storage: Storage, resolve: Resolve) -> None:
        for lazy in by_storage.pop(storage):
            value = resolve(lazy._lazy.value)
            if lazy._parameter_class is None:
                _become(lazy, value)
                continue
            data = value if sink is None else _handed_over(lazy, value, sink)
            if type(data) in (Tensor, nn.Parameter):
                _become(lazy, make_parameter(lazy._parameter_class, data, lazy.requires_grad))
            else:  # a DTensor is another kind of object in C, so the old one cannot become it
                replaced[id(lazy)] = parameter = nn.Parameter(data, lazy.requires_grad)
                _give(parameter, _belongings(lazy))

    tape.settle()
    before = {generator: generator.get_state() for generator in tape.generators.generators()}
    advance = [generator for generator in before if tape.generators.untouched(generator)]
    try:
        with undisturbed(tape):
            Replay(tape, values, deliver, advance, transient=sink is not None).run()
        for generator in advance:
            del before[generator]
    finally:
        for generator, state in before.items():
            generator.set_state(state)


def _handed_over(lazy: LazyTensor, value: Tensor, sink: Sink) -> Tensor:
    data = sink(lazy, value)  # type: ignore[arg-type]  # an nn.Parameter by isinstance
    if data.shape != value.shape:
        raise ValueError(f"the sink returned shape {tuple(data.shape)} for a parameter of shape {tuple(value.shape)}")
    return data


def _become(lazy: LazyTensor, real: Tensor) -> None:
    """Give the object `lazy` the class and content of `real`.

    ``torch.utils.swap_tensors`` does this, but refuses objects with weak references, which here are as welcome as any
    other reference: they stay with the object. `real` must be referenced by the caller only.
    """
    if real.__class__ is Tensor:
        real = real.detach()  # a new object: the replay may still hold the one it made
        if lazy.requires_grad:
            real.requires_grad_()
    if use_count(lazy) > 1:
        raise LazyInitError(f"{lazy!r} cannot become real: an autograd graph or something else in C++ holds it")
    belongings = _belongings(lazy)
    cls = type(real)
    real.__class__, lazy.__class__ = LazyTensor, cls  # type: ignore[assignment]
    vars(lazy).clear()
    swap_content(lazy, real)
    _give(lazy, belongings)


def _belongings(lazy: LazyTensor) -> dict[str, Any]:
    """Attributes, hooks and the gradient that users have put on a lazy tensor."""
    if isinstance(lazy.grad, LazyTensor):
        raise LazyInitError(f"{lazy!r} has a lazy gradient; set .grad to None before the model is materialised")
    hooks = {name: getattr(lazy, name, None) for name in TENSOR_HOOKS}
    attributes = {name: value for name, value in vars(lazy).items() if name not in ("_lazy", "_parameter_class")}
    hooks["grad"] = lazy.grad
    return attributes | {name: value for name, value in hooks.items() if value is not None}


def _give(tensor: Tensor, belongings: dict[str, Any]) -> None:
    for name, value in belongings.items():
        setattr(tensor, name, value)  # hooks live half in C++; this ties them to the new tensor


def _lazies_by_tape(module: nn.Module | Tensor) -> list[tuple[Tape, list[LazyTensor]]]:
    tapes: dict[int, tuple[Tape, list[LazyTensor]]] = {}
    seen: set[int] = set()
    owners = [module] if isinstance(module, Tensor) else [vars(child) for child in module.modules()]
    for owner in owners:
        for lazy in _find(owner, _SEARCH_DEPTH):
            if id(lazy) not in seen:
                seen.add(id(lazy))
                tape = lazy._lazy.tape
                tapes.setdefault(id(tape), (tape, []))[1].append(lazy)
    return list(tapes.values())


def _find(owner: Any, depth: int) -> Iterator[LazyTensor]:
    """Find lazy tensors in nested containers; other objects, modules too, are not looked into."""
    if isinstance(owner, LazyTensor):
        yield owner
    elif depth and isinstance(owner, dict):
        for item in owner.values():
            yield from _find(item, depth - 1)
    elif depth and isinstance(owner, list | tuple | set):
        for item in owner:
            yield from _find(item, depth - 1)
