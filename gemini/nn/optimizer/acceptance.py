"""Which optimizers can be boosted, and what to tell about the others."""

import torch
from torch.optim import Optimizer

from .hybrid_adam import HybridAdam

_WHOLE_TENSOR = {
    "adafactor": "factors the second moment of a matrix into its rows and columns",
    "lamb": "scales each tensor's update by norms of the whole tensor",
    "lars": "scales each tensor's update by norms of the whole tensor",
    "lbfgs": "searches along directions made from all parameters at once",
    "muon": "makes each matrix's update orthogonal",
    "shampoo": "multiplies each matrix with preconditioners of its rows and columns",
    "soap": "rotates each matrix into the basis of its preconditioners",
}
"""By lower-case name: what it does that no part of a tensor can do alone."""

_ELEMENTWISE = (
    torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax,
    torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Rprop,
)  # fmt: skip


def accepted(optimizer: Optimizer) -> HybridAdam:
    """The `HybridAdam` that an optimizer is, or becomes.

    Raises
    ------
    TypeError
        If its arithmetic is not Adam's; says why that matters.
    ValueError
        If it is an Adam with an option that `HybridAdam` does not have.
    """
    if isinstance(optimizer, HybridAdam):
        return optimizer
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return HybridAdam.from_torch(optimizer)  # type: ignore[arg-type]
    raise TypeError(f"optimizer must be a HybridAdam, torch.optim.Adam or torch.optim.AdamW, {_why_not(optimizer)}")


def _why_not(optimizer: Optimizer) -> str:
    name = type(optimizer).__name__
    for cls in type(optimizer).__mro__:
        does = _WHOLE_TENSOR.get(cls.__name__.lower())
        if does is not None:
            return (
                f"got {name}: it {does}, and states in chunks are updated in pieces, wherever each piece is. "
                "Train it unmanaged, or use HybridAdam"
            )
    if isinstance(optimizer, torch.optim.Adam):
        return f"got {name}, a subclass, which may compute something else; give the optimizer itself, or use HybridAdam"
    if isinstance(optimizer, _ELEMENTWISE):
        return f"got {name}: it is element-wise and could run on chunks, but there is no kernel for it; use HybridAdam"
    return f"got {name}: there is no kernel for it on chunks. Train it unmanaged, or use HybridAdam"
