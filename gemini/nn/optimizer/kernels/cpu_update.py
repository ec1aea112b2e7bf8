"""Adam updates of CPU tensors by the compiled kernels: arrays for them, slices for threads, and what is ready.

Import this module only when there is something to update: numba takes a while.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from torch import Tensor

from .arithmetic import AdamScalars
from .cpu_kernel import LINE_BYTES, gather_kernel, many_kernels, part_kernels
from .forms import FORMS, MOMENTS
from .kernel_pool import KernelPool, default_pool

_logger = logging.getLogger(__name__)

STREAMING_PAYS = get_host_cpu_name().startswith("znver")
"""Elsewhere lines are held for long on their way around the caches. What has not been measured is not streamed."""
STREAM_NUMEL = 1 << 20
"""Copies from this length on are streamed: the update goes through 30 MB, so that little of a copy would be in the
caches when it is used."""


_ready: set[tuple[Any, ...]] = set()
"""Kernels, and types that they have been compiled for."""

_LIKE: dict[torch.dtype | None, Any] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.int16),
    torch.float16: np.empty(0, np.uint16),
    torch.uint8: np.empty(0, np.uint8),
    None: None,
}
"""What tells kernels the type of a buffer of which they get the address. (Not ``tensor.numpy()``: that makes the
storage unresizable for good, and full copies of chunks are resized. The caller holds the tensors while kernels run.)"""


_DTYPES = {
    form: (specs[0].dtype, next(spec.dtype for spec in specs if spec.name == MOMENTS[0]))
    for form, specs in FORMS.items()
}
"""Of the parameter and of the moments."""


def adam_cpu(
    form: str,
    buffers: Sequence[Tensor],
    grad: Tensor,
    scalars: AdamScalars,
    out: Tensor | None = None,
    pool: KernelPool | None = None,
) -> None:
    """Update flat CPU buffers in place; same contract as ``update.adam_update``, without its validation.

    Can be called from several threads at once, on different buffers. When it raises, nothing has been changed.

    Parameters
    ----------
    pool
        The threads to use; those of the process by default.
    """
    kernel = part_kernels[form]
    addresses = (*(tensor.data_ptr() for tensor in buffers), grad.data_ptr(), 0 if out is None else out.data_ptr())
    dtypes = (*_DTYPES[form], grad.dtype, None if out is None else out.dtype)
    like = [_LIKE[dtype] for dtype in dtypes]
    numbers = _numbers(scalars)
    streams = _streams(form, out, grad)
    # Everything that can fail is done before the first element changes: the kernel is compiled for these types, and the
    # parts are known. What is left to the threads allocates nothing to speak of.
    _have(kernel, dtypes, scalars, addresses, *like, 0, 0, False, numbers)
    threads = pool or default_pool()
    threads.run(lambda at: kernel(addresses, *like, at.start, at.stop, streams, numbers), threads.cut(grad.numel()))


BY_FORM = {form: partial(adam_cpu, form) for form in FORMS}
"""A kernel for each form (`update.Kernel`)."""


MANY_COLUMNS = (
    "numel", "step", "param", "grad", "out", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale",
)  # fmt: skip
"""Of a table of tensors: a length, and addresses (0 where there is no copy); the last two only with 8 bits."""


def many_cpu(
    form: str,
    table: Any,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    scalars: AdamScalars,
    step: int,
    pool: KernelPool | None = None,
) -> Callable[[], None]:
    """Make ready one step of many CPU tensors at once. It is done by calling the result, which does not fail.

    Parameters
    ----------
    form
        How the moments are kept; parameters are float32.
    table
        int64, a row for each parameter (`MANY_COLUMNS`). The caller keeps that memory alive until the step is
        done. No two rows share any.
    dtypes
        Of gradients and low-precision copies (None: there are none).
    step
        Written to where the rows say.
    """
    known = (*_DTYPES[form], *dtypes)
    types_only = (*(_LIKE[dtype] for dtype in known), np.float32(step), _numbers(scalars))
    kernel = many_kernels[form]
    _have(kernel, known, scalars, table[:0], *types_only)
    threads = pool or default_pool()
    pieces = [table[rows] for rows in threads.cut_rows(table[:, 0])]
    return lambda: threads.run(lambda piece: kernel(piece, *types_only), pieces)


def values_at(addresses: Any) -> Any:
    """The float32 numbers that lie at these addresses (int64)."""
    out = np.empty(addresses.size, np.float32)
    _have(gather_kernel, (), None, addresses[:0], out)
    gather_kernel(addresses, out)
    return out


@lru_cache(maxsize=16)
def _numbers(s: AdamScalars) -> tuple[Any, ...]:
    """What the kernels unpack. All chunks of a group have the same."""
    return (
        np.float32(s.grad_scale),
        np.float32(s.decay),
        None if s.l2 == 0.0 else np.float32(s.l2),
        np.float32(s.lerp),
        s.lerp_from_grad,
        np.float32(s.beta2),
        np.float32(s.grad_sq),
        np.float32(s.step_size),
        np.float32(s.bias2_sqrt),
        np.float32(s.eps),
        np.int32(s.noise),
    )


def _streams(form: str, out: Tensor | None, grad: Tensor) -> bool:
    if not STREAMING_PAYS or out is None or out.numel() < STREAM_NUMEL or out.data_ptr() == grad.data_ptr():
        return False
    return form != "8bit" or out.data_ptr() % LINE_BYTES == 0  # its kernel streams from the first element on


def _have(kernel: Any, dtypes: tuple[torch.dtype | None, ...], scalars: AdamScalars | None, *nothing: Any) -> None:
    """See to it that a kernel is compiled for these types, by a call in which it has nothing to do."""
    kind = (id(kernel), dtypes, scalars is not None and scalars.l2 == 0.0)
    if kind in _ready:
        return
    try:
        kernel(*nothing)
    except OSError as error:
        # The kernel itself does no I/O: numba compiled it and then failed to store it, before running it. It is in
        # memory now, so that the second call does not touch the disk.
        _logger.info("the compiled Adam kernel cannot be kept for the next process: %s", error)
        kernel(*nothing)
    _ready.add(kind)
