"""The state dict of a running average, compared with the model before anything is changed."""

from collections.abc import Callable, Mapping
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..checkpoint import is_extra_state
from ..chunk import converts, copy_fault
from ..formats import listed, shown

PREFIX, COUNT = "module.", "n_averaged"
"""As in the state dict of `torch.optim.swa_utils.AveragedModel`."""


def checked_state(
    model: nn.Module, state_dict: Mapping[str, Any], dtype_of: Callable[[Tensor], torch.dtype]
) -> tuple[dict[Tensor, Tensor], int]:
    """What is to be the average of each parameter, and how many steps it has taken in.

    Buffers and extra states, which an `AveragedModel` has as well, are left out. Tied parameters need one name.

    Parameters
    ----------
    dtype_of
        From a parameter to the dtype of its average.

    Raises
    ------
    TypeError
        If it is no mapping, or something in it is of another type.
    ValueError
        If names are missing or unexpected, or values do not fit. All of them are named.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"expected the state dict of an average, got a {type(state_dict).__name__}")
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(PREFIX + name)
    found = {parameter: next((name for name in each if name in state_dict), None) for parameter, each in names.items()}
    known = {COUNT, *(name for each in names.values() for name in each)}
    known.update(PREFIX + name for name, _ in model.named_buffers(remove_duplicate=False))
    missing = [names[parameter][0] for parameter, name in found.items() if name is None]
    missing += [] if COUNT in state_dict else [COUNT]
    unexpected = [name for name in state_dict if name not in known and not is_extra_state(str(name))]
    faults = [f"missing: {listed(missing)}"] if missing else []
    faults += [f"unexpected: {listed(unexpected)}"] if unexpected else []
    values: dict[Tensor, Tensor] = {}
    for holder, key in found.items():
        if key is None:
            continue
        value = state_dict[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"{key} must be a tensor, got a {type(value).__name__}: the average is as it was")
        values[holder] = value
        if fault := _fault(value, holder.shape, dtype_of(holder)):
            faults.append(f"{key} {fault}")
    if faults:
        raise ValueError(
            "this is no state of the average, which is as it was; give what state_dict() of an average of the same "
            f"model returned. {listed(faults, '; ', width=300)}"
        )
    return values, _checked_count(state_dict[COUNT])


def _fault(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> str | None:
    """Why a tensor cannot be an average of this shape and dtype; None if it can."""
    if (fault := copy_fault(value)) is not None:
        return fault
    if value.shape != shape:
        return f"has the shape {tuple(value.shape)}, expected {tuple(shape)}"
    return None if converts(value.dtype, dtype) else f"is of {value.dtype}, expected real numbers for {dtype}"


def _checked_count(given: Any) -> int:
    is_number = isinstance(given, Tensor) and copy_fault(given) is None and given.numel() == 1
    value = given.item() if is_number else given
    if isinstance(value, bool | Tensor) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{COUNT} must be an integer or a tensor of one, got {shown(given)}: the average is as it was")
    if (count := index(value)) < 0:
        raise ValueError(f"{COUNT} counts steps and is 0 or more, got {count}: the average is as it was")
    return count
