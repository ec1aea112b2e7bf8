"""What homes a chunk wants, by what its parameters have in common, and what that makes of its full copy. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..chunk import STATE_ROLES, ChunkLayout, MemoryMap, Role, StateSlot, Tier
from ..config import GeminiConfig
from ..planning.placement import ChunkNeed


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters of different groups do not share a chunk."""

    param_group: int
    """Index of the optimizer's group; -1 without one."""
    trainable: bool
    """Has a gradient, and what the optimizer keeps."""
    keeps_fp32: bool = False
    """Computes in fp32 whatever the precision: its module has running statistics, which keep their dtype, and takes
    low-precision inputs beside fp32 weights."""
    states: tuple[StateSlot, ...] = ()
    """What the optimizer keeps for each element; the same for all of one optimizer's group."""

    def dtype(self, config: GeminiConfig) -> torch.dtype:
        """Of the full copy and the gradient."""
        return torch.float32 if self.keeps_fp32 else config.compute_dtype

    def splits(self, config: GeminiConfig) -> bool:
        """Whether its masters are in two halves where units can use the upper one. See [Note: Split master]."""
        has_room = any(slot.has_spare_sign for slot in self.states)
        return config.split_master and has_room and self.dtype(config) is torch.bfloat16


def chunk_need(layout: ChunkLayout, group: Group, compute_dtype: torch.dtype, borrow: bool) -> ChunkNeed:
    """What a chunk asks for; ``borrow``: its gradient has no home."""
    low = layout.numel * compute_dtype.itemsize
    if not group.trainable:
        return ChunkNeed(roles={Role.MASTER: low}, full_nbytes=low)
    full = layout.numel * 4
    states = zip(STATE_ROLES, group.states, strict=False)
    roles = {
        Role.MASTER: full,
        **{role: slot.numel(layout.numel) * slot.dtype.itemsize for role, slot in states},
    }
    if not borrow:
        roles[Role.GRADIENT] = low
    return ChunkNeed(roles=roles, full_nbytes=low, shadow_nbytes=low if low < full else 0, borrows_gradient=borrow)


def full_is_home(group: Group, homes: Mapping[Role, Tier], config: GeminiConfig, memory: MemoryMap) -> bool:
    """True if a chunk with these homes needs no full copy beside them."""
    return memory.computes_on(homes[Role.MASTER]) and (
        group.dtype(config) is torch.float32 or not group.trainable or group.splits(config)
    )


def with_halves(
    group: Group, homes: Mapping[Role, Tier], config: GeminiConfig, memory: MemoryMap
) -> Mapping[Role, Tier]:
    """A master in two halves takes the bytes of a whole one, at the same place."""
    if group.splits(config) and full_is_home(group, homes, config, memory):
        return {Role.MASTER: homes[Role.MASTER], Role.MASTER_LOW: homes[Role.MASTER], **homes}
    return homes
