"""Choosing the chunk size. Pure: integers in, integers out."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .layout import ALIGN_NUMEL, align

Integers = npt.NDArray[np.int64]

LARGEST_NUMEL = 32 << 20
"""Above this a transfer is long past the latency of its link, and eviction gets coarse."""
SMALLEST_NUMEL = 1 << 18
"""Below this (64 KiB in bf16) the fixed cost of a move dominates."""
CHUNKS_WANTED = 24
"""A model should be at least this many chunks, or there is little to place."""
RING_CHUNKS = 6
"""Chunks that must fit into the room for full copies."""
CANDIDATES = 256
"""The most sizes that are tried: it takes a third of a second for ten thousand tensors."""


@dataclass(frozen=True, slots=True)
class ChunkSearch:
    """The size found and what it costs."""

    numel: int
    """Elements a chunk holds."""
    waste_ratio: float
    """Unused share of chunk-sized blocks, averaged over all chunks (tensors with their own chunk left out)."""


def bounds(sizes: Sequence[int], room_numel: int | None = None) -> tuple[int, int]:
    """The range of sizes worth trying for tensors of these sizes and this room for full copies, all in elements."""
    total = sum(align(size) for size in sizes)  # what they take when packed: many tiny tensors are mostly padding
    high = min(LARGEST_NUMEL, max(total // CHUNKS_WANTED, min(SMALLEST_NUMEL, total)))
    if room_numel is not None:
        high = min(high, room_numel // RING_CHUNKS)  # chunks below the smallest are slow, without room nothing runs
    high = align(max(high, 1))
    return align(high // 2), high


def waste_ratio(sizes: Sequence[int], numel: int, groups: Sequence[Hashable] | None = None) -> float:
    """Unused share of chunk-sized blocks when ``sizes`` are packed next-fit, in order, each group on its own."""
    return float(waste_ratios(sizes, [numel], groups)[0])


def waste_ratios(
    sizes: Sequence[int], numels: Sequence[int], groups: Sequence[Hashable] | None = None
) -> npt.NDArray[np.float64]:
    """`waste_ratio` for many chunk sizes at once."""
    blocks: Integers = np.array([align(numel) for numel in numels], np.int64)
    used, taken = np.zeros_like(blocks), np.zeros_like(blocks)
    tensors: Integers = np.array(sizes, np.int64)
    numbers: dict[Hashable, int] = {}
    group_of = np.array([numbers.setdefault(g, len(numbers)) for g in groups or [None] * len(sizes)], np.int64)
    for group in numbers.values():
        in_group, in_blocks = _packed(tensors[group_of == group], blocks)
        used += in_group
        # A single chunk is cut to what it holds.
        taken += np.where(in_blocks > 1, in_blocks * blocks, in_group)
    return 1.0 - np.divide(used, taken, out=np.ones(len(blocks)), where=taken > 0)


def _packed(tensors: Integers, blocks: Integers) -> tuple[Integers, Integers]:
    """For each size of block, what the tensors that fit one take when packed, and how many blocks they fill."""
    used, counts = np.zeros_like(blocks), np.zeros_like(blocks)
    fitting = np.searchsorted(np.sort(tensors), blocks, side="right")
    for count in np.unique(fitting[fitting > 0]):
        which = np.flatnonzero(fitting == count)  # sizes that hold the same tensors
        small = tensors[tensors <= blocks[which[0]]]
        ends = np.cumsum(-(-small // ALIGN_NUMEL) * ALIGN_NUMEL)
        used[which] = ends[-1]
        for i in which:
            # What is the first tensor of the next block, if a block begins with this one? Then jump along.
            following = np.searchsorted(ends, np.concatenate(([0], ends[:-1])) + blocks[i], side="right").tolist()
            at = 0
            while at < len(following):
                at = following[at]
                counts[i] += 1
    return used, counts


def search_chunk_numel(
    sizes: Sequence[int], low: int, high: int, step: int | None = None, groups: Sequence[Hashable] | None = None
) -> ChunkSearch:
    """Find the chunk size with the least waste.

    Parameters
    ----------
    sizes
        Elements of each tensor, in packing order.
    low, high
        Inclusive range of sizes to try, elements; both are rounded up to ``ALIGN_NUMEL``.
    step
        Sizes tried lie a multiple of this apart, the smallest that makes at most `CANDIDATES` of the range.
    groups
        Of each tensor; those of different groups never share a chunk. None: all are of one.

    Raises
    ------
    ValueError
        If the range is empty, or it or the step is not positive.
    """
    if not 0 < low <= high:
        raise ValueError(f"expected 0 < low <= high, got low={low}, high={high}")
    if step is not None and step <= 0:
        raise ValueError(f"step must be positive, got {step}")
    stride = align(step or ALIGN_NUMEL)
    stride *= -(-(align(high) - align(low) + 1) // (stride * CANDIDATES))
    candidates = range(align(high), align(low) - 1, -stride)
    wastes = waste_ratios(sizes, candidates, groups)
    best = int(np.argmin(np.round(wastes, 6)))  # from large to small: of equals the larger wins
    return ChunkSearch(candidates[best], float(wastes[best]))
