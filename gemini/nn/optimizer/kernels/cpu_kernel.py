"""Adam on the CPU in one pass over memory, compiled by numba on first use. Import this module only then.

Why numba: its code releases the GIL, so an update can run behind the next forward, and it lets us place the fused
multiply-add ourselves. ``fastmath`` was tried: slower, and its contractions depend on the surroundings.

Arrays are numpy views of the tensors. numpy has no bfloat16 and numba no float16, so the type of the view says what
the 16 bits are::

    float32   float32
    int16     bfloat16
    uint16    float16
    uint8     8-bit codes

numba specialises the kernels on these types, and on ``None`` where there is no low-precision copy or no L2 term. Every
operation is the same in the vector body and in the scalar remainder of a loop, so results do not depend on how a buffer
is cut.

Where it pays, a large copy is written around the caches ("streamed"): a line of it that is written whole need not be
read first, which is 2 of 30 bytes a parameter. Measured, ns a parameter without and with it: on an EPYC 0.66 and 0.62
with one thread, 0.58 and 0.51 with two; on a Xeon (Skylake server) 2.00 and 2.30, 0.99 and 1.13. Tried and slower, on
both: software prefetching at any distance and in any order. On the EPYC alone: streaming parameters and moments too
(0.45 instead of 0.34). No different: blocks of 64 to 2048 elements; division by a constant as a product and a
correction.

All in one file: numba looks at the file of a kernel alone to find out whether compiled code in its cache is old.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array

from .reduced import BLOCK_NUMEL, EXP_AVG, ROOT

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_logger = logging.getLogger(__name__)

_BLOCK_NUMEL = BLOCK_NUMEL
"""Elements that are computed into buffers on the stack before they are streamed or packed."""
LINE_BYTES = 64
"""A cache line, and the widest vector."""

_F32, _F16, _I32, _I16, _I8 = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)


def _instructions(result: Any, *of: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of these types from a function that gets an LLVM builder and the arguments, and emits code."""

    def declare(emit: Callable[..., Any]) -> Any:
        @wraps(emit)  # numba asks for its signature, and leaves out the first argument
        def typed(typingctx: Any, *given: Any) -> Any:
            return result(*of), lambda context, builder, signature, args: emit(builder, *args)

        return intrinsic(typed)

    return declare


@_instructions(types.float32, types.float32, types.float32, types.float32)
def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of float32, rounded once."""
    return builder.fma(a, b, c)


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


_NAN_BITS = 0x7FC00000
_INF_BITS = 0x7F800000
_SMALLEST_NORMAL = 2.0**-14
_EXP_AVG_MANTISSA, _ROOT_MANTISSA = EXP_AVG.mantissa, ROOT.mantissa


def _known_bits(builder: Any, number: Any) -> Any:
    """The bits of a float32, the same ones for all NaN."""
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.select(is_nan, _I32(_NAN_BITS), builder.bitcast(number, _I32))


@_instructions(types.float32, types.int16, types.int16, types.float32)
def _joined(builder: Any, high: Any, low: Any, mark: Any) -> Any:
    """The master of its two halves and the state with its mark. See [Note: Split master]."""
    high = builder.shl(builder.zext(high, _I32), _I32(16))
    mark = builder.and_(builder.lshr(builder.bitcast(mark, _I32), _I32(15)), _I32(0x10000))
    return builder.bitcast(builder.add(builder.add(high, builder.sext(low, _I32)), mark), _F32)


@_instructions(types.int16, types.float32)
def _lower_half(builder: Any, master: Any) -> Any:
    """The lower 16 bits of a float32."""
    return builder.trunc(builder.bitcast(master, _I32), _I16)


@_instructions(types.float32, types.float32, types.float32)
def _marked(builder: Any, number: Any, master: Any) -> Any:
    """A number that is not negative, with the sign that says that its master is a tie and was rounded down.

    NaN may come with a sign, which says nothing.
    """
    low = builder.and_(builder.bitcast(master, _I32), _I32(0x1FFFF))
    sign = builder.select(builder.icmp_signed("==", low, _I32(0x8000)), _I32(1 << 31), _I32(0))
    magnitude = builder.and_(builder.bitcast(number, _I32), _I32(0x7FFFFFFF))
    return builder.bitcast(builder.or_(magnitude, sign), _F32)


@_instructions(types.float32, types.float32)
def _unmarked(builder: Any, number: Any) -> Any:
    """The number that `_marked` was given."""
    return builder.bitcast(builder.and_(builder.bitcast(number, _I32), _I32(0x7FFFFFFF)), _F32)


@_instructions(types.int32, types.float32, types.float32, types.int32)
def _random_bits(builder: Any, exp_avg: Any, exp_avg_sq: Any, noise: Any) -> Any:
    """The hash in [Note: Reduced states]."""
    h = builder.mul(_known_bits(builder, exp_avg), _I32(0x9E3779B1))
    h = builder.xor(builder.xor(h, _known_bits(builder, exp_avg_sq)), noise)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = builder.mul(builder.xor(h, builder.lshr(h, _I32(shift))), _I32(factor))
    return builder.xor(h, builder.lshr(h, _I32(16)))


@_instructions(types.int32, types.int32)
def _low(builder: Any, bits: Any) -> Any:
    """The low 16 of 32 bits."""
    return builder.and_(bits, _I32(0xFFFF))


@_instructions(types.int32, types.int32)
def _high(builder: Any, bits: Any) -> Any:
    """The high 16 of 32 bits."""
    return builder.lshr(bits, _I32(16))


@intrinsic
def _narrow_randomly(typingctx: Any, value: Any, array: Any, random: Any) -> Any:
    """A float32 as it is where ``array`` is one of those, else rounded to bfloat16 by 16 random bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if array.dtype == types.float32:
            return args[0]
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        rounded = builder.lshr(builder.add(builder.bitcast(args[0], _I32), args[2]), _I32(16))
        return builder.trunc(builder.select(is_nan, _I32(_NAN_BITS >> 16), rounded), _I16)

    return array.dtype(types.float32, array, types.int32), codegen


