"""Which batches are measured, and what is expected of those that are not."""

import pytest

from gemini.memory.non_model import Batch, NonModelProfile

SMALL, WIDE, LONG = ((4, 128),), ((8, 128),), ((2, 512),)


def measured(profile: NonModelProfile, batch: Batch, *moments: int) -> None:
    profile.begin(batch)
    assert profile.is_measuring
    for nbytes in (9999, *moments[:-1]):  # the first is of what was before the cycle
        profile.add(nbytes)
    profile.end(moments[-1])


def test_the_first_cycle_of_each_kind_is_measured_and_the_next_like_it_are_not() -> None:
    profile = NonModelProfile()
    measured(profile, Batch(True, SMALL), 10, 30, 20)
    profile.begin(Batch(True, SMALL))
    assert not profile.is_measuring
    profile.end(9999)
    profile.begin(Batch(False, SMALL))
    assert profile.is_measuring
    assert profile.heaviest[True].moments == (10, 30, 20) and profile.heaviest[True].peak_bytes == 30


def test_a_heavier_batch_is_measured_again_and_a_lighter_one_is_not() -> None:
    profile = NonModelProfile()
    measured(profile, Batch(True, SMALL), 30)
    measured(profile, Batch(True, WIDE), 55)
    measured(profile, Batch(True, LONG), 90)  # as many elements, but attention grows with the square of the length
    for shapes in (SMALL, WIDE, LONG):
        profile.begin(Batch(True, shapes))
        assert not profile.is_measuring
    assert profile.expected_peak_bytes(Batch(True, SMALL)) == 90


def test_a_larger_batch_is_expected_to_take_more_before_it_has_been_measured() -> None:
    profile = NonModelProfile()
    assert profile.expected_peak_bytes(Batch(True, SMALL)) is None
    measured(profile, Batch(True, SMALL), 30)
    assert profile.expected_peak_bytes(Batch(True, ((12, 128),))) == 90
    assert profile.expected_peak_bytes(Batch(False, SMALL)) is None


def test_a_cycle_that_did_not_end_tells_nothing() -> None:
    profile = NonModelProfile()
    profile.begin(Batch(True, WIDE))
    profile.add(7)
    measured(profile, Batch(True, SMALL), 30)
    assert profile.heaviest[True].moments == (30,)
    profile.begin(Batch(True, WIDE))
    assert profile.is_measuring


@pytest.mark.parametrize("shapes", [(), ((),), ((0, 3),)])
def test_batches_without_elements_are_measured_once(shapes: tuple[tuple[int, ...], ...]) -> None:
    profile = NonModelProfile()
    measured(profile, Batch(True, shapes), 5)
    profile.begin(Batch(True, shapes))
    assert not profile.is_measuring
    assert profile.expected_peak_bytes(Batch(True, shapes)) == 5
