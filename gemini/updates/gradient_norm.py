"""Norms of gradients, in chunks and outside of them: what clipping and overflow checks look at."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..chunk import Chunk

_NORM_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def total_norm(chunks: Sequence[Chunk], plain: Mapping[int, Sequence[Tensor]], order: float) -> Tensor:
    """The norm of all gradients together, fp32 on CPU.

    One norm a parameter, then the norm of the norms, in the order of the parameters: torch does the same, so the result
    is bit-equal to ``torch.nn.utils.clip_grad_norm_``'s.

    Parameters
    ----------
    chunks
        Those that have gradients.
    plain
        Parameters with a gradient outside of the chunks, by group.
    """
    found: list[tuple[int, Tensor]] = []
    for chunk in chunks:
        assert chunk.gradient is not None
        keys = [chunk.layout.slots[position].key for position in sorted(chunk.gradient.present)]
        found += zip(keys, chunk.gradient.norms(order), strict=True)
    norms = [norm for _, norm in sorted(found, key=lambda item: item[0])]
    for parameters in plain.values():
        for parameter in parameters:
            assert parameter.grad is not None
            dtype = torch.promote_types(parameter.grad.dtype, torch.float32)  # a norm of fp64 is not taken in fp32
            norms.append(torch.linalg.vector_norm(parameter.grad, order, dtype=dtype).float().cpu())
    total: Tensor = (
        torch.linalg.vector_norm(torch.stack(norms), order)
        if norms
        else torch.zeros((), dtype=torch.float32, device="cpu")
    )
    return total


def clip_coefficient(norm: Tensor, max_norm: float) -> float:
    """What to multiply gradients of this norm with so that it is at most ``max_norm``."""
    return float((max_norm / (norm + _NORM_EPS)).clamp(max=1.0))


def first_nonfinite(chunks: Sequence[Chunk]) -> str:
    """The name of the first parameter whose gradient is infinite or NaN."""
    for chunk in chunks:
        assert chunk.gradient is not None
        for position, norm in zip(sorted(chunk.gradient.present), chunk.gradient.norms(), strict=True):
            if not torch.isfinite(norm):
                return chunk.layout.slots[position].name
    return "a parameter outside of the chunks"
