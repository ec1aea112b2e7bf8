"""One chunk's homes go to other tiers with what they have, while its parameters, graphs and gradients live on.

::

    allocate the new homes -> copy what is in the old ones -> the chunk has the new ones -> free the old ones
    '------------ may fail: the chunk is as it was ---------' '---------------- cannot fail ----------------'

At no moment are values in neither place. Of other chunks nothing is touched, so moving a model down a tier takes room
for the homes of one chunk beside what there was.
"""

import mmap
from collections.abc import Iterator, Mapping

import torch

from .buffer import Buffer
from .building import ChunkBuilder, homes_of, prepare
from .chunk import Chunk
from .content import Codec
from .gradient import GradientBuffer
from .names import GRADIENT, MASTER
from .plan import ChunkPlan
from .shared_gradient import Gradient
from .stored import Stored
from .tier import Tier

PIECE_BYTES = 4 << 20
"""What is carried to another tier at once."""
_DECODED_NUMEL = 1 << 18
"""Values that take computing are carried in smaller pieces."""


class Relocation:
    """Moves homes, one chunk after the other.

    Parameters
    ----------
    builder
        Has the memory of the tiers.
    """

    def __init__(self, builder: ChunkBuilder) -> None:
        self._builder = builder
        # Aligned as homes on disk are, so that pieces go around the page cache.
        self._piece = torch.frombuffer(mmap.mmap(-1, PIECE_BYTES), dtype=torch.uint8)

    def move(self, chunk: Chunk, plan: ChunkPlan) -> None:
        """Give a chunk the homes of a plan for the same content. Where that fails, it has those that it had.

        The chunk is at rest. If its full copy becomes a home, or is one no longer, nothing uses the full copy.

        Raises
        ------
        OutOfMemory, OffloadError
            If a new home gets no room, or the values cannot be read or written.
        """
        before = homes_of(chunk)
        with self._builder.memories.all_or_nothing():
            homes = self._new_homes(chunk, plan)
            for name, codec in plan.codecs.items():
                self._carry(chunk, plan, homes, name, codec)
            gradient, buffer = self._new_gradient(chunk, plan)
            built = None
            if plan.full_is_home is not chunk.full_is_home or gradient is not chunk.gradient:
                built = self._builder.assemble(plan, homes, gradient)
                prepare(chunk, built)
            if buffer is not None:
                assert isinstance(gradient, GradientBuffer)
                gradient.relocate(buffer)  # the last that may fail
        if built is None:
            chunk.replan(plan, homes)
        else:
            chunk.rehome(built)
        after = homes_of(chunk)
        for home in before:
            if all(home is not other for other in after):
                self._builder.memories.free(home)

    def _new_homes(self, chunk: Chunk, plan: ChunkPlan) -> dict[str, Buffer]:
        """Homes for all buffers of the plan but the gradient's: those of now where they can stay."""
        homes = {}
        for name, codec in plan.codecs.items():
            is_same = _keeps_form(chunk.codecs[name], codec)
            for spec in codec.specs:
                can_stay = is_same and chunk.specs.get(spec.name) == spec
                stays = can_stay and chunk.plan.tiers[spec.name] == plan.tiers[spec.name]
                homes[spec.name] = chunk.homes[spec.name] if stays else self._builder.home(plan, spec)
        return homes

    def _carry(self, chunk: Chunk, plan: ChunkPlan, homes: Mapping[str, Buffer], name: str, codec: Codec) -> None:
        """Put one kind of values into its new homes."""
        new = {spec.name for spec in codec.specs if homes[spec.name] is not chunk.homes.get(spec.name)}
        if _keeps_form(chunk.codecs[name], codec):
            for spec in [spec for spec in codec.specs if spec.name in new and spec.name in chunk.homes]:
                self._copy(chunk.homes[spec.name], homes[spec.name])
                new.discard(spec.name)
        if not new:
            return
        numel = codec.specs[0].numel(len(plan.extent))
        for start in range(0, numel, _DECODED_NUMEL):
            count = min(_DECODED_NUMEL, numel - start)
            stored = Stored(chunk.homes, chunk.specs, chunk.codecs[name], start, count)
            there = Stored(homes, plan.specs, codec, start, count)
            values = chunk.codecs[name].decode(stored)[:count]
            for buffer, piece in codec.encode(values, there).items():
                if buffer in new or codec.computes:
                    homes[buffer].write(there.part(buffer).start, piece.contiguous())

    def _copy(self, source: Buffer, target: Buffer, parts: Iterator[range] | None = None) -> None:
        """Copy a buffer as it is, or parts of it."""
        room = self._piece.view(source.dtype)
        for part in parts or iter((range(source.numel),)):
            for start in range(part.start, part.stop, room.numel()):
                piece = room[: min(room.numel(), part.stop - start)]
                source.read(start, piece)
                target.write(start, piece)

    def _new_gradient(self, chunk: Chunk, plan: ChunkPlan) -> tuple[Gradient | None, Buffer | None]:
        """The chunk's gradient, and the buffer that it is to lie in from now on, if that is another one."""
        gradient = chunk.gradient
        if gradient is None or keeps_gradient(chunk, plan):
            return gradient, None
        if replaces_gradient(chunk, plan):
            assert not gradient.present, "gradients that are lent or shared do not move"
            return self._builder.gradient(plan), None
        assert isinstance(gradient, GradientBuffer) and gradient.buffer is not None
        buffer = self._builder.home(plan, plan.gradient_spec)
        slots = (plan.layout.slots[position] for position in sorted(gradient.present))
        self._copy(gradient.buffer, buffer, (range(slot.offset, slot.stop) for slot in slots))
        return gradient, buffer


def replaces_gradient(chunk: Chunk, plan: ChunkPlan) -> bool:
    """True if moving makes another gradient, which has nothing yet: shared, in borrowed memory, or in tensors."""
    is_plain = GRADIENT in plan.tiers and isinstance(chunk.gradient, GradientBuffer)
    return chunk.gradient is not None and not is_plain and not keeps_gradient(chunk, plan)


def keeps_gradient(chunk: Chunk, plan: ChunkPlan) -> bool:
    """True if the gradient can stay where it is, and is borrowed on the tier that it was borrowed on."""
    before = chunk.plan.tiers
    is_borrowed = chunk.is_trainable and (GRADIENT not in plan.tiers or not plan.owner.is_alone)
    if is_borrowed and (plan.tiers[MASTER] is Tier.DEVICE) is not (before[MASTER] is Tier.DEVICE):
        return False
    return plan.tiers.get(GRADIENT) == before.get(GRADIENT)


def _keeps_form(before: Codec, after: Codec) -> bool:
    """True if buffers of the same name have the same content in both."""
    return before == after or not (before.computes or after.computes)