@intrinsic
def _stack_block(typingctx: Any, like: Any) -> Any:
    """Pointer to ``_BLOCK_NUMEL`` numbers of the type of ``like`` (or of its elements), where a cache line begins."""
    dtype = getattr(like, "dtype", like)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = ir.ArrayType(context.get_data_type(dtype), _BLOCK_NUMEL)
        memory = cgutils.alloca_once(builder, block)
        memory.align = LINE_BYTES
        return builder.bitcast(memory, context.get_value_type(signature.return_type))

    return types.CPointer(dtype)(like), codegen


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to numbers of the type of ``like``'s elements."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), codegen


@intrinsic
def _stream_line(typingctx: Any, target: Any, source: Any, at: Any) -> Any:
    """Copy the cache line that begins at element ``at``, aligned in both, without leaving the target in the caches."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(_I8, LINE_BYTES).as_pointer()
        to, origin = (
            builder.bitcast(builder.gep(make_array(kind)(context, builder, value).data, [args[2]]), line)
            for kind, value in zip(signature.args[:2], args[:2], strict=True)
        )
        store = builder.store(builder.load(origin, align=LINE_BYTES), to, align=LINE_BYTES)
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


@_instructions(types.int32, types.int32, types.float32)
def _larger(builder: Any, bits: Any, number: Any) -> Any:
    """The larger one of ``bits`` and those of a float32 without its sign; any NaN is larger than infinity."""
    magnitude = builder.and_(_known_bits(builder, number), _I32(0x7FFFFFFF))
    return builder.select(builder.icmp_signed(">", magnitude, bits), magnitude, bits)


@intrinsic(prefer_literal=True)
def _scale(typingctx: Any, top: Any, mantissa: Any) -> Any:
    """The scale of a block from the bits of its largest magnitude, as ``reduced.scale_of`` has it."""
    shift = 23 - mantissa.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponent = builder.lshr(builder.add(args[0], _I32((1 << shift) - 1)), _I32(23))
        for limit, sign in ((1, "<"), (253, ">")):
            exponent = builder.select(builder.icmp_signed(sign, exponent, _I32(limit)), _I32(limit), exponent)
        is_finite = builder.icmp_signed("<", args[0], _I32(_INF_BITS))
        return builder.bitcast(builder.select(is_finite, builder.shl(exponent, _I32(23)), _I32(_NAN_BITS)), _F32)

    return types.float32(types.int32, mantissa), codegen


def _first(builder: Any, is_small: Any, mantissa: int) -> Any:
    return builder.select(is_small, _I32(113 << mantissa), _I32(112 << mantissa))


def _encoded(builder: Any, magnitude: Any, inverse: Any, random: Any, mantissa: int) -> Any:
    """The code of a magnitude, as ``reduced.encode`` has it."""
    y = builder.fmul(magnitude, inverse)
    is_small = builder.fcmp_ordered("<", y, _F32(_SMALLEST_NORMAL))
    z = builder.fadd(y, builder.select(is_small, _F32(_SMALLEST_NORMAL), _F32(0.0)))
    shift = 23 - mantissa
    up = builder.add(builder.bitcast(z, _I32), builder.shl(random, _I32(shift - 16)))
    code = builder.sub(builder.ashr(up, _I32(shift)), _first(builder, is_small, mantissa))
    largest = _I32((16 << mantissa) - 1)
    code = builder.select(builder.icmp_signed(">", code, largest), largest, code)
    return builder.select(builder.fcmp_unordered("uno", y, y), _I32(0), code)


def _decoded(builder: Any, code: Any, scale: Any, mantissa: int) -> Any:
    """The magnitude of a code, as ``reduced.decode`` has it."""
    is_small = builder.icmp_signed("<", code, _I32(1 << mantissa))
    z = builder.shl(builder.add(code, _first(builder, is_small, mantissa)), _I32(23 - mantissa))
    z = builder.fsub(builder.bitcast(z, _F32), builder.select(is_small, _F32(_SMALLEST_NORMAL), _F32(0.0)))
    return builder.fmul(z, scale)


@_instructions(types.uint8, types.float32, types.float32, types.int32)
def _pack_exp_avg(builder: Any, number: Any, inverse: Any, random: Any) -> Any:
    """The 8 bits of a first moment; ``inverse`` is one divided by the scale."""
    bits = builder.bitcast(number, _I32)
    magnitude = builder.bitcast(builder.and_(bits, _I32(0x7FFFFFFF)), _F32)
    sign = builder.and_(builder.lshr(bits, _I32(24)), _I32(0x80))
    code = builder.or_(sign, _encoded(builder, magnitude, inverse, random, _EXP_AVG_MANTISSA))
    # In a block of NaN all codes are 0.
    is_nan = builder.fcmp_unordered("uno", inverse, inverse)
    return builder.trunc(builder.select(is_nan, _I32(0), code), _I8)


@_instructions(types.uint8, types.float32, types.float32, types.int32)
def _pack_root(builder: Any, root: Any, inverse: Any, random: Any) -> Any:
    """The 8 bits of a second moment's root."""
    code = _encoded(builder, root, inverse, random, _ROOT_MANTISSA)
    lost = builder.and_(builder.icmp_signed("==", code, _I32(0)), builder.fcmp_ordered(">", root, _F32(0.0)))
    is_nan = builder.fcmp_unordered("uno", inverse, inverse)
    code = builder.select(builder.and_(lost, builder.not_(is_nan)), _I32(1), code)
    return builder.trunc(code, _I8)


