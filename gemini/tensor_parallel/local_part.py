"""The part of a distributed parameter that this rank has, as a plain parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .sharding import Sharding


class LocalPart(nn.Parameter):
    """What chunks and the optimizer have in the place of a parameter that is a `DTensor`."""

    sharding: Sharding
    """Of which tensor it is a part."""

    @staticmethod
    def of(distributed: DTensor, sharding: Sharding) -> LocalPart:
        """The part of a distributed parameter; the memory is the same."""
        with torch.no_grad():
            part = LocalPart(distributed.to_local(), requires_grad=distributed.requires_grad)
        part.__dict__.update(vars(distributed))
        part.sharding = sharding
        return part

    def distributed(self) -> DTensor:
        """The `DTensor`, over the memory of this part. Its gradient becomes that of the part."""
        # A view first, by a function of torch: it is seen by those who watch for uses, and brings what is away.
        return self.sharding.distribute(self.view_as(self))


def is_sharded(parameter: Tensor) -> bool:
    """True for a part of a tensor that no rank has whole."""
    return isinstance(parameter, LocalPart) and parameter.sharding.is_sharded
