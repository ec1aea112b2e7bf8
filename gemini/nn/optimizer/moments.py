"""How Adam's two moments are kept: the words of ``HybridAdam(states=...)``, and the way to float32 and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .reduced import BLOCK_NUMEL, pack_exp_avg, pack_exp_avg_sq, unpack_exp_avg, unpack_exp_avg_sq
from .rule import StateSlot

MOMENTS = ("exp_avg", "exp_avg_sq")

_SLOTS = {
    "fp32": tuple(StateSlot(name) for name in MOMENTS),
    "bf16": tuple(StateSlot(name, torch.bfloat16) for name in MOMENTS),
    "8bit": (
        *(StateSlot(name, torch.uint8) for name in MOMENTS),
        *(StateSlot(f"{name}_scale", torch.float32, BLOCK_NUMEL) for name in MOMENTS),
    ),
}


def slots(states: str) -> tuple[StateSlot, ...]:
    """What is kept, in the order in which kernels take it.

    Raises
    ------
    ValueError
        If there is no such way.
    """
    if states not in _SLOTS:
        raise ValueError(f"states must be one of {', '.join(map(repr, _SLOTS))}, got {states!r}")
    return _SLOTS[states]


def unpacked(states: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments in float32, exactly, from flat tensors by the names of the slots."""
    if states == "8bit":
        return {
            "exp_avg": unpack_exp_avg(kept["exp_avg"], kept["exp_avg_scale"]),
            "exp_avg_sq": unpack_exp_avg_sq(kept["exp_avg_sq"], kept["exp_avg_sq_scale"]),
        }
    return {name: kept[name].float() for name in MOMENTS}


def packed(states: str, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `unpacked` undoes: flat tensors by the names of the slots, rounded to nearest where they have to be."""
    if states == "8bit":
        exp_avg, exp_avg_scale = pack_exp_avg(moments["exp_avg"].float())
        exp_avg_sq, exp_avg_sq_scale = pack_exp_avg_sq(moments["exp_avg_sq"].float())
        return {
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "exp_avg_scale": exp_avg_scale,
            "exp_avg_sq_scale": exp_avg_sq_scale,
        }
    return {slot.name: moments[slot.name].to(slot.dtype) for slot in slots(states)}