@_instructions(types.float32, types.uint8, types.float32)
def _unpack_exp_avg(builder: Any, byte: Any, scale: Any) -> Any:
    """The first moment of 8 bits."""
    code = builder.zext(byte, _I32)
    magnitude = _decoded(builder, builder.and_(code, _I32(0x7F)), scale, _EXP_AVG_MANTISSA)
    sign = builder.shl(builder.and_(code, _I32(0x80)), _I32(24))
    return builder.bitcast(builder.or_(builder.bitcast(magnitude, _I32), sign), _F32)


@_instructions(types.float32, types.uint8, types.float32)
def _unpack_root(builder: Any, byte: Any, scale: Any) -> Any:
    """The root of a second moment of 8 bits."""
    return _decoded(builder, builder.zext(byte, _I32), scale, _ROOT_MANTISSA)


# error_model "numpy": the default checks every division for zero, which prevents vector code.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


@njit(inline="always", **_OPTIONS)
def _stepped(p: Any, m: Any, v: Any, g: Any, numbers: Any) -> Any:
    """Parameter, moments and the root of the second one after a step, of float32."""
    grad_scale, decay, l2, lerp, lerp_from_grad, beta2, grad_sq, step_size, bias2_sqrt, eps, _noise = numbers
    g = g * grad_scale
    p = p * decay
    g = _plus_l2(p, l2, g)
    m = _fma(lerp, g - m, g if lerp_from_grad else m)
    v = _fma(grad_sq * g, g, beta2 * v)
    root = np.sqrt(v)
    p += (step_size * m) / (root / bias2_sqrt + eps)
    return p, m, v, root


@njit(inline="always", **_OPTIONS)
def _element(param: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, i: Any, numbers: Any) -> Any:
    """Update element ``i``; the new parameter."""
    p, m, v, _root = _stepped(param[i], _widen(exp_avg[i]), _widen(exp_avg_sq[i]), _widen(grad[i]), numbers)
    random = _random_bits(m, v, numbers[-1])  # not computed where nothing is rounded
    exp_avg[i] = _narrow_randomly(m, exp_avg, _low(random))
    exp_avg_sq[i] = _narrow_randomly(v, exp_avg_sq, _high(random))
    param[i] = p
    return p


