"""The numbers do not depend on the order in which streams go on, nor on the stream that the user trains in."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from parity import check_equal, run_managed
from sim_tasks import expected, task
from simulated import SimulatedDevice

pytestmark = [pytest.mark.one_in(3), pytest.mark.own_process()]

ORDERS = {
    "any": (0.3, 0.5),
    "late": (0.0, 1.0),
    "late, all that is not needed first": (0.0, 0.0),
    "early": (0.8, 0.0),
}
"""Chances: that the device goes on by itself, and that a wait runs only what it needs."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_no_order_of_streams_changes_the_numbers(
    device: SimulatedDevice, placement: dict[str, Any], order: tuple[float, float]
) -> None:
    for seed in range(2):
        device.seed(seed, *order)
        run, _ = run_managed(task("bf16"), **placement)
        check_equal(run, expected("bf16"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_user_may_train_in_a_stream_of_their_own(
    device: SimulatedDevice, placement: dict[str, Any], precision: str
) -> None:
    for seed in range(2):
        device.seed(seed)
        stream = torch.Stream("sim")
        stream.wait_stream(torch.accelerator.current_stream())
        with stream:
            run, _ = run_managed(task(precision), **placement)
        check_equal(run, expected(precision))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("own_stream", [False, True], ids=["", "in a stream of the user's"])
@pytest.mark.parametrize("options", [{}, {"update_in_backward": True}], ids=["in step", "in backward"])
@pytest.mark.usefixtures("late_updates")
def test_what_is_fetched_is_what_the_update_has_made_however_late_it_is(
    device: SimulatedDevice, placement: dict[str, Any], options: dict[str, Any], own_stream: bool
) -> None:
    for seed in range(2):
        device.seed(seed)
        with torch.Stream("sim") if own_stream else nullcontext():
            run, _ = run_managed(task("bf16"), **placement, **options)
        check_equal(run, expected("bf16"))
