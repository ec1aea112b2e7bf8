"""What kernels are promised about a parameter outside of chunks: its gradient and its states have its shape, its device
and memory of their own.

Kernels get raw addresses and believe them, and anybody may change a parameter, a gradient or a state between two steps
(``p.data = ...``, ``resize_``, ``optimizer.state[p]["exp_avg"] = ...``). What does not fit any more is an error before
the first byte is written.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rules.rule import BufferSpec
from .parameter_state import PARAM_DTYPES, needs_master, state_dtype

_NEW_STATE = "drop its state with optimizer.state.pop(parameter), or build a new optimizer"
_NEW_GRADIENT = "clear it with optimizer.zero_grad() and run backward again"


def check_dtype(param: Tensor, states: str) -> None:
    """Raise ``TypeError`` unless ``HybridAdam`` trains parameters of this dtype with states that are kept so."""
    if param.dtype == torch.float64 and states != "fp32":
        raise TypeError(
            f"states={states!r} is not for float64 parameters (of shape {tuple(param.shape)}), which are there for "
            "accuracy; leave states at 'fp32', or train them in float32"
        )
    if param.dtype not in PARAM_DTYPES:
        hint = "; view it as real (torch.view_as_real)" if param.is_complex() else ""
        raise TypeError(
            f"HybridAdam trains {', '.join(map(str, PARAM_DTYPES))} parameters, got {param.dtype} of shape "
            f"{tuple(param.shape)}{hint}"
        )


def check_parameter(param: Tensor, what: str) -> None:
    """Raise ``ValueError`` unless each element of a parameter can be written; ``what`` names it in the message."""
    _check_memory(param, what, "give it memory of its own: p.data = p.data.contiguous().clone()")


def check_gradient(param: Tensor, grad: Tensor, what: str) -> None:
    """Raise ``ValueError`` unless a gradient has one element for each of the parameter's, on its device."""
    _check_shape(grad, param.shape, f"the gradient of {what}", _NEW_GRADIENT)
    _check_device(grad, param, f"the gradient of {what}", _NEW_GRADIENT)
    if _is_missing(grad):
        raise ValueError(f"the gradient of {what} has no memory (meta, or its storage was freed); {_NEW_GRADIENT}")


def check_state(param: Tensor, state: Tensor, what: str, shape: torch.Size | None = None) -> None:
    """Raise ``ValueError`` unless a state has the parameter's shape (or another one, if given), and its device."""
    _check_shape(state, param.shape if shape is None else shape, what, _NEW_STATE)
    _check_device(state, param, what, _NEW_STATE)
    _check_memory(state, what, _NEW_STATE)


def check_states(param: Tensor, state: Mapping[str, Any], slots: Sequence[BufferSpec], states: str, what: str) -> None:
    """Raise ``ValueError`` unless a complete state of ``HybridAdam`` is one of this parameter.

    Parameters
    ----------
    slots, states
        What is kept of the moments, and the word for it.
    """
    own_dtype = state_dtype(param)
    expected = {
        slot.name: (
            own_dtype if states == "fp32" else slot.dtype,
            param.shape if slot.block_numel == 1 else torch.Size((slot.numel(param.numel()),)),
        )
        for slot in slots
    }
    if needs_master(param):
        expected["master"] = (torch.float32, param.shape)
    for name, (dtype, shape) in expected.items():
        here = f"{name} of {what}"
        tensor = state.get(name)
        if not isinstance(tensor, Tensor):
            found = "is missing" if tensor is None else f"is a {type(tensor).__name__}"
            raise ValueError(f"{here} {found}, expected a tensor of shape {tuple(shape)}; {_NEW_STATE}")
        check_state(param, tensor, here, shape)
        if tensor.dtype != dtype:
            raise ValueError(f"{here} is {tensor.dtype}, expected {dtype}; {_NEW_STATE}")
    step = state.get("step")
    if not isinstance(step, Tensor) or step.numel() != 1 or step.is_meta:
        raise ValueError(f"step of {what} is {step!r}, expected a tensor with one number; {_NEW_STATE}")


def check_apart(states: Iterable[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` if two parameters have one state: each of them would count the other's steps."""
    seen: set[int] = set()
    for state in states:
        address = state["step"].data_ptr()
        if address in seen:
            raise ValueError(
                f"two parameters share the step of one state, a tensor at {address:#x}; give each a state of its own"
            )
        seen.add(address)


def called(group: Mapping[str, Any], param: Tensor) -> str:
    """A parameter of a group, for messages: its name if the group has names, else its place in the group."""
    place = next((i for i, other in enumerate(group["params"]) if other is param), None)
    names = group.get("param_names")
    shape = f"(shape {tuple(param.shape)})"
    if place is None:
        return f"a parameter {shape}"
    return f"{names[place]} {shape}" if names is not None else f"parameter {place} of its group {shape}"


def _check_shape(tensor: Tensor, shape: torch.Size, what: str, remedy: str) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, expected {tuple(shape)}: one of the two has been given another "
            f"shape; {remedy}"
        )


def _check_device(tensor: Tensor, param: Tensor, what: str, remedy: str) -> None:
    if tensor.device != param.device:
        raise ValueError(f"{what} is on {tensor.device}, expected {param.device}; {remedy}")


def _check_memory(tensor: Tensor, what: str, remedy: str) -> None:
    if tensor.layout is not torch.strided:
        raise ValueError(f"{what} has the layout {tensor.layout}, expected a dense tensor; {remedy}")
    if _is_missing(tensor):
        raise ValueError(f"{what} has no memory (meta, or its storage was freed), so it cannot be updated; {remedy}")
    if not tensor.is_contiguous() and overlaps_itself(tensor):
        raise ValueError(
            f"several elements of {what} share memory (strides {tensor.stride()}), so they cannot be updated one by "
            f"one; {remedy}"
        )


def _is_missing(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (tensor.is_meta or tensor.data_ptr() == 0)


def overlaps_itself(tensor: Tensor) -> bool:
    """True if two elements have the same address, as after ``expand``."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                break
            reach += stride * (size - 1)
    else:
        return False
    # Dimensions that lie between each other: only counting tells.
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, dtype=torch.int64, device="cpu") * stride
    return bool(offsets.unique().numel() < tensor.numel())
