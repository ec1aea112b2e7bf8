"""The search for chunks and homes that fit: candidates, best first, each tried by placing it. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..chunk.layout import ChunkLayout, pack
from ..chunk.memory_map import MemoryMap
from ..chunk.names import GRADIENT
from ..chunk.search import RING_CHUNKS, ChunkSearch, bounds, search_chunk_numel, waste_ratio
from ..chunk.tier import Tier
from ..planning.gradient_room import gradient_room
from ..planning.placement import Capacity, ChunkNeed, Placement, StaticPlacementPolicy, Unplaced, place
from .problem import NamedSet, Problem, Use

SMALLEST_BLOCK_NUMEL = 4096
LARGEST_BLOCK_NUMEL = 1 << 20
"""4 MiB in fp32: past the latency of any disk, and three blocks of four roles are still only 48 MiB."""
STAGING_SHARE = 8
"""Staging takes at most one part in eight of the HOST capacity."""
SPARE_BLOCK_NUMEL = 1 << 16
"""Of staging while nothing is on DISK: homes may go there later."""
SHRINKINGS = 4
"""Chunk sizes to try, each half of the one before: a unit may need several chunks, or one beside a huge tensor."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Chunks and homes that fit."""

    search: ChunkSearch
    layouts: tuple[ChunkLayout, ...]
    placement: Placement
    staging_block_numel: int
    """Elements of a block of staging; 0 where there is no DISK, or no RAM for staging while nothing is there."""
    staging_bytes: int
    """What all blocks between DISK and everything else take on HOST."""
    full_copies_limit_bytes: int | None
    """What full copies may take on DEVICE, where the policy says less than what is free."""
    use: Use
    """Chunks that are needed at once, as far as the modules tell before anything has run."""
    sibling_peak_bytes: int
    """Full copies that units beside each other may have in use at once. With less room a step may run out of it."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What the last candidate lacks, which asks for least."""

    homes_bytes: int
    """Bytes of all homes."""
    unit: str
    """The unit that needs most room for full copies at once."""
    unit_bytes: int
    unplaced: Unplaced


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to pack, and what it asks for; whether it fits shows when it is placed."""

    search: ChunkSearch
    layouts: tuple[ChunkLayout, ...]
    use: Use
    """Of chunks."""
    block_numel: int
    needs: Sequence[ChunkNeed]
    capacity: Capacity


def solve(problem: Problem) -> Solution | Shortfall:
    """Choose the chunk size, pack, and place."""
    for each in _candidates(problem):
        found = place(each.needs, each.capacity, problem.policy)
        if isinstance(found, Placement):
            # What each chunk's full copy takes beside its home.
            full = zip(each.needs, found.full_is_home, strict=True)
            copies = [0 if is_home else need.full_nbytes for need, is_home in full]
            if _largest(each.use.units, copies)[1] <= each.capacity.ring_bytes:
                return _solution(problem, each, found, copies)
    assert isinstance(found, Unplaced), "the smallest ring holds each unit"
    unit, nbytes = _largest(each.use.units, [need.full_nbytes for need in each.needs])
    return Shortfall(sum(need.home_nbytes for need in each.needs), unit, nbytes, found)


def _solution(problem: Problem, each: _Candidate, placement: Placement, copies: Sequence[int]) -> Solution:
    peak = _largest((*each.use.units, *each.use.siblings), copies)[1]
    limit = None
    if isinstance(problem.policy, StaticPlacementPolicy) and problem.capacity.memory is not MemoryMap.UNIFIED:
        limit = max(round((1.0 - problem.policy.offload_param_frac) * sum(copies)), peak)
    staging = each.block_numel, each.capacity.staging_bytes
    if not placement.uses_disk:
        staging = _spare(problem, each, placement)
    return Solution(each.search, each.layouts, placement, *staging, limit, each.use, peak)


def _spare(problem: Problem, each: _Candidate, placement: Placement) -> tuple[int, int]:
    """A block of staging, and all of them in bytes, for homes that may go to DISK later; zeros if they cannot."""
    capacity = problem.capacity
    room = capacity.nbytes[Tier.HOST] - placement.nbytes[Tier.HOST] - placement.gradient_room.get(Tier.HOST, 0)
    if capacity.memory.compute_tier is Tier.HOST:
        room -= each.capacity.ring_bytes
    for block in (min(each.block_numel, SPARE_BLOCK_NUMEL), SMALLEST_BLOCK_NUMEL):
        nbytes = problem.staging_bytes(block)
        if capacity.nbytes.get(Tier.DISK, 0) and nbytes <= room:
            return block, nbytes
    return 0, 0


def _candidates(problem: Problem) -> Iterator[_Candidate]:
    """Ways to pack and place, best first.

    Chunks of the best size come before smaller ones, which make a smaller ring. With each, gradients have no homes
    before they have some, unless there is not even RAM for a few of them. With either, there is no ring at first (where
    each home is the full copy, nothing streams), then rings from what prefetching likes down to what the units need.
    """
    has_choice = problem.borrows_gradients and problem.capacity.nbytes[Tier.DISK] > 0
    for search in _chunk_sizes(problem):
        layouts = pack(problem.tensors, search.numel)
        use = problem.use.of_chunks({slot.key: layout.index for layout in layouts for slot in layout.slots})
        block = _staging_block(layouts, problem)
        staging = problem.staging_bytes(block)
        for borrow in (True, False) if has_choice else (problem.borrows_gradients,):
            needs = [problem.needs[layout.slots[0].key](layout.numel, borrow) for layout in layouts]
            gradients = {i: need.full_nbytes for i, need in enumerate(needs) if need.borrows_gradient}
            is_summed = any(GRADIENT in needs[i].buffers for i in gradients)
            stages = [frozenset(gradients)] if is_summed else use.stages  # all are there when backward is over
            borrowed = gradient_room(stages, gradients)
            for ring in _ring_sizes(use, [need.full_nbytes for need in needs], problem.max_prefetch):
                kept = replace(problem.capacity, ring_bytes=ring, staging_bytes=staging, gradient_bytes=borrowed)
                yield _Candidate(search, layouts, use, block, needs, kept)


def _chunk_sizes(problem: Problem) -> Iterator[ChunkSearch]:
    """The size with the least waste, then smaller ones, unless the user has chosen."""
    sizes = [spec.numel for spec in problem.tensors]
    groups = [spec.group for spec in problem.tensors]
    if problem.chunk_numel is not None:
        yield ChunkSearch(problem.chunk_numel, waste_ratio(sizes, problem.chunk_numel, groups))
    elif problem.search_range is not None:
        yield search_chunk_numel(sizes, *problem.search_range, problem.search_step, groups)
    else:
        room = problem.capacity.nbytes[Tier.DEVICE] // problem.compute_itemsize
        if problem.capacity.memory is MemoryMap.UNIFIED:
            room //= 4  # most of this RAM is for homes
        for _ in range(SHRINKINGS):
            low, high = bounds(sizes, room)
            yield search_chunk_numel(sizes, low, high, problem.search_step, groups)
            room = min(room // 2, RING_CHUNKS * high // 2)


def _staging_block(layouts: Sequence[ChunkLayout], problem: Problem) -> int:
    largest = max((layout.numel for layout in layouts), default=0)
    affordable = problem.capacity.nbytes[Tier.HOST] // STAGING_SHARE // (problem.staging_blocks * 4)
    return max(min(largest, affordable, LARGEST_BLOCK_NUMEL) // 2048 * 2048, SMALLEST_BLOCK_NUMEL)


def _ring_sizes(use: Use, copies: Sequence[int], max_prefetch: int) -> list[int]:
    """Room for full copies, in bytes: none, then from most to least. All but the first hold each unit."""
    least, likely = _largest(use.units, copies)[1], _largest(use.siblings, copies)[1]
    ahead, most = max(copies, default=0), sum(copies)
    starts, depths = (max(least, likely), least), (max_prefetch, 1, 0)
    return [0, *sorted({min(start + depth * ahead, most) for start in starts for depth in depths}, reverse=True)]


def _largest(sets: Sequence[NamedSet], copies: Sequence[int]) -> tuple[str, int]:
    """The set that needs most room for full copies at once, and how much."""
    return max(((name, sum(copies[i] for i in chunks)) for name, chunks in sets), key=lambda u: u[1], default=("", 0))
