"""From a plan to a chunk with homes, a full copy and a place for its gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .buffer import Buffer
from .chunk import Chunk
from .disk import DiskBackend
from .gradient import GradientBuffer
from .gradient_pool import GradientPool
from .host_arena import padded
from .ledger import Ledger
from .memory import Arrived, DeviceBackend
from .plan import ChunkPlan
from .tier import Role, Tier


def reserve_homes(plans: Sequence[ChunkPlan], ledger: Ledger, device: DeviceBackend) -> None:
    """Tell the device how much RAM the homes will take, where it would rather have that at once."""
    homes = [plan.nbytes(role) for plan in plans for role, tier in plan.homes.items() if tier is Tier.HOST]
    if sum(homes) <= ledger.free(Tier.HOST):  # else a home will say so
        device.reserve(sum(map(padded, homes)))


@dataclass(frozen=True, slots=True)
class ChunkBuilder:
    """Builds chunks with the ledger, the backends (no disk backend if no home is on DISK) and the gradient pool."""

    ledger: Ledger
    device: DeviceBackend
    disk: DiskBackend | None
    gradient_pool: GradientPool

    def build(self, plan: ChunkPlan) -> Chunk:
        """The chunk with homes where its plan says, and whatever else it needs."""
        homes: dict[Role, Buffer] = {
            role: self._home(plan, role, tier) for role, tier in plan.homes.items() if role is not Role.GRADIENT
        }
        master = homes[Role.MASTER]
        if plan.full_is_home:
            assert master.tensor is not None and master.dtype is plan.compute_dtype
            chunk = Chunk(plan.layout, homes, master.tensor, True, plan.update_reaches_full, plan.states)
            chunk.begin_fetch(Arrived())
            chunk.finish_fetch()
        else:
            full = torch.empty(plan.layout.numel, dtype=plan.compute_dtype, device=self.device.device)
            chunk = Chunk(plan.layout, homes, full, False, plan.update_reaches_full, plan.states)
            self.device.shrink(full)
        if Role.GRADIENT in plan.homes:
            buffer = self._home(plan, Role.GRADIENT, plan.homes[Role.GRADIENT])
            if buffer.tensor is not None:
                # Its pages come now: if there are none it is told before training, and what the resident set grows by
                # later is full copies and non-model data.
                buffer.tensor.zero_()
            chunk.gradient = GradientBuffer(plan.layout, buffer, self.device)
        elif plan.borrows_gradient:
            tier = Tier.DEVICE if master.tier is Tier.DEVICE else Tier.HOST
            borrow = partial(self.gradient_pool.borrow, plan.layout, tier, plan.compute_dtype)
            chunk.gradient = GradientBuffer(plan.layout, None, self.device, borrow)
        return chunk

    def _home(self, plan: ChunkPlan, role: Role, tier: Tier) -> Buffer:
        numel, dtype = plan.numel(role), plan.dtype(role)
        what = f"{plan.name(role)} of chunk {plan.layout.index} (with {plan.layout.slots[0].name})"
        if tier is Tier.DISK:
            assert self.disk is not None
            return self.disk.allocate(numel, dtype, what)
        self.ledger.take(tier, numel * dtype.itemsize, what)
        return self.device.home(tier, numel, dtype)