def _at(address: int, like: Any, start: int, numel: int) -> Any:
    """Elements ``start`` to ``start + numel`` of the array of ``like``'s type that begins at an address; None where
    ``like`` is None. For kernels."""
    raise NotImplementedError


@overload(_at)
def _typed_at(address, like, start, numel):  # type: ignore[no-untyped-def]  # numba compares the signatures
    if like is types.none:
        return lambda address, like, start, numel: None
    return lambda address, like, start, numel: carray(_pointer(address + start * like.itemsize, like), numel)


# Kernels get the addresses of whole buffers and the elements that they are to update, ``begin`` to ``end``: making five
# arrays for each thread's part took Python as long as 1% of an update of 32 M elements. Of the arrays ``as_...`` only
# the types count.


def _adam_split(
    addresses: Any, as_half: Any, as_state: Any, as_grad: Any, as_out: Any,
    begin: int, end: int, streams: bool, numbers: Any,
) -> None:  # fmt: skip
    """One step of masters in two halves. See [Note: Split master]. Addresses: halves, moments, gradient."""
    numel = end - begin
    high, low = _at(addresses[0], as_half, begin, numel), _at(addresses[1], as_half, begin, numel)
    ms, vs = _at(addresses[2], as_state, begin, numel), _at(addresses[3], as_state, begin, numel)
    gs = _at(addresses[4], as_grad, begin, numel)
    for i in range(numel):
        p = _joined(high[i], low[i], vs[i])
        p, m, v, _root = _stepped(p, ms[i], _unmarked(vs[i]), _widen(gs[i]), numbers)
        high[i] = _narrow(p, high)
        low[i] = _lower_half(p)
        ms[i] = m
        vs[i] = _marked(v, p)


