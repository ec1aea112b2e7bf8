"""What frozen chunks become when an optimizer is given their parameters. Changes nothing."""

from collections.abc import Sequence

import torch

from ..chunk import ChunkLayout, ChunkPlan, Role, StateSlot
from ..config import GeminiConfig
from ..planning.placement import AutoPlacementPolicy, Room, place
from .homes import Group, chunk_need, full_is_home, with_halves


def unfrozen_plans(
    layouts: Sequence[ChunkLayout],
    dtypes: Sequence[torch.dtype],
    param_group: int,
    slots: tuple[StateSlot, ...],
    config: GeminiConfig,
    room: Room,
) -> tuple[ChunkPlan, ...]:
    """Plans for the same slots, with masters, gradients and states.

    A chunk is unfrozen as a whole: that keeps the place of every parameter, and parameters that stay frozen beside
    those that do not take room for nothing, up to a chunk at either end of what is unfrozen.

    Parameters
    ----------
    dtypes
        Of the full copy of each of the chunks.
    param_group, slots
        Of the optimizer's new group.
    room
        What is left.

    Raises
    ------
    DoesNotFit
        If it is too small.
    ValueError
        If states that a block of elements shares would not begin with a parameter.
    """
    multiple = max((slot.block_numel for slot in slots), default=1)
    for layout in layouts:
        for slot in layout.slots:
            if slot.offset % multiple:
                raise ValueError(
                    f"{slot.name} was packed without room for blocks of {multiple} elements, which these states need"
                )
    groups = [Group(param_group, True, dtype is torch.float32, slots) for dtype in dtypes]
    needs = [
        chunk_need(layout, group, dtype, config.update_in_backward)
        for layout, group, dtype in zip(layouts, groups, dtypes, strict=True)
    ]
    placement = place(needs, room, AutoPlacementPolicy())
    return tuple(
        ChunkPlan(
            layout,
            with_halves(group, homes, config, room.memory),
            dtype,
            slots,
            param_group=param_group,
            borrows_gradient=Role.GRADIENT not in homes,
            full_is_home=full_is_home(group, homes, config, room.memory),
            update_reaches_full=room.memory.update_reaches_full(homes[Role.MASTER]),
        )
        for layout, group, dtype, homes in zip(layouts, groups, dtypes, placement.homes, strict=True)
    )
