"""Flat views of tensors in memory order, so that an elementwise kernel can run over any dense layout."""

import torch
from torch import Tensor

# Dimensions from the slowest to the fastest in memory, e.g. (0, 2, 3, 1) for channels_last; None if they are sorted.
Order = tuple[int, ...] | None


def memory_order(tensor: Tensor) -> Order:
    """Find the order of dimensions in which ``tensor`` lies in memory; None also if it has gaps or overlaps."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
    # A chunk keeps such a tensor contiguous, so its blocks of elements must be those of the contiguous one here, too.
    return order if tensor.permute(order).is_contiguous() else None


def flatten(tensor: Tensor, order: Order) -> Tensor:
    """Elements of ``tensor`` with its dimensions in the given order, one-dimensional and contiguous.

    A view where the memory allows it, else a copy.
    """
    detached = tensor.detach()
    return (detached if order is None else detached.permute(order)).contiguous().view(-1)


def copy_back(flat: Tensor, tensor: Tensor, order: Order) -> None:
    """Write to ``tensor`` what became of ``flatten(tensor, order)``; needed, and done, only if that was a copy."""
    if flat.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            permuted = tensor.detach() if order is None else tensor.detach().permute(order)
            permuted.copy_(flat.view(permuted.shape))
