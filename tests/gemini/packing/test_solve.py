"""Solving for chunks and homes, on values alone: what comes out fits, or says what would."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemini.chunk.layout import TensorSpec
from gemini.chunk.memory_map import MemoryMap
from gemini.chunk.names import GRADIENT, MASTER, SHADOW
from gemini.chunk.tier import Tier
from gemini.packing.problem import Problem, Use
from gemini.packing.solve import Shortfall, Solution, solve
from gemini.planning.placement import AutoPlacementPolicy, Capacity, ChunkNeed, StaticPlacementPolicy


@dataclass(frozen=True)
class Adam:
    """fp32 masters and two states, full copies of 2 bytes an element."""

    name: str

    def need(self, numel: int, borrow: bool) -> ChunkNeed:
        buffers = dict.fromkeys((MASTER, "exp_avg", "exp_avg_sq"), 4 * numel)
        gradient = {} if borrow else {GRADIENT: 2 * numel}
        return ChunkNeed(
            buffers={**buffers, **gradient}, full_nbytes=2 * numel, shadow_nbytes=2 * numel, borrows_gradient=borrow
        )


@dataclass(frozen=True)
class Frozen:
    """A master that is the full copy where units run."""

    name: str = "frozen"

    def need(self, numel: int, borrow: bool) -> ChunkNeed:
        return ChunkNeed(buffers={MASTER: 2 * numel}, full_nbytes=2 * numel, full_can_be_home=True)


GROUPS = (Adam("decay"), Adam("no decay"), Frozen())


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    tensors = draw(st.lists(st.tuples(st.integers(0, 4000), st.sampled_from(GROUPS)), max_size=10))
    keys = st.integers(0, len(tensors) - 1)
    sets = st.lists(st.frozensets(keys, min_size=1), max_size=5) if tensors else st.just([])
    units, siblings, stages = draw(sets), draw(sets), draw(sets)
    memory = draw(st.sampled_from(MemoryMap))
    nbytes = {
        Tier.DEVICE: draw(st.integers(0, 200_000)),
        Tier.HOST: draw(st.integers(0, 400_000)),
        Tier.DISK: draw(st.just(0) | st.integers(1, 1 << 20)),
    }
    return Problem(
        tensors=tuple(TensorSpec(f"p{i}", (n,), (1,), group) for i, (n, group) in enumerate(tensors)),
        needs=tuple(group.need for _, group in tensors),
        use=Use([(f"u{i}", s) for i, s in enumerate(units)], [(f"s{i}", s) for i, s in enumerate(siblings)], stages),
        capacity=Capacity(nbytes=memory.capacities(nbytes), memory=memory),
        policy=draw(
            st.just(AutoPlacementPolicy()) | st.builds(StaticPlacementPolicy, offload_param_frac=st.floats(0, 1))
        ),
        chunk_numel=draw(st.none() | st.integers(1, 6000)),
        search_range=None,
        search_step=None,
        max_prefetch=draw(st.integers(0, 3)),
        compute_itemsize=2,
        borrows_gradients=draw(st.booleans()),
        staging_blocks=3,
    )


def with_bytes(problem: Problem, nbytes: Mapping[Tier, int]) -> Problem:
    capacity = problem.capacity
    return replace(problem, capacity=replace(capacity, nbytes=capacity.memory.capacities(nbytes)))


def copies(problem: Problem, found: Solution) -> dict[int, int]:
    """Bytes of the full copy beside its home, for the chunk of each tensor."""
    return {
        slot.key: 0 if is_home else layout.numel * 2
        for layout, is_home in zip(found.layouts, found.placement.full_is_home, strict=True)
        for slot in layout.slots
    }


@settings(deadline=None, max_examples=200)
@given(problem=problems())
def test_what_is_found_holds_every_tensor_once_and_chunks_are_of_one_group(problem: Problem) -> None:
    found = solve(problem)
    if isinstance(found, Shortfall):
        return
    keys = [slot.key for layout in found.layouts for slot in layout.slots]
    assert sorted(keys) == list(range(len(problem.tensors)))
    for layout, homes in zip(found.layouts, found.placement.homes, strict=True):
        (group,) = {problem.tensors[slot.key].group for slot in layout.slots}
        assert isinstance(group, Adam | Frozen)
        borrows = isinstance(group, Adam) and GRADIENT not in homes
        assert not borrows or problem.borrows_gradients
        assert homes.keys() - {SHADOW} == group.need(layout.numel, borrows).buffers.keys()


@settings(deadline=None, max_examples=200)
@given(problem=problems())
def test_homes_leave_room_for_each_unit_staging_and_borrowed_gradients(problem: Problem) -> None:
    found = solve(problem)
    if isinstance(found, Shortfall):
        return
    memory, placement = problem.capacity.memory, found.placement
    needed = dict(placement.nbytes)
    for tier, nbytes in placement.gradient_room.items():
        needed[tier] += nbytes
    needed[Tier.HOST] += found.staging_bytes
    nbytes_of = copies(problem, found)
    chunk_of = {slot.key: layout.index for layout in found.layouts for slot in layout.slots}
    for _, tensors in problem.use.units:
        of_chunks = {chunk_of[key]: nbytes_of[key] for key in tensors}
        at_once = needed[memory.compute_tier] + sum(of_chunks.values())
        assert at_once <= problem.capacity.nbytes[memory.compute_tier]
        assert sum(of_chunks.values()) <= found.sibling_peak_bytes
    assert all(needed[tier] <= problem.capacity.nbytes[tier] for tier in memory.pools)
    assert found.staging_block_numel > 0 or not placement.uses_disk


@settings(deadline=None, max_examples=200)
@given(problem=problems())
def test_a_shortfall_names_the_unit_that_needs_most_and_more_memory_ends_it(problem: Problem) -> None:
    found = solve(problem)
    assume(isinstance(found, Shortfall))
    assert isinstance(found, Shortfall)
    assert found.unplaced.missing_bytes > 0
    assert found.unit in {"", *(name for name, _ in problem.use.units)}
    plenty = dict.fromkeys(Tier, 1 << 40)
    assert isinstance(solve(with_bytes(problem, plenty)), Solution)


@settings(deadline=None, max_examples=200)
@given(problem=problems())
def test_the_same_problem_has_the_same_solution(problem: Problem) -> None:
    assert solve(problem) == solve(replace(problem))
