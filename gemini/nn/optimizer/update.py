"""``adam_update``: one Adam step on flat buffers, by the kernel of their device."""

import functools
import importlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .arithmetic import AdamHyper, AdamScalars, scalars
from .reference import SLICE_NUMEL, adam_reference

_logger = logging.getLogger(__name__)

_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, AdamScalars, Tensor | None], None]

# Where each kernel lives. Imported on first use, because compilers are slow to import and may be missing.
_KERNELS = {"cpu": ("cpu_kernel", "adam_cpu", "numba"), "cuda": ("cuda_kernel", "adam_cuda", "Triton")}

_READY_NUMEL = 64

_GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    param, exp_avg, exp_avg_sq
        float32, one-dimensional, contiguous, of equal length, on one device. Written.
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
    _check(param, exp_avg, exp_avg_sq, grad, out)
    if param.numel() > 0:
        _kernel_of(param.device.type)(param, exp_avg, exp_avg_sq, grad, at_step, out)


@functools.cache
def ready(device: torch.device, grad_dtype: torch.dtype, out_dtype: torch.dtype | None, has_l2: bool) -> None:
    """Have the kernel for these types: compiled, loaded, its threads started. All that takes memory, and may fail."""
    param, exp_avg, exp_avg_sq = (torch.zeros(_READY_NUMEL, device=device) for _ in range(3))
    grad = torch.zeros(_READY_NUMEL, dtype=grad_dtype, device=device)
    out = None if out_dtype is None else torch.zeros(_READY_NUMEL, dtype=out_dtype, device=device)
    weight_decay = 0.1 if has_l2 else 0.0
    hyper = AdamHyper(
        lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, decoupled=False, bias_correction=True
    )
    adam_update(param, exp_avg, exp_avg_sq, grad, scalars(hyper, 1), out)


def _check(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, out: Tensor | None) -> None:
    numel, device = param.numel(), param.device
    for name, tensor in (
        ("param", param),
        ("exp_avg", exp_avg),
        ("exp_avg_sq", exp_avg_sq),
        ("grad", grad),
        ("out", out),
    ):
        if tensor is None:
            continue
        dtypes = _GRAD_DTYPES if name in ("grad", "out") else (torch.float32,)
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be one-dimensional and contiguous, got shape {tuple(tensor.shape)}, "
                f"stride {tensor.stride()}"
            )
        if tensor.numel() != numel:
            raise ValueError(f"{name} has {tensor.numel()} elements, param has {numel}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, param on {device}")


def atomic_numel(device: torch.device) -> int | None:
    """Elements up to which `adam_update` writes all or nothing when it raises; None: any number."""
    return SLICE_NUMEL if _kernel_of(device.type) is adam_reference else None


@functools.cache
def _kernel_of(device_type: str) -> _Kernel:
    if device_type not in _KERNELS:
        return adam_reference
    module, function, compiler = _KERNELS[device_type]
    try:
        kernel: _Kernel = getattr(importlib.import_module(f".{module}", __package__), function)
    except ImportError as error:
        # Cached, hence said once.
        _logger.warning(
            "%s cannot be used (%s): Adam on %s runs in plain torch operations, with the same results but slower",
            compiler,
            error,
            device_type,
        )
        return adam_reference
    return kernel
