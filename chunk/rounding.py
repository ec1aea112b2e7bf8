"""Chunks whose codec rounds what is written: users cannot change their parameters one by one.

In plain PyTorch a parameter has afterwards what it was given. Here it would have that until the full copy goes, and
something else when it comes back. So the full copy gets the values of home again, and an error says what to do instead.
Loading replaces values by rounded ones, which is what it is for.
"""

from torch import Tensor

from .bits import differing
from .chunk import Chunk
from .names import MASTER
from .values import flattened, read_own


def changed(chunk: Chunk) -> list[int]:
    """Positions of the parameters whose full copy has been changed."""
    if not chunk.is_valid:
        return []
    if chunk.is_shared:
        lent = chunk.loan.positions if chunk.loan is not None and chunk.loan.has_changed() else []
        return sorted({*chunk.bindings.edited(), *lent})
    positions = {*chunk.bindings.edited(), *(chunk.loan.positions if chunk.loan is not None else ())}
    return [position for position in sorted(positions) if not _is_at_home(chunk, position, chunk.views[position])]


def check_same(chunk: Chunk, position: int, value: Tensor) -> None:
    """See whether a tensor that is assigned to ``data`` has the values that the parameter has.

    Raises
    ------
    ValueError
        If it has not.
    """
    if value.shape != chunk.layout.slots[position].shape or not _is_at_home(chunk, position, value):
        raise refusal(chunk, [position])


def refusal(chunk: Chunk, positions: list[int]) -> ValueError:
    """What is said of a change."""
    names = ", ".join(chunk.layout.slots[position].name for position in positions)
    return ValueError(
        f"{names} would be changed, and its values are kept in fewer bits (quantize=...), which would round what is "
        "written; it is as it was. Train adapters beside it (booster.enable_lora). To merge them, or to change values "
        "in another way, do it after gemini.to_torch(model), or in a model that is boosted without quantize. "
        "booster.load_model and load_state_dict replace values by rounded ones"
    )


def shown(chunk: Chunk, position: int, value: Tensor) -> Tensor:
    """What a full copy is to show of a parameter that is given a value."""
    slot, codec = chunk.layout.slots[position], chunk.plan.codec
    if codec.rounds:
        flat = flattened(value, slot.shape, slot.stride, value.dtype)
        value = codec.decode(codec.encode(flat, {}))[: slot.numel].as_strided(slot.shape, slot.stride)
    return value


def _is_at_home(chunk: Chunk, position: int, value: Tensor) -> bool:
    """True if home has these values, as far as it is here."""
    slot, own = chunk.layout.slots[position], chunk.place(position, MASTER).own
    flat = flattened(value, slot.shape, slot.stride, chunk.full.dtype)[own.start : own.stop]
    return not differing(flat, read_own(chunk, position)).any()
