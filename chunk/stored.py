"""What the homes of a chunk have for some elements, as a codec takes it; and all of it as one buffer of values."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .buffer import Buffer
from .content import BufferSpec, Codec, MasterCodec

_CPU = torch.device("cpu")

Homes = Mapping[str, Buffer]
Specs = Mapping[str, BufferSpec]


class Stored(Mapping[str, Tensor]):
    """Copies of what homes have for values ``[start, start + numel)`` (`Pieces`), on CPU if no device is named.

    Reads what is asked for.
    """

    def __init__(
        self, homes: Homes, specs: Specs, codec: Codec, start: int, numel: int, device: torch.device = _CPU
    ) -> None:
        self._homes = homes
        self._specs = specs
        self._unit = codec.block_numel
        self._start, self._numel, self._device = start, numel, device

    def part(self, name: str) -> slice:
        """Where a buffer has what belongs to the values; blocks of elements that share more than these begin there."""
        block = self._specs[name].block_numel // self._unit
        return slice(self._start // block, -(-(self._start + self._numel) // block))

    def __getitem__(self, name: str) -> Tensor:
        home, part = self._homes[name], self.part(name)
        flat = torch.empty(part.stop - part.start, dtype=home.dtype, device=self._device)
        home.read(part.start, flat)
        return flat

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


class Decoded(Buffer):
    """The masters of a chunk as one buffer that can be read (a `Buffer`), whatever they are kept in."""

    tensor: Tensor | None = None

    def __init__(self, homes: Homes, specs: Specs, codec: MasterCodec) -> None:
        home = homes[codec.specs[0].name]
        self.tier, self.dtype = home.tier, codec.dtype
        self.numel = home.numel * codec.specs[0].block_numel
        self._homes, self._specs, self._codec = homes, specs, codec

    @property
    def nbytes(self) -> int:
        return sum(self._homes[spec.name].nbytes for spec in self._codec.specs)

    @property
    def device(self) -> torch.device:
        """Where it can be decoded: on the device if all of it is there."""
        tensors = [self._homes[spec.name].tensor for spec in self._codec.specs]
        found = {_CPU if tensor is None else tensor.device for tensor in tensors}
        return found.pop() if len(found) == 1 else _CPU

    def read(self, start: int, out: Tensor) -> None:
        """As `Buffer.read`; ``out`` is on CPU or on `device`."""
        stored = Stored(self._homes, self._specs, self._codec, start, out.numel(), out.device)
        self._codec.decode_into(out, stored)

    def write(self, start: int, source: Tensor) -> None:
        raise NotImplementedError
