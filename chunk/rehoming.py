"""Homes go elsewhere: other tiers for some of them, a file on disk for all of them, or plain tensors of the user's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from .building import ChunkBuilder
from .chunk import Chunk
from .communicator import all_or_none
from .disk import DiskBackend
from .eviction import Eviction
from .full_copies import FullCopies
from .names import MASTER
from .plan import ChunkPlan
from .relocation import Relocation, replaces_gradient
from .tier import Tier
from .tier_memory import TierMemories
from .together import Together
from .values import read_slot


class Rehoming:
    """Gives chunks other homes with the values that they have.

    Parameters
    ----------
    builder
        Builds chunks in the memory of the tiers.
    chunks, full_copies, eviction, together
        What there is of the model, and the other owners.
    """

    def __init__(
        self,
        builder: ChunkBuilder,
        chunks: Sequence[Chunk],
        full_copies: FullCopies,
        eviction: Eviction,
        together: Together,
    ) -> None:
        self.parking: DiskBackend | None = None
        """Where all homes are while the model is released."""
        self._builder = builder
        self._chunks = chunks
        self._full_copies = full_copies
        self._eviction = eviction
        self._together = together

    def rebuild(self, plans: Sequence[ChunkPlan], fill: Callable[[Chunk], None] | None = None) -> None:
        """Give chunks other homes, and what else these plans say, with the values that they have. All or nothing.

        They must be at rest. ``fill`` puts into the homes of a new chunk that the old one has not what is not to be
        zero. Masters that keep their form and tier stay where they are.

        Raises
        ------
        OutOfMemory, OffloadError
            If a new home gets no room; the old ones go when all new ones are there.
        ValueError
            If code outside of the manager holds memory of such a chunk.
        """
        self._rebuild_with(self._builder, plans, fill)

    def move(self, plans: Sequence[ChunkPlan]) -> None:
        """Move homes to other tiers, one chunk after the other in this order, while training goes on. All or nothing.

        The plans say the same of a chunk as those of now, but for tiers and what follows from them. Gradients go along.
        Each chunk's old room is given back before the next one moves. Where one cannot move, those before it go back;
        if even that fails, all are somewhere, as their plans say.

        Raises
        ------
        OutOfMemory, OffloadError
            If a new home gets no room, or the values cannot be read or written.
        ValueError
            If code outside of the manager holds memory of a chunk whose full copy becomes a home, or is one no longer.
        """
        if not plans:
            return
        self.refuse_lent([c for c, plan in self._with(plans) if plan.full_is_home is not c.full_is_home])
        relocation, moved = Relocation(self._builder), list[ChunkPlan]()
        with self._together.changing(f"moving homes of {len(plans)} chunks"):
            try:
                for chunk, plan in self._with(plans):
                    before = chunk.plan
                    with all_or_none(self._together.communicator, f"moving homes of chunk {chunk.index}"):
                        self._move(relocation, chunk, plan)
                    moved.append(before)
            except BaseException:
                for chunk, plan in reversed(self._with(moved)):
                    self._move(relocation, chunk, plan)
                raise
        self._together.communicator.agree("the end of moving homes")  # gradients may come now

    def _with(self, plans: Sequence[ChunkPlan]) -> list[tuple[Chunk, ChunkPlan]]:
        return [(self._chunks[plan.layout.index], plan) for plan in plans]

    def _move(self, relocation: Relocation, chunk: Chunk, plan: ChunkPlan) -> None:
        self._full_copies.reclaim(chunk)
        self._full_copies.arrive(chunk)
        self._full_copies.bring_home(chunk)
        self._builder.device.synchronize()  # no home is being written
        is_other = plan.full_is_home is not chunk.full_is_home or replaces_gradient(chunk, plan)
        if is_other and chunk.is_resident:
            self._full_copies.evict(chunk)
        coming = [name for name, at in plan.tiers.items() if at != chunk.plan.tiers.get(name)]
        for tier in (Tier.DEVICE, Tier.HOST):
            self._eviction.make_room_for(tier, plan.nbytes_on(tier, coming))
        becomes_home, before = plan.full_is_home and not chunk.full_is_home, chunk.full
        if becomes_home:  # graphs that are still to run have views of what was the full copy, and it is theirs now
            self._builder.device.grow(before)
        try:
            relocation.move(chunk, plan)
        except BaseException:
            if becomes_home:
                self._builder.device.shrink(before)
            raise
        if becomes_home:
            before.copy_(chunk.full)

    def extend(self, plans: Sequence[ChunkPlan]) -> None:
        """Give chunks the homes that these plans have beside theirs. Raises as `rebuild`."""
        chunks = [self._chunks[plan.layout.index] for plan in plans]
        pairs = zip(plans, chunks, strict=True)
        added = [(plan, name) for plan, chunk in pairs for name in plan.specs.keys() - chunk.specs.keys()]
        self._eviction.make_room_for(Tier.HOST, sum(plan.nbytes_on(Tier.HOST, (name,)) for plan, name in added))
        for chunk in chunks:
            self._full_copies.bring_home(chunk)
        with all_or_none(self._together.communicator, "the room for these homes"):
            self._builder.extend(chunks, plans)

    def shorten(self, plans: Sequence[ChunkPlan]) -> None:
        """Free the homes of chunks that these plans do not have."""
        chunks = [self._chunks[plan.layout.index] for plan in plans]
        for chunk in chunks:
            self._full_copies.bring_home(chunk)
        self._builder.shorten(chunks, plans)

    def release(self, plans: Sequence[ChunkPlan], parking: DiskBackend) -> None:
        """Have all homes on disk, by these plans, and no memory on other tiers. Values can be read and replaced there.

        Parameters
        ----------
        parking
            The manager's own disk, if it has one.

        Raises
        ------
        OutOfMemory, OffloadError, ValueError
            As `rebuild`; the chunks are as they were.
        """
        self._rebuild_with(self._builder_on(parking), plans)
        self.parking = parking
        self._eviction.evict_idle()
        self._builder.gradient_pool.let_go()
        self._builder.device.trim()

    def resume(self, plans: Sequence[ChunkPlan]) -> None:
        """Have homes again where these plans say. Raises as `rebuild`; the model is still released then."""
        assert self.parking is not None
        self._rebuild_with(self._builder_on(self.parking), plans)
        if not self._builder.memories.has(self.parking):
            self.parking.close()
        self.parking = None

    def let_go(self, room: Mapping[Chunk, Sequence[Tensor]]) -> None:
        """Have parameters lie in ``room``, with the values that they have, and follow their chunks no longer.

        What a chunk has is freed when all of its parameters are there. Several owners do this together.
        """
        for chunk in self._chunks:
            self._full_copies.bring_home(chunk)
        communicator = self._together.communicator
        builder = self._builder if self.parking is None else self._builder_on(self.parking)
        for chunk, memory in room.items():
            builder.free_states(chunk)
            for position, target in enumerate(memory):
                target.copy_(read_slot(chunk, position, MASTER, communicator))
            if communicator.owner.is_alone:
                self._let_go(builder, chunk, memory)
        if not communicator.owner.is_alone:
            communicator.agree("the end of gemini.to_torch")  # the others have all that is here
            for chunk, memory in room.items():
                self._let_go(builder, chunk, memory)

    def refuse_lent(self, chunks: Sequence[Chunk]) -> None:
        """Raise ValueError if code outside of the manager holds memory of one of these chunks."""
        for chunk in chunks:
            if chunk.loan is not None and chunk.is_lent:
                names = ", ".join(chunk.layout.slots[position].name for position in chunk.loan.positions)
                raise ValueError(
                    f"memory of {names} is held outside of the model (by p.data, p.detach(), a NumPy array or a view): "
                    "a copy would do no harm, but this cannot move. Drop it, or hold p.detach().clone()"
                )

    def _builder_on(self, parking: DiskBackend) -> ChunkBuilder:
        builder = self._builder
        return replace(builder, memories=TierMemories(builder.ledger, builder.device, parking))

    def _rebuild_with(
        self, builder: ChunkBuilder, plans: Sequence[ChunkPlan], fill: Callable[[Chunk], None] | None = None
    ) -> None:
        if plans:
            with self._together.changing(f"giving {len(plans)} chunks other homes"):
                self._rebuild_now(builder, plans, fill)
            self._together.communicator.agree("the end of giving chunks other homes")  # gradients may come now

    def _rebuild_now(
        self, builder: ChunkBuilder, plans: Sequence[ChunkPlan], fill: Callable[[Chunk], None] | None
    ) -> None:
        rebuilt = [self._chunks[plan.layout.index] for plan in plans]
        self.refuse_lent(rebuilt)
        for old in rebuilt:
            self._full_copies.reclaim(old)
            self._full_copies.arrive(old)  # what can go wrong goes wrong now
            self._full_copies.bring_home(old)
        builder.device.synchronize()  # no home is being written
        self._eviction.make_room_for(Tier.HOST, sum(plan.nbytes_on(Tier.HOST) for plan in plans))
        # When all owners have it, nobody reads the old homes any more.
        with all_or_none(self._together.communicator, "the room for these homes"):
            built = builder.rebuild(rebuilt, plans, fill)
        for old, new in zip(rebuilt, built, strict=True):
            if old.is_resident:
                self._full_copies.evict(old)
            builder.replace(old, new)

    def _let_go(self, builder: ChunkBuilder, chunk: Chunk, memory: Sequence[Tensor]) -> None:
        self._full_copies.reclaim(chunk)
        if chunk.is_resident:
            self._full_copies.evict(chunk)
        chunk.bindings.let_go(memory)
        builder.free(chunk)
        if chunk.full_is_home and builder.device.is_ram:
            builder.device.shrink(chunk.full)  # its views would keep the home
