"""Choosing the chunk size. Pure: integers in, integers out."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .layout import ALIGN_NUMEL, align

LARGEST_NUMEL = 32 << 20
"""Above this a transfer is long past the latency of its link, and eviction gets coarse."""
SMALLEST_NUMEL = 1 << 15
"""Below this (64 KiB in bf16) the fixed cost of a move dominates."""
CHUNKS_WANTED = 24
"""A model should be at least this many chunks, or there is little to place."""
RING_CHUNKS = 6
"""So many chunks must fit into the room for full copies."""
CANDIDATES = 256


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


def waste_ratio(sizes: Sequence[int], numel: int) -> float:
    """Unused share of chunk-sized blocks when ``sizes`` are packed next-fit, in order."""
    ends = list(accumulate(align(s) for s in sizes if s <= numel))
    chunks, start, first = 0, 0, 0
    while first < len(ends):  # one jump per chunk, not per tensor
        first = bisect_right(ends, start + align(numel))
        start = ends[first - 1]
        chunks += 1
    return 1.0 - start / (chunks * align(numel)) if chunks > 1 else 0.0  # a single chunk is cut to what it holds


def search_chunk_numel(sizes: Sequence[int], low: int, high: int, step: int | None = None) -> ChunkSearch:
    """Find the chunk size with the least waste.

    Parameters
    ----------
    sizes
        Elements of each tensor, in packing order.
    low, high
        Inclusive range of sizes to try, elements; both are rounded up to ``ALIGN_NUMEL``.
    step
        Distance between sizes tried; by default the range is divided into `CANDIDATES`.

    Raises
    ------
    ValueError
        If the range is empty, or it or the step is not positive.
    """
    if not 0 < low <= high:
        raise ValueError(f"expected 0 < low <= high, got low={low}, high={high}")
    if step is not None and step <= 0:
        raise ValueError(f"step must be positive, got {step}")
    stride = align(step or max((high - low) // CANDIDATES, ALIGN_NUMEL))
    candidates = range(align(high), align(low) - 1, -stride)  # from large to small: of equals the larger wins
    best = min(candidates, key=lambda numel: round(waste_ratio(sizes, numel), 6))
    return ChunkSearch(best, waste_ratio(sizes, best))