def _adam(
    addresses: Any, as_param: Any, as_state: Any, as_grad: Any, as_out: Any,
    begin: int, end: int, streams: bool, numbers: Any,
) -> None:  # fmt: skip
    """One step. Addresses: parameter, moments, gradient, copy; this is streamed from where a cache line begins."""
    numel = end - begin
    param = _at(addresses[0], as_param, begin, numel)
    exp_avg, exp_avg_sq = _at(addresses[1], as_state, begin, numel), _at(addresses[2], as_state, begin, numel)
    grad = _at(addresses[3], as_grad, begin, numel)
    head = numel
    if as_out is not None:
        out = _at(addresses[4], as_out, begin, numel)
        if streams:
            head = min(-(addresses[4] + begin * as_out.itemsize) % LINE_BYTES // as_out.itemsize, numel)
    whole = (numel - head) // _BLOCK_NUMEL * _BLOCK_NUMEL
    if as_out is not None:
        buffer = carray(_stack_block(as_out), _BLOCK_NUMEL)
        for start in range(head, head + whole, _BLOCK_NUMEL):
            stop = start + _BLOCK_NUMEL
            p, m, v = param[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop]
            g, copy = grad[start:stop], out[start:stop]
            for i in range(_BLOCK_NUMEL):
                buffer[i] = _narrow(_element(p, m, v, g, i, numbers), as_out)
            for i in range(0, _BLOCK_NUMEL, LINE_BYTES // as_out.itemsize):
                _stream_line(copy, buffer, i)
        _fence()
    for start, stop in ((0, head), (head + whole, numel)):
        # Slices: with indices that may be negative, as far as numba knows, there is no vector code.
        p, m, v, g = param[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop], grad[start:stop]
        if as_out is None:
            for i in range(p.size):
                _element(p, m, v, g, i, numbers)
        else:
            copy = out[start:stop]
            for i in range(p.size):
                copy[i] = _narrow(_element(p, m, v, g, i, numbers), as_out)


def _adam_8bit(
    addresses: Any, as_param: Any, as_state: Any, as_grad: Any, as_out: Any,
    begin: int, end: int, streams: bool, numbers: Any,
) -> None:  # fmt: skip
    """One step with moments in 8 bits. Addresses: parameter, moments, their scales, gradient, copy.

    ``begin`` begins a block, and a copy that is streamed begins with a cache line there.
    """
    numel = end - begin
    param, grad = _at(addresses[0], as_param, begin, numel), _at(addresses[5], as_grad, begin, numel)
    exp_avg, exp_avg_sq = _at(addresses[1], as_state, begin, numel), _at(addresses[2], as_state, begin, numel)
    first, blocks = begin // _BLOCK_NUMEL, (numel + _BLOCK_NUMEL - 1) // _BLOCK_NUMEL
    exp_avg_scale = _at(addresses[3], as_param, first, blocks)
    exp_avg_sq_scale = _at(addresses[4], as_param, first, blocks)
    new_exp_avg = carray(_stack_block(np.float32(0)), _BLOCK_NUMEL)
    new_root = carray(_stack_block(np.float32(0)), _BLOCK_NUMEL)
    random = carray(_stack_block(np.int32(0)), _BLOCK_NUMEL)
    if as_out is not None:
        buffer = carray(_stack_block(as_out), _BLOCK_NUMEL)
        out = _at(addresses[6], as_out, begin, numel)
    for block in range(blocks):
        start = block * _BLOCK_NUMEL
        stop = min(start + _BLOCK_NUMEL, numel)
        p, ms, vs, gs = param[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop], grad[start:stop]
        m_scale, v_scale = exp_avg_scale[block], exp_avg_sq_scale[block]
        m_top, v_top = np.int32(0), np.int32(0)
        for i in range(p.size):
            root = _unpack_root(vs[i], v_scale)
            new, m, v, root = _stepped(p[i], _unpack_exp_avg(ms[i], m_scale), root * root, _widen(gs[i]), numbers)
            p[i] = new
            new_exp_avg[i] = m
            new_root[i] = root
            random[i] = _random_bits(m, v, numbers[-1])
            m_top = _larger(m_top, m)
            v_top = _larger(v_top, root)
            if as_out is not None:
                buffer[i] = _narrow(new, as_out)
        m_scale, v_scale = _scale(m_top, _EXP_AVG_MANTISSA), _scale(v_top, _ROOT_MANTISSA)
        exp_avg_scale[block], exp_avg_sq_scale[block] = m_scale, v_scale
        m_inverse, v_inverse = np.float32(1.0) / m_scale, np.float32(1.0) / v_scale
        for i in range(p.size):
            ms[i] = _pack_exp_avg(new_exp_avg[i], m_inverse, _low(random[i]))
            vs[i] = _pack_root(new_root[i], v_inverse, _high(random[i]))
        if as_out is not None:
            copy = out[start:stop]
            if streams and p.size == _BLOCK_NUMEL:
                for i in range(0, _BLOCK_NUMEL, LINE_BYTES // as_out.itemsize):
                    _stream_line(copy, buffer, i)
            else:
                for i in range(p.size):
                    copy[i] = buffer[i]
    if as_out is not None:
        _fence()


def _compiled(function: Callable[..., None]) -> Any:
    try:
        # numba looks for a writable folder itself: NUMBA_CACHE_DIR, next to this file, the user's cache folder.
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        _logger.info("the compiled Adam kernel cannot be kept for the next process: %s", error)
        return njit(**_OPTIONS)(function)


_adam_kernel, _adam_8bit_kernel = _compiled(_adam), _compiled(_adam_8bit)
part_kernels = {"fp32": _adam_kernel, "bf16": _adam_kernel, "8bit": _adam_8bit_kernel, "split": _compiled(_adam_split)}
"""By the form of the buffers (`forms.FORMS`)."""


def _adam_many(table: Any, as_param: Any, as_state: Any, as_grad: Any, as_out: Any, step: Any, numbers: Any) -> None:
    """One step of each row of ``table`` (`MANY_COLUMNS`)."""
    for numel, counter, p, g, copy, m, v in table:
        _adam_kernel((p, m, v, g, copy), as_param, as_state, as_grad, as_out, 0, numel, False, numbers)
        _at(counter, as_param, 0, 1)[0] = step


def _adam_8bit_many(
    table: Any, as_param: Any, as_state: Any, as_grad: Any, as_out: Any, step: Any, numbers: Any
) -> None:
    """As `_adam_many`, with moments in 8 bits."""
    for numel, counter, p, g, copy, m, v, m_scale, v_scale in table:
        addresses = (p, m, v, m_scale, v_scale, g, copy)
        _adam_8bit_kernel(addresses, as_param, as_state, as_grad, as_out, 0, numel, False, numbers)
        _at(counter, as_param, 0, 1)[0] = step


def _gather(addresses: Any, out: Any) -> None:
    """The numbers that lie there."""
    for i in range(addresses.size):
        out[i] = _at(addresses[i], out, 0, 1)[0]


gather_kernel = _compiled(_gather)
_many_kernel = _compiled(_adam_many)
many_kernels = {"fp32": _many_kernel, "bf16": _many_kernel, "8bit": _compiled(_adam_8bit_many)}
"""By the form of the buffers, too."""
