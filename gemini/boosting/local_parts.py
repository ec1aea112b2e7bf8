"""Distributed parameters of a model (`DTensor`) become plain ones: the part that this rank has."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..chunk import Communicator
from ..packing.packing import MANAGED_DTYPES
from ..tensor_parallel import LocalPart, show_distributed
from ..tensor_parallel.distributed_view import show_as_before
from ..torch_private import TENSOR_HOOKS, own_buffers, own_parameters

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@contextmanager
def local_parts(model: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """Put parts into the places of distributed parameters; if the body raises, the model has its parameters again.

    What the optimizer has is undone by `unchanged_on_failure`. A model without such parameters stays as it is.

    Raises
    ------
    ValueError
        If a distributed parameter cannot be managed. Nothing has been changed.
    """
    if "torch.distributed.tensor" not in sys.modules:
        yield
        return
    distributed = _checked(model)
    if not distributed:
        yield
        return
    from ..tensor_parallel.sharding import Replaced, Sharding

    parts = {key: LocalPart.of(parameter, Sharding.of(parameter)) for key, parameter in distributed.items()}
    changed = _put(model, parts)
    try:
        if optimizer is not None:
            _give_parts(optimizer, parts)
        yield
    except BaseException:
        for module, before in changed:
            show_as_before(module)
            own_parameters(module).update(before)
        raise
    for parameter in distributed.values():
        Replaced.replace(parameter)


def check_groups(model: nn.Module, communicator: Communicator) -> None:
    """See that no rank has two parts of the work: another part of a tensor, and the same chunks.

    Raises
    ------
    ValueError
        Before anything has been changed.
    """
    group = next((p.sharding.group for p in model.parameters() if isinstance(p, LocalPart)), None)
    if group is None or communicator.owner.is_alone:
        return
    words = communicator.agree("booster.boost of a model with DTensors", dist.get_rank())
    both = (set(words) & set(dist.get_process_group_ranks(group))) - {dist.get_rank()}
    if both:
        raise ValueError(
            f"rank {dist.get_rank()} shares the parameters of this model, which are DTensors, with the ranks "
            f"{sorted(map(str, both))}, and is to keep equal chunks with them. Make a mesh of two dimensions, "
            'init_device_mesh(device, (data, tensor), mesh_dim_names=("dp", "tp")), make the parameters DTensors on '
            'mesh["tp"], and boost with GeminiPlugin(process_group=mesh["dp"])'
        )


def _checked(model: nn.Module) -> "dict[int, DTensor]":
    """The distributed parameters by their id, if all can be managed."""
    from torch.distributed.tensor import DTensor

    found = {id(p): (name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if not found:
        return {}
    for prefix, module in model.named_modules():
        for name, buffer in own_buffers(module).items():
            if isinstance(buffer, DTensor):
                raise ValueError(
                    f"the buffer {f'{prefix}.{name}'.lstrip('.')} is a DTensor; replace it by its local tensor "
                    "(to_local()) or make it a parameter"
                )
        if isinstance(module, nn.RNNBase) and any(isinstance(p, DTensor) for p in own_parameters(module).values()):
            raise ValueError(f"{prefix}: recurrent layers keep lists of their weights, which cannot be DTensors")
    meshes = {parameter.device_mesh for _, parameter in found.values()}
    if len(meshes) > 1:
        raise ValueError(
            f"the parameters are DTensors on several meshes ({meshes}); put all of them on one, mesh['tp']"
        )
    for name, parameter in found.values():
        for is_so, why in _FAULTS:
            if is_so(parameter):
                raise ValueError(f"the parameter {name} is a DTensor {why(parameter)}")
    return {key: parameter for key, (_, parameter) in found.items()}


def _is_unknown(placement: Any) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    return type(placement) not in (Replicate, Shard)


_FAULTS: tuple[tuple[Callable[[Any], bool], Callable[[Any], str]], ...] = (
    (
        lambda p: p.device_mesh.ndim != 1,
        lambda p: (
            f"on a mesh of {p.device_mesh.ndim} dimensions; put it on the tensor-parallel one alone, mesh['tp'], and "
            "give the data-parallel one to GeminiPlugin(process_group=mesh['dp']), which shards what is equal on it"
        ),
    ),
    (
        lambda p: any(map(_is_unknown, p.placements)),
        lambda p: f"placed as {p.placements}; chunks hold parts by Shard and Replicate: p.redistribute(placements=...)",
    ),
    (
        lambda p: p.dtype not in MANAGED_DTYPES,
        lambda p: f"of {p.dtype}; convert the model first, or keep this parameter plain (p.full_tensor())",
    ),
    (lambda p: p.is_meta, lambda p: "on the meta device and has no values: model.to_empty(...) and load it first"),
    (lambda p: p.grad is not None, lambda p: "that has a gradient already: call optimizer.zero_grad() before boost"),
    (
        lambda p: any(getattr(p, name, None) for name in TENSOR_HOOKS),
        lambda p: "with hooks; register them on model.parameters() after boost",
    ),
)
"""What a distributed parameter must not be, and what is said about it."""


def _put(model: nn.Module, parts: Mapping[int, LocalPart]) -> list[tuple[nn.Module, dict[str, nn.Parameter | None]]]:
    """Have modules keep parts. Returns each with the parameters that it had."""
    changed = []
    for module in model.modules():
        before = {name: p for name, p in own_parameters(module).items() if id(p) in parts}
        if before:
            own_parameters(module).update({name: parts[id(p)] for name, p in before.items()})
            show_distributed(module, before)
            changed.append((module, before))
    return changed


def _give_parts(optimizer: Optimizer, parts: Mapping[int, LocalPart]) -> None:
    """Have an optimizer update parts, from its states' parts."""
    for group in optimizer.param_groups:
        group["params"] = [parts.get(id(parameter), parameter) for parameter in group["params"]]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in parts]:
        part, state = parts[id(parameter)], optimizer.state.pop(parameter)
        optimizer.state[part] = {name: _part_of(value, part) for name, value in state.items()}


def _part_of(value: Any, part: LocalPart) -> Any:
    """What an optimizer keeps of a distributed parameter, for the part of it that is here."""
    if not hasattr(value, "to_local"):
        return value
    return value.redistribute(placements=part.sharding.placements).to_local()
