"""What the parameters of a chunk have in common: what that asks of memory, and the plan of the chunk once placed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..chunk import STATE_ROLES, ChunkLayout, ChunkPlan, MemoryMap, Role, StateSlot
from ..config import GeminiConfig
from ..planning.placement import ChunkNeed, Placement


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters of different groups do not share a chunk."""

    param_group: int
    """Index of the optimizer's group; -1 if it is frozen or in none."""
    keeps_fp32: bool
    """Computes in fp32 whatever the precision: its module has running statistics, which keep their dtype, and takes
    low-precision inputs beside fp32 weights."""
    states: tuple[StateSlot, ...]
    """What the optimizer keeps for each element; the same for all of one optimizer's group."""
    compute_dtype: torch.dtype
    """Of the full copy and the gradient."""
    splits_master: bool
    """Its masters are in two halves where units can use the upper one. See [Note: Split master]."""

    @classmethod
    def of(cls, config: GeminiConfig, index: int, keeps_fp32: bool, states: tuple[StateSlot, ...] = ()) -> "Group":
        """The group of parameters in the optimizer's group ``index`` (-1: in none)."""
        dtype = torch.float32 if keeps_fp32 else config.compute_dtype
        has_room = dtype is torch.bfloat16 and any(slot.has_spare_sign for slot in states)
        return cls(index, keeps_fp32, states, dtype, config.split_master and has_room)

    @property
    def is_trainable(self) -> bool:
        return self.param_group >= 0

    def need(self, numel: int, borrow: bool) -> ChunkNeed:
        """What a chunk of ``numel`` elements asks for; with ``borrow`` its gradient has no home."""
        low, full = numel * self.compute_dtype.itemsize, numel * 4
        if not self.is_trainable:
            return ChunkNeed(roles={Role.MASTER: low}, full_nbytes=low, full_can_be_home=True)
        states = zip(STATE_ROLES, self.states, strict=False)
        roles = {Role.MASTER: full, **{role: slot.numel(numel) * slot.dtype.itemsize for role, slot in states}}
        return ChunkNeed(
            roles=roles if borrow else {**roles, Role.GRADIENT: low},
            full_nbytes=low,
            shadow_nbytes=low if low < full else 0,
            borrows_gradient=borrow,
            full_can_be_home=low == full or self.splits_master,
        )


def plans(
    layouts: Sequence[ChunkLayout], groups: Sequence[Group], placement: Placement, memory: MemoryMap
) -> tuple[ChunkPlan, ...]:
    """The plans of chunks that have been placed, each with its group."""
    found = []
    for layout, group, homes, is_full in zip(layouts, groups, placement.homes, placement.full_is_home, strict=True):
        master = homes[Role.MASTER]
        halves = {Role.MASTER: master, Role.MASTER_LOW: master}  # they take the bytes of the whole, at the same place
        found.append(
            ChunkPlan(
                layout,
                {**halves, **homes} if group.splits_master and is_full else homes,
                group.compute_dtype,
                group.states,
                param_group=group.param_group,
                borrows_gradient=group.is_trainable and Role.GRADIENT not in homes,
                full_is_home=is_full,
                update_reaches_full=memory.update_reaches_full(master),
            )
        )
    return tuple(found)
