"""What becomes of saved tensors: kept while they fit, moved where that hides, else what saves most per second."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.planning.activation_choice import (
    Choice,
    Decision,
    Link,
    UnitCost,
    added_seconds,
    choose,
    first_choice,
    peak_bytes,
)

KEEP, OFFLOAD, RECOMPUTE, BOTH = Choice
MIB = 1 << 20


def block(unit: int, saved: int = 34 * MIB, seconds: float = 0.1, inputs: int = MIB) -> UnitCost:
    return UnitCost(unit=unit, saved_bytes=saved, forward_seconds=seconds, movable_bytes=saved, input_bytes=inputs)


def blocks(count: int = 8) -> list[UnitCost]:
    return [block(unit) for unit in range(count)]


def disk(bytes_per_second: float, ahead: int = 4 * MIB) -> Link:
    return Link(down_bytes_per_second=bytes_per_second, up_bytes_per_second=bytes_per_second, ahead_bytes=ahead)


units_of_models = st.lists(
    st.builds(
        UnitCost,
        unit=st.just(0),
        saved_bytes=st.integers(100, 1000),
        forward_seconds=st.floats(0.01, 2.0),
        movable_bytes=st.integers(0, 100),
        input_bytes=st.integers(1, 90),
        can_recompute=st.booleans(),
    ),
    min_size=1,
    max_size=5,
).map(lambda units: [replace(unit, unit=at) for at, unit in enumerate(units)])
links = st.none() | st.builds(
    Link,
    down_bytes_per_second=st.floats(10, 10_000),
    up_bytes_per_second=st.floats(10, 10_000),
    ahead_bytes=st.integers(0, 200),
)


def in_order(decision: Decision) -> list[Choice]:
    return [decision.choices[unit] for unit in sorted(decision.choices)]


def possible(units: Sequence[UnitCost], link: Link | None) -> list[tuple[Choice, ...]]:
    return [
        choices
        for choices in product(Choice, repeat=len(units))
        if all(unit.allows(choice, link) for unit, choice in zip(units, choices, strict=True))
    ]


def test_everything_is_kept_where_it_fits() -> None:
    decision = choose(blocks(), 8 * 34 * MIB, disk(1e12))
    assert decision.keeps_all
    assert decision.added_seconds == 0
    assert decision.peak_bytes == 8 * 34 * MIB


def test_with_a_fast_tier_below_the_first_units_move_and_the_last_ones_stay() -> None:
    decision = choose(blocks(), 5 * 34 * MIB, disk(10_000 * MIB))
    assert in_order(decision) == [OFFLOAD] * 3 + [KEEP] * 5
    assert decision.added_seconds == 0


def test_what_would_not_hide_is_computed_again_where_that_is_quicker() -> None:
    slow = disk(100 * MIB)  # a unit takes 0.68 s down and up, its forward 0.1 s
    decision = choose(blocks(), 4 * 34 * MIB, slow)
    assert decision.peak_bytes <= 4 * 34 * MIB
    assert set(in_order(decision)) == {OFFLOAD, RECOMPUTE, KEEP}
    assert in_order(decision)[0] is OFFLOAD  # one of them hides
    assert in_order(decision)[-1] is KEEP


def test_without_a_tier_below_units_are_computed_again() -> None:
    decision = choose(blocks(), 4 * 34 * MIB, None)
    assert set(in_order(decision)) == {RECOMPUTE, KEEP}
    assert decision.peak_bytes <= 4 * 34 * MIB


def test_units_that_save_most_for_a_second_are_computed_again_first() -> None:
    cheap, dear = block(0, seconds=0.1), block(1, seconds=1.0)
    decision = choose([dear, cheap, block(2)], 2 * 34 * MIB + 2 * MIB, None)
    assert decision.choices == {1: KEEP, 0: RECOMPUTE, 2: KEEP}


def test_a_unit_that_must_not_run_twice_does_not() -> None:
    units = [replace(unit, can_recompute=unit.unit != 2) for unit in blocks()]
    decision = choose(units, MIB, None)
    assert decision.choices[2] is KEEP
    assert decision.peak_bytes > MIB  # the caller can tell that it does not fit


def test_where_even_one_unit_is_too_much_at_once_all_of_them_move() -> None:
    decision = choose(blocks(), 20 * MIB, disk(100 * MIB))
    assert set(in_order(decision)) == {OFFLOAD}
    assert decision.peak_bytes <= 20 * MIB


def test_the_inputs_of_units_that_run_again_move_before_all_does() -> None:
    many = [block(unit) for unit in range(64)]
    decision = choose(many, 60 * MIB, disk(100 * MIB))
    assert BOTH in in_order(decision)
    assert decision.peak_bytes <= 60 * MIB


def test_a_first_forward_keeps_only_what_is_known_to_fit() -> None:
    assert first_choice([3, 4], 10, room_bytes=10, has_link=True) == {3: KEEP, 4: KEEP}
    assert first_choice([3, 4], 11, room_bytes=10, has_link=True) == {3: OFFLOAD, 4: OFFLOAD}
    assert first_choice([3, 4], None, room_bytes=10, has_link=False) == {3: RECOMPUTE, 4: RECOMPUTE}


def test_a_link_without_a_speed_is_refused() -> None:
    with pytest.raises(ValueError, match="up_bytes_per_second must be positive"):
        Link(down_bytes_per_second=1.0, up_bytes_per_second=0.0)


def test_what_is_written_late_and_what_comes_late_is_waited_for() -> None:
    units = blocks(2)
    link = disk(34 * MIB / 0.1)  # a unit moves in the time of a forward
    assert added_seconds(units, [OFFLOAD, KEEP], link) == pytest.approx(0)
    assert added_seconds(units, [KEEP, OFFLOAD], link) == pytest.approx(0.1 + 0.1)
    assert added_seconds(units, [RECOMPUTE, KEEP], link) == pytest.approx(0.1)


@settings(max_examples=200, deadline=None)
@given(units_of_models, st.integers(50, 4000), links)
def test_what_can_fit_without_moving_fits_and_nothing_is_chosen_in_vain(
    units: list[UnitCost], room: int, link: Link | None
) -> None:
    decision = choose(units, room, link)
    chosen = in_order(decision)
    assert decision.peak_bytes == peak_bytes(units, chosen, link)
    assert all(unit.allows(choice, link) for unit, choice in zip(units, chosen, strict=True))
    if decision.peak_bytes <= room:
        for at, choice in enumerate(chosen):
            if choice is not KEEP:
                assert peak_bytes(units, [*chosen[:at], KEEP, *chosen[at + 1 :]], link) > room
    elif link is None:
        assert all(peak_bytes(units, other, link) > room for other in possible(units, link))


@settings(max_examples=100, deadline=None)
@given(units_of_models, links)
def test_more_room_never_takes_longer_where_units_are_alike(units: list[UnitCost], link: Link | None) -> None:
    alike = [replace(units[0], unit=at) for at in range(6)]
    rooms = range(0, 6 * units[0].saved_bytes + 1, max(units[0].saved_bytes // 2, 1))
    found = [choose(alike, room, link) for room in rooms]
    fitting = [decision for decision, room in zip(found, rooms, strict=True) if decision.peak_bytes <= room]
    for less, more in pairwise(fitting):
        assert more.added_seconds <= less.added_seconds + 1e-9
