"""How Adam's two moments are kept: the words of ``HybridAdam(states=...)``, and the way to float32 and back."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..kernels.forms import FORMS, MOMENTS, SPLIT
from ..kernels.reduced import pack_exp_avg, pack_exp_avg_sq, unpack_exp_avg, unpack_exp_avg_sq
from .rule import BufferSpec

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


def kept_names(states: str, moment: str) -> tuple[str, ...]:
    """The slots that a moment is kept in."""
    return (moment, f"{moment}_scale") if states == "8bit" else (moment,)


def unpack(states: str, moment: str, kept: Sequence[Tensor]) -> Tensor:
    """A moment in float32, exactly, from what its slots have (flat)."""
    if states == "8bit":
        return (unpack_exp_avg if moment == "exp_avg" else unpack_exp_avg_sq)(*kept)
    return kept[0].float()


def pack(states: str, moment: str, value: Tensor) -> tuple[Tensor, ...]:
    """What `unpack` undoes: what its slots have for a moment (flat), rounded to nearest where it has to be."""
    if states == "8bit":
        return (pack_exp_avg if moment == "exp_avg" else pack_exp_avg_sq)(value.float())
    return (value.to(slots(states)[0].dtype),)


def unpacked(states: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All moments from flat tensors by the names of the slots."""
    return {name: unpack(states, name, [kept[of] for of in kept_names(states, name)]) for name in MOMENTS}


def packed(states: str, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `unpacked` undoes."""
    return {
        of: tensor
        for name in MOMENTS
        for of, tensor in zip(kept_names(states, name), pack(states, name, moments[name]), strict=True)
    }
