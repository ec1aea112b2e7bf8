"""Setting a parameter's data, whatever device it was on."""

from typing import Any

from torch import Tensor, nn

from ..torch_private import TENSOR_HOOKS, fits_in_place, swap_content, use_count


def give_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Do what ``parameter.data = data`` does, also between devices for which torch refuses that.

    It refuses from the CPU to devices of other makers (an NPU), whose tensors are of another kind. Then the object gets
    another tensor inside. It stays itself, with its class and attributes, so that optimizers go on holding it.

    Raises
    ------
    ValueError
        If an autograd graph or hooks have been tied to the tensor inside already. The parameter is as it was.
    """
    if fits_in_place(parameter, data):
        parameter.data = data
        return
    hooks = [name for name in TENSOR_HOOKS if getattr(parameter, name, None)]
    if hooks or use_count(parameter) > 1:
        what = "has hooks" if hooks else "is part of an autograd graph"
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} {what} and cannot follow its model from {parameter.device} "
            f"to {data.device}: move the model there first (model.to({data.device.type!r}))"
        )
    gradient: Any = parameter.grad
    inside = nn.Parameter(data.detach(), requires_grad=parameter.requires_grad)
    swap_content(parameter, inside)
    if gradient is not None:
        parameter.grad = gradient.to(data.device)
