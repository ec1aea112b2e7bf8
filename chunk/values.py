"""What the homes of a chunk have for one parameter, wherever they are."""

from math import prod

import torch
from torch import Tensor

from .chunk import Chunk
from .communicator import Communicator, Span
from .names import MASTER
from .state import ChunkState
from .stored import Stored
from .tier import Tier

_PIECE_NUMEL = 1 << 18
"""Values that take computing are read and written in pieces: that takes room for a dozen bytes an element."""


def read_slot(chunk: Chunk, position: int, name: str, communicator: Communicator) -> Tensor:
    """A copy, on CPU, of the masters (``"master"``) or of one state of the parameter at this position."""
    place, flat = chunk.place(position, name), read_own(chunk, position, name)
    if len(place.own) < place.numel:
        own, flat = flat, flat.new_empty(place.numel)
        flat[place.own.start : place.own.stop] = own
        communicator.gather(Span(chunk.index, name, place.start), flat, place.parts).wait()
    return flat.as_strided(place.shape, place.stride)


def write_slot(chunk: Chunk, position: int, name: str, value: Tensor) -> None:
    """Put ``value`` (any dtype, the shape of `read_slot`, or one for all) where the masters or a state live.

    Where several owners keep extents of the chunk, each writes the part that is at home with it.
    """
    codec, place = chunk.codecs[name], chunk.place(position, name)
    if not codec.computes and len(place.own) == place.numel:
        announce_change(chunk, position)
        for buffer, stored in codec.encode(value.detach(), {}).items():
            home = chunk.homes[buffer]
            with torch.no_grad():
                if home.tensor is not None:
                    offset = home.tensor.storage_offset() + place.index
                    home.tensor.as_strided(place.shape, place.stride, offset).copy_(stored)
                else:
                    home.write(place.index, flattened(stored, place.shape, place.stride, home.dtype))
        return
    dtype = value.dtype if codec.computes else codec.dtype  # then it is cast piece by piece, and rounded once
    flat = flattened(value, place.shape, place.stride, dtype)
    write_part(chunk, name, place.index, flat[place.own.start : place.own.stop])


def announce_change(chunk: Chunk, position: int) -> None:
    """Somebody may change the values of a parameter where they are at home. See `Homes`."""
    slot = chunk.layout.slots[position]
    chunk.homes.before_change(slot.offset, slot.stop)


def read_own(chunk: Chunk, position: int, name: str = MASTER) -> Tensor:
    """A copy, on CPU, of what is at home here of the values of a parameter (flat)."""
    place = chunk.place(position, name)
    return read_part(chunk, name, place.index, len(place.own))


def read_part(chunk: Chunk, name: str, index: int, numel: int) -> Tensor:
    """A copy, on CPU, of values at home here (flat), from an index in their buffers on."""
    codec = chunk.codecs[name]
    if not numel:
        return torch.empty(0, dtype=codec.dtype, device="cpu")
    if not codec.computes:
        return codec.decode(Stored(chunk.homes, chunk.specs, codec, index, numel))
    flat = torch.empty(numel, dtype=codec.dtype, device="cpu")
    for part in flat.split(_PIECE_NUMEL):
        stored = Stored(chunk.homes, chunk.specs, codec, index + part.storage_offset(), part.numel())
        part.copy_(codec.decode(stored)[: part.numel()])
    return flat


def write_part(chunk: Chunk, name: str, index: int, values: Tensor) -> None:
    """Replace values at home here, from an index in their buffers on. They are as `Codec.encode` has them, on CPU."""
    codec, block_numel = chunk.codecs[name], chunk.specs[name].block_numel
    first = chunk.extent.start + index * block_numel
    chunk.homes.before_change(first, first + values.numel() * block_numel)
    for part in values.split(_PIECE_NUMEL) if values.numel() else ():
        there = Stored(chunk.homes, chunk.specs, codec, index, part.numel())
        for buffer, stored in codec.encode(part, there).items():
            chunk.homes[buffer].write(there.part(buffer).start, stored)
        index += part.numel()


def last_value(chunk: Chunk, position: int) -> Tensor:
    """The values of a parameter whose model is gone, in memory of its own.

    Raises
    ------
    RuntimeError
        If they were on disk.
    """
    chunk.settle()
    slot, view = chunk.layout.slots[position], chunk.views[position]
    if chunk.state is ChunkState.READY:
        return view.clone(memory_format=torch.preserve_format)
    if not chunk.is_whole:
        raise RuntimeError(
            f"{slot.name} was in the chunks of a boosted model that is gone, and other processes had parts of it: keep "
            "the model for as long as its parameters are used, or keep p.detach().clone()"
        )
    if any(part.tier is Tier.DISK for spec in chunk.plan.codec.specs for part in chunk.homes[spec.name].parts):
        raise RuntimeError(
            f"{slot.name} was on disk in the chunks of a boosted model that is gone, and its values with it: keep "
            "the model for as long as its parameters are used, or keep p.detach().clone()"
        )
    shaped = read_own(chunk, position).as_strided(slot.shape, slot.stride)
    return shaped.to(view.device, view.dtype, copy=True, memory_format=torch.preserve_format)


def flattened(value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``value`` (of this shape, or one for all) on CPU, as it lies in memory with these dense strides."""
    value = value.detach().to("cpu", dtype)
    if (value.shape, value.stride()) != (shape, stride):
        value = torch.empty(prod(shape), dtype=dtype, device="cpu").as_strided(shape, stride).copy_(value)
    return value.as_strided((prod(shape),), (1,))
