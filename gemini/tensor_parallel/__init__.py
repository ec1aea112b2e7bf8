"""Parameters that are `DTensor`: chunks hold the part that this rank has.

::

    nn.Parameter(DTensor) --boost--> LocalPart, a plain parameter: in chunks, in the optimizer, in model.parameters()
                                        |
    forward asks for module.weight  --> DTensor over the part, made for this use (`DistributedView`)
"""

from .distributed_view import DistributedView, show_distributed
from .local_part import LocalPart, is_sharded
from .norms import whole_norms

__all__ = ["DistributedView", "LocalPart", "is_sharded", "show_distributed", "whole_norms"]
