"""From a plan to a chunk with homes, a full copy and a place for its gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .buffer import Buffer, Room
from .chunk import Chunk
from .communicator import Communicator
from .content import BufferSpec
from .gradient import GradientBuffer
from .gradient_pool import GradientPool
from .gradient_tensors import GradientTensors, is_large
from .host_arena import padded
from .ledger import Ledger
from .memory import Arrived, DeviceBackend
from .names import GRADIENT, MASTER
from .plan import ChunkPlan
from .shared_gradient import Gradient, SharedGradient
from .tier import Tier
from .tier_memory import TierMemories
from .values import read_slot, write_slot

_PIECE_NUMEL = 1 << 20
"""Elements of a home that are carried to another tier at once."""


@dataclass(frozen=True, slots=True)
class ChunkBuilder:
    """Builds chunks with homes in the memory of the tiers, as the ledger has room."""

    ledger: Ledger
    device: DeviceBackend
    memories: TierMemories
    gradient_pool: GradientPool
    communicator: Communicator

    def build(self, plans: Sequence[ChunkPlan]) -> tuple[Chunk, ...]:
        """The chunks with homes where their plans say, and whatever else they need."""
        return self._build_all([(plan, {}) for plan in plans])

    def rebuild(
        self, chunks: Sequence[Chunk], plans: Sequence[ChunkPlan], fill: Callable[[Chunk], None] | None
    ) -> tuple[Chunk, ...]:
        """Other chunks with the same masters and states, or none and no memory taken.

        Masters that keep their form and tier stay in the homes that they have, which are both chunks' then.

        Parameters
        ----------
        fill
            Puts into the homes of a new chunk that the old one has not what is not to be zero.
        """
        with self.memories.all_or_nothing():
            kept = [
                {s.name: chunk.homes[s.name] for s in plan.codec.specs} if plan.keeps_masters_of(chunk.plan) else {}
                for chunk, plan in zip(chunks, plans, strict=True)
            ]
            built = self._build_all(list(zip(plans, kept, strict=True)))
            for old, new in zip(chunks, built, strict=True):
                self._carry(old, new)
                if fill is not None:
                    fill(new)
                prepare(old, new)
        return built

    def _carry(self, old: Chunk, new: Chunk) -> None:
        """Put into a new chunk the values that the old one has."""
        if new.plan.codec == old.plan.codec and new.extent == old.extent:
            for name, home in new.homes.items():
                if old.specs.get(name) == new.specs[name] and old.homes[name] is not home:
                    _copy(old.homes[name], home)
        else:
            for position in range(len(new.layout.slots)):
                write_slot(new, position, MASTER, read_slot(old, position, MASTER, self.communicator))

    def replace(self, chunk: Chunk, built: Chunk) -> None:
        """Give a chunk what was built in its place, and free the homes that it does not keep."""
        before = homes_of(chunk)
        chunk.rehome(built)
        after = homes_of(chunk)
        for home in before:
            if all(home is not other for other in after):
                self.memories.free(home)

    def extend(self, chunks: Sequence[Chunk], plans: Sequence[ChunkPlan]) -> None:
        """Give chunks the homes that these plans have beside theirs, or none of them and no memory taken."""
        with self.memories.all_or_nothing():
            added = [
                {spec.name: self.home(plan, spec) for spec in plan.specs.values() if spec.name not in chunk.specs}
                for chunk, plan in zip(chunks, plans, strict=True)
            ]
        for chunk, plan, homes in zip(chunks, plans, added, strict=True):
            chunk.replan(plan, homes)

    def shorten(self, chunks: Sequence[Chunk], plans: Sequence[ChunkPlan]) -> None:
        """Free the homes of chunks that these plans do not have."""
        for chunk, plan in zip(chunks, plans, strict=True):
            for home in chunk.replan(plan, {}):
                self.memories.free(home)

    def free_states(self, chunk: Chunk) -> None:
        """Free what the optimizer has kept of a chunk, but for what its masters need. No update can follow."""
        for spec in chunk.states if not chunk.plan.codec.computes else ():
            self.memories.free(chunk.homes.pop(spec.name))

    def free(self, chunk: Chunk) -> None:
        """Free what a chunk has; it is unusable then."""
        for home in homes_of(chunk):
            self.memories.free(home)
        chunk.homes.clear()

    def _build_all(self, pairs: Sequence[tuple[ChunkPlan, Mapping[str, Buffer]]]) -> tuple[Chunk, ...]:
        """One chunk for each plan, with the homes that are there already."""
        homes = [
            nbytes
            for plan, there in pairs
            for name in plan.tiers.keys() - there.keys()
            for tier, nbytes in plan.parts(name)
            if tier is Tier.HOST
        ]
        if sum(homes) <= self.ledger.free(Tier.HOST):  # else a home will say so
            self.device.reserve(sum(map(padded, homes)))
        return tuple(self._build(plan, there) for plan, there in pairs)

    def _build(self, plan: ChunkPlan, kept: Mapping[str, Buffer]) -> Chunk:
        homes = {
            name: kept[name] if name in kept else self.home(plan, spec)
            for name, spec in plan.specs.items()
            if name != GRADIENT
        }
        return self.assemble(plan, homes, self.gradient(plan))

    def assemble(self, plan: ChunkPlan, homes: dict[str, Buffer], gradient: Gradient | None) -> Chunk:
        """The chunk with these homes."""
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

    def gradient(self, plan: ChunkPlan) -> Gradient | None:
        """What takes the gradients of a chunk; None if it is not trained."""
        if (tier := self._comes_in_tensors(plan)) is not None:
            room = self.memories.reserve(tier, plan.layout.numel, plan.compute_dtype, _what(plan, GRADIENT))
            return GradientTensors(plan.layout, room, self.device)
        if GRADIENT in plan.tiers:
            buffer = self.home(plan, plan.gradient_spec)
            for memory in (part.tensor for part in buffer.parts if part.tensor is not None):
                # Its pages come now: if there are none it is told before training, and what the resident set grows by
                # later is full copies and non-model data.
                memory.zero_()
            if plan.owner.is_alone:
                return GradientBuffer(plan.layout, buffer, self.device)
            collected, give_back = self._borrowed(plan), self.gradient_pool.release
            return SharedGradient(plan, buffer, self.device, collected, give_back, self.communicator)
        return self._borrowed(plan) if plan.borrows_gradient else None

    def _comes_in_tensors(self, plan: ChunkPlan) -> Tier | None:
        """The tier of a gradient that stays in autograd's tensors: they are in its memory, and some are large."""
        where = plan.tiers.get(GRADIENT)
        if not (self.device.is_ram and plan.owner.is_alone and isinstance(where, Tier) and where is not Tier.DISK):
            return None
        return where if any(is_large(slot, plan.compute_dtype) for slot in plan.layout.slots) else None

    def _borrowed(self, plan: ChunkPlan) -> GradientBuffer:
        """A gradient in memory that is borrowed when it comes."""
        tier = Tier.DEVICE if plan.tiers[MASTER] is Tier.DEVICE else Tier.HOST
        borrow = partial(self.gradient_pool.borrow, plan.layout, tier, plan.compute_dtype)
        return GradientBuffer(plan.layout, None, self.device, borrow)

    def home(self, plan: ChunkPlan, spec: BufferSpec) -> Buffer:
        """Zeros for one buffer of a chunk."""
        return self.memories.allocate_parts(plan.parts(spec.name), spec.dtype, _what(plan, spec.name))


def _what(plan: ChunkPlan, name: str) -> str:
    return f"{name} of chunk {plan.layout.index} (with {plan.layout.slots[0].name})"


def _copy(source: Buffer, target: Buffer) -> None:
    for start in range(0, source.numel, _PIECE_NUMEL):
        piece = torch.empty(min(_PIECE_NUMEL, source.numel - start), dtype=source.dtype, device="cpu")
        source.read(start, piece)
        target.write(start, piece)


def prepare(chunk: Chunk, built: Chunk) -> None:
    """Ask for the memory that `Chunk.rehome` of a chunk needs, for which another one was built."""
    views = built.views if chunk.full_is_home or built.full_is_home else chunk.views
    built.bindings.prepare([binding.parameter for binding in chunk.bindings], views)


def homes_of(chunk: Chunk) -> list[Buffer | Room]:
    """All homes of a chunk, with its gradient's."""
    gradient = chunk.gradient
    if gradient is None or gradient.buffer is None or gradient.is_borrowed:
        return list(chunk.homes.values())
    return [*chunk.homes.values(), gradient.buffer]
