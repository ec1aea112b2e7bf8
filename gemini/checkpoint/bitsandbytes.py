"""Weights as bitsandbytes saves them, read without it.

Beside ``x.weight`` there are further tensors::

    4 bits   weight (codes, two a byte), weight.absmax, weight.quant_map (the levels),
             weight.quant_state.bitsandbytes__nf4 or ..__fp4 (JSON in bytes: shape, blocksize, ...);
             if the absmax are quantised, too: weight.nested_absmax, weight.nested_quant_map
    8 bits   weight (int8), SCB (the largest magnitude of each row), weight_format

The values are float32, not rounded to a compute dtype: a chunk whose parameters are kept in the same levels with blocks
of the same length gets the same codes from them. (That of a ``Conv1D`` of transformers is stored transposed, and its
blocks run in the other direction.)
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gemini.errors import CheckpointError

from .match import Source

_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Dequantised(Source):
    """A stored tensor of a linear layer that is dequantised when it is read."""


def dequantised(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What is stored, with one `Dequantised` for each group of tensors of a quantised weight.

    Parameters
    ----------
    where
        The checkpoint, for messages.

    Raises
    ------
    CheckpointError
        If tensors of a group are missing or do not go together.
    """
    found = dict(stored)
    for name in stored:
        try:
            if (of_state := _STATE.fullmatch(name)) is not None:
                weight = of_state["weight"]
                parts = {part: found.pop(f"{weight}.{part}", None) for part in _PARTS}
                found[weight] = _four_bits(found[weight], found.pop(name), parts)
            elif name.endswith(".SCB"):
                weight = f"{name.removesuffix('SCB')}weight"
                found[weight] = _eight_bits(found[weight], found.pop(name))
                found.pop(f"{name.removesuffix('SCB')}weight_format", None)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{where}: {name} and what belongs to it are no quantised weight: {error}") from error
    return found


def as_laid_out(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """The same by the names of the model, with weights of ``Conv1D`` as the model has them: transposed."""
    found = dict(named)
    if (transformers := sys.modules.get("transformers.pytorch_utils")) is None:
        return found
    for name, source in named.items():
        if isinstance(source, Dequantised) and isinstance(_owner(model, name), transformers.Conv1D):
            found[name] = replace(source, shape=source.shape[::-1], read=_transposed(source.read))
    return found


def _transposed(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: read().t()


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def _four_bits(codes: Source, state: Source, parts: Mapping[str, Source | None]) -> Dequantised:
    if _whole(state).dtype is not torch.uint8 or prod(state.shape) > _STATE_BYTES:
        raise ValueError(f"its state is of {state.dtype} with shape {state.shape}")
    said = json.loads(bytes(state.read().flatten().tolist()))
    shape, block = tuple(said["shape"]), said["blocksize"]
    if not (all(isinstance(size, int) and size >= 0 for size in (*shape, block)) and block and len(shape) == 2):
        raise ValueError(f"its state says shape {shape} and blocks of {block!r}")
    numel = prod(shape)
    absmax, levels = _part(parts, "absmax", -(-numel // block)), _part(parts, "quant_map", 16)
    is_nested = parts["nested_absmax"] is not None
    if is_nested:
        nested_block, offset = int(said["nested_blocksize"]), float(said["nested_offset"])
        of_blocks = _part(parts, "nested_absmax", -(-prod(absmax.shape) // nested_block))
        of_levels = _part(parts, "nested_quant_map", 256)
        if absmax.dtype is not torch.uint8:
            raise ValueError(f"its absmax are of {absmax.dtype}, expected uint8, as they are quantised themselves")
    if _whole(codes).dtype is not torch.uint8 or prod(codes.shape) != -(-numel // 2):
        raise ValueError(f"its codes are of {codes.dtype} with shape {codes.shape}, expected uint8 for {numel} numbers")

    def read() -> Tensor:
        scales = absmax.read().flatten()
        if is_nested:
            scales = _scaled(of_levels.read()[scales.int()], of_blocks.read(), nested_block) + offset
        bytes_ = codes.read().flatten()
        pairs = torch.stack((bytes_ >> 4, bytes_ & 0xF), dim=1).view(-1)[:numel]
        return _scaled(levels.read().float()[pairs.int()], scales.float(), block).view(shape)

    return Dequantised(shape, torch.float32, read)


def _part(parts: Mapping[str, Source | None], name: str, numel: int) -> Source:
    source = parts[name]
    if source is None or prod(source.shape) != numel:
        raise ValueError(f"{name} has {'no' if source is None else prod(source.shape)} values, expected {numel}")
    return _whole(source)


def _whole(source: Source) -> Source:
    if source.fault is not None:
        raise ValueError(f"a tensor of it {source.fault}")
    return source


def _scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    numel = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -numel % block)).view(-1, block)
    return (blocks * scales[:, None]).view(-1)[:numel]


def _eight_bits(weight: Source, scales: Source) -> Dequantised:
    is_matrix = _whole(weight).dtype is torch.int8 and len(weight.shape) == 2
    if not is_matrix or prod(_whole(scales).shape) != weight.shape[0]:
        raise ValueError(f"its weight is of {weight.dtype} with shape {weight.shape}, its scales have {scales.shape}")
    return Dequantised(
        weight.shape, torch.float32, lambda: weight.read().float() * (scales.read().float().view(-1, 1) / 127)
    )
