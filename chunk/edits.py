"""What users change in parameters, on its way home.

Forward and backward change no parameter, so home and full copy differ where somebody else has written: in place through
the parameter (its version counter tells), in memory that was lent ([Note: Loans]), or by assigning to ``p.data``.
"""

import torch
from torch import Tensor

from .bits import differing
from .chunk import Chunk
from .loan import Loan
from .names import MASTER
from .rounding import shown
from .values import read_own, write_part, write_slot


def bring_edits_home(chunk: Chunk) -> None:
    """Write home what was changed in place in a full copy, of a chunk that no update is changing.

    Only elements that differ, bit by bit. The others keep the bits that the compute dtype has no room for.

    Raises
    ------
    ValueError
        If masters are in two halves and a module has changed one in its forward: which elements differ cannot be told.
    """
    if chunk.is_split:
        if chunk.loan is not None:
            _bring_upper_halves_home(chunk, chunk.loan)
        if edited := chunk.bindings.edited():
            raise ValueError(
                f"{chunk.layout.slots[edited[0]].name} was changed in place, which with split_master=True changes only "
                "the upper half of its masters: assign to p.data instead (p.data = p.data.clone() takes what it shows "
                "now), or boost without split_master"
            )
    if chunk.full_is_home:
        edited = chunk.bindings.edited()
        chunk.homes.note_edits(edited)
        for position in edited:
            chunk.accept(position)
    if chunk.full_is_home or not chunk.is_valid:
        return
    positions = set(chunk.bindings.edited())
    if chunk.loan is not None:
        positions.update(chunk.loan.positions)
        chunk.end_loan()  # before looking: what is written from now on is seen the next time
    for position in sorted(positions):
        own = chunk.place(position, MASTER).own
        view = _flat(chunk.views[position])[own.start : own.stop]
        home = read_own(chunk, position).to(view.device)
        _write_differing(chunk, position, view, home, differing(view, home))


def is_ahead(chunk: Chunk) -> bool:
    """True if the full copy has what users have changed, and home has not: all owners bring that home together."""
    if not chunk.is_shared or not chunk.is_valid:
        return False
    return chunk.bindings.is_edited or (chunk.loan is not None and chunk.loan.has_changed())


def has_to_stay(chunk: Chunk) -> bool:
    """True if somebody holds memory of the full copy, or it has values that are nowhere else."""
    return chunk.is_lent or is_ahead(chunk)


def with_edits(chunk: Chunk, position: int, masters: Tensor) -> Tensor:
    """What the masters of a parameter are to be, where its full copy is ahead of them."""
    view = chunk.views[position].detach().cpu()
    return torch.where(differing(view, masters), view.to(masters.dtype), masters)


def own_with_edits(chunk: Chunk, position: int, masters: Tensor) -> Tensor:
    """The same for the part that is at home here (flat)."""
    own = chunk.place(position, MASTER).own
    view = _flat(chunk.views[position])[own.start : own.stop].cpu()
    return torch.where(differing(view, masters), view.to(masters.dtype), masters)


def _bring_upper_halves_home(chunk: Chunk, loan: Loan) -> None:
    chunk.end_loan()
    for position in loan.positions:
        view = _flat(chunk.views[position])
        differs = differing(view, _flat(loan.before(position)))
        home = read_own(chunk, position).to(differs.device) if differs.any() else differs
        _write_differing(chunk, position, view, home, differs)
        loan.remember(position)


def _write_differing(chunk: Chunk, position: int, view: Tensor, home: Tensor, differs: Tensor) -> None:
    """Write what differs of the part of a parameter that is at home here; all are flat."""
    if differs.any():
        index = chunk.place(position, MASTER).index
        write_part(chunk, MASTER, index, torch.where(differs, view.to(home.dtype), home).cpu())
    chunk.accept(position)


def _flat(view: Tensor) -> Tensor:
    """Dense memory as it lies."""
    return view.detach().as_strided((view.numel(),), (1,))


def check_assigned(chunk: Chunk, position: int, value: Tensor) -> None:
    """See whether a tensor can be the ``data`` of a parameter.

    Raises
    ------
    ValueError
        If it has another shape, dtype or device.
    """
    view = chunk.views[position]
    if value.dtype not in (view.dtype, chunk.plan.codec.dtype) or value.device != view.device:
        raise ValueError(
            f"a tensor of {value.dtype} on {value.device} was assigned to the data of "
            f"{chunk.layout.slots[position].name}, which is of {view.dtype} on {view.device} and keeps both after "
            "booster.boost: copy with p.data.copy_(value), or convert the model before booster.boost"
        )
    check_shape(chunk, position, value)


def check_shape(chunk: Chunk, position: int, value: Tensor) -> None:
    """Raise ValueError if a value has another shape than the parameter that it is for."""
    slot = chunk.layout.slots[position]
    if value.shape != slot.shape:
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} was assigned to the data of {slot.name}, whose shape is "
            f"{tuple(slot.shape)}: a parameter keeps its place in its chunk, and with it its shape. Resize it before "
            "booster.boost, or copy values of its own shape with p.data.copy_(value)"
        )


def put(chunk: Chunk, position: int, value: Tensor) -> None:
    """Have home and, where there is one, the full copy hold a value. No update and no move is under way."""
    write_slot(chunk, position, MASTER, value)
    if chunk.is_resident and not chunk.full_is_home:
        with torch.no_grad():
            chunk.views[position].copy_(shown(chunk, position, value))
    chunk.accept(position)
