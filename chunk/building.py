"""From a plan to a chunk with homes, a full copy and a place for its gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .buffer import Buffer
from .chunk import Chunk
from .communicator import Communicator
from .content import BufferSpec
from .disk import DiskBackend
from .gradient import GradientBuffer
from .gradient_pool import GradientPool
from .host_arena import padded
from .ledger import Ledger
from .memory import Arrived, DeviceBackend
from .names import GRADIENT, MASTER
from .plan import ChunkPlan
from .shared_gradient import Gradient, SharedGradient
from .tier import Tier


def reserve_homes(plans: Sequence[ChunkPlan], ledger: Ledger, device: DeviceBackend) -> None:
    """Tell the device how much RAM the homes will take, where it would rather have that at once."""
    homes = [plan.nbytes(name) for plan in plans for name, tier in plan.tiers.items() if tier is Tier.HOST]
    if sum(homes) <= ledger.free(Tier.HOST):  # else a home will say so
        device.reserve(sum(map(padded, homes)))


@dataclass(frozen=True, slots=True)
class ChunkBuilder:
    """Builds chunks on a device backend and, if homes are on DISK, a disk backend, as the ledger has room."""

    ledger: Ledger
    device: DeviceBackend
    disk: DiskBackend | None
    gradient_pool: GradientPool
    communicator: Communicator

    def build(self, plan: ChunkPlan) -> Chunk:
        """The chunk with homes where its plan says, and whatever else it needs."""
        homes = {name: self._home(plan, spec) for name, spec in plan.specs.items() if name != GRADIENT}
        gradient = self._gradient(plan)
        if plan.full_is_home:
            assert plan.codec.source is not None
            home = homes[plan.codec.source].tensor
            assert home is not None
            chunk = Chunk(plan, homes, home, gradient)
            chunk.begin_fetch(Arrived())
            chunk.finish_fetch()
            return chunk
        full = torch.empty(plan.layout.numel, dtype=plan.compute_dtype, device=self.device.device)
        chunk = Chunk(plan, homes, full, gradient)  # which makes views of memory that has to be there for that
        self.device.shrink(full)
        return chunk

    def _gradient(self, plan: ChunkPlan) -> Gradient | None:
        if GRADIENT in plan.tiers:
            buffer = self._home(plan, plan.gradient_spec)
            if buffer.tensor is not None:
                # Its pages come now: if there are none it is told before training, and what the resident set grows by
                # later is full copies and non-model data.
                buffer.tensor.zero_()
            if plan.owner.count == 1:
                return GradientBuffer(plan.layout, buffer, self.device)
            collected, give_back = self._borrowed(plan), self.gradient_pool.release
            return SharedGradient(plan, buffer, self.device, collected, give_back, self.communicator)
        return self._borrowed(plan) if plan.borrows_gradient else None

    def _borrowed(self, plan: ChunkPlan) -> GradientBuffer:
        """A gradient in memory that is borrowed when it comes."""
        tier = Tier.DEVICE if plan.tiers[MASTER] is Tier.DEVICE else Tier.HOST
        borrow = partial(self.gradient_pool.borrow, plan.layout, tier, plan.compute_dtype)
        return GradientBuffer(plan.layout, None, self.device, borrow)

    def _home(self, plan: ChunkPlan, spec: BufferSpec) -> Buffer:
        tier, numel, dtype = plan.tiers[spec.name], spec.numel(len(plan.extent)), spec.dtype
        what = f"{spec.name} of chunk {plan.layout.index} (with {plan.layout.slots[0].name})"
        if tier is Tier.DISK:
            assert self.disk is not None
            return self.disk.allocate(numel, dtype, what)
        self.ledger.take(tier, numel * dtype.itemsize, what)
        return self.device.home(tier, numel, dtype)
