"""Where homes go when capacities change while a model is trained. Pure: plans in, plans out.

Homes are placed anew as `boost` places them, so what leaves a tier first is what it would have been given last: the
optimizer's states and the gradients of chunks that the next forward comes to last, then their masters. Capacities that
come back bring the same homes back.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..chunk import MASTER, ChunkPlan, MemoryMap, Tier
from ..planning.placement import Capacity, ChunkNeed, Placement, PlacementPolicy, Unplaced, on_tier, place
from .group import Group, plans

_SPEED = {tier: rank for rank, tier in enumerate((Tier.DISK, Tier.HOST, Tier.DEVICE))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resizing:
    """Chunks that are there, and the room that they are to have."""

    plans: tuple[ChunkPlan, ...]
    """By the index of the chunk."""
    order: Sequence[int]
    """Indices of the chunks, in the order of their first use."""
    room: Mapping[Tier, int]
    """Bytes for homes and full copies."""
    fixed: frozenset[int] = frozenset()
    """Chunks whose homes stay where they are; ``room`` is beside these."""
    staying: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Index of other chunks -> their buffers that stay where they are; ``room`` is beside these, too."""
    in_use: Sequence[frozenset[int]]
    """Chunks whose full copies are needed at once."""
    likely: Sequence[frozenset[int]] = ()
    """Chunks whose full copies may be needed at once: to be given room if homes leave it."""
    memory: MemoryMap
    policy: PlacementPolicy
    split_master: bool
    """Masters are in two halves where that is of use, as the user has said."""
    max_prefetch: int
    has_ring: bool = True
    """The room of the tier where units run is for full copies, too."""


def resized(problem: Resizing) -> tuple[ChunkPlan, ...] | Unplaced:
    """The plans of all chunks in the room that there is, by their indices."""
    lacking = {tier: -nbytes for tier, nbytes in problem.room.items() if nbytes < 0}
    if lacking:
        return Unplaced(lacking, 0)
    moving = [problem.plans[index] for index in problem.order if index not in problem.fixed]
    groups = [Group.of_plan(plan, problem.split_master) for plan in moving]
    stays = [problem.staying.get(plan.layout.index, frozenset()) for plan in moving]
    needs = [_need(*each) for each in zip(moving, groups, stays, strict=True)]
    found: Placement | Unplaced | None = None
    for ring in _rings(problem):
        found = place(needs, Capacity(nbytes=problem.room, memory=problem.memory, ring_bytes=ring), problem.policy)
        if isinstance(found, Unplaced):
            continue
        new = {plan.layout.index: plan for plan in _plans(moving, groups, stays, found, problem.memory)}
        whole = tuple(new.get(plan.layout.index, plan) for plan in problem.plans)
        copies = [0 if plan.full_is_home else plan.layout.numel * plan.compute_dtype.itemsize for plan in whole]
        if not problem.has_ring or _largest(problem.in_use, copies) <= ring:
            return whole
    assert isinstance(found, Unplaced), "the smallest ring holds what is used at once"
    return found


def moves(before: Sequence[ChunkPlan], after: Sequence[ChunkPlan]) -> list[ChunkPlan]:
    """The plans that differ: first those that give room on the faster tiers, then those that take it."""
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old.tiers != new.tiers]
    return [new for old, new in sorted(pairs, key=lambda pair: _rise(*pair))]


def _rise(old: ChunkPlan, new: ChunkPlan) -> int:
    """Bytes that come to faster tiers, less those that leave them."""
    return sum(_SPEED[tier] * (new.nbytes_on(tier) - old.nbytes_on(tier)) for tier in Tier)


def _need(plan: ChunkPlan, group: Group, staying: frozenset[str]) -> ChunkNeed:
    """What a chunk asks for anew. Room for borrowed gradients has been set aside, and grows as they need it."""
    need = group.need(plan.layout.numel, plan.borrows_gradient)
    averages = {spec.name: spec.nbytes(len(plan.extent)) for spec in plan.averages}
    buffers = {name: nbytes for name, nbytes in {**need.buffers, **averages}.items() if name not in staying}
    need = replace(need, buffers=buffers, borrows_gradient=False)
    return replace(need, shadow_nbytes=0, full_can_be_home=False) if MASTER in staying else need


def _plans(
    before: Sequence[ChunkPlan],
    groups: Sequence[Group],
    staying: Sequence[frozenset[str]],
    found: Placement,
    memory: MemoryMap,
) -> tuple[ChunkPlan, ...]:
    each = list(zip(before, staying, found.homes, found.full_is_home, strict=True))
    homes = tuple({**at, **{name: plan.tiers[name] for name in names}} for plan, names, at, _ in each)
    full_is_home = tuple(plan.full_is_home if MASTER in names else is_home for plan, names, _, is_home in each)
    placed = replace(found, homes=homes, full_is_home=full_is_home)
    return plans([plan.layout for plan in before], groups, placed, memory, [plan.averages for plan in before])


def _rings(problem: Resizing) -> list[int]:
    """Room for full copies: none, which may do where each home is one, then from most to least."""
    if not problem.has_ring:
        return [0]
    copies = [plan.layout.numel * plan.compute_dtype.itemsize for plan in problem.plans]
    least, likely = _largest(problem.in_use, copies), _largest(problem.likely, copies)
    ahead, most = max(copies, default=0), sum(copies)
    starts, depths = (max(least, likely), least), (problem.max_prefetch, 1, 0)
    return [0, *sorted({min(start + depth * ahead, most) for start in starts for depth in depths}, reverse=True)]


def _largest(sets: Sequence[frozenset[int]], copies: Sequence[int]) -> int:
    """Bytes of the full copies of the set that needs most."""
    return max((sum(copies[index] for index in chunks) for chunks in sets), default=0)


def home_bytes(plan: ChunkPlan, tier: Tier, names: Iterable[str] | None = None) -> int:
    """Bytes of a chunk's homes on a tier: of those with these names, or of all."""
    of = plan.tiers if names is None else names
    return sum(on_tier(nbytes, at) for name in of for at, nbytes in plan.parts(name) if at is tier)
