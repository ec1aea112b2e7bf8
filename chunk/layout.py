"""Where each parameter lies: packing tensors into chunks. Pure: no torch, no device.

::

    chunk 0                                   chunk 1 (larger than chunk_numel: a tensor on its own)
    +-----------+--+-----+-----------------+  +--------------------------------------+
    | slot 0    |//| s 1 | slot 2          |  | slot 3                               |
    +-----------+--+-----+-----------------+  +--------------------------------------+
    0           ^ padding to ALIGN_NUMEL      0

A chunk is as long as what was packed into it, so packing wastes alignment gaps and nothing else.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

ALIGN_NUMEL = 32
"""Slots start at multiples of this many elements: 64 bytes in bf16, 128 in fp32, so views are cache-line aligned."""


def align(numel: int, multiple: int = ALIGN_NUMEL) -> int:
    """Round ``numel`` up to a multiple."""
    return -(-numel // multiple) * multiple


def size_class(nbytes: int) -> int:
    """Round up to one of eight sizes between powers of two, so that blocks of memory for similar sizes are the same."""
    grain = max(1 << max(nbytes - 1, 0).bit_length() >> 4, 64)
    return align(nbytes, grain)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to be packed."""

    name: str
    """Full name in the model, for messages."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Strides in elements; dense (a permutation of contiguous), so that the tensor spans exactly its numel."""
    group: Hashable = None
    """Tensors of different groups never share a chunk. Any key will do; it means nothing here and is not kept."""
    align_numel: int = ALIGN_NUMEL
    """Its slot starts at a multiple of this (itself a multiple of `ALIGN_NUMEL`); the same within a group."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def aligned(self, numel: int) -> int:
        """Where the next slot can start."""
        return align(numel, self.align_numel)


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in its chunk, in elements."""

    key: int
    """Index of the tensor in the sequence given to `pack`."""
    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The slots of one chunk, in order, without overlap."""

    index: int
    numel: int
    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        end = 0
        for slot in self.slots:
            if slot.offset < end or slot.stop > self.numel:
                raise ValueError(
                    f"chunk {self.index}: slot {slot.name} [{slot.offset}, {slot.stop}) overlaps or overruns"
                )
            end = slot.stop

    @property
    def used_numel(self) -> int:
        """Elements that belong to tensors, without padding."""
        return sum(slot.numel for slot in self.slots)


def pack(specs: Sequence[TensorSpec], chunk_numel: int) -> tuple[ChunkLayout, ...]:
    """Pack tensors into chunks in the order given (next-fit within each group).

    Parameters
    ----------
    specs
        The tensors, best in the order of first use: neighbours in a chunk are fetched together.
    chunk_numel
        Elements a chunk may hold. A larger tensor gets a chunk of its own length.

    Raises
    ------
    ValueError
        If ``chunk_numel`` is not positive.
    """
    if chunk_numel <= 0:
        raise ValueError(f"chunk_numel must be positive, got {chunk_numel}")
    done: list[tuple[list[Slot], int]] = []
    open_chunks: dict[Hashable, tuple[list[Slot], int]] = {}

    for key, spec in enumerate(specs):
        if spec.numel > chunk_numel:  # beside the open chunk, which goes on filling
            done.append(([Slot(key, spec.name, 0, spec.numel, spec.shape, spec.stride)], spec.aligned(spec.numel)))
            continue
        slots, end = open_chunks.pop(spec.group, ([], 0))
        if end + spec.numel > chunk_numel:
            done.append((slots, end))
            slots, end = [], 0
        slots.append(Slot(key, spec.name, end, spec.numel, spec.shape, spec.stride))
        open_chunks[spec.group] = (slots, spec.aligned(end + spec.numel))
    done.extend(open_chunks.values())

    # Chunk numbers follow first use, so that "the first chunks" means the same to placement and to people.
    done.sort(key=lambda item: item[0][0].key)
    return tuple(ChunkLayout(i, max(end, ALIGN_NUMEL), tuple(slots)) for i, (slots, end) in enumerate(done))
