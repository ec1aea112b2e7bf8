"""The search for the chunk size."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemini.chunk import search
from gemini.chunk.layout import ChunkLayout, TensorSpec, align, pack
from gemini.chunk.search import (
    CANDIDATES,
    LARGEST_NUMEL,
    RING_CHUNKS,
    SMALLEST_NUMEL,
    bounds,
    search_chunk_numel,
    waste_ratio,
)

sizes_of_tensors = st.lists(st.integers(0, 3000), max_size=60)


def layouts(sizes: list[int], numel: int, groups: list[int] | None = None) -> list[ChunkLayout]:
    """The chunks that `pack` makes, those of one large tensor left out."""
    specs = [TensorSpec(str(i), (size,), (1,), groups[i] if groups else None) for i, size in enumerate(sizes)]
    return [layout for layout in pack(specs, numel) if layout.slots[0].numel <= numel]


@settings(deadline=None, max_examples=200)
@given(
    tensors=st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([0, 0, 0, 1, 2])), max_size=60),
    blocks=st.integers(1, 100),
)
@example(tensors=[(64, 0), (5000, 0), (64, 0), (5000, 0), (64, 0)], blocks=4)  # large ones do not close the open chunk
@example(tensors=[(5000, 0), (5000, 0)], blocks=4)
@example(tensors=[(0, 0), (0, 0), (128, 0), (0, 0)], blocks=4)
@example(tensors=[(100, 0), (100, 1)] * 5, blocks=8)  # groups that take turns
def test_the_waste_is_that_of_packing(tensors: list[tuple[int, int]], blocks: int) -> None:
    numel = blocks * 32
    sizes, groups = [size for size, _ in tensors], [group for _, group in tensors]
    used = taken = 0
    for group in {*groups}:
        chunks = [layout for layout in layouts(sizes, numel, groups) if groups[layout.slots[0].key] == group]
        in_group = sum(align(size) for size, g in tensors if g == group and size <= numel)
        used += in_group
        taken += len(chunks) * numel if len(chunks) > 1 else in_group
    assert waste_ratio(sizes, numel, groups) == (1.0 - used / taken if taken else 0.0)


def test_the_search_knows_that_groups_do_not_share_chunks() -> None:
    sizes, groups = [512, 32] * 40, [0, 1] * 40
    assert search_chunk_numel(sizes, 1000, 1100).numel == 1088
    assert search_chunk_numel(sizes, 1000, 1100, groups=groups).numel == 1024


@settings(deadline=None, max_examples=150)
@given(
    sizes=sizes_of_tensors, low=st.integers(1, 4000), span=st.integers(0, 4000), step=st.none() | st.integers(1, 5000)
)
def test_the_result_is_in_the_range_and_nothing_tried_wastes_less(
    sizes: list[int], low: int, span: int, step: int | None
) -> None:
    found = search_chunk_numel(sizes, low, low + span, step)
    assert align(low) <= found.numel <= align(low + span) and found.numel % 32 == 0
    assert found.waste_ratio == waste_ratio(sizes, found.numel)
    assert found.waste_ratio <= round(waste_ratio(sizes, align(low + span)), 6) + 1e-6


def test_of_sizes_that_waste_the_same_the_larger_wins() -> None:
    assert search_chunk_numel([64] * 100, 64, 320).numel == 320


def test_the_size_that_fits_the_tensors_is_found() -> None:
    found = search_chunk_numel([480] * 50, 500, 1000)
    assert (found.numel, found.waste_ratio) == (960, 0.0)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (-5, 10), (20, 10)])
def test_an_empty_range_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"low={low}, high={high}"):
        search_chunk_numel([1], low, high)


@pytest.mark.parametrize("step", [0, -1, -64])
def test_a_step_that_is_not_positive_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step must be positive, got {step}"):
        search_chunk_numel([100] * 10, 32, 320, step)


def test_a_model_of_ten_thousand_tensors_tries_a_bounded_number_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    original = search.waste_ratios

    def counting(sizes: list[int], numels: Sequence[int], groups: object) -> object:
        tried.extend(numels)
        return original(sizes, numels, None)

    monkeypatch.setattr(search, "waste_ratios", counting)
    sizes = [4096 * 4096, 4096, 4096 * 11008] * 3334
    for low, high, step in ((*bounds(sizes), None), (32 << 20, 64 << 20, 1024)):  # the latter is ColossalAI's default
        tried.clear()
        search_chunk_numel(sizes, low, high, step)
        assert CANDIDATES / 2 < len(tried) <= CANDIDATES
        assert {(high - numel) % (step or 32) for numel in tried} == {0}


@settings(deadline=None, max_examples=150)
@given(sizes=st.lists(st.integers(0, 1 << 30), max_size=30), room=st.none() | st.integers(0, 1 << 34))
@example(sizes=[], room=None)
@example(sizes=[], room=0)
@example(sizes=[1] * 10, room=1)
@example(sizes=[10**12], room=1)
def test_the_range_is_never_empty_nor_above_the_largest_size(sizes: list[int], room: int | None) -> None:
    low, high = bounds(sizes, room)
    assert 0 < low <= high <= LARGEST_NUMEL
    assert low % 32 == 0 and high % 32 == 0
    search_chunk_numel(sizes, low, high)


@settings(deadline=None, max_examples=150)
@given(sizes=st.lists(st.integers(0, SMALLEST_NUMEL // 20), max_size=10))
@example(sizes=[1] * 10)
def test_a_small_model_is_one_chunk_without_waste(sizes: list[int]) -> None:
    found = search_chunk_numel(sizes, *bounds(sizes))
    assert len(layouts(sizes, found.numel)) <= 1
    assert found.waste_ratio == 0.0


@pytest.mark.parametrize("room", [32 * RING_CHUNKS, 10_000, 1 << 20, 1 << 30])
def test_a_ring_of_chunks_fits_into_the_room(room: int) -> None:
    _, high = bounds([1 << 20] * 1000, room)
    assert high * RING_CHUNKS <= room + 32 * RING_CHUNKS


def test_a_large_model_is_many_chunks() -> None:
    sizes = [1 << 20] * 100
    low, high = bounds(sizes)
    assert sum(sizes) // (high - 32) >= 24 and low == align(high // 2)
    assert bounds([1 << 30] * 1000) == (LARGEST_NUMEL // 2, LARGEST_NUMEL)
