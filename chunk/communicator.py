"""The seam for several ranks: a chunk asks here to gather its shards or to reduce a gradient."""

from typing import Protocol

import torch
from torch import Tensor

from .gradient import GradientBuffer


class Communicator(Protocol):
    """What a chunk needs of its process group. Planner and states never learn of ranks."""

    rank: int
    world_size: int

    def all_gather(self, full: Tensor) -> None:
        """Fill ``full`` (flat) from every rank's shard; this rank's part is in place already."""

    def reduce_gradient(self, gradient: GradientBuffer) -> None:
        """Sum a gradient, which is complete here, over ranks."""

    def agree_max(self, value: Tensor) -> Tensor:
        """The element-wise maximum over ranks (an overflow seen by one rank is seen by all)."""


class SingleProcess:
    """One rank: its shard is the whole, there is nothing to exchange."""

    rank = 0
    world_size = 1

    def all_gather(self, full: Tensor) -> None:
        pass

    def reduce_gradient(self, gradient: GradientBuffer) -> None:
        pass

    def agree_max(self, value: torch.Tensor) -> torch.Tensor:
        return value
