"""Packing: where each tensor lies in its chunk."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.chunk.layout import ALIGN_NUMEL, ChunkLayout, Slot, TensorSpec, align, pack


def spec(numel: int, group: object = None, name: str = "w") -> TensorSpec:
    return TensorSpec(name, (numel,), (1,), group)  # type: ignore[arg-type]


def keys(layouts: tuple[ChunkLayout, ...]) -> list[list[int]]:
    return [[slot.key for slot in layout.slots] for layout in layouts]


specs = st.lists(st.builds(spec, st.integers(0, 400), st.integers(0, 2)), max_size=40)


@settings(deadline=None, max_examples=150)
@given(specs=specs, chunk_numel=st.integers(1, 500))
def test_every_tensor_gets_one_slot_that_overlaps_no_other_and_is_aligned(
    specs: list[TensorSpec], chunk_numel: int
) -> None:
    layouts = pack(specs, chunk_numel)
    assert sorted(key for chunk in keys(layouts) for key in chunk) == list(range(len(specs)))
    for layout in layouts:
        end = 0
        for slot in layout.slots:
            assert (slot.shape, slot.stride, slot.numel) == (specs[slot.key].shape, (1,), specs[slot.key].numel)
            assert slot.offset % ALIGN_NUMEL == 0
            assert end <= slot.offset and slot.stop <= layout.numel
            end = slot.stop
        assert layout.numel == max(align(end), ALIGN_NUMEL)
        assert layout.used_numel == sum(specs[slot.key].numel for slot in layout.slots)


@settings(deadline=None, max_examples=150)
@given(specs=specs, chunk_numel=st.integers(1, 500))
def test_groups_do_not_share_chunks_and_chunks_are_numbered_by_first_use(
    specs: list[TensorSpec], chunk_numel: int
) -> None:
    layouts = pack(specs, chunk_numel)
    assert [layout.index for layout in layouts] == list(range(len(layouts)))
    assert [chunk[0] for chunk in keys(layouts)] == sorted(chunk[0] for chunk in keys(layouts))
    for layout in layouts:
        assert len({specs[slot.key].group for slot in layout.slots}) == 1
        assert [slot.key for slot in layout.slots] == sorted(slot.key for slot in layout.slots)


@settings(deadline=None, max_examples=150)
@given(specs=specs, chunk_numel=st.integers(1, 500))
def test_only_a_tensor_on_its_own_exceeds_the_chunk_size(specs: list[TensorSpec], chunk_numel: int) -> None:
    for layout in pack(specs, chunk_numel):
        if layout.slots[-1].stop > chunk_numel:
            assert len(layout.slots) == 1 and layout.slots[0].numel > chunk_numel


@settings(deadline=None, max_examples=150)
@given(specs=specs, chunk_numel=st.integers(1, 500))
def test_no_tensor_would_have_fitted_into_the_chunk_before_its_own(specs: list[TensorSpec], chunk_numel: int) -> None:
    usual = [layout for layout in pack(specs, chunk_numel) if layout.slots[0].numel <= chunk_numel]
    for group in range(3):
        chunks = [layout for layout in usual if specs[layout.slots[0].key].group == group]
        for before, after in pairwise(chunks):
            assert align(before.slots[-1].stop) + after.slots[0].numel > chunk_numel


def test_a_large_tensor_gets_its_own_chunk_and_the_open_one_goes_on_filling() -> None:
    layouts = pack([spec(10), spec(1000), spec(10)], 128)
    assert keys(layouts) == [[0, 2], [1]]
    assert [layout.numel for layout in layouts] == [64, 1024]


def test_a_tensor_as_large_as_a_chunk_is_not_too_large() -> None:
    assert keys(pack([spec(128), spec(1), spec(128)], 128)) == [[0], [1], [2]]


def test_interleaved_groups_each_keep_their_open_chunk() -> None:
    assert keys(pack([spec(32, "a"), spec(32, "b"), spec(32, "a"), spec(32, "b")], 64)) == [[0, 2], [1, 3]]


def test_empty_tensors_and_scalars_have_places() -> None:
    empty, scalar = TensorSpec("e", (0, 5), (5, 1)), TensorSpec("s", (), ())
    (layout,) = pack([empty, scalar, empty], 32)
    assert [(slot.offset, slot.numel) for slot in layout.slots] == [(0, 0), (0, 1), (32, 0)]
    flat = torch.arange(layout.numel)
    views = [flat.as_strided(slot.shape, slot.stride, slot.offset) for slot in layout.slots]
    assert [tuple(view.shape) for view in views] == [(0, 5), (), (0, 5)]


def test_a_chunk_of_empty_tensors_is_not_empty() -> None:
    (layout,) = pack([spec(0), spec(0)], 100)
    assert layout.numel == ALIGN_NUMEL


def test_no_tensors_make_no_chunks() -> None:
    assert pack([], 100) == ()


def test_strides_are_kept_and_span_exactly_the_slot() -> None:
    weight = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = spec(7)
    (layout,) = pack([before, TensorSpec("conv", tuple(weight.shape), weight.stride())], 1000)
    slot = layout.slots[1]
    assert slot.stride == weight.stride() and slot.numel == prod(weight.shape)
    flat = torch.full((layout.numel,), -1)
    flat.as_strided(slot.shape, slot.stride, slot.offset).copy_(weight)
    assert torch.equal(flat[slot.offset : slot.stop], weight.permute(0, 2, 3, 1).reshape(-1))
    assert bool((flat[: slot.offset] == -1).all()) and bool((flat[slot.stop :] == -1).all())


@pytest.mark.parametrize("chunk_numel", [0, -1])
def test_a_chunk_size_that_is_not_positive_is_refused(chunk_numel: int) -> None:
    with pytest.raises(ValueError, match=f"positive, got {chunk_numel}"):
        pack([spec(1)], chunk_numel)


@pytest.mark.parametrize(
    "places", [[(0, 10), (9, 10)], [(0, 10), (95, 10)], [(50, 10), (0, 10)]], ids=["overlap", "overrun", "disorder"]
)
def test_a_layout_with_slots_that_overlap_or_overrun_cannot_be_made(places: list[tuple[int, int]]) -> None:
    slots = tuple(Slot(i, f"w{i}", offset, numel, (numel,), (1,)) for i, (offset, numel) in enumerate(places))
    with pytest.raises(ValueError, match="chunk 3: slot w1"):
        ChunkLayout(3, 100, slots)
