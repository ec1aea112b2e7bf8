"""Adam on the CPU in one pass over memory, compiled by numba on first use. Import this module only then.

Why numba: its code releases the GIL, so an update can run behind the next forward, and it lets us place the fused
multiply-add ourselves. ``fastmath`` was tried: slower, and its contractions depend on the surroundings.

Arrays are numpy views of the tensors. numpy has no bfloat16 and numba no float16, so the type of the view says what
the 16 bits are::

    float32   float32
    int16     bfloat16
    uint16    float16

numba specialises the kernel on these types, and on ``None`` where there is no low-precision copy or no L2 term. Every
operation is the same in the vector body and in the scalar remainder of a loop, so results do not depend on how a buffer
is cut.
"""

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic
from torch import Tensor

from .arithmetic import AdamScalars
from .kernel_pool import KernelPool, default_pool

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_logger = logging.getLogger(__name__)

_F32, _F16, _I32, _I16 = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16)


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of float32, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def _widen(typingctx: Any, value: Any) -> Any:
    """A float32, bfloat16 (int16) or float16 (uint16) as float32, exactly."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (bits,) = args
        if value == types.float32:
            return bits
        if value == types.int16:
            return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _F32)
        return builder.fpext(builder.bitcast(bits, _F16), _F32)

    return types.float32(value), codegen


@intrinsic
def _narrow(typingctx: Any, value: Any, array: Any) -> Any:
    """A float32 in the format of ``array``, rounded to nearest even; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = args[0]
        if array.dtype == types.float32:
            return number
        if array.dtype == types.uint16:
            return builder.bitcast(builder.fptrunc(number, _F16), _I16)
        # Not the avx512_bf16 instruction: it flushes subnormals.
        bits = builder.bitcast(number, _I32)
        is_odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(is_odd, _I32(0x7FFF))), _I32(16))
        is_nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(builder.select(is_nan, _I32(0x7FC0), rounded), _I16)

    return array.dtype(types.float32, array), codegen


def _adam(
    param: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    grad: Any,
    out: Any,
    grad_scale: Any,
    decay: Any,
    l2: Any,
    lerp: Any,
    lerp_from_grad: Any,
    beta2: Any,
    grad_sq: Any,
    step_size: Any,
    bias2_sqrt: Any,
    eps: Any,
) -> None:
    for i in range(param.size):
        g = _widen(grad[i]) * grad_scale
        p = param[i] * decay
        if l2 is not None:
            g = _fma(p, l2, g)
        m = exp_avg[i]
        m = _fma(lerp, g - m, g if lerp_from_grad else m)
        v = _fma(grad_sq * g, g, beta2 * exp_avg_sq[i])
        p += (step_size * m) / (np.sqrt(v) / bias2_sqrt + eps)
        exp_avg[i] = m
        exp_avg_sq[i] = v
        param[i] = p
        if out is not None:
            out[i] = _narrow(p, out)


def _compiled() -> Callable[..., None]:
    # error_model "numpy": the default checks every division for zero, which prevents vector code.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        # numba looks for a writable folder itself: NUMBA_CACHE_DIR, next to this file, the user's cache folder.
        kernel: Callable[..., None] = njit(cache=True, **options)(_adam)
    except RuntimeError as error:
        _logger.info("the compiled Adam kernel cannot be kept for the next process: %s", error)
        kernel = njit(**options)(_adam)
    return kernel


_kernel = _compiled()


_ready: set[tuple[Any, ...]] = set()
"""Types that the kernel has been compiled for."""

_ELEMENTS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.uint16}


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
    s = scalars
    numbers = (
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
    )

    # Everything that can fail is done before the first element changes: the kernel is compiled for these types, and the
    # slices are made. What is left to the threads allocates nothing to speak of.
    kind = (grad.dtype, None if out is None else out.dtype, s.l2 == 0.0)
    if kind not in _ready:
        _call(*(array[:0] for array in arrays), None if copy is None else copy[:0], *numbers)
        _ready.add(kind)
    threads = pool or default_pool()
    pieces = [
        (*(array[at] for array in arrays), None if copy is None else copy[at], *numbers)
        for at in threads.cut(param.numel())
    ]
    threads.run(lambda piece: _kernel(*piece), pieces)


def _call(*args: Any) -> None:
    try:
        _kernel(*args)
    except OSError as error:
        # The kernel itself does no I/O: numba compiled it and then failed to store it, before running it. It is in
        # memory now, so that the second call does not touch the disk.
        _logger.info("the compiled Adam kernel cannot be kept for the next process: %s", error)
        _kernel(*args)
