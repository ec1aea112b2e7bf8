"""The coarsest modules are chosen, never more than fits, never two for one unit."""

from hypothesis import given
from hypothesis import strategies as st

from gemini.units.coarse import coarsest

# A model of an embedding (unit 0) and two blocks of two layers (units 1, 2 and 3, 4); unit n has chunk n of 10 bytes.
WITHIN = {
    0: {"model", "embedding"},
    1: {"model", "block 0", "q"},
    2: {"model", "block 0", "v"},
    3: {"model", "block 1", "q'"},
    4: {"model", "block 1", "v'"},
}
CHUNKS = {unit: {unit} for unit in WITHIN}
NBYTES = dict.fromkeys(WITHIN, 10)


def test_the_model_stands_for_all_where_everything_fits() -> None:
    assert coarsest(WITHIN, CHUNKS, NBYTES, 50) == {"model": frozenset(WITHIN)}


def test_blocks_stand_for_their_layers_where_only_they_fit() -> None:
    assert coarsest(WITHIN, CHUNKS, NBYTES, 49) == {"block 0": {1, 2}, "block 1": {3, 4}}


def test_nothing_changes_where_no_two_layers_fit() -> None:
    assert coarsest(WITHIN, CHUNKS, NBYTES, 19) == {}


def test_a_chunk_of_two_units_counts_once() -> None:
    assert coarsest(WITHIN, {**CHUNKS, 2: {1}}, NBYTES, 10) == {"block 0": {1, 2}}


def test_chunks_that_never_move_take_nothing() -> None:
    assert coarsest(WITHIN, CHUNKS, {}, 0) == {"model": frozenset(WITHIN)}


def test_a_unit_that_was_called_by_itself_stays_one() -> None:
    assert coarsest({**WITHIN, 1: set()}, CHUNKS, NBYTES, 50) == {"model": {0, 2, 3, 4}}


def test_a_layer_of_two_blocks_belongs_to_what_is_around_both() -> None:
    shared = {**WITHIN, 2: {"model", "v"}}
    assert coarsest(shared, CHUNKS, NBYTES, 49) == {"block 1": {3, 4}}


@given(
    st.dictionaries(st.integers(0, 9), st.sets(st.sampled_from("abcdef"))),
    st.lists(st.integers(0, 50), min_size=10, max_size=10),
    st.integers(0, 200),
)
def test_what_is_chosen_fits_and_never_overlaps(
    within: dict[int, set[str]], sizes: list[int], budget_bytes: int
) -> None:
    nbytes = dict(enumerate(sizes))
    chosen = coarsest(within, {unit: {unit} for unit in within}, nbytes, budget_bytes)
    covered = [unit for units in chosen.values() for unit in units]
    assert len(covered) == len(set(covered))
    for module, units in chosen.items():
        assert len(units) > 1
        assert sum(nbytes[unit] for unit in units) <= budget_bytes
        assert all(module in within[unit] for unit in units)
