"""What the parameters of a chunk have in common: what that asks of memory, and the plan of the chunk once placed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..chunk import (
    GRADIENT,
    MASTER,
    SHADOW,
    BlockFormat,
    BufferSpec,
    ChunkLayout,
    ChunkPlan,
    MasterCodec,
    MemoryMap,
    Plain,
    Quantised,
    SplitBf16,
    WithShadow,
)
from ..chunk.extent import Owner
from ..chunk.layout import ALIGN_NUMEL, align
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
    states: tuple[BufferSpec, ...]
    """What the optimizer keeps for each element; the same for all of one optimizer's group."""
    compute_dtype: torch.dtype
    """Of the full copy and the gradient."""
    splits_master: bool
    """Its masters are in two halves where units can use the upper one. See [Note: Split master]."""
    owner: Owner
    """Who keeps which extent of its chunks."""
    form: BlockFormat | None = None
    """What frozen weights are rounded to; None: they keep the compute dtype."""

    @classmethod
    def of(
        cls,
        config: GeminiConfig,
        index: int,
        own: torch.dtype,
        states: tuple[BufferSpec, ...] = (),
        keeps_fp32: bool = False,
        form: BlockFormat | None = None,
    ) -> "Group":
        """The group of parameters in their ``own`` dtype, in the optimizer's group ``index`` (-1: in none)."""
        dtype = torch.float32 if keeps_fp32 else config.dtype_of(own)
        has_room = dtype is torch.bfloat16 and any(spec.has_spare_sign for spec in states)
        return cls(index, keeps_fp32, states, dtype, config.split_master and has_room, config.communicator.owner, form)

    @classmethod
    def of_plan(cls, plan: ChunkPlan, split_master: bool) -> "Group":
        """The group of the parameters in a chunk that is there; ``split_master`` as the user has said."""
        form = plan.codec.form if isinstance(plan.codec, Quantised) else None
        has_room = plan.compute_dtype is torch.bfloat16 and any(spec.has_spare_sign for spec in plan.states)
        index, keeps_fp32 = plan.param_group if plan.is_trainable else -1, plan.compute_dtype is torch.float32
        return cls(index, keeps_fp32, plan.states, plan.compute_dtype, split_master and has_room, plan.owner, form)

    @property
    def is_trainable(self) -> bool:
        return self.param_group >= 0

    @property
    def align_numel(self) -> int:
        """Parameters begin at multiples of it: so the elements that share a value do not depend on what is around."""
        specs = (*self.codec(is_full=False, has_shadow=False).specs, *self.states)
        return align(ALIGN_NUMEL, max(spec.block_numel for spec in specs))

    def need(self, numel: int, borrow: bool) -> ChunkNeed:
        """What a chunk of ``numel`` elements asks for; with ``borrow`` its gradient has no home.

        The largest extent counts, so that all owners decide alike. Beside its home, each collects the whole gradient of
        a backward in borrowed memory.
        """
        extent, is_alone = len(self.owner.extents(numel)[0]), self.owner.is_alone
        low, full = extent * self.compute_dtype.itemsize, extent * 4
        full_nbytes = numel * self.compute_dtype.itemsize
        if not self.is_trainable:
            codec = self.codec(is_full=False, has_shadow=False)
            return ChunkNeed(
                buffers={spec.name: spec.nbytes(extent) for spec in codec.specs},
                full_nbytes=full_nbytes,
                full_can_be_home=self.owner.count == 1 and codec.source is not None,
            )
        buffers = {MASTER: full, **{spec.name: spec.nbytes(extent) for spec in self.states}}
        return ChunkNeed(
            buffers=buffers if borrow else {**buffers, GRADIENT: low},
            full_nbytes=full_nbytes,
            shadow_nbytes=low if low < full else 0,
            borrows_gradient=borrow or not is_alone,
            full_can_be_home=self.owner.count == 1 and (low == full or self.splits_master),
        )

    def codec(self, is_full: bool, has_shadow: bool) -> MasterCodec:
        """How the masters of a chunk are kept: as the full copy if ``is_full``, and with a shadow or without."""
        if is_full and self.splits_master:
            return SplitBf16(next(spec.name for spec in self.states if spec.has_spare_sign))
        if has_shadow:
            return WithShadow(BufferSpec(MASTER), self.compute_dtype)
        if self.form is not None:
            return Quantised(self.form, self.compute_dtype)
        return Plain(BufferSpec(MASTER, torch.float32 if self.is_trainable else self.compute_dtype))


def plans(
    layouts: Sequence[ChunkLayout],
    groups: Sequence[Group],
    placement: Placement,
    memory: MemoryMap,
    averages: Sequence[tuple[BufferSpec, ...]] = (),
) -> tuple[ChunkPlan, ...]:
    """The plans of chunks that have been placed, each with its group, and with its averages if there are some."""
    found = []
    each = zip(layouts, groups, placement.homes, placement.full_is_home, averages or [()] * len(layouts), strict=True)
    for layout, group, homes, is_full, averaged in each:
        codec = group.codec(is_full, SHADOW in homes)
        found.append(
            ChunkPlan(
                layout,
                codec,
                group.states,
                # The parts of a master take the bytes of the whole, at the same place.
                {**{spec.name: homes[MASTER] for spec in codec.specs}, **homes},
                group.compute_dtype,
                param_group=group.param_group,
                borrows_gradient=group.is_trainable and GRADIENT not in homes,
                full_is_home=is_full,
                update_reaches_full=group.owner.count == 1 and memory.update_reaches_full(homes[MASTER]),
                averages=averaged,
                owner=group.owner,
            )
        )
    return tuple(found)
