"""One Adam step on flat buffers, by the kernel for their device and their form."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .arithmetic import AdamScalars
from .compiled import traced_update
from .forms import check
from .reference import SLICE_NUMEL

_logger = logging.getLogger(__name__)

_COMPILED = {"cpu": ("cpu_update", "numba"), "cuda": ("cuda_kernel", "Triton")}
"""By the type of a device: the module of its kernels, and the compiler that it needs."""


class Kernel(Protocol):
    """Does one step in place on flat buffers of one form, which have been checked."""

    def __call__(
        self, buffers: Sequence[Tensor], grad: Tensor, scalars: AdamScalars, out: Tensor | None = None, /
    ) -> None: ...


class _Kernels(dict[tuple[str, str], Kernel]):
    """Filled for a device when it is first asked: compilers are slow to import and may be missing."""

    def __missing__(self, key: tuple[str, str]) -> Kernel:
        device = key[0]
        self.update({(device, form): kernel for form, kernel in _kernels_of(device).items()})
        return self[key]


KERNELS = _Kernels()
"""By the type of a device, and the form of the buffers (`forms.FORMS`)."""


def adam_update(
    form: str, buffers: Sequence[Tensor], grad: Tensor, scalars: AdamScalars, out: Tensor | None = None
) -> None:
    """Do one Adam step in place, elementwise: any cut of a buffer into pieces gives the same bits.

    Parameters
    ----------
    form, buffers
        The parameter and the moments as `forms.FORMS` has them: one-dimensional, contiguous, on one device. Written.
        With 8-bit moments pieces begin at a multiple of `reduced.BLOCK_NUMEL`.
    grad
        The gradient, float32, bfloat16 or float16, as long as the parameter. Not changed.
    scalars
        From ``arithmetic.scalars``: the hyperparameters at this step.
    out
        Receives the new parameter rounded to its dtype (float32, bfloat16, float16). May be ``grad`` itself.

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
    if torch.compiler.is_compiling():
        traced_update(form, list(buffers), grad, scalars, out)
        return
    check(form, buffers, grad, out)
    if grad.numel() > 0:
        KERNELS[grad.device.type, form](buffers, grad, scalars, out)


def is_compiled(device_type: str) -> bool:
    """Whether a device has kernels of its own, rather than plain torch operations."""
    return KERNELS[device_type, "fp32"] is not reference.BY_FORM["fp32"]


def atomic_numel(device: torch.device) -> int | None:
    """Elements up to which `adam_update` writes all or nothing when it raises; None: any number."""
    return None if is_compiled(device.type) else SLICE_NUMEL


def _kernels_of(device_type: str) -> Mapping[str, Kernel]:
    if device_type not in _COMPILED:
        return reference.BY_FORM
    module, compiler = _COMPILED[device_type]
    try:
        kernels: Mapping[str, Kernel] = importlib.import_module(f".{module}", __package__).BY_FORM
    except ImportError as error:
        # The table keeps the answer, hence said once.
        _logger.warning(
            "%s cannot be used (%s): Adam on %s runs in plain torch operations, with the same results but slower",
            compiler,
            error,
            device_type,
        )
        return reference.BY_FORM
    return kernels
