"""How Adam's two moments are kept: the words of ``HybridAdam(states=...)``, and the way to float32 and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gemini.chunk import BufferSpec, Codec, Plain

from ..kernels.forms import FORMS, SPLIT
from ..kernels.reduced import pack_exp_avg, pack_exp_avg_sq, unpack_exp_avg, unpack_exp_avg_sq

STATES = tuple(form for form in FORMS if form != SPLIT)


def slots(states: str) -> tuple[BufferSpec, ...]:
    """What is kept, in the order in which kernels take it.

    Raises
    ------
    ValueError
        If there is no such way.
    """
    if states not in STATES:
        raise ValueError(f"states must be one of {', '.join(map(repr, STATES))}, got {states!r}")
    return FORMS[states][1:]


@dataclass(frozen=True, slots=True)
class Rounded(Plain):
    """A moment in a floating-point dtype, rounded to nearest (a `Codec`)."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored[self.spec.name].float()

    def encode(self, values: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.spec.name: values.to(self.spec.dtype)}


@dataclass(frozen=True, slots=True)
class EightBit:
    """A moment in 8 bits with a scale for each block, rounded to nearest (a `Codec`). See [Note: Reduced states]."""

    specs: tuple[BufferSpec, ...]
    """Of the codes and of the scales."""
    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor], Tensor]
    computes: ClassVar[bool] = True
    block_numel: ClassVar[int] = 1
    dtype: ClassVar[torch.dtype] = torch.float32

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        codes, scales = (stored[spec.name] for spec in self.specs)
        return self.unpack(codes, scales)

    def encode(self, values: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {spec.name: part for spec, part in zip(self.specs, self.pack(values.float()), strict=True)}


_EXP_AVG, _EXP_AVG_SQ, _EXP_AVG_SCALE, _EXP_AVG_SQ_SCALE = slots("8bit")

CODECS: dict[str, Mapping[str, Codec]] = {
    **{states: {spec.name: Rounded(spec) for spec in slots(states)} for states in ("fp32", "bf16")},
    "8bit": {
        "exp_avg": EightBit((_EXP_AVG, _EXP_AVG_SCALE), pack_exp_avg, unpack_exp_avg),
        "exp_avg_sq": EightBit((_EXP_AVG_SQ, _EXP_AVG_SQ_SCALE), pack_exp_avg_sq, unpack_exp_avg_sq),
    },
}
"""Each moment in float32 (flat), from what the slots have and back."""


def unpacked(states: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All moments from flat tensors by the names of the slots."""
    return {name: codec.decode(kept) for name, codec in CODECS[states].items()}


def packed(states: str, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The flat tensors of all slots from the moments."""
    kept: dict[str, Tensor] = {}
    for name, codec in CODECS[states].items():
        kept |= codec.encode(moments[name], {})
    return kept
