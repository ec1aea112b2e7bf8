"""Adam in plain torch operations, bit-equal to the kernels: what they are tested against and fall back to.

See [Note: Adam arithmetic] in ``arithmetic.py`` for the order of operations.
"""

import torch
from torch import Tensor

from gemini.chunk import halves, joined, marked, unmarked

from .arithmetic import AdamHyper, AdamScalars
from .reduced import (
    BLOCK_NUMEL,
    pack_exp_avg,
    pack_exp_avg_sq,
    random_bits,
    sqrt,
    to_bfloat16,
    unpack_exp_avg,
    unpack_exp_avg_sq,
)

# A dozen float64 temporaries are alive at once: slices keep them small, and near the caches of a CPU.
SLICE_NUMEL = 1 << 16


def fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """Compute ``a * b + c`` of float32 values, rounded once.

    The product of two float32 is exact in float64, the sum is not, and rounding it to float64 and then to float32 can
    land one float32 off when the first rounding produces a tie. So the float64 sum is rounded *to odd*: where it is
    inexact (Knuth's two-sum gives the error exactly) and its last bit is 0, it moves one step towards the exact value,
    whose neighbour there has last bit 1. An odd 53-bit value is never a tie for 24 bits, so the second rounding is
    right (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008). No float64 operation here can
    overflow or underflow: exponents stay within +-300.
    """
    x = a.double() * (b.double() if isinstance(b, Tensor) else b)
    y = c.double()
    total = x + y
    y_seen = total - x
    error = (x - (total - y_seen)) + (y - y_seen)
    bits = total.view(torch.int64)
    inexact_and_even = torch.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    towards = torch.where((error > 0) == (total > 0), 1, -1)  # in units of magnitude
    odd = torch.where(inexact_and_even, bits + towards, bits).view(torch.float64)
    return odd.float()


def adam_reference(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    out: Tensor | None = None,
) -> None:
    """Update flat buffers in place; same contract as ``update.adam_update``, without its validation."""
    with torch.no_grad():
        for start in range(0, param.numel(), SLICE_NUMEL):
            p, m, v, g = (t[start : start + SLICE_NUMEL] for t in (param, exp_avg, exp_avg_sq, grad))
            p_new, m_new, v_new = _adam(p, m.float(), v.float(), g.float(), scalars)
            if m.dtype == torch.bfloat16:
                for_m, for_v = random_bits(m_new, v_new, scalars.noise)
                m_new, v_new = to_bfloat16(m_new, for_m), to_bfloat16(v_new, for_v)
            m.copy_(m_new)
            v.copy_(v_new)
            p.copy_(p_new)
            if out is not None:
                out[start : start + SLICE_NUMEL].copy_(p_new)


def adam_8bit_reference(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor,
    grad: Tensor,
    scalars: AdamScalars,
    out: Tensor | None = None,
) -> None:
    """Update flat buffers in place; same contract as ``update.adam_8bit_update``, without its validation."""
    with torch.no_grad():
        for start in range(0, param.numel(), SLICE_NUMEL):
            p, m, v, g = (t[start : start + SLICE_NUMEL] for t in (param, exp_avg, exp_avg_sq, grad))
            ms, vs = (
                t[start // BLOCK_NUMEL : (start + SLICE_NUMEL) // BLOCK_NUMEL]
                for t in (exp_avg_scale, exp_avg_sq_scale)
            )
            old = unpack_exp_avg(m, ms), unpack_exp_avg_sq(v, vs)
            p_new, m_new, v_new = _adam(p, *old, g.float(), scalars)
            for_m, for_v = random_bits(m_new, v_new, scalars.noise)
            packed = (*pack_exp_avg(m_new, for_m), *pack_exp_avg_sq(v_new, for_v))
            for tensor, new in zip((m, ms, v, vs, p), (*packed, p_new), strict=True):
                tensor.copy_(new)
            if out is not None:
                out[start : start + SLICE_NUMEL].copy_(p_new)


def adam_split_reference(
    high: Tensor, low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, scalars: AdamScalars
) -> None:
    """Update flat buffers in place; same contract as ``update.adam_split_update``, without its validation."""
    with torch.no_grad():
        for start in range(0, high.numel(), SLICE_NUMEL):
            at = slice(start, start + SLICE_NUMEL)
            p = joined(high[at], low[at], exp_avg_sq[at])
            p, m, v = _adam(p, exp_avg[at], unmarked(exp_avg_sq[at]), grad[at].float(), scalars)
            upper, lower, mark = halves(p)
            v = marked(v, mark)
            for tensor, new in ((high, upper), (low, lower), (exp_avg, m), (exp_avg_sq, v)):
                tensor[at].copy_(new)


def _adam(p: Tensor, m: Tensor, v: Tensor, g: Tensor, s: AdamScalars) -> tuple[Tensor, Tensor, Tensor]:
    g = g * s.grad_scale
    p = p * s.decay
    if s.l2 != 0.0:
        g = fma(p, s.l2, g)
    m = fma(g - m, s.lerp, g if s.lerp_from_grad else m)
    v = fma(g * s.grad_sq, g, v * s.beta2)
    p = p + (m * s.step_size) / (sqrt(v) / s.bias2_sqrt + s.eps)
    return p, m, v


def adam_float64(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    hyper: AdamHyper,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Update float64 tensors of any layout in place, with the operations of torch's single-tensor Adam.

    Float64 parameters are for checking other things (gradients, convergence), so no kernel of ours serves them.
    """
    bias1 = 1.0 - hyper.beta1**step if hyper.bias_correction else 1.0
    bias2 = 1.0 - hyper.beta2**step if hyper.bias_correction else 1.0
    with torch.no_grad():
        if grad_scale != 1.0:
            grad = grad * grad_scale
        if hyper.weight_decay != 0.0:
            if hyper.decoupled:
                param.mul_(1.0 - hyper.lr * hyper.weight_decay)
            else:
                grad = grad.add(param, alpha=hyper.weight_decay)
        exp_avg.lerp_(grad, 1.0 - hyper.beta1)
        exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1.0 - hyper.beta2)
        denominator = (exp_avg_sq.sqrt() / bias2**0.5).add_(hyper.eps)
        param.addcdiv_(exp_avg, denominator, value=-(hyper.lr / bias1))
