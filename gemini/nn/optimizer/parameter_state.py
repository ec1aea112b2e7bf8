"""The optimizer state of one parameter, in ``torch.optim.AdamW``'s layout plus a float32 master copy.

=============  ==================================================================================
``step``       float32 scalar on CPU
``exp_avg``    float32 (float64 for float64 parameters), layout of the parameter
``exp_avg_sq`` likewise
``master``     likewise; only for bfloat16 and float16 parameters, which receive it rounded
=============  ==================================================================================
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def needs_master(param: Tensor) -> bool:
    """Whether ``param`` is too coarse to train without a float32 copy."""
    return param.dtype in _LOW_PRECISION


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of the moments and of the master."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def complete_state(state: dict[str, Any], param: Tensor) -> None:
    """Add to ``state`` what is missing for an update of ``param``: everything at first, a master after loading."""
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format)
    if needs_master(param) and "master" not in state:
        state["master"] = param.detach().to(torch.float32)


def check_saved(saved: Mapping[str, Any], param: Tensor, where: str) -> None:
    """Raise ``ValueError`` if ``saved`` cannot be the Adam state of ``param``; ``where`` names it in the message."""
    missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in saved]
    if missing:
        raise ValueError(f"{where}: the loaded state has no {', '.join(missing)}; it is not that of an Adam optimizer")
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name in saved and saved[name].shape != param.shape:
            raise ValueError(
                f"{where}: the loaded {name} has shape {tuple(saved[name].shape)}, the parameter {tuple(param.shape)}"
            )


def restored(saved: Mapping[str, Any], param: Tensor, *, copy: bool) -> dict[str, Any]:
    """Turn a saved state, ours or torch's, into one for ``param``.

    Parameters
    ----------
    copy
        Whether tensors that already fit are copied. Sharing them with a state dict would train two optimizers on the
        same memory.
    """
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if name == "step":
            state[name] = torch.tensor(float(value))
        elif name in ("exp_avg", "exp_avg_sq") or (name == "master" and needs_master(param)):
            state[name] = _like(value, param, copy)
        elif name != "master":
            state[name] = value.detach().clone() if copy and isinstance(value, Tensor) else value
    return state


def _like(value: Tensor, param: Tensor, copy: bool) -> Tensor:
    fits = value.dtype == state_dtype(param) and value.device == param.device and value.stride() == param.stride()
    if fits and not copy:
        return value
    empty = torch.empty_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format, requires_grad=False)
    return empty.copy_(value.detach())
