"""What the homes of a chunk have for one parameter, wherever they are."""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from .chunk import Chunk
from .state import ChunkState

_PIECE_NUMEL = 1 << 18
"""Values that take computing are read and written in pieces: that takes room for a dozen bytes an element."""


class _Stored(Mapping[str, Tensor]):
    """Copies, on CPU, of what the buffers of a chunk have for some elements (`Pieces`). Reads what is asked for."""

    def __init__(self, chunk: Chunk, start: int, numel: int) -> None:
        self._homes, self._start, self._numel = chunk.homes, start, numel

    def __getitem__(self, name: str) -> Tensor:
        home = self._homes[name]
        flat = torch.empty(self._numel, dtype=home.dtype, device="cpu")
        home.read(self._start, flat)
        return flat

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def read_slot(chunk: Chunk, position: int, name: str) -> Tensor:
    """A copy, on CPU, of the masters (``"master"``) or of one state of the parameter at this position."""
    codec = chunk.codecs[name]
    offset, shape, stride = chunk.place(position, name)
    if not codec.computes:
        flat = codec.decode(_Stored(chunk, offset, prod(shape)))
    else:
        flat = torch.empty(prod(shape), dtype=codec.dtype, device="cpu")
        for part in flat.split(_PIECE_NUMEL):
            part.copy_(codec.decode(_Stored(chunk, offset + part.storage_offset(), part.numel())))
    return flat.as_strided(shape, stride)


def write_slot(chunk: Chunk, position: int, name: str, value: Tensor) -> None:
    """Put ``value`` (any dtype, the shape of `read_slot`, or one for all) where the masters or a state live."""
    codec = chunk.codecs[name]
    offset, shape, stride = chunk.place(position, name)
    if not codec.computes:
        for buffer, stored in codec.encode(value.detach(), {}).items():
            _write(chunk, buffer, offset, shape, stride, stored)
        return
    start = offset
    for part in _flat(value, shape, stride, codec.dtype).split(_PIECE_NUMEL):
        for buffer, stored in codec.encode(part, _Stored(chunk, start, part.numel())).items():
            chunk.homes[buffer].write(start, stored)
        start += part.numel()


def last_value(chunk: Chunk, position: int) -> Tensor:
    """The values of a parameter whose model is gone, in memory of its own.

    Raises
    ------
    RuntimeError
        If they were on disk.
    """
    chunk.settle()
    slot, view, home = chunk.layout.slots[position], chunk.views[position], chunk.source.tensor
    if chunk.state is ChunkState.READY:
        return view.clone(memory_format=torch.preserve_format)
    if home is None:
        raise RuntimeError(
            f"{slot.name} was on disk in the chunks of a boosted model that is gone, and its values with it: keep "
            "the model for as long as its parameters are used, or keep p.detach().clone()"
        )
    shaped = home.as_strided(slot.shape, slot.stride, home.storage_offset() + slot.offset)
    return shaped.to(view.device, view.dtype, copy=True, memory_format=torch.preserve_format)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what the bits of an element can be compared as. As numbers, NaN differs from itself and -0.0 equals 0.0."""


def differing(view: Tensor, home: Tensor) -> Tensor:
    """Where a full copy has other bits than its home gives it (a mask in their shape)."""
    as_bits = _BITS[view.element_size()]
    return view.detach().view(as_bits) != home.to(view.dtype).view(as_bits)


def _write(
    chunk: Chunk, buffer: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], value: Tensor
) -> None:
    home = chunk.homes[buffer]
    with torch.no_grad():
        if home.tensor is not None:
            home.tensor.as_strided(shape, stride, home.tensor.storage_offset() + offset).copy_(value)
            return
        home.write(offset, _flat(value, shape, stride, home.dtype))


def _flat(value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``value`` (of this shape, or one for all) on CPU, as it lies in memory with these dense strides."""
    value = value.detach().to("cpu", dtype)
    if (value.shape, value.stride()) != (shape, stride):
        value = torch.empty(prod(shape), dtype=dtype, device="cpu").as_strided(shape, stride).copy_(value)
    return value.as_strided((prod(shape),), (1,))
