"""From the user's process group to the communicator of a model."""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..chunk.communicator import ALONE, Communicator
from ..torch_private import group_timeout
from .mailbox import Mailbox
from .peers import Peers


def group_of(given: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group that a user has given, maybe as a mesh.

    Raises
    ------
    ValueError
        If a mesh has several dimensions.
    TypeError
        If it is something else.
    """
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise ValueError(
                f"process_group must be a mesh of one dimension, got one of {given.ndim} "
                f"({', '.join(given.mesh_dim_names or ())}): slice the data-parallel one out of it, mesh['dp']"
            )
        return given.get_group()
    if given is None or isinstance(given, dist.ProcessGroup):
        return given
    raise TypeError(f"process_group must be a ProcessGroup or a DeviceMesh, got {type(given).__name__}")


def join(group: dist.ProcessGroup | None, gradient_reduction: str = "sum") -> Communicator:
    """The communicator over the ranks of a group (None: of the default one). All of them call this at once.

    A Gloo group of its own is made over them, whatever the given one runs on: tensors then travel between the CPUs.

    Raises
    ------
    ValueError
        If this process is not one of them.
    """
    if not dist.is_initialized():
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
    timeout: timedelta = group_timeout(group)
    own = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
    assert isinstance(own, dist.ProcessGroup)
    names = tuple(f"rank {rank}" for rank in ranks)
    factor = 1.0 / len(ranks) if gradient_reduction == "mean" else 1.0
    return Peers(Mailbox(own, ranks.index(dist.get_rank()), names, timeout), factor)
