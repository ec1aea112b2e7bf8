"""What homes a chunk wants, by what its parameters have in common, and what that makes of its full copy. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..chunk import (
    GRADIENT,
    MASTER,
    MASTER_LOW,
    SHADOW,
    BufferSpec,
    ChunkLayout,
    ChunkPlan,
    MasterCodec,
    Plain,
    SplitBf16,
    Tier,
    WithShadow,
)
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
    states: tuple[BufferSpec, ...] = ()
    """What the optimizer keeps for each element; the same for all of one optimizer's group."""

    def dtype(self, config: GeminiConfig) -> torch.dtype:
        """Of the full copy and the gradient."""
        return torch.float32 if self.keeps_fp32 else config.compute_dtype

    def splits(self, config: GeminiConfig) -> bool:
        """Whether its masters are in two halves where units can use the upper one. See [Note: Split master]."""
        has_room = any(slot.has_spare_sign for slot in self.states)
        return config.split_master and has_room and self.dtype(config) is torch.bfloat16


def chunk_need(layout: ChunkLayout, config: GeminiConfig, borrow: bool) -> ChunkNeed:
    """What a chunk asks for; ``borrow``: its gradient has no home.

    The largest extent counts, so that all owners decide alike. Each collects gradients of whole chunks before they are
    summed, in borrowed memory.
    """
    owner, itemsize = config.communicator.owner, layout.group.dtype(config).itemsize
    numel = len(owner.extents(layout.numel)[0])
    full, low = layout.numel * itemsize, numel * itemsize
    if not layout.group.trainable:
        return ChunkNeed(buffers={MASTER: low}, full_nbytes=full)
    buffers = {MASTER: numel * 4, **{spec.name: spec.nbytes(numel) for spec in layout.group.states}}
    if not borrow:
        buffers[GRADIENT] = low
    shadow = low if itemsize < 4 else 0
    borrows = borrow or owner.count > 1
    return ChunkNeed(buffers=buffers, full_nbytes=full, shadow_nbytes=shadow, borrows_gradient=borrows)


def full_is_home(layout: ChunkLayout, homes: Mapping[str, Tier], config: GeminiConfig, unified: bool) -> bool:
    """True if a chunk with these homes needs no full copy beside them."""
    tier = homes[MASTER]
    in_reach = config.communicator.owner.count == 1 and (tier is Tier.DEVICE or (tier is Tier.HOST and unified))
    group = layout.group
    return in_reach and (group.dtype(config) is torch.float32 or not group.trainable or group.splits(config))


def planned(layout: ChunkLayout, homes: Mapping[str, Tier], config: GeminiConfig, unified: bool) -> ChunkPlan:
    """What to build for a chunk whose buffers have been placed."""
    group = layout.group
    dtype, is_home = group.dtype(config), full_is_home(layout, homes, config, unified)
    codec: MasterCodec
    if is_home and group.splits(config):  # its halves take the bytes of the whole, at the same place
        codec = SplitBf16(next(spec.name for spec in group.states if spec.has_spare_sign))
        homes = {MASTER: homes[MASTER], MASTER_LOW: homes[MASTER], **homes}
    elif SHADOW in homes:
        codec = WithShadow(BufferSpec(MASTER), dtype)
    else:
        codec = Plain(BufferSpec(MASTER, torch.float32 if group.trainable else dtype))
    return ChunkPlan(
        layout,
        codec,
        group.states,
        homes,
        dtype,
        full_is_home=is_home,
        borrows_gradient=group.trainable and GRADIENT not in homes,
        owner=config.communicator.owner,
    )
