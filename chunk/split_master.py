"""A float32 master in two halves, one of which is the full copy. Pure: tensors in, tensors out.

[Note: Split master]
::

    master, 32 bits  ->  high: the master as bfloat16, rounded to nearest, ties to even, as everywhere
                         low:  its lower 16 bits
                         mark: a tie that was rounded down

    bits of master = (high << 16) + low (as a signed number) + (mark << 16)

A negative ``low`` says that ``high`` was rounded up. Half way between two bfloat16, at 0x8000, it is negative too, but
every second time ``high`` was rounded down to its even neighbour. 32 bits cannot tell these apart: an even bfloat16
stands for 65537 masters, both ties among them. So there is a mark, in a bit that is free: the sign of a state of
the optimizer that is never negative (``BufferSpec.has_spare_sign``; Adam's second moment). Nothing is lost, and nothing
is rounded otherwise: any master comes back with its own bits, but for the payload of NaN. The sign of a state that is
NaN must go: as a mark it would make -0.0 of a NaN whose upper half is 0x7FFF, as GPUs have it.

Weights in two halves are from Kalamkar et al., "Optimizing Deep Learning Recommender Systems' Training on CPU Cluster
Architectures", 2020 (Split-SGD-BF16), where the upper one is cut off, not rounded. The price: code that writes to
``high`` behind the optimizer's back leaves a ``low`` that belongs to another number.
"""

import torch
from torch import Tensor

_TIE = 0x8000


def halves(master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split float32 numbers.

    Returns
    -------
    tuple of Tensor
        ``high`` (bfloat16), ``low`` (int16) and the mark (bool), each in the shape of ``master``.
    """
    bits = master.view(torch.int32)
    low = bits & 0xFFFF
    is_even = (bits & 0x10000) == 0
    return master.to(torch.bfloat16), low.to(torch.int16), (low == _TIE) & is_even


def joined(high: Tensor, low: Tensor, marked_state: Tensor) -> Tensor:
    """The float32 numbers of ``high``, ``low`` and the state that has the marks."""
    upper = high.view(torch.int16).to(torch.int32) + marked_state.signbit()
    return ((upper << 16) + low).view(torch.float32)


def marked(state: Tensor, mark: Tensor) -> Tensor:
    """A state that is not negative, with the marks as its signs."""
    return torch.where(mark, -state.abs(), state.abs())


def unmarked(state: Tensor) -> Tensor:
    """The state itself."""
    return state.abs()
