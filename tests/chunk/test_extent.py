"""Which elements of a chunk an owner keeps at home, and where those of one parameter are."""

from hypothesis import given
from hypothesis import strategies as st

from gemini.chunk.extent import EXTENT_MULTIPLE, Owner, Place
from gemini.chunk.layout import Slot

counts = st.integers(1, 5)
blocks = st.sampled_from([1, 32, 256])


@given(numel=st.integers(0, 5000), count=counts)
def test_extents_cover_a_chunk_and_begin_with_a_block(numel: int, count: int) -> None:
    extents = Owner(0, count).extents(numel)
    assert len(extents) == count
    assert [i for extent in extents for i in extent] == list(range(numel))
    assert all(extent.start % EXTENT_MULTIPLE == 0 for extent in extents if extent)


@given(offset=st.integers(0, 12), numel=st.integers(1, 3000), rest=st.integers(0, 2000), count=counts, block=blocks)
def test_the_parts_of_a_parameter_are_all_of_it(offset: int, numel: int, rest: int, count: int, block: int) -> None:
    slot = Slot(0, "w", offset * 256, numel, (numel,), (1,))
    extents = Owner(0, count).extents(slot.stop + rest)
    places = [Place.of(slot, block, extents, owner) for owner in range(count)]
    assert [i for place in places for i in place.own] == list(range(-(-numel // block)))
    for place, extent in zip(places, extents, strict=True):
        assert place.start * block == slot.offset
        if place.own:
            assert place.index == place.start + place.own.start - extent.start // block
