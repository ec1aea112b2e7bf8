"""Frozen masters in four or eight bits (a `MasterCodec`). See [Note: Block formats].

::

    elements    0 1 2 3 ...            63 | 64 ...           a slot begins with a block, and so does an extent
    master      byte 0, byte 1, ...       | byte 32, ...     codes; of int8 one byte for each element
    absmax      number 0                  | number 1 ...
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .block_codes import decode, decode_into, encode
from .block_format import BLOCK_NUMEL, BlockFormat
from .content import BufferSpec, Codec, Pieces, Plain
from .names import ABSMAX, MASTER


@dataclass(frozen=True, slots=True)
class Quantised:
    """Frozen masters that are decoded by each fetch. What is written is rounded to them, whole blocks at a time."""

    form: BlockFormat
    dtype: torch.dtype
    """Of the values: the compute dtype. They are encoded from any dtype, without rounding to this one first."""
    computes: ClassVar[bool] = True
    rounds: ClassVar[bool] = True
    source: ClassVar[None] = None
    block_numel: ClassVar[int] = 1

    @property
    def specs(self) -> tuple[BufferSpec, ...]:
        return (
            BufferSpec(MASTER, torch.uint8, self.form.codes_per_byte),
            BufferSpec(ABSMAX, torch.float32, BLOCK_NUMEL),
        )

    def of_state(self, spec: BufferSpec) -> Codec:
        return Plain(spec)

    def decode(self, stored: Pieces) -> Tensor:
        return decode(stored[MASTER], stored[ABSMAX], self.form, self.dtype)

    def decode_into(self, out: Tensor, stored: Pieces) -> None:
        decode_into(out, stored[MASTER], stored[ABSMAX], self.form)

    def encode(self, values: Tensor, stored: Pieces) -> Pieces:
        codes, absmax = encode(values, self.form)
        return {MASTER: codes, ABSMAX: absmax}
