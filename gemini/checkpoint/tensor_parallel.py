"""Whole tensors of a model whose parameters are parts: gathered for reading, cut for writing.

Gathering is a collective of the tensor-parallel group. Where files are written its first rank leads: it says which
tensor comes next, and the others give their parts until it is done.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gemini.errors import RankError

from ..tensor_parallel import LocalPart, is_sharded
from ..torch_private import own_parameters

_led: ContextVar["dist.ProcessGroup | None"] = ContextVar("gemini_memory_led_group", default=None)
"""The group that waits to be told which tensor comes next; None: all ranks read the same by themselves."""


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, or of that of which it is a part."""
    return tuple(tensor.sharding.shape if isinstance(tensor, LocalPart) else tensor.shape)


def whole_numel(tensor: Tensor) -> int:
    """Elements of that shape."""
    return prod(whole_shape(tensor))


def gathered(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """The whole of a tensor, from the value of what is here. All ranks of its group call this."""
    if not isinstance(tensor, LocalPart) or not is_sharded(tensor):
        return value
    if (group := _led.get()) is not None:
        dist.broadcast_object_list([(name, "")], group=group, group_src=0)
    return tensor.sharding.gather(value)


def cut(tensor: Tensor, value: Tensor) -> Tensor:
    """What is here of a whole value."""
    return tensor.sharding.cut(value) if isinstance(tensor, LocalPart) else value


def refuse_parts(optimizer: Optimizer, doing: str) -> None:
    """Raise for an optimizer whose states are of parts.

    Raises
    ------
    ValueError
        Nothing has been changed or written.
    """
    if any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"{doing} cannot put together the states of parameters that are DTensors, of which each tensor-parallel "
            "rank has a part: booster.save(folder, model=model, optimizer=optimizer, layout='dcp') stores the parts, "
            "and booster.load reads them with any number of ranks"
        )


def write_by_first(of: Any, doing: str, write: Callable[[], None], read: Callable[[str], object]) -> None:
    """Have the first rank of a tensor-parallel group write; the others give it their parts meanwhile.

    Parameters
    ----------
    of
        The model, optimizer or scheduler that is saved.
    doing
        What this is, in words.
    read
        Reads the tensor of a name on the others, by `gathered`.

    Raises
    ------
    RankError
        On the others, if it fails on the first one.
    """
    group = row_of(of)
    if group is None:
        write()
    elif dist.get_rank(group):
        _follow(group, doing, read)
    else:
        with _leading(group):
            write()


@contextmanager
def _leading(group: dist.ProcessGroup) -> Iterator[None]:
    token, error = _led.set(group), ""
    try:
        yield
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        _led.reset(token)
        dist.broadcast_object_list([(None, error)], group=group, group_src=0)


def _follow(group: dist.ProcessGroup, doing: str, read: Callable[[str], object]) -> None:
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, group=group, group_src=0)
        name, error = told[0]
        if error:
            raise RankError(f"rank {dist.get_global_rank(group, 0)} failed in {doing}: {error}")
        if name is None:
            return
        read(name)


def is_divided(of: Any) -> bool:
    """True if each rank of a tensor-parallel group has a part of what is saved."""
    return row_of(of) is not None


def row_of(of: Any) -> "dist.ProcessGroup | None":
    """The tensor-parallel group of a model, an optimizer or a scheduler."""
    parameters: Mapping[int, Any]
    if isinstance(of, nn.Module):  # not of.parameters(), which waits for updates
        parameters = {id(p): p for module in of.modules() for p in own_parameters(module).values()}
    else:
        optimizer = of if isinstance(of, Optimizer) else getattr(of, "optimizer", None)
        groups = getattr(optimizer, "param_groups", ())
        parameters = {id(p): p for group in groups for p in group["params"]}
    return next((p.sharding.group for p in parameters.values() if isinstance(p, LocalPart) and is_sharded(p)), None)
