"""What a chunk holds, declared: which buffers, and how their elements become values and come from them.

::

    values     master              exp_avg    exp_avg_sq
                 |  codec             |           |
    buffers    master, master_low  exp_avg    exp_avg_sq (whose signs are the marks of split masters)

A codec stands for one kind of values: the masters, or one state of the optimizer. It works on flat pieces of buffers,
so a chunk's values can be read and written in parts wherever they lie. Another form of parameters is one more codec, as
that of quantised ones is (`Quantised`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .names import MASTER, MASTER_LOW, SHADOW
from .split_master import halves, joined, marked, unmarked

Pieces = Mapping[str, Tensor]
"""What buffers have for the same elements, by the names of the buffers."""


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """One buffer of a chunk: a value for each element, or for each block of elements."""

    name: str
    """For a state of the optimizer its own word, such as ``exp_avg``: in its state dict, checkpoints and messages."""
    dtype: torch.dtype = torch.float32
    """Of the buffer, hence also its bytes per element; at most 4."""
    block_numel: int = 1
    """Elements of the parameter that share one value. A parameter begins with a block, and may end within one."""

    has_spare_sign: bool = False
    """float32, never negative, and its optimizer knows that the signs may say something else ([Note: Split master])."""

    def numel(self, numel: int) -> int:
        """Values that are kept for this number of elements."""
        return -(-numel // self.block_numel)

    def nbytes(self, numel: int) -> int:
        """Bytes that are kept for this number of elements."""
        return self.numel(numel) * self.dtype.itemsize

    def part(self, start: int, stop: int) -> slice:
        """The values of elements ``[start, stop)``, which begin with a block."""
        return slice(start // self.block_numel, self.numel(stop))

    def zeros(self, numel: int, device: torch.device) -> Tensor:
        """What is kept for this number of elements before the first step (flat)."""
        return torch.zeros(self.numel(numel), dtype=self.dtype, device=device)


class Codec(Protocol):
    """How one kind of values lies in buffers."""

    computes: ClassVar[bool]
    """The values are not just what one buffer has, and what is written depends on what was there."""

    @property
    def specs(self) -> tuple[BufferSpec, ...]:
        """The buffers that are there for these values alone."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""

    @property
    def block_numel(self) -> int:
        """Elements of the parameter that share one of the values: 1 for masters, whatever they are kept in."""

    def decode(self, stored: Pieces) -> Tensor:
        """The values of what the buffers have. It may be what a buffer has itself, and is not to be changed.

        A buffer may hold more than was asked of it (where elements share what it has), so that there are more values.
        """

    def encode(self, values: Tensor, stored: Pieces) -> Pieces:
        """What is to be written for ``values``, by buffer.

        Parameters
        ----------
        values
            Flat. Of any dtype where the codec computes.
        stored
            What the buffers have so far; not looked at if the codec does not compute.
        """


class MasterCodec(Codec, Protocol):
    """The codec of a chunk's masters."""

    rounds: ClassVar[bool]
    """Values do not come back as they were written."""

    @property
    def source(self) -> str | None:
        """The buffer that, rounded to the compute dtype, is the full copy; None: a fetch decodes the values."""

    def of_state(self, spec: BufferSpec) -> Codec:
        """How a state of the optimizer lies in its buffer beside such masters."""

    def decode_into(self, out: Tensor, stored: Pieces) -> None:
        """As `decode`, into memory (flat, dense) that is where the pieces are."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Values that are kept as they are (a `Codec`; as one of masters, a `MasterCodec`)."""

    spec: BufferSpec
    computes: ClassVar[bool] = False
    rounds: ClassVar[bool] = False

    @property
    def specs(self) -> tuple[BufferSpec, ...]:
        return (self.spec,)

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def block_numel(self) -> int:
        return self.spec.block_numel

    @property
    def source(self) -> str:
        return self.spec.name

    def of_state(self, spec: BufferSpec) -> Codec:
        return Plain(spec)

    def decode(self, stored: Pieces) -> Tensor:
        return stored[self.spec.name]

    def decode_into(self, out: Tensor, stored: Pieces) -> None:
        out.copy_(self.decode(stored)[: out.numel()])

    def encode(self, values: Tensor, stored: Pieces) -> Pieces:
        return {self.spec.name: values}


@dataclass(frozen=True, slots=True)
class WithShadow(Plain):
    """Masters in float32, and beside them what fetches read (a `MasterCodec`)."""

    low: torch.dtype
    """Of the shadow: the compute dtype."""

    @property
    def specs(self) -> tuple[BufferSpec, ...]:
        return (self.spec, BufferSpec(SHADOW, self.low))

    @property
    def source(self) -> str:
        return SHADOW

    def encode(self, values: Tensor, stored: Pieces) -> Pieces:
        return {self.spec.name: values, SHADOW: values.to(self.dtype).to(self.low)}


@dataclass(frozen=True, slots=True)
class Marked(Plain):
    """A state that is never negative, whose signs belong to split masters (a `Codec`)."""

    computes: ClassVar[bool] = True

    def decode(self, stored: Pieces) -> Tensor:
        return unmarked(stored[self.spec.name])

    def encode(self, values: Tensor, stored: Pieces) -> Pieces:
        return {self.spec.name: marked(values.float(), stored[self.spec.name].signbit())}


@dataclass(frozen=True, slots=True)
class SplitBf16:
    """Masters in two halves, the upper one in bfloat16 (a `MasterCodec`). See [Note: Split master]."""

    marks: str
    """The state whose signs belong to the masters."""
    computes: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float32
    block_numel: ClassVar[int] = 1
    source: ClassVar[str] = MASTER
    specs: ClassVar[tuple[BufferSpec, ...]] = (BufferSpec(MASTER, torch.bfloat16), BufferSpec(MASTER_LOW, torch.int16))

    def of_state(self, spec: BufferSpec) -> Codec:
        return Marked(spec) if spec.name == self.marks else Plain(spec)

    def decode(self, stored: Pieces) -> Tensor:
        return joined(stored[MASTER], stored[MASTER_LOW], stored[self.marks])

    def decode_into(self, out: Tensor, stored: Pieces) -> None:
        out.copy_(self.decode(stored))

    def encode(self, values: Tensor, stored: Pieces) -> Pieces:
        high, low, marks = halves(values.float())
        written = {MASTER: high, MASTER_LOW: low}
        if not torch.equal(marks, stored[self.marks].signbit()):
            written[self.marks] = marked(stored[self.marks], marks)
        return written
