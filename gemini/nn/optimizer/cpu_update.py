"""Adam updates of CPU tensors by the compiled kernels: arrays for them, slices for threads, and what is ready.

Import this module only when there is something to update: numba takes a while.
"""

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_name
from torch import Tensor

from .arithmetic import AdamScalars
from .cpu_kernel import LINE_BYTES, adam_8bit_kernel, adam_kernel, adam_split_kernel, gather_kernel, many_kernels
from .kernel_pool import KernelPool, default_pool
from .reduced import BLOCK_NUMEL

_logger = logging.getLogger(__name__)

STREAMING_PAYS = get_host_cpu_name().startswith("znver")
"""Elsewhere lines are held for long on their way around the caches. What has not been measured is not streamed."""
STREAM_NUMEL = 1 << 20
"""Copies from this length on are streamed: the update goes through 30 MB, so that little of a copy would be in the
caches when it is used."""


_ready: set[tuple[Any, ...] | str] = set()
"""Types that the kernel has been compiled for."""

_ELEMENTS: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.int16: np.int16,
    torch.float16: np.uint16,
    torch.uint8: np.uint8,
}


def _array(tensor: Tensor) -> Any:
    # Not ``tensor.numpy()``: that makes the storage unresizable for good, and full copies of chunks are resized.
    # The array does not keep the memory alive: the caller holds the tensor while it uses the array.
    raw: Any = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return np.frombuffer(raw, dtype=_ELEMENTS[tensor.dtype])


def adam_cpu(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
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
    arrays = [_array(t) for t in (param, exp_avg, exp_avg_sq, grad)]
    copy = None if out is None else _array(out)
    numbers = _numbers(scalars)

    # Everything that can fail is done before the first element changes: the kernel is compiled for these types, and the
    # slices are made. What is left to the threads allocates nothing to speak of.
    kind = (exp_avg.dtype, grad.dtype, None if out is None else out.dtype, scalars.l2 == 0.0)
    if kind not in _ready:
        _call(adam_kernel, *(array[:0] for array in arrays), None if copy is None else copy[:0], 0, numbers)
        _ready.add(kind)
    threads = pool or default_pool()
    streams = _streams(out, grad)
    pieces = []
    for at in threads.cut(param.numel()):
        part, head = None, at.stop - at.start
        if copy is not None:
            part = copy[at]
            if streams:
                head = min(-part.ctypes.data % LINE_BYTES // part.itemsize, head)
        pieces.append((*(array[at] for array in arrays), part, head, numbers))
    threads.run(lambda piece: adam_kernel(*piece), pieces)


def adam_8bit_cpu(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    out: Tensor | None = None,
    pool: KernelPool | None = None,
) -> None:
    """As `adam_cpu`, with moments in 8 bits; same contract as ``update.adam_8bit_update``."""
    arrays = [_array(t) for t in (param, exp_avg, exp_avg_sq, grad)]
    scales = [_array(t) for t in (exp_avg_scale, exp_avg_sq_scale)]
    copy = None if out is None else _array(out)
    numbers = _numbers(scalars)
    kind = (exp_avg.dtype, grad.dtype, None if out is None else out.dtype, scalars.l2 == 0.0)
    if kind not in _ready:
        p, m, v, g, ms, vs = (array[:0] for array in (*arrays, *scales))
        _call(adam_8bit_kernel, p, m, v, ms, vs, g, None if copy is None else copy[:0], False, numbers)
        _ready.add(kind)
    threads = pool or default_pool()
    streams = _streams(out, grad) and out is not None and out.data_ptr() % LINE_BYTES == 0
    pieces = []
    for at in threads.cut(param.numel()):
        p, m, v, g = (array[at] for array in arrays)
        ms, vs = (scale[at.start // BLOCK_NUMEL : -(-at.stop // BLOCK_NUMEL)] for scale in scales)
        pieces.append((p, m, v, ms, vs, g, None if copy is None else copy[at], streams, numbers))
    threads.run(lambda piece: adam_8bit_kernel(*piece), pieces)


def adam_split_cpu(
    high: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    pool: KernelPool | None = None,
) -> None:
    """As `adam_cpu`, on a master in two halves; same contract as ``update.adam_split_update``."""
    arrays = [_array(t) for t in (high, low, exp_avg, exp_avg_sq, grad)]
    numbers = _numbers(scalars)
    kind = ("split", grad.dtype, scalars.l2 == 0.0)
    if kind not in _ready:
        _call(adam_split_kernel, *(array[:0] for array in arrays), numbers)
        _ready.add(kind)
    threads = pool or default_pool()
    pieces = [tuple(array[at] for array in arrays) for at in threads.cut(high.numel())]
    threads.run(lambda piece: adam_split_kernel(*piece, numbers), pieces)


MANY_COLUMNS = (
    "numel", "step", "param", "grad", "out", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale",
)  # fmt: skip
"""Of a table of tensors: a length, and addresses (0 where there is no copy); the last two only with 8 bits."""


def many_cpu(
    table: Any,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    scalars: AdamScalars,
    step: int,
    pool: KernelPool | None = None,
) -> Callable[[], None]:
    """Make ready one step of many CPU tensors at once. It is done by calling the result, which does not fail.

    Parameters
    ----------
    table
        int64, a row for each parameter (`MANY_COLUMNS`). Nobody else keeps its memory alive. Two rows share none.
    dtypes
        Of moments, gradients, and low-precision copies (None: there are none); the rest is float32.
    step
        Written to where the rows say.
    """
    arrays = [None if dtype is None else np.empty(0, _ELEMENTS[dtype]) for dtype in dtypes]
    types_only = (np.empty(0, np.float32), *arrays, np.float32(step), _numbers(scalars))
    kernel = many_kernels[dtypes[0] is torch.uint8]
    kind = ("many", *dtypes, scalars.l2 == 0.0)
    if kind not in _ready:
        _call(kernel, table[:0], *types_only)
        _ready.add(kind)
    threads = pool or default_pool()
    pieces = [table[rows] for rows in threads.cut_rows(table[:, 0])]
    return lambda: threads.run(lambda piece: kernel(piece, *types_only), pieces)


def values_at(addresses: Any) -> Any:
    """The float32 numbers that lie at these addresses (int64)."""
    out = np.empty(addresses.size, np.float32)
    if "gather" not in _ready:
        _call(gather_kernel, addresses[:0], out)
        _ready.add("gather")
    gather_kernel(addresses, out)
    return out


def _numbers(s: AdamScalars) -> tuple[Any, ...]:
    """What the kernels unpack."""
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


def _streams(out: Tensor | None, grad: Tensor) -> bool:
    if not STREAMING_PAYS or out is None:
        return False
    return out.numel() >= STREAM_NUMEL and out.data_ptr() != grad.data_ptr()


def _call(kernel: Any, *args: Any) -> None:
    try:
        kernel(*args)
    except OSError as error:
        # The kernel itself does no I/O: numba compiled it and then failed to store it, before running it. It is in
        # memory now, so that the second call does not touch the disk.
        _logger.info("the compiled Adam kernel cannot be kept for the next process: %s", error)
        kernel(*args)
