"""The forms in which a step of Adam finds its numbers. Each of them has a kernel on every device.

``fp32``, ``bf16`` and ``8bit`` say how the two moments are kept (``HybridAdam(states=...)``), beside a float32
parameter. In ``split`` the moments are float32 and the parameter is in two halves, see [Note: Split master].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemini.chunk import BufferSpec

from .reduced import BLOCK_NUMEL

MOMENTS = ("exp_avg", "exp_avg_sq")
SPLIT = "split"
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PARAM = BufferSpec("param")

FORMS: dict[str, tuple[BufferSpec, ...]] = {
    "fp32": (_PARAM, BufferSpec("exp_avg"), BufferSpec("exp_avg_sq", has_spare_sign=True)),
    "bf16": (_PARAM, *(BufferSpec(name, torch.bfloat16) for name in MOMENTS)),
    "8bit": (
        _PARAM,
        *(BufferSpec(name, torch.uint8) for name in MOMENTS),
        *(BufferSpec(f"{name}_scale", block_numel=BLOCK_NUMEL) for name in MOMENTS),
    ),
    SPLIT: (
        BufferSpec("high", torch.bfloat16),
        BufferSpec("low", torch.int16),
        *(BufferSpec(name) for name in MOMENTS),
    ),
}
"""The buffers of each form, in the order in which kernels take them: the parameter, then the moments."""


def check(form: str, buffers: Sequence[Tensor], grad: Tensor, out: Tensor | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless tensors are what a kernel of this form takes."""
    param = buffers[0]
    for spec, tensor in zip(FORMS[form], buffers, strict=True):
        _check(spec.name, tensor, (spec.dtype,), param, spec.numel(param.numel()))
    _check("grad", grad, GRAD_DTYPES, param, param.numel())
    if out is not None:
        if form == SPLIT:
            raise ValueError("a parameter in two halves has its copy already, the upper one; pass out=None")
        _check("out", out, GRAD_DTYPES, param, param.numel())


def _check(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], param: Tensor, numel: int) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be one-dimensional and contiguous, got shape {tuple(tensor.shape)}, stride {tensor.stride()}"
        )
    if tensor.numel() != numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, must have {numel} where param has {param.numel()}")
    if tensor.device != param.device:
        raise ValueError(f"{name} is on {tensor.device}, param on {param.device}")
    if numel > 0 and not tensor.is_meta and tensor.data_ptr() == 0:
        raise ValueError(f"{name} has no memory: it is lazy, or its storage has been freed")
