"""Adam on CUDA in one pass over memory, compiled by Triton on first use. Import this module only then.

See [Note: Adam arithmetic] in ``arithmetic.py``. Three things keep the bits equal to the CPU's: fused multiply-adds
stand only where the definition has them (``enable_fp_fusion=False`` keeps the compiler from making more), square root
and division are the correctly rounded ones (Triton's ``/`` and ``tl.sqrt`` on float32 are approximations), and
conversions round to nearest even, as ``tl`` casts do by default.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import AdamScalars
from .reduced import BLOCK_NUMEL, EXP_AVG, ROOT

_BLOCK_NUMEL = 1024
_ROWS = _BLOCK_NUMEL // BLOCK_NUMEL

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
    g = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * grad_scale
    p = tl.load(param_ptr + at, mask=inside) * decay
    m = tl.load(exp_avg_ptr + at, mask=inside).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside).to(tl.float32)
    if HAS_L2:
        g = tl.fma(p, l2, g)
    if LERP_FROM_GRAD:
        m = tl.fma(lerp, g - m, g)
    else:
        m = tl.fma(lerp, g - m, m)
    v = tl.fma(grad_sq * g, g, beta2 * v)
    p = p + tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps)
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


@triton.jit
def _adam_split(
    high_ptr,
    low_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
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
    HAS_L2: tl.constexpr,
    LERP_FROM_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    # See [Note: Split master] for how the halves and the mark are put together and taken apart.
    high = tl.load(high_ptr + at, mask=inside).to(tl.int16, bitcast=True).to(tl.int32) << 16
    low = tl.load(low_ptr + at, mask=inside).to(tl.int32)
    v_bits = tl.load(exp_avg_sq_ptr + at, mask=inside).to(tl.int32, bitcast=True)
    p = (high + low + ((v_bits >> 15) & 0x10000)).to(tl.float32, bitcast=True) * decay
    v = (v_bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    g = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * grad_scale
    m = tl.load(exp_avg_ptr + at, mask=inside)
    if HAS_L2:
        g = tl.fma(p, l2, g)
    if LERP_FROM_GRAD:
        m = tl.fma(lerp, g - m, g)
    else:
        m = tl.fma(lerp, g - m, m)
    v = tl.fma(grad_sq * g, g, beta2 * v)
    p = p + tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps)
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
    blocks,
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
    is_row = row < blocks
    at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = at < numel
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * grad_scale
    p = tl.load(param_ptr + at, mask=inside, other=0.0) * decay
    m_code = tl.load(exp_avg_ptr + at, mask=inside, other=0).to(tl.int32)
    v_code = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0).to(tl.int32)
    m = _decode(m_code & 0x7F, tl.load(exp_avg_scale_ptr + row, mask=is_row, other=0.0), EXP_AVG_MANTISSA)
    m = tl.where(m_code >= 0x80, -m, m)
    root = _decode(v_code, tl.load(exp_avg_sq_scale_ptr + row, mask=is_row, other=0.0), ROOT_MANTISSA)
    if HAS_L2:
        g = tl.fma(p, l2, g)
    if LERP_FROM_GRAD:
        m = tl.fma(lerp, g - m, g)
    else:
        m = tl.fma(lerp, g - m, m)
    v = tl.fma(grad_sq * g, g, beta2 * (root * root))
    root = tl.sqrt_rn(v)
    p = p + tl.div_rn(step_size * m, tl.div_rn(root, bias2_sqrt) + eps)
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


def adam_cuda(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    out: Tensor | None = None,
) -> None:
    """Update flat CUDA buffers in place on the current stream; same contract as ``update.adam_update``."""
    s = scalars
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(param.device):
        _adam[(triton.cdiv(param.numel(), _BLOCK_NUMEL),)](
            param.detach(),
            exp_avg,
            exp_avg_sq,
            grad,
            param.detach() if out is None else out.detach(),
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
            BLOCK=_BLOCK_NUMEL,
            enable_fp_fusion=False,
        )


def adam_split_cuda(
    high: Tensor, low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, scalars: AdamScalars
) -> None:
    """Update flat CUDA buffers in place on the current stream; same contract as ``update.adam_split_update``."""
    s = scalars
    with torch.cuda.device(high.device):
        _adam_split[(triton.cdiv(high.numel(), _BLOCK_NUMEL),)](
            high.detach(),
            low,
            exp_avg,
            exp_avg_sq,
            grad,
            high.numel(),
            s.grad_scale,
            s.decay,
            s.l2,
            s.lerp,
            s.beta2,
            s.grad_sq,
            s.step_size,
            s.bias2_sqrt,
            s.eps,
            HAS_L2=s.l2 != 0.0,
            LERP_FROM_GRAD=s.lerp_from_grad,
            BLOCK=_BLOCK_NUMEL,
            enable_fp_fusion=False,
        )


def adam_8bit_cuda(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    out: Tensor | None = None,
) -> None:
    """Update flat CUDA buffers in place on the current stream; same contract as ``update.adam_8bit_update``."""
    s = scalars
    with torch.cuda.device(param.device):
        _adam_8bit[(triton.cdiv(param.numel(), _BLOCK_NUMEL),)](
            param.detach(),
            exp_avg,
            exp_avg_sq,
            exp_avg_scale,
            exp_avg_sq_scale,
            grad,
            param.detach() if out is None else out.detach(),
            param.numel(),
            exp_avg_scale.numel(),
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
            ROWS=_ROWS,
            COLUMNS=BLOCK_NUMEL,
            EXP_AVG_MANTISSA=EXP_AVG.mantissa,
            ROOT_MANTISSA=ROOT.mantissa,
            enable_fp_fusion=False,
        )
