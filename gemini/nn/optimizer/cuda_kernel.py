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

_BLOCK_NUMEL = 1024


@triton.jit
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
    m = tl.load(exp_avg_ptr + at, mask=inside)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside)
    if HAS_L2:
        g = tl.fma(p, l2, g)
    if LERP_FROM_GRAD:
        m = tl.fma(lerp, g - m, g)
    else:
        m = tl.fma(lerp, g - m, m)
    v = tl.fma(grad_sq * g, g, beta2 * v)
    p = p + tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps)
    tl.store(exp_avg_ptr + at, m, mask=inside)
    tl.store(exp_avg_sq_ptr + at, v, mask=inside)
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
            HAS_L2=s.l2 != 0.0,
            LERP_FROM_GRAD=s.lerp_from_grad,
            HAS_OUT=out is not None,
            BLOCK=_BLOCK_NUMEL,
            enable_fp_fusion=False,
        )
