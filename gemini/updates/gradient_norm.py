"""Norms of gradients, in chunks and outside of them: what clipping and overflow checks look at."""

from collections.abc import Container, Iterable

import torch
from torch import Tensor

from ..chunk import Chunk, ChunkManager
from ..tensor_parallel import whole_norms

Found = tuple[Chunk, int]
"""A gradient that is there, by its chunk and its position in it."""

_NORM_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def find_gradients(chunks: Iterable[Chunk], parameters: Container[int]) -> list[Found]:
    """The gradients of these parameters (ids), which are those that the step uses."""
    return [
        (chunk, position)
        for chunk in chunks
        if chunk.gradient is not None
        for position in sorted(chunk.gradient.present)
        if id(chunk.bindings[position].parameter) in parameters
    ]


def in_model_order(found: Iterable[Found]) -> list[Tensor]:
    """The parameters of these gradients."""
    in_order = sorted(found, key=lambda place: place[0].layout.slots[place[1]].key)
    return [chunk.bindings[position].parameter for chunk, position in in_order]


def total_norm(manager: ChunkManager, parameters: Iterable[Tensor], order: float) -> Tensor:
    """The norm of the gradients of these parameters together, fp32 on CPU.

    One norm a parameter, then the norm of the norms, in the order of the parameters: torch does the same, so the result
    is bit-equal to ``torch.nn.utils.clip_grad_norm_``'s, which depends on their order, too. Of tensors that are sharded
    it is the norm of the whole.
    """
    found = [(p, norm) for p in parameters if (norm := _norm_of(manager, p, order)) is not None]
    norms = whole_norms([parameter for parameter, _ in found], [norm for _, norm in found], order)
    total: Tensor = (
        torch.linalg.vector_norm(torch.stack(norms), order)
        if norms
        else torch.zeros((), dtype=torch.float32, device="cpu")
    )
    return total


def clip_coefficient(norm: Tensor, max_norm: float) -> float:
    """What to multiply gradients of this norm with so that it is at most ``max_norm``."""
    return float((max_norm / (norm + _NORM_EPS)).clamp(max=1.0))


def first_nonfinite(found: Iterable[Found]) -> str:
    """The name of the first parameter whose gradient is infinite or NaN."""
    for chunk, position in found:
        assert chunk.gradient is not None
        if not torch.isfinite(chunk.gradient.norm(position)):
            return chunk.layout.slots[position].name
    return "a parameter outside of the chunks"


def _norm_of(manager: ChunkManager, parameter: Tensor, order: float) -> Tensor | None:
    """None where there is no gradient."""
    place = manager.find(parameter)
    if place is None:
        gradient = parameter.grad
        if gradient is None:
            return None
        dtype = torch.promote_types(gradient.dtype, torch.float32)  # a norm of fp64 is not taken in fp32
        norm: Tensor = torch.linalg.vector_norm(gradient, order, dtype=dtype).float().cpu()
        return norm
    chunk, position = place
    if chunk.gradient is None or position not in chunk.gradient.present:
        return None
    return chunk.gradient.norm(position, order)
