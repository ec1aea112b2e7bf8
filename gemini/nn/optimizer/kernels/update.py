"""One Adam step on flat buffers, by the kernel of their device: ``adam_update``, ``adam_8bit_update`` and
``adam_split_update``.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rules.moments import slots
from .arithmetic import AdamHyper, AdamScalars, scalars
from .reduced import BLOCK_NUMEL
from .reference import SLICE_NUMEL, adam_8bit_reference, adam_reference, adam_split_reference

_logger = logging.getLogger(__name__)

_Kernel = Callable[..., None]

# Where the kernels live. Imported on first use, because compilers are slow to import and may be missing.
_KERNELS = {"cpu": ("cpu_update", "numba"), "cuda": ("cuda_kernel", "Triton")}
_REFERENCES: dict[str, _Kernel] = {
    "adam": adam_reference,
    "adam_8bit": adam_8bit_reference,
    "adam_split": adam_split_reference,
}

_READY_NUMEL = 64

_GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOMENT_DTYPES = (torch.float32, torch.bfloat16)


def adam_update(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    at_step: AdamScalars,
    out: Tensor | None = None,
) -> None:
    """Do one Adam step in place, elementwise: any cut of a buffer into pieces gives the same bits.

    Parameters
    ----------
    param
        float32, one-dimensional, contiguous. Written.
    exp_avg, exp_avg_sq
        Likewise, or both bfloat16 (see [Note: Reduced states]), of equal length, on one device. Written.
    grad
        The gradient, float32, bfloat16 or float16, likewise. Not changed.
    at_step
        From ``arithmetic.scalars``: the hyperparameters at this step.
    out
        Receives the new ``param`` rounded to its dtype (float32, bfloat16, float16). May be ``grad`` itself.

    Raises
    ------
    TypeError, ValueError
        If a tensor does not fit this description. Nothing has been written then.

    Notes
    -----
    When a kernel raises, nothing has been written; the plain torch fallback may have done some slices of
    `atomic_numel` elements. Safe from several threads at once on different buffers; the CPU kernel releases the GIL. On
    CUDA the work is queued on the current stream. Payloads of NaN are not defined, that a NaN stays one is. See
    [Note: Adam arithmetic].
    """
    _check("exp_avg", exp_avg, param, _MOMENT_DTYPES)
    _check("exp_avg_sq", exp_avg_sq, param, (exp_avg.dtype,))
    _check_around(param, grad, out)
    if param.numel() > 0:
        _kernel_of(param.device.type)(param, exp_avg, exp_avg_sq, grad, at_step, out)


def adam_8bit_update(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    at_step: AdamScalars,
    out: Tensor | None = None,
) -> None:
    """Do one Adam step on moments in 8 bits. Cuts at multiples of `reduced.BLOCK_NUMEL` give the same bits.

    Parameters
    ----------
    param, grad, at_step, out
        As in `adam_update`.
    exp_avg, exp_avg_sq
        uint8, as long as ``param``. Written.
    exp_avg_scale, exp_avg_sq_scale
        float32, one element for each block, the last of which may be shorter. Written.

    Raises
    ------
    TypeError, ValueError
        If a tensor does not fit this description. Nothing has been written then.
    """
    blocks = -(-param.numel() // BLOCK_NUMEL)
    _check("exp_avg", exp_avg, param, (torch.uint8,))
    _check("exp_avg_sq", exp_avg_sq, param, (torch.uint8,))
    _check("exp_avg_scale", exp_avg_scale, param, (torch.float32,), blocks)
    _check("exp_avg_sq_scale", exp_avg_sq_scale, param, (torch.float32,), blocks)
    _check_around(param, grad, out)
    if param.numel() > 0:
        kernel = _kernel_of(param.device.type, "adam_8bit")
        kernel(param, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad, at_step, out)


def adam_split_update(
    high: Tensor, low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, at_step: AdamScalars
) -> None:
    """Do one Adam step on masters in two halves, as `adam_update` does it on the masters. See [Note: Split master].

    Parameters
    ----------
    high, low
        bfloat16 and int16, one-dimensional, contiguous. Written. ``high`` is what ``out`` of `adam_update` receives.
    exp_avg, exp_avg_sq
        float32, likewise, of equal length, on one device; ``exp_avg_sq`` with the marks of ties. Written.
    grad, at_step
        As in `adam_update`.

    Raises
    ------
    TypeError, ValueError
        If a tensor does not fit this description. Nothing has been written then.
    """
    _check("high", high, high, (torch.bfloat16,))
    _check("low", low, high, (torch.int16,))
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check(name, moment, high, (torch.float32,))
    _check("grad", grad, high, _GRAD_DTYPES)
    if high.numel() > 0:
        _kernel_of(high.device.type, "adam_split")(high, low, exp_avg, exp_avg_sq, grad, at_step)


def update_states(
    param: Tensor, states: Sequence[Tensor], grad: Tensor, at_step: AdamScalars, out: Tensor | None = None
) -> None:
    """Do one step on states that are kept in any of the ways that `moments` knows."""
    if len(states) == 2:
        exp_avg, exp_avg_sq = states
        adam_update(param, exp_avg, exp_avg_sq, grad, at_step, out)
    else:
        exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale = states
        adam_8bit_update(param, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, grad, at_step, out)


@functools.cache
def ready(
    device: torch.device, grad_dtype: torch.dtype, out_dtype: torch.dtype | None, has_l2: bool, states: str = "fp32"
) -> None:
    """Have the kernel for these types: compiled, loaded, its threads started. All that takes memory, and may fail."""
    param = torch.zeros(_READY_NUMEL, dtype=torch.float32, device=device)
    kept = [slot.zeros(_READY_NUMEL, device) for slot in slots(states)]
    grad = torch.zeros(_READY_NUMEL, dtype=grad_dtype, device=device)
    out = None if out_dtype is None else torch.zeros(_READY_NUMEL, dtype=out_dtype, device=device)
    weight_decay = 0.1 if has_l2 else 0.0
    hyper = AdamHyper(
        lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, decoupled=False, bias_correction=True
    )
    update_states(param, kept, grad, scalars(hyper, 1), out)


def many_kernels() -> Any:
    """The module with `cpu_update.many_cpu` and `cpu_update.values_at`; None without numba."""
    return None if _kernel_of("cpu") is adam_reference else importlib.import_module(".cpu_update", __package__)


def _check_around(param: Tensor, grad: Tensor, out: Tensor | None) -> None:
    _check("param", param, param, (torch.float32,))
    _check("grad", grad, param, _GRAD_DTYPES)
    if out is not None:
        _check("out", out, param, _GRAD_DTYPES)


def _check(name: str, tensor: Tensor, param: Tensor, dtypes: Sequence[torch.dtype], numel: int | None = None) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be one-dimensional and contiguous, got shape {tuple(tensor.shape)}, stride {tensor.stride()}"
        )
    wanted = param.numel() if numel is None else numel
    if tensor.numel() != wanted:
        raise ValueError(f"{name} has {tensor.numel()} elements, must have {wanted} where param has {param.numel()}")
    if tensor.device != param.device:
        raise ValueError(f"{name} is on {tensor.device}, param on {param.device}")
    if wanted > 0 and not tensor.is_meta and tensor.data_ptr() == 0:
        raise ValueError(f"{name} has no memory: it is lazy, or its storage has been freed")


def atomic_numel(device: torch.device) -> int | None:
    """Elements up to which `adam_update` writes all or nothing when it raises; None: any number."""
    return SLICE_NUMEL if _kernel_of(device.type) is adam_reference else None


@functools.cache
def _kernel_of(device_type: str, name: str = "adam") -> _Kernel:
    if device_type not in _KERNELS:
        return _REFERENCES[name]
    module, compiler = _KERNELS[device_type]
    try:
        kernel: _Kernel = getattr(importlib.import_module(f".{module}", __package__), f"{name}_{device_type}")
    except ImportError as error:
        # Cached, hence said once.
        _logger.warning(
            "%s cannot be used (%s): Adam on %s runs in plain torch operations, with the same results but slower",
            compiler,
            error,
            device_type,
        )
        return _REFERENCES[name]
    return kernel
