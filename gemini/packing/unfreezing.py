"""What frozen chunks become when an optimizer is given their parameters. Changes nothing."""

from collections.abc import Sequence

import torch

from ..chunk import ChunkLayout, ChunkPlan, StateSlot
from ..config import GeminiConfig
from ..planning.placement import AutoPlacementPolicy, Capacity, Unplaced, place
from .group import Group, plans


def unfrozen_plans(
    layouts: Sequence[ChunkLayout],
    dtypes: Sequence[torch.dtype],
    param_group: int,
    slots: tuple[StateSlot, ...],
    config: GeminiConfig,
    capacity: Capacity,
) -> tuple[ChunkPlan, ...] | Unplaced:
    """Plans for the same slots, with masters, gradients and states; or what there is no room for.

    A chunk is unfrozen as a whole: that keeps the place of every parameter, and parameters that stay frozen beside
    those that do not take room for nothing, up to a chunk at either end of what is unfrozen.

    Parameters
    ----------
    dtypes
        Of the full copy of each of the chunks.
    param_group, slots
        Of the optimizer's new group.
    capacity
        What is left.

    Raises
    ------
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
    groups = [Group.of(config, param_group, dtype is torch.float32, slots) for dtype in dtypes]
    pairs = zip(layouts, groups, strict=True)
    needs = [group.need(layout.numel, config.update_in_backward) for layout, group in pairs]
    found = place(needs, capacity, AutoPlacementPolicy())
    return found if isinstance(found, Unplaced) else plans(layouts, groups, found, capacity.memory)
