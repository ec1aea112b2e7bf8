"""The dynamic loss scale."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.updates.scaler import LossScaler


def scales(scaler: LossScaler, overflows: str) -> list[float]:
    """The scale after each step; ``x`` is an overflow, ``.`` is none."""
    found = []
    for step in overflows:
        scaler.update(step == "x")
        found.append(scaler.scale)
    return found


def test_the_scale_grows_after_so_many_finite_steps_in_a_row() -> None:
    scaler = LossScaler(scale=4.0, growth_interval=3)
    assert scales(scaler, ".......") == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]


def test_an_overflow_starts_the_count_of_finite_steps_anew() -> None:
    scaler = LossScaler(scale=4.0, growth_interval=3, hysteresis=9)
    assert scales(scaler, "..x...") == [4.0] * 5 + [8.0]


def test_overflows_in_a_row_are_tolerated_up_to_the_hysteresis() -> None:
    scaler = LossScaler(scale=64.0, hysteresis=3)
    assert scales(scaler, "xx.xxxx") == [64.0, 64.0, 64.0, 64.0, 64.0, 32.0, 16.0]


def test_without_hysteresis_the_first_overflow_backs_off() -> None:
    assert scales(LossScaler(scale=64.0, hysteresis=1), "x") == [32.0]


def test_growth_and_backoff_stop_at_the_bounds() -> None:
    scaler = LossScaler(scale=4.0, min_scale=3.0, max_scale=6.0, growth_interval=1, hysteresis=1)
    assert scales(scaler, "..xx.") == [6.0, 6.0, 3.0, 3.0, 6.0]


def test_the_factors_are_those_given() -> None:
    scaler = LossScaler(scale=8.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=1, hysteresis=1)
    assert scales(scaler, ".x") == [32.0, 8.0]


steps = st.text("x.", max_size=40)
scalers = st.builds(
    LossScaler,
    scale=st.sampled_from([1.0, 8.0, 64.0]),
    max_scale=st.sampled_from([64.0, 1024.0]),
    growth_interval=st.integers(1, 4),
    hysteresis=st.integers(1, 3),
)


@settings(deadline=None, max_examples=200)
@given(scaler=scalers, steps=steps)
def test_the_scale_stays_within_its_bounds(scaler: LossScaler, steps: str) -> None:
    assert all(scaler.min_scale <= scale <= scaler.max_scale for scale in scales(scaler, steps))


@settings(deadline=None, max_examples=200)
@given(scaler=scalers, before=steps, after=steps)
def test_a_saved_scaler_goes_on_as_if_nothing_had_happened(scaler: LossScaler, before: str, after: str) -> None:
    scales(scaler, before)
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert other == scaler
    assert scales(other, after) == scales(scaler, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.5}, "min_scale <= initial_scale"),
        ({"min_scale": 0.0}, "0 < min_scale"),
        ({"min_scale": -1.0}, "0 < min_scale"),
        ({"max_scale": 2.0}, "initial_scale <= max_scale"),
        ({"scale": float("nan")}, "initial_scale"),
        ({"max_scale": float("inf")}, "finite"),
        ({"growth_factor": 0.5}, "growth_factor >= 1"),
        ({"growth_factor": float("nan")}, "growth_factor >= 1"),
        ({"backoff_factor": 0.0}, "0 < backoff_factor < 1"),
        ({"backoff_factor": 1.0}, "0 < backoff_factor < 1"),
        ({"growth_interval": 0}, "growth_interval must be 1 or more, got 0"),
        ({"hysteresis": 0}, "hysteresis must be 1 or more, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused_also_when_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossScaler(**options)
    scaler = LossScaler()
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict({**LossScaler(good_steps=7).state_dict(), **options})
    assert scaler == LossScaler()


def test_a_saved_state_with_something_unknown_is_refused_before_anything_changes() -> None:
    scaler = LossScaler()
    with pytest.raises(ValueError, match="'colour'"):
        scaler.load_state_dict({"scale": 8.0, "colour": 3})
    assert scaler == LossScaler()
