"""Whether values can be copied out of a tensor that somebody hands in, asked before anything is written."""

import warnings
from functools import cache

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
"""Of subclasses nobody knows what an attribute costs; what they are is for those to say who made them."""


def copy_fault(value: Tensor) -> str | None:
    """Why no values can be copied out of a tensor; None if they can. Reads none."""
    if type(value) not in _PLAIN:
        return None
    if value.layout != torch.strided:
        return f"has the layout {value.layout}, expected a dense tensor"
    if value.is_nested:
        return "is a nested tensor, expected a dense one"
    if value.is_meta:
        return "has no values: it is on the meta device"
    if value.is_quantized:
        return f"is quantised ({value.dtype}), expected a dense tensor"
    if value.numel() and not value.data_ptr():
        return "has no values: its memory was given back"
    return None


@cache
def converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether torch can copy values of one dtype into another without dropping an imaginary part."""
    if source.is_complex and not target.is_complex:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some dtypes are experimental or deprecated
            torch.empty(1, dtype=target, device="cpu").copy_(torch.empty(1, dtype=source, device="cpu"))
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
