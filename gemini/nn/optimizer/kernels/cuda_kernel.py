"""Adam on CUDA in one pass over memory, compiled by Triton on first use. Import this module only then.

See [Note: Adam arithmetic] in ``arithmetic.py``. Three things keep the bits equal to the CPU's: fused multiply-adds
stand only where the definition has them (``enable_fp_fusion=False`` keeps the compiler from making more), square root
and division are the correctly rounded ones (Triton's ``/`` and ``tl.sqrt`` on float32 are approximations), and
conversions round to nearest even, as ``tl`` casts do by default.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import AdamScalars
from .forms import FORMS, SPLIT
from .reduced import BLOCK_NUMEL, EXP_AVG, ROOT

_BLOCK_NUMEL = 1024

# Triton reads globals only if they are marked.
_SMALLEST_NORMAL = tl.constexpr(2.0**-14)


@triton.jit
def _known_bits(x):
    """The bits of a float32, the same ones for all NaN."""
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)


@triton.jit
def _random_bits(m, v, noise):
    """The hash in [Note: Reduced states]."""
    h = (_known_bits(m).to(tl.uint32) * 0x9E3779B1).to(tl.uint32)
    h = h ^ _known_bits(v).to(tl.uint32) ^ noise.to(tl.uint32, bitcast=True)
    h = ((h ^ (h >> 16)) * 0x85EBCA6B).to(tl.uint32)
    h = ((h ^ (h >> 13)) * 0xC2B2AE35).to(tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _to_bfloat16(x, random):
    """Round by 16 random bits; NaN stays NaN."""
    rounded = (x.to(tl.uint32, bitcast=True) + random).to(tl.uint32) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _scale(magnitude, MANTISSA: tl.constexpr):
    """The scales of the rows of a tile, as ``reduced.scale_of`` has them, from their largest magnitudes."""
    bits = _known_bits(magnitude).to(tl.int32)  # of a positive number: as integers they have the same order
    top = tl.max(bits, axis=1)
    exponent = (top + ((1 << (23 - MANTISSA)) - 1)) >> 23
    # A sum that leaves the positive numbers belongs to NaN, which is not finite.
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    bits = tl.where(top < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _encode(magnitude, scale, random, MANTISSA: tl.constexpr):
    """Codes, as ``reduced.encode`` has them."""
    inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.int32).to(tl.float32, bitcast=True)
    inverse = tl.where(scale == scale, inverse, scale)[:, None]  # one divided by a power of two
    y = magnitude * inverse
    is_small = y < _SMALLEST_NORMAL
    z = y + tl.where(is_small, _SMALLEST_NORMAL, 0.0)
    first = tl.where(is_small, 113 << MANTISSA, 112 << MANTISSA)
    up = z.to(tl.int32, bitcast=True) + (random.to(tl.int32) << (7 - MANTISSA))
    code = (up >> (23 - MANTISSA)) - first
    return tl.where(y == y, tl.minimum(code, (16 << MANTISSA) - 1), 0)


@triton.jit
def _decode(code, scale, MANTISSA: tl.constexpr):
    """Magnitudes, as ``reduced.decode`` has them."""
    is_small = code < (1 << MANTISSA)
    z = ((code + tl.where(is_small, 113 << MANTISSA, 112 << MANTISSA)) << (23 - MANTISSA)).to(tl.int32)
    return (z.to(tl.float32, bitcast=True) - tl.where(is_small, _SMALLEST_NORMAL, 0.0)) * scale[:, None]


@triton.jit
def _stepped(
    p,
    m,
    v,
    g,
    grad_scale,
    decay,
    l2,
    lerp,
    beta2,
    grad_sq,
    step_size,
    bias2_sqrt,
    eps,
    HAS_L2: tl.constexpr,
    LERP_FROM_GRAD: tl.constexpr,
):
    """Parameter, moments and the root of the second one after a step, of float32."""
    g = g * grad_scale
    p = p * decay
    if HAS_L2:
        g = tl.fma(p, l2, g)
    if LERP_FROM_GRAD:
        m = tl.fma(lerp, g - m, g)
    else:
        m = tl.fma(lerp, g - m, m)
    v = tl.fma(grad_sq * g, g, beta2 * v)
    root = tl.sqrt_rn(v)
    p = p + tl.div_rn(step_size * m, tl.div_rn(root, bias2_sqrt) + eps)
    return p, m, v, root


@triton.jit(do_not_specialize=["noise"])
def _adam(
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    out_ptr,
    numel,
    grad_scale,
    decay,
    l2,
    lerp,
    beta2,
    grad_sq,
    step_size,
    bias2_sqrt,
    eps,
    noise,
    HAS_L2: tl.constexpr,
    LERP_FROM_GRAD: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # Triton reads annotations of arguments: none but its own
    # int64: a chunk may have more than 2**31 elements.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(grad_ptr + at, mask=inside).to(tl.float32)
    p = tl.load(param_ptr + at, mask=inside)
    m = tl.load(exp_avg_ptr + at, mask=inside).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside).to(tl.float32)
    p, m, v, _ = _stepped(
        p, m, v, g, grad_scale, decay, l2, lerp, beta2, grad_sq, step_size, bias2_sqrt, eps, HAS_L2, LERP_FROM_GRAD
    )
    if exp_avg_ptr.dtype.element_ty == tl.bfloat16:
        random = _random_bits(m, v, noise)
        tl.store(exp_avg_ptr + at, _to_bfloat16(m, random & 0xFFFF), mask=inside)
        tl.store(exp_avg_sq_ptr + at, _to_bfloat16(v, random >> 16), mask=inside)
    else:
        tl.store(exp_avg_ptr + at, m, mask=inside)
        tl.store(exp_avg_sq_ptr + at, v, mask=inside)
    tl.store(param_ptr + at, p, mask=inside)
    if HAS_OUT:
        tl.store(out_ptr + at, p.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["noise"])
def _adam_split(
    high_ptr,
    low_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    out_ptr,
    numel,
    grad_scale,
    decay,
    l2,
    lerp,
    beta2,
    grad_sq,
    step_size,
    bias2_sqrt,
    eps,
    noise,
    HAS_L2: tl.constexpr,
    LERP_FROM_GRAD: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # the upper half is the copy: no other, and no noise
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    # See [Note: Split master] for how the halves and the mark are put together and taken apart.
    high = tl.load(high_ptr + at, mask=inside).to(tl.int16, bitcast=True).to(tl.int32) << 16
    low = tl.load(low_ptr + at, mask=inside).to(tl.int32)
    v_bits = tl.load(exp_avg_sq_ptr + at, mask=inside).to(tl.int32, bitcast=True)
    p = (high + low + ((v_bits >> 15) & 0x10000)).to(tl.float32, bitcast=True)
    v = (v_bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    g = tl.load(grad_ptr + at, mask=inside).to(tl.float32)
    m = tl.load(exp_avg_ptr + at, mask=inside)
    p, m, v, _ = _stepped(
        p, m, v, g, grad_scale, decay, l2, lerp, beta2, grad_sq, step_size, bias2_sqrt, eps, HAS_L2, LERP_FROM_GRAD
    )
    bits = p.to(tl.int32, bitcast=True)
    v_bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN may come with a sign
    v_bits = v_bits | tl.where((bits & 0x1FFFF) == 0x8000, -(2**31), 0).to(tl.int32)
    tl.store(exp_avg_ptr + at, m, mask=inside)
    tl.store(exp_avg_sq_ptr + at, v_bits.to(tl.float32, bitcast=True), mask=inside)
    tl.store(high_ptr + at, p.to(tl.bfloat16), mask=inside)
    tl.store(low_ptr + at, bits.to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["noise"])
def _adam_8bit(
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_scale_ptr,
    grad_ptr,
    out_ptr,
    numel,
    grad_scale,
    decay,
    l2,
    lerp,
    beta2,
    grad_sq,
    step_size,
    bias2_sqrt,
    eps,
    noise,
    HAS_L2: tl.constexpr,
    LERP_FROM_GRAD: tl.constexpr,
    HAS_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXP_AVG_MANTISSA: tl.constexpr,
    ROOT_MANTISSA: tl.constexpr,
):
    # A row of the tile is a block of elements that share a scale. Behind the end everything is 0.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row * COLUMNS < numel
    at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = at < numel
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + at, mask=inside, other=0.0)
    m_code = tl.load(exp_avg_ptr + at, mask=inside, other=0).to(tl.int32)
    v_code = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0).to(tl.int32)
    m = _decode(m_code & 0x7F, tl.load(exp_avg_scale_ptr + row, mask=is_row, other=0.0), EXP_AVG_MANTISSA)
    m = tl.where(m_code >= 0x80, -m, m)
    root = _decode(v_code, tl.load(exp_avg_sq_scale_ptr + row, mask=is_row, other=0.0), ROOT_MANTISSA)
    p, m, v, root = _stepped(
        p,
        m,
        root * root,
        g,
        grad_scale,
        decay,
        l2,
        lerp,
        beta2,
        grad_sq,
        step_size,
        bias2_sqrt,
        eps,
        HAS_L2,
        LERP_FROM_GRAD,
    )
    # An infinite grad_scale makes NaN of the zeros behind the end.
    m, root = tl.where(inside, m, 0.0), tl.where(inside, root, 0.0)
    random = _random_bits(m, v, noise)
    m_scale = _scale(tl.abs(m), EXP_AVG_MANTISSA)
    v_scale = _scale(root, ROOT_MANTISSA)
    sign = tl.where((m.to(tl.int32, bitcast=True) < 0) & (m_scale == m_scale)[:, None], 0x80, 0)
    m_code = _encode(tl.abs(m), m_scale, random & 0xFFFF, EXP_AVG_MANTISSA) | sign
    v_code = _encode(root, v_scale, random >> 16, ROOT_MANTISSA)
    v_code = tl.where((v_code == 0) & (root > 0) & (v_scale == v_scale)[:, None], 1, v_code)
    tl.store(exp_avg_ptr + at, m_code.to(tl.uint8), mask=inside)
    tl.store(exp_avg_sq_ptr + at, v_code.to(tl.uint8), mask=inside)
    tl.store(exp_avg_scale_ptr + row, m_scale, mask=is_row)
    tl.store(exp_avg_sq_scale_ptr + row, v_scale, mask=is_row)
    tl.store(param_ptr + at, p, mask=inside)
    if HAS_OUT:
        tl.store(out_ptr + at, p.to(out_ptr.dtype.element_ty), mask=inside)


_KERNELS: dict[str, tuple[Any, dict[str, int]]] = {
    "fp32": (_adam, {"BLOCK": _BLOCK_NUMEL}),
    "bf16": (_adam, {"BLOCK": _BLOCK_NUMEL}),
    SPLIT: (_adam_split, {"BLOCK": _BLOCK_NUMEL}),
    "8bit": (
        _adam_8bit,
        {
            "ROWS": _BLOCK_NUMEL // BLOCK_NUMEL,
            "COLUMNS": BLOCK_NUMEL,
            "EXP_AVG_MANTISSA": EXP_AVG.mantissa,
            "ROOT_MANTISSA": ROOT.mantissa,
        },
    ),
}


def _update(
    form: str, buffers: Sequence[Tensor], grad: Tensor, scalars: AdamScalars, out: Tensor | None = None
) -> None:
    """Update flat CUDA buffers in place on the current stream (an `update.Kernel`)."""
    s = scalars
    kernel, constants = _KERNELS[form]
    param = buffers[0].detach()
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(param.device):
        kernel[(triton.cdiv(param.numel(), _BLOCK_NUMEL),)](
            param,
            *buffers[1:],
            grad,
            param if out is None else out.detach(),
            param.numel(),
            s.grad_scale,
            s.decay,
            s.l2,
            s.lerp,
            s.beta2,
            s.grad_sq,
            s.step_size,
            s.bias2_sqrt,
            s.eps,
            s.noise,
            HAS_L2=s.l2 != 0.0,
            LERP_FROM_GRAD=s.lerp_from_grad,
            HAS_OUT=out is not None,
            enable_fp_fusion=False,
            **constants,
        )


BY_FORM = {form: partial(_update, form) for form in FORMS}
"""A kernel for each form."""
