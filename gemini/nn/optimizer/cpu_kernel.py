"""Adam on the CPU in one pass over memory, compiled by numba on first use. Import this module only then.

Why numba: its code releases the GIL, so an update can run behind the next forward, and it lets us place the fused
multiply-add ourselves. ``fastmath`` was tried: slower, and its contractions depend on the surroundings.

Arrays are numpy views of the tensors. numpy has no bfloat16 and numba no float16, so the type of the view says what
the 16 bits are::

    float32   float32
    int16     bfloat16
    uint16    float16

numba specialises the kernels on these types, and on ``None`` where there is no low-precision copy or no L2 term. Every
operation is the same in the vector body and in the scalar remainder of a loop, so results do not depend on how a buffer
is cut.

A large copy is written around the caches ("streamed"): a line of it that is written whole need not be read first, which
is 2 of 30 bytes a parameter. Measured: 0.51 instead of 0.58 ns a parameter on two threads, 0.62 instead of 0.66 on one,
which is what the same reads and writes take without any arithmetic. Software prefetching, in any distance and order,
made it slower; so did blocks of 4096 elements. Division by a constant as a product and a correction changed nothing.
"""

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import Tensor

from .arithmetic import AdamScalars
from .kernel_pool import KernelPool, default_pool

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_logger = logging.getLogger(__name__)

STREAM_NUMEL = 1 << 20
"""Copies from this length on are streamed: the update goes through 30 MB, so that little of a copy would be in the
caches when it is used."""
_STREAM_BLOCK = 256
"""Elements that are computed into a buffer on the stack, then streamed out; half a KiB of bfloat16."""
_LINE_BYTES = 64
"""A cache line, and the widest vector."""

_F32, _F16, _I32, _I16, _I8 = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of float32, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def _plus_l2(typingctx: Any, p: Any, l2: Any, g: Any) -> Any:
    """``p * l2 + g``, rounded once; ``g`` where there is no L2 term."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[2] if l2 is types.none else builder.fma(*args)

    return types.float32(types.float32, l2, types.float32), codegen


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


@intrinsic
def _line_buffer(typingctx: Any, array: Any) -> Any:
    """Pointer to ``_STREAM_BLOCK`` elements of the type of ``array``, on the stack, at the begin of a cache line."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = ir.ArrayType(context.get_data_type(array.dtype), _STREAM_BLOCK)
        memory = cgutils.alloca_once(builder, block)
        memory.align = _LINE_BYTES
        return builder.bitcast(memory, context.get_value_type(signature.return_type))

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def _stream_line(typingctx: Any, target: Any, source: Any, at: Any) -> Any:
    """Copy the cache line that begins at element ``at``, aligned in both, without leaving the target in the caches."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(_I8, _LINE_BYTES).as_pointer()
        to, origin = (
            builder.bitcast(builder.gep(make_array(kind)(context, builder, value).data, [args[2]]), line)
            for kind, value in zip(signature.args[:2], args[:2], strict=True)
        )
        store = builder.store(builder.load(origin, align=_LINE_BYTES), to, align=_LINE_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(target, source, types.intp), codegen


@intrinsic
def _fence(typingctx: Any) -> Any:
    """Have what was streamed seen before anything that this thread does later: ordinary locks do not promise that."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# error_model "numpy": the default checks every division for zero, which prevents vector code.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


@njit(inline="always", **_OPTIONS)
def _element(param: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, i: Any, numbers: Any) -> Any:
    """Update element ``i``; the new parameter."""
    grad_scale, decay, l2, lerp, lerp_from_grad, beta2, grad_sq, step_size, bias2_sqrt, eps = numbers
    g = _widen(grad[i]) * grad_scale
    p = param[i] * decay
    g = _plus_l2(p, l2, g)
    m = exp_avg[i]
    m = _fma(lerp, g - m, g if lerp_from_grad else m)
    v = _fma(grad_sq * g, g, beta2 * exp_avg_sq[i])
    p += (step_size * m) / (np.sqrt(v) / bias2_sqrt + eps)
    exp_avg[i] = m
    exp_avg_sq[i] = v
    param[i] = p
    return p


def _adam(param: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, out: Any, head: Any, numbers: Any) -> None:
    """One step. ``out`` is streamed from its element ``head`` on, where a cache line begins."""
    whole = (param.size - head) // _STREAM_BLOCK * _STREAM_BLOCK
    if out is not None:
        buffer = carray(_line_buffer(out), _STREAM_BLOCK)
        for start in range(head, head + whole, _STREAM_BLOCK):
            stop = start + _STREAM_BLOCK
            p, m, v = param[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop]
            g, copy = grad[start:stop], out[start:stop]
            for i in range(_STREAM_BLOCK):
                buffer[i] = _narrow(_element(p, m, v, g, i, numbers), out)
            for i in range(0, _STREAM_BLOCK, _LINE_BYTES // out.itemsize):
                _stream_line(copy, buffer, i)
        _fence()
    for start, stop in ((0, head), (head + whole, param.size)):
        # Slices: with indices that may be negative, as far as numba knows, there is no vector code.
        p, m, v, g = param[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop], grad[start:stop]
        if out is None:
            for i in range(p.size):
                _element(p, m, v, g, i, numbers)
        else:
            copy = out[start:stop]
            for i in range(p.size):
                copy[i] = _narrow(_element(p, m, v, g, i, numbers), out)


def _compiled(function: Callable[..., None]) -> Any:
    try:
        # numba looks for a writable folder itself: NUMBA_CACHE_DIR, next to this file, the user's cache folder.
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        _logger.info("the compiled Adam kernel cannot be kept for the next process: %s", error)
        return njit(**_OPTIONS)(function)


_kernel = _compiled(_adam)


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
        _call(*(array[:0] for array in arrays), None if copy is None else copy[:0], 0, numbers)
        _ready.add(kind)
    threads = pool or default_pool()
    streams = out is not None and out.numel() >= STREAM_NUMEL and out.data_ptr() != grad.data_ptr()
    pieces = []
    for at in threads.cut(param.numel()):
        numel = at.stop - at.start
        part, head = None, numel
        if copy is not None:
            part = copy[at]
            if streams:
                head = min(-part.ctypes.data % _LINE_BYTES // part.itemsize, numel)
        pieces.append((*(array[at] for array in arrays), part, head, numbers))
    threads.run(lambda piece: _kernel(*piece), pieces)


def _call(*args: Any) -> None:
    try:
        _kernel(*args)
    except OSError as error:
        # The kernel itself does no I/O: numba compiled it and then failed to store it, before running it. It is in
        # memory now, so that the second call does not touch the disk.
        _logger.info("the compiled Adam kernel cannot be kept for the next process: %s", error)
        _kernel(*args)
