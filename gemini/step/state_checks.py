"""What a state of one parameter in a chunk may be."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..chunk import Chunk, Marked
from ..nn.optimizer.rules.rule import whole_steps

STEP = "step"


def check_value(chunk: Chunk, parameter: Tensor, name: str, value: Any) -> None:
    """Raise what is wrong with one entry of a state.

    Raises
    ------
    TypeError, ValueError
        If it is no count, or no tensor that has a place in the chunk.
    """
    if name == STEP:
        whole_steps(value)
        return
    if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
        what = f"a {value.dtype}, {value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} of a parameter is a dense, real tensor of its shape, got {what}")
    if value.shape != parameter.shape:
        raise ValueError(
            f"{name} has the shape of its parameter, {tuple(parameter.shape)}, got {tuple(value.shape)}: "
            "what the optimizer keeps has its place in a chunk, and with it its shape"
        )
    _check_sign(chunk, name, value)


def check_side(name: str, shape: tuple[int, ...], value: Any) -> None:
    """Raise what is wrong with a side state.

    Raises
    ------
    TypeError, ValueError
        If it is no number and no tensor of its shape.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and shape == ():
        return
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        raise TypeError(f"{name} is a tensor of floating-point numbers, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} of this parameter has the shape {shape}, got {tuple(value.shape)}")


def check_signs(chunk: Chunk, state: Mapping[Any, Any], read: Callable[[Any], Any]) -> None:
    """Raise ``ValueError`` if a state is negative whose signs belong to split masters. Reads no other states.

    Parameters
    ----------
    read
        From an entry to its value.
    """
    for name in state.keys() & chunk.codecs.keys():
        if isinstance(chunk.codecs[name], Marked) and state[name] is not None:
            _check_sign(chunk, name, read(state[name]))


def _check_sign(chunk: Chunk, name: str, value: Tensor) -> None:
    if isinstance(chunk.codecs.get(name), Marked) and bool((value < 0).any()):
        raise ValueError(
            f"{name} cannot be negative with split_master=True, which keeps a part of the masters in its signs; "
            "boost without split_master"
        )
