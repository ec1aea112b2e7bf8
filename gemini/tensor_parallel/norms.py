"""Norms of tensors of which each rank of a tensor-parallel group has a part."""

from collections.abc import Sequence
from functools import reduce
from math import inf
from operator import add

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankError
from .local_part import LocalPart


def whole_norms(parameters: Sequence[Tensor], norms: Sequence[Tensor], order: float) -> list[Tensor]:
    """The norms of whole tensors from those of this rank's parts of them; others are as they were.

    Parameters
    ----------
    parameters, norms
        Of each parameter the norm of what is here: fp32 scalars on CPU.
    order
        Of the norm.

    Raises
    ------
    RankError
        If another rank of the group has gradients of other parameters.
    """
    parts = [(i, p.sharding) for i, p in enumerate(parameters) if isinstance(p, LocalPart) and p.sharding.is_sharded]
    if not parts:
        return list(norms)
    group = parts[0][1].group
    own = [(tuple(sharding.shape), float(norms[i])) for i, sharding in parts]
    said: list[list[tuple[tuple[int, ...], float]]] = [own] * dist.get_world_size(group)
    dist.all_gather_object(said, own, group=group)
    shapes = [[shape for shape, _ in each] for each in said]
    for index, each in enumerate(shapes):
        if each != shapes[0]:
            raise RankError(
                f"rank {dist.get_global_rank(group, index)} has gradients of {len(each)} sharded parameters, rank "
                f"{dist.get_global_rank(group, 0)} of {len(shapes[0])}, or of others: ranks of one tensor-parallel "
                "group run the same batches through the same modules"
            )
    whole = list(norms)
    for (i, _), *of_ranks in zip(parts, *said, strict=True):
        whole[i] = _together([torch.tensor(norm, dtype=torch.float32, device="cpu") for _, norm in of_ranks], order)
    return whole


def _together(norms: Sequence[Tensor], order: float) -> Tensor:
    """The norm of all parts, in the arithmetic of `DTensor`: powers, summed in the order of the ranks, and the root."""
    if abs(order) == inf:
        stacked = torch.stack(list(norms))
        return stacked.max() if order > 0 else stacked.min()
    if order == 0:
        return reduce(add, norms)
    return reduce(add, [norm**order for norm in norms]) ** (1.0 / order)
