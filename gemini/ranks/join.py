"""From the user's process group to the communicator of a model."""

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..chunk.communicator import ALONE, Communicator
from ..torch_private import default_store, group_timeout
from .mailbox import Mailbox, PointToPoint
from .peers import Peers


def group_of(given: dist.ProcessGroup | DeviceMesh | None) -> tuple[dist.ProcessGroup | None, int | None]:
    """The process group that a user has given, maybe as a mesh, and how many ranks of it keep the model together.

    Returns
    -------
    tuple
        None for the default group; None where all of it keep the model together.

    Raises
    ------
    ValueError
        If a mesh has more than two dimensions.
    TypeError
        If it is something else.
    """
    if isinstance(given, DeviceMesh):
        if given.ndim == 1:
            return given.get_group(), None
        if given.ndim == 2:
            ranks = given.mesh.flatten().tolist()
            if ranks == list(range(dist.get_world_size())):
                return None, given.size(1)
            return dist.new_group(ranks, use_local_synchronization=True), given.size(1)
        raise ValueError(
            f"process_group must be a mesh of one dimension, or of two (replicate, shard), got one of {given.ndim} "
            f"({', '.join(given.mesh_dim_names or ())}): slice the data-parallel ones out of it, mesh['dp']"
        )
    if given is None or isinstance(given, dist.ProcessGroup):
        return given, None
    raise TypeError(f"process_group must be a ProcessGroup or a DeviceMesh, got {type(given).__name__}")


def join(group: dist.ProcessGroup | None, shard_size: int | None, gradient_reduction: str = "sum") -> Communicator:
    """The communicator over the ranks of a group (None: of the default one). All of them call this at once.

    A Gloo group of its own is made over them, whatever the given one runs on: tensors then travel between the CPUs.

    Parameters
    ----------
    shard_size
        How many ranks, one after the other, keep the model together; None for all.

    Raises
    ------
    ValueError
        If this process is not one of them, or they cannot be divided like this.
    """
    if not dist.is_initialized():
        _warn_of_ranks_that_have_not_joined()
        return ALONE
    group = dist.group.WORLD if group is None else group
    assert group is not None
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"rank {dist.get_rank()} is none of the process group's, which are {ranks}: boost in these only"
        )
    if len(ranks) == 1:
        return ALONE
    shard_size = len(ranks) if shard_size is None else shard_size
    if len(ranks) % shard_size:
        raise ValueError(f"{len(ranks)} ranks cannot be divided into shards of hybrid_shard_size={shard_size}")
    names, factor = tuple(f"rank {rank}" for rank in ranks), 1.0 / len(ranks) if gradient_reduction == "mean" else 1.0
    timeout: timedelta = group_timeout(group)
    mailbox = Mailbox(_connected(ranks, timeout), ranks.index(dist.get_rank()), names, timeout)
    return Peers(mailbox, shard_size, factor)


def _warn_of_ranks_that_have_not_joined() -> None:
    """A launcher has started several, and without a process group each of them trains a model of its own."""
    if (count := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        warnings.warn(
            f"this is one of {count} processes (WORLD_SIZE), and there is no process group: each trains a model of its "
            "own. Call gemini.launch_from_torch() before booster.boost to train one together",
            stacklevel=2,
        )


def _connected(ranks: Sequence[int], timeout: timedelta) -> PointToPoint:
    """A Gloo group of our own over these ranks.

    Not by ``dist.new_group``, whose names depend on how many groups a process has, which need not be the same with all;
    and what it makes ends with the user's ``dist.destroy_process_group()``, when other ranks may need ours still.
    """
    from torch.distributed.distributed_c10d import PrefixStore  # not every build of torch has it

    store, name = default_store(), f"gemini-memory/{'-'.join(map(str, ranks))}"
    number = store.add(f"{name}/{dist.get_rank()}", 1)
    own = PrefixStore(f"{name}/{number}", store)
    return cast(PointToPoint, dist.ProcessGroupGloo(own, ranks.index(dist.get_rank()), len(ranks), timeout))
