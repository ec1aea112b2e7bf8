"""What frozen chunks become when an optimizer is given their parameters. Changes nothing."""

from collections.abc import Sequence
from dataclasses import replace

from ..chunk import BufferSpec, ChunkLayout, ChunkPlan
from ..config import GeminiConfig
from ..planning.placement import AutoPlacementPolicy, Room, place
from .homes import Group, chunk_need, planned


def unfrozen_plans(
    layouts: Sequence[ChunkLayout],
    param_group: int,
    slots: tuple[BufferSpec, ...],
    config: GeminiConfig,
    room: Room,
) -> tuple[ChunkPlan, ...]:
    """Plans for the same slots, with masters, gradients and states.

    A chunk is unfrozen as a whole: that keeps the place of every parameter, and parameters that stay frozen beside
    those that do not take room for nothing, up to a chunk at either end of what is unfrozen.

    Parameters
    ----------
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
    layouts = [replace(layout, group=Group(param_group, True, layout.group.keeps_fp32, slots)) for layout in layouts]
    needs = [chunk_need(layout, config, config.update_in_backward) for layout in layouts]
    placement = place(needs, room, AutoPlacementPolicy())
    return tuple(
        planned(layout, homes, config, room.unified) for layout, homes in zip(layouts, placement.homes, strict=True)
    )
