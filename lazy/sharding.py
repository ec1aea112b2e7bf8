"""A lazy model straight into shards: each rank keeps its part of every parameter as a ``DTensor``.

Every rank replays the whole tape, one tensor at a time, and keeps its chunk, so nothing is sent between ranks and the
parts put together are the eager values. That needs the same random state on all of them, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from gemini.torch_private import own_parameters

from .tape import Tape
from .tensor import LazyTensor

Placements = Placement | Sequence[Placement]
Rule = Callable[[str, nn.Parameter], Placements | None]
Layout = Placements | Mapping[str, Placements | None] | Rule


class _Unsaid:
    """A mapping has no pattern for this name; another name of the same parameter may have one."""


def decide(module: nn.Module, mesh: DeviceMesh, layout: Layout) -> dict[int, tuple[Placement, ...] | None]:
    """Return the placements of each lazy parameter by its id; None for one that stays whole.

    Raises
    ------
    TypeError, ValueError
        If mesh or layout do not fit the model; see :func:`gemini.lazy.materialize`.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"device_mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in {mesh}; materialise on the ranks of the mesh only")
    parameters = list(module.named_parameters(remove_duplicate=False))
    choose = _rule(layout, [name for name, _ in parameters])
    decided: dict[int, tuple[Placement, ...] | None] = {}
    names: dict[int, str] = {}
    for name, parameter in parameters:
        chosen = choose(name, parameter)
        if isinstance(chosen, _Unsaid):
            continue
        placements = None if chosen is None else _check(name, parameter, mesh, chosen)
        other = names.setdefault(id(parameter), name)
        if decided.setdefault(id(parameter), placements) != placements:
            raise ValueError(
                f"{other} and {name} are one parameter, but are placed as {decided[id(parameter)]} and {placements}"
            )
    for name, parameter in parameters:
        if id(parameter) not in decided:
            decided[id(parameter)] = _check(name, parameter, mesh, [Replicate()] * mesh.ndim)
    return decided


def sharding(mesh: DeviceMesh, decided: Mapping[int, tuple[Placement, ...] | None]) -> Callable[..., Tensor]:
    """Return the sink that keeps this rank's part of each parameter."""

    def keep(parameter: nn.Parameter, value: Tensor) -> Tensor:
        placements = decided[id(parameter)]
        return value.clone() if placements is None else shard(value, mesh, placements)

    return keep


def shard(value: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """Return this rank's part of `value`, which every rank has whole, as a DTensor with memory of its own."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    local = value
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            chunks = local.chunk(mesh.size(dim), placement.dim)
            empty = local.narrow(placement.dim, 0, 0)
            local = chunks[coordinate[dim]] if coordinate[dim] < len(chunks) else empty
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def check_agreement(tapes: Sequence[Tape], mesh: DeviceMesh) -> None:
    """Raise ValueError if the ranks of `mesh` would not draw the same numbers."""
    mine = [tape.fingerprint() for tape in tapes]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        everyone: list[list[str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        if any(other != mine for other in everyone):
            raise ValueError(
                "the ranks built this model from different random states, so their shards would not fit together; "
                "call torch.manual_seed with the same number on every rank before LazyInitContext"
            )


def _rule(layout: Layout, names: list[str]) -> Callable[[str, nn.Parameter], Placements | _Unsaid | None]:
    if isinstance(layout, Mapping):
        patterns = dict(layout)
        unused = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if unused:
            raise ValueError(f"placements names {unused}, which no parameter is called; parameters are {names[:5]} ...")

        def first_match(name: str, parameter: nn.Parameter) -> Placements | _Unsaid | None:
            return next((patterns[pattern] for pattern in patterns if fnmatchcase(name, pattern)), _Unsaid())

        return first_match
    if isinstance(layout, Placement | Sequence):
        return lambda name, parameter: layout
    if callable(layout):
        return layout
    raise TypeError(f"placements must be placements, a mapping or a function, got {type(layout).__name__}")


def _check(name: str, parameter: nn.Parameter, mesh: DeviceMesh, chosen: Placements) -> tuple[Placement, ...]:
    if not isinstance(parameter, LazyTensor | DTensor):
        raise ValueError(
            f"{name} is a real tensor already; build it inside LazyInitContext, or make it a DTensor with "
            "torch.distributed.tensor.distribute_tensor first"
        )
    if parameter.device.type != mesh.device_type:
        raise ValueError(
            f"{name} will live on {parameter.device}, the mesh is on {mesh.device_type}; "
            f"build the model in LazyInitContext(default_device={mesh.device_type!r})"
        )
    placements = tuple(_each(chosen))
    if len(placements) != mesh.ndim:
        raise ValueError(f"{name} needs one placement for each of the {mesh.ndim} mesh dimensions, got {placements}")
    return tuple(_normal(name, parameter, placement) for placement in placements)


def _each(chosen: Placements) -> Iterator[Placement]:
    yield from [chosen] if isinstance(chosen, Placement) else chosen


def _normal(name: str, parameter: nn.Parameter, placement: object) -> Placement:
    if type(placement) is Replicate:
        return placement
    if type(placement) is not Shard:
        raise ValueError(f"{name} can be placed by Shard or Replicate, got {placement!r}")
    if not -parameter.dim() <= placement.dim < parameter.dim():
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}, which has no dimension {placement.dim} to shard")
    return Shard(placement.dim % parameter.dim())


def replace_everywhere(module: nn.Module, new: Mapping[int, nn.Parameter]) -> None:
    """Put new parameters where the old ones are referred to, by id: in modules, and in containers in attributes."""
    for child in module.modules():
        for name, parameter in list(own_parameters(child).items()):
            if id(parameter) in new:
                setattr(child, name, new[id(parameter)])  # recurrent layers keep a list of weights up to date here
        for name, attribute in list(vars(child).items()):
            if attribute is not own_parameters(child) and isinstance(attribute, dict | list | tuple | LazyTensor):
                vars(child)[name] = _replaced(attribute, new, 4)


def _replaced(node: object, new: Mapping[int, nn.Parameter], depth: int) -> object:
    if isinstance(node, LazyTensor):
        return new.get(id(node), node)
    if not depth:
        return node
    if isinstance(node, dict):
        for key in node:
            node[key] = _replaced(node[key], new, depth - 1)
    elif isinstance(node, list):
        node[:] = [_replaced(item, new, depth - 1) for item in node]
    elif type(node) is tuple:
        return tuple(_replaced(item, new, depth - 1) for item in node)
    return node
