"""Bit for bit: whether two runs returned the same."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def frozen(value: Any) -> Any:
    """Copy what a use returned, so that it can be compared later."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if isinstance(value, numpy.ndarray | numpy.generic):
        return torch.from_numpy(numpy.array(value))
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    raise TypeError(f"a use returned a {type(value).__name__}, which cannot be compared")


def differing(where: str, ours: Any, plain: Any) -> str:
    """Name the first part that is not the same, and how many others are not; nothing if all is."""
    found = list(_unequal(where, ours, plain))
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "") if found else ""


def _unequal(where: str, ours: Any, plain: Any) -> Iterator[str]:
    if isinstance(plain, Tensor):
        if not isinstance(ours, Tensor):
            yield f"{where}: {ours!r} for a tensor"
        elif (ours.dtype, ours.shape) != (plain.dtype, plain.shape):
            yield f"{where}: {ours.dtype} {tuple(ours.shape)} for {plain.dtype} {tuple(plain.shape)}"
        elif not torch.equal(ours, plain):
            yield f"{where}: {_apart(ours, plain)}"
    elif isinstance(plain, dict) and isinstance(ours, dict):
        if ours.keys() != plain.keys():
            yield f"{where}: {sorted(map(str, ours))} for {sorted(map(str, plain))}"
        for key in plain:
            if key in ours:
                yield from _unequal(f"{where}[{key}]", ours[key], plain[key])
    elif isinstance(plain, list) and isinstance(ours, list):
        if len(ours) != len(plain):
            yield f"{where}: {len(ours)} items for {len(plain)}"
        for index, (one, other) in enumerate(zip(ours, plain, strict=False)):
            yield from _unequal(f"{where}[{index}]", one, other)
    elif type(ours) is not type(plain) or ours != plain:
        yield f"{where}: {_short(ours)} for {_short(plain)}"


def _apart(ours: Tensor, plain: Tensor) -> str:
    if ours.is_floating_point() and ours.isnan().any():
        return f"{int(ours.isnan().sum())} of {ours.numel()} are NaN"
    apart = (ours.double() - plain.double()).abs().max().item()
    return f"differs by up to {apart:.3g}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
