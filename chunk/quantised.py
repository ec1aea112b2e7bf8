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
    """Frozen masters that are decoded by each fetch.

    What is written is rounded to the compute dtype, as for all frozen parameters, and then to codes. The largest
    magnitude of a block is then a number of that dtype, so that values which were read give the same codes when they
    are written. Two kinds of blocks keep a scale that is no such number (it was written in another format, or with
    other precision): those whose values are just what there is, and those in float32 which are values of codes.
    """

    form: BlockFormat
    dtype: torch.dtype
    """Of the values: the compute dtype."""
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
        codes, absmax = encode(values.to(self.dtype), self.form)
        if values.dtype is self.dtype:
            kept, had = (stored[MASTER], stored[ABSMAX]) if stored else (codes, absmax)
        else:
            kept, had = encode(values, self.form)
        if had is not absmax and not torch.equal(had, absmax):
            shown = decode(kept, had, self.form, values.dtype)[: values.numel()]
            is_kept = _of_blocks(_bits(shown) == _bits(values))
            absmax = torch.where(is_kept, had, absmax)
            codes = torch.where(self._of_bytes(is_kept)[: codes.numel()], kept, codes)
        return {MASTER: codes, ABSMAX: absmax}

    def _of_bytes(self, blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(BLOCK_NUMEL // self.form.codes_per_byte)


def _of_blocks(is_same: Tensor) -> Tensor:
    """Whether all elements of a block are."""
    padded = torch.nn.functional.pad(is_same, (0, -is_same.numel() % BLOCK_NUMEL), value=True)
    return padded.view(-1, BLOCK_NUMEL).all(1)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype is torch.float32 else torch.int16)
