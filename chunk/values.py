"""What one role's home has for one parameter of a chunk, wherever the home is."""

from math import prod

import torch
from torch import Tensor

from .chunk import Chunk
from .split_master import halves, joined, marked, unmarked
from .tier import Role

_PIECE_NUMEL = 1 << 18
"""Masters in two halves are put together and taken apart in pieces: that takes room for a dozen bytes an element."""


def read_slot(chunk: Chunk, position: int, role: Role) -> Tensor:
    """A copy, on CPU, of what a role holds for the parameter at this position."""
    offset, shape, stride = chunk.place(position, role)
    if not _is_entwined(chunk, role):
        flat = _read(chunk, role, offset, prod(shape))
    else:
        flat = torch.empty(prod(shape))
        for part in flat.split(_PIECE_NUMEL):
            part.copy_(_disentangled(chunk, role, offset + part.storage_offset(), part.numel()))
    return flat.as_strided(shape, stride)


def write_slot(chunk: Chunk, position: int, role: Role, value: Tensor) -> None:
    """Put ``value`` (any dtype, the shape of `read_slot`, or one for all) where a role lives; a master also into its
    shadow."""
    if role is Role.MASTER and Role.SHADOW in chunk.homes:
        _write(chunk, position, Role.SHADOW, value.to(chunk.master_dtype))  # rounded once, as the update does it
    if not _is_entwined(chunk, role):
        _write(chunk, position, role, value)
        return
    offset, shape, stride = chunk.place(position, role)
    start = offset
    for part in _flat(value, shape, stride, torch.float32).split(_PIECE_NUMEL):
        _entwine(chunk, role, start, part)
        start += part.numel()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what the bits of an element can be compared as. As numbers, NaN differs from itself and -0.0 equals 0.0."""


def differing(view: Tensor, home: Tensor) -> Tensor:
    """Where a full copy has other bits than its home gives it (a mask in their shape)."""
    as_bits = _BITS[view.element_size()]
    return view.detach().view(as_bits) != home.to(view.dtype).view(as_bits)


def _is_entwined(chunk: Chunk, role: Role) -> bool:
    """True if other homes than the role's own belong to its values, or its home has more than them."""
    return chunk.is_split and role in (Role.MASTER, chunk.marks_role)


def _disentangled(chunk: Chunk, role: Role, start: int, numel: int) -> Tensor:
    state = _read(chunk, chunk.marks_role, start, numel)
    if role is chunk.marks_role:
        return unmarked(state)
    high, low = (_read(chunk, half, start, numel) for half in (Role.MASTER, Role.MASTER_LOW))
    return joined(high, low, state)


def _entwine(chunk: Chunk, role: Role, start: int, values: Tensor) -> None:
    state = _read(chunk, chunk.marks_role, start, values.numel())
    if role is chunk.marks_role:
        chunk.homes[role].write(start, marked(values, state.signbit()))
        return
    high, low, marks = halves(values)
    chunk.homes[Role.MASTER].write(start, high)
    chunk.homes[Role.MASTER_LOW].write(start, low)
    if not torch.equal(marks, state.signbit()):
        chunk.homes[chunk.marks_role].write(start, marked(state, marks))


def _read(chunk: Chunk, role: Role, start: int, numel: int) -> Tensor:
    home = chunk.homes[role]
    flat = torch.empty(numel, dtype=home.dtype)
    home.read(start, flat)
    return flat


def _write(chunk: Chunk, position: int, role: Role, value: Tensor) -> None:
    home, (offset, shape, stride) = chunk.homes[role], chunk.place(position, role)
    with torch.no_grad():
        if home.tensor is not None:
            home.tensor.as_strided(shape, stride, home.tensor.storage_offset() + offset).copy_(value)
            return
        home.write(offset, _flat(value, shape, stride, home.dtype))


def _flat(value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``value`` (of this shape, or one for all) on CPU, as it lies in memory with these dense strides."""
    value = value.detach().to("cpu", dtype)
    if (value.shape, value.stride()) != (shape, stride):
        value = torch.empty(prod(shape), dtype=dtype).as_strided(shape, stride).copy_(value)
    return value.as_strided((prod(shape),), (1,))
