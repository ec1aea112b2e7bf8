"""The Adam step as an operator of torch, for code that ``torch.compile`` traces: it is called as it is, unseen.

Not ``torch.library.triton_op``, which shows a Triton kernel to the compiler: that one compiles it again, without our
``enable_fp_fusion=False``, and fuses multiplications and additions, which gives other bits.
"""

from typing import Any

import torch
from torch import Tensor

from .arithmetic import AdamScalars

NAME = "gemini_memory::adam_update"
_NOT_FLOATS = ("lerp_from_grad", "noise")
_FLOATS = tuple(name for name in AdamScalars.__annotations__ if name not in _NOT_FLOATS)


@torch.library.custom_op(NAME, mutates_args=("buffers", "out"))
def _operator(
    form: str,
    buffers: list[Tensor],
    grad: Tensor,
    out: Tensor | None,
    floats: list[float],
    lerp_from_grad: bool,
    noise: int,
) -> None:
    from .update import adam_update  # which comes here

    named: dict[str, Any] = dict(zip(_FLOATS, floats, strict=True))
    scalars = AdamScalars(**named, lerp_from_grad=lerp_from_grad, noise=noise)
    adam_update(form, buffers, grad, scalars, out)


def traced_update(form: str, buffers: list[Tensor], grad: Tensor, scalars: AdamScalars, out: Tensor | None) -> None:
    """As `update.adam_update`, in code that is being traced; ``out`` is not ``grad``."""
    floats = [getattr(scalars, name) for name in _FLOATS]
    _operator(form, buffers, grad, out, floats, scalars.lerp_from_grad, scalars.noise)
