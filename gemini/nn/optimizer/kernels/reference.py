"""Adam in plain torch operations, bit-equal to the kernels: what they are tested against and fall back to.

See [Note: Adam arithmetic] in ``arithmetic.py`` for the order of operations.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gemini.chunk import halves, joined, marked, unmarked

from .arithmetic import AdamHyper, AdamScalars
from .forms import FORMS, SPLIT
from .reduced import (
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


def _update(
    form: str, buffers: Sequence[Tensor], grad: Tensor, scalars: AdamScalars, out: Tensor | None = None
) -> None:
    """Decode flat buffers, take the step in float32, and encode what it gives (an `update.Kernel`)."""
    decode, encode = _CODECS[form]
    with torch.no_grad():
        for start in range(0, grad.numel(), SLICE_NUMEL):
            stop = min(start + SLICE_NUMEL, grad.numel())
            parts = [buffer[spec.part(start, stop)] for spec, buffer in zip(FORMS[form], buffers, strict=True)]
            p, m, v = _adam(*decode(*parts), grad[start:stop].float(), scalars)
            for part, new in zip(parts, encode(p, m, v, scalars.noise), strict=True):
                part.copy_(new)
            if out is not None:
                out[start:stop].copy_(p)


_Tensors = tuple[Tensor, ...]
_Values = tuple[Tensor, Tensor, Tensor]


def _floats(p: Tensor, m: Tensor, v: Tensor) -> _Values:
    return p, m.float(), v.float()


def _unchanged(p: Tensor, m: Tensor, v: Tensor, noise: int) -> _Tensors:
    return p, m, v


def _rounded(p: Tensor, m: Tensor, v: Tensor, noise: int) -> _Tensors:
    for_m, for_v = random_bits(m, v, noise)
    return p, to_bfloat16(m, for_m), to_bfloat16(v, for_v)


def _unpacked(p: Tensor, m: Tensor, v: Tensor, m_scale: Tensor, v_scale: Tensor) -> _Values:
    return p, unpack_exp_avg(m, m_scale), unpack_exp_avg_sq(v, v_scale)


def _packed(p: Tensor, m: Tensor, v: Tensor, noise: int) -> _Tensors:
    for_m, for_v = random_bits(m, v, noise)
    (m, m_scale), (v, v_scale) = pack_exp_avg(m, for_m), pack_exp_avg_sq(v, for_v)
    return p, m, v, m_scale, v_scale


def _joined(high: Tensor, low: Tensor, m: Tensor, v: Tensor) -> _Values:
    return joined(high, low, v), m, unmarked(v)


def _halved(p: Tensor, m: Tensor, v: Tensor, noise: int) -> _Tensors:
    high, low, mark = halves(p)
    return high, low, m, marked(v, mark)


_CODECS: dict[str, tuple[Callable[..., _Values], Callable[[Tensor, Tensor, Tensor, int], _Tensors]]] = {
    "fp32": (_floats, _unchanged),
    "bf16": (_floats, _rounded),
    "8bit": (_unpacked, _packed),
    SPLIT: (_joined, _halved),
}
"""From the buffers of each form to float32 values of parameter and moments, and back."""

BY_FORM = {form: partial(_update, form) for form in FORMS}
"""A kernel for each form, on any device."""


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
