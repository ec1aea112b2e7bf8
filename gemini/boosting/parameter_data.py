"""Setting a parameter's data, whatever device it was on."""

from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def give_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Do what ``parameter.data = data`` does, also between devices for which torch refuses that.

    It refuses from the CPU to devices of other makers (an NPU), whose tensors are of another kind. Then the object gets
    another tensor inside. It stays itself, with its class and attributes, so that optimizers go on holding it.

    Raises
    ------
    ValueError
        If an autograd graph or hooks have been tied to the tensor inside already. The parameter is as it was.
    """
    if torch._has_compatible_shallow_copy_type(parameter, data):
        parameter.data = data
        return
    hooks = [name for name in _HOOKS if getattr(parameter, name, None)]
    if hooks or parameter._use_count() > 1:  # type: ignore[attr-defined]
        what = "has hooks" if hooks else "is part of an autograd graph"
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} {what} and cannot follow its model from {parameter.device} "
            f"to {data.device}: move the model there first (model.to({data.device.type!r}))"
        )
    gradient: Any = parameter.grad
    inside = nn.Parameter(data.detach(), requires_grad=parameter.requires_grad)
    torch._C._swap_tensor_impl(parameter, inside)
    if gradient is not None:
        parameter.grad = gradient.to(data.device)
