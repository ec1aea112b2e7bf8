"""`gemini.utils`: what scripts call around their training."""

import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from gemini.colossal import timer as timer_module
from gemini.utils import MultiTimer, Timer, conditional_context, ensure_path_exists, set_seed


def test_a_seed_repeats_the_numbers_of_python_numpy_and_torch() -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        drawn = []
        for _ in range(2):
            set_seed(3)
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
        set_seed(4)
        other = (random.random(), np.random.rand(), torch.rand(1).item())
        assert drawn[0] == drawn[1]
        assert not set(drawn[0]) & set(other)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    for _ in range(2):
        ensure_path_exists(tmp_path / "a" / "b" / "file.pt")
    assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b" / "file.pt").exists()


def test_a_context_is_entered_if_it_is_enabled() -> None:
    with conditional_context(torch.no_grad()):
        assert not torch.is_grad_enabled()
    with conditional_context(torch.no_grad(), enable=False):
        assert torch.is_grad_enabled()
    with conditional_context(nullcontext("value")) as value:
        assert value == "value"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time is the last number of the list."""
    times = [100.0]
    monkeypatch.setattr(timer_module.time, "perf_counter", lambda: times[-1])
    return times


def test_a_timer_measures_from_start_to_stop_and_keeps_what_it_is_told_to(clock: list[float]) -> None:
    timer = Timer()
    timer.start()
    clock.append(103.0)
    assert timer.lap() == 3.0
    clock.append(104.0)
    assert timer.stop(keep_in_history=True) == 4.0
    timer.start()
    clock.append(106.0)
    assert timer.stop() == timer.get_elapsed_time() == 2.0
    timer.start()
    clock.append(107.0)
    timer.stop(keep_in_history=True)
    assert (timer.has_history, timer.get_history_sum(), timer.get_history_mean()) == (True, 5.0, 2.5)
    timer.reset()
    assert (timer.has_history, timer.get_history_sum(), timer.get_elapsed_time()) == (False, 0, 0.0)


def test_a_timer_waits_for_the_device_before_it_looks_at_the_clock(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the device was asked for takes a second."""
    accelerator = type(timer_module.get_accelerator())
    monkeypatch.setattr(accelerator, "synchronize", lambda self: clock.append(clock[-1] + 1))
    timer = Timer()
    timer.start()
    assert timer.stop() == 1.0


def test_a_timer_that_is_not_running_and_one_that_is_say_so() -> None:
    timer = Timer()
    with pytest.raises(RuntimeError, match=r"not running: call start\(\)"):
        timer.stop()
    with pytest.raises(ValueError, match="keep_in_history=True"):
        timer.get_history_mean()
    timer.start()
    with pytest.raises(RuntimeError, match=r"is running: call stop\(\)"):
        timer.get_elapsed_time()


def test_timers_by_name_measure_apart(clock: list[float]) -> None:
    timers = MultiTimer()
    timers.start("forward")
    clock.append(101.0)
    timers.start("backward")
    clock.append(103.0)
    assert timers.stop("forward", keep_in_history=True) == 3.0
    assert timers.stop("backward", keep_in_history=True) == 2.0
    assert {name: each.get_history_sum() for name, each in timers} == {"forward": 3.0, "backward": 2.0}
    timers.reset("forward")
    assert (timers.get_timer("forward").has_history, timers.get_timer("backward").has_history) == (False, True)
    timers.reset()
    assert not timers.get_timer("backward").has_history


def test_timers_that_are_off_measure_nothing() -> None:
    timers = MultiTimer(on=False)
    timers.start("forward")
    assert timers.stop("forward", keep_in_history=True) is None
    assert (timers.is_on(), list(timers)) == (False, [])
    timers.set_status(True)
    timers.start("forward")
    assert timers.is_on() and [name for name, _ in timers] == ["forward"]
