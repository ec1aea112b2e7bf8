"""Tensors that share memory without being the same object: a chunk would give each of them memory of its own."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from ..lazy.tensor import memory_of


def sharing(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two different tensors that have an element in common; None if no two have."""
    distinct = {id(tensor): (name, tensor) for name, tensor in reversed(list(tensors.items())) if tensor.numel()}
    by_storage: dict[Any, list[tuple[int, int, str, Tensor]]] = {}
    for name, tensor in distinct.values():
        where, start = memory_of(tensor)
        by_storage.setdefault(where, []).append((start, start + _reach(tensor), name, tensor))
    for group in by_storage.values():
        for run in _touching(sorted(group, key=lambda extent: extent[:2])):
            for (a_start, _, a_name, a), (b_start, _, b_name, b) in combinations(run, 2):
                if _meet(a, a_start, b, b_start):
                    first, second = sorted((a_name, b_name), key=list(tensors).index)
                    return first, second
    return None


def _touching(extents: Iterable[tuple[int, int, str, Tensor]]) -> Iterable[list[tuple[int, int, str, Tensor]]]:
    """Runs of extents, in order, in which each one begins before the others have ended."""
    run: list[tuple[int, int, str, Tensor]] = []
    end = 0
    for extent in extents:
        if run and extent[0] >= end:
            yield run
            run = []
        run.append(extent)
        end = max(end, extent[1])
    yield run


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return int(steps + 1) * tensor.element_size()


def _meet(a: Tensor, a_start: int, b: Tensor, b_start: int) -> bool:
    if a_start + _reach(a) <= b_start or b_start + _reach(b) <= a_start:
        return False
    if all(_reach(tensor) == tensor.numel() * tensor.element_size() for tensor in (a, b)):
        return True
    return bool(np.intersect1d(_addresses(a, a_start), _addresses(b, b_start)).size)


def _addresses(tensor: Tensor, start: int) -> Any:
    """Of every byte; columns of one matrix lie between each other and have none in common."""
    at = np.arange(start, start + tensor.element_size())
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        at = (at[..., None] + np.arange(size) * stride * tensor.element_size()).reshape(-1)
    return at
