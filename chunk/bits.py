"""Where values differ, bit by bit."""

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what the bits of an element can be compared as. As numbers, NaN differs from itself and -0.0 equals 0.0."""


def differing(view: Tensor, home: Tensor) -> Tensor:
    """Where a full copy has other bits than its home gives it (a mask in their shape)."""
    as_bits = _BITS[view.element_size()]
    return view.detach().view(as_bits) != home.to(view.dtype).view(as_bits)
