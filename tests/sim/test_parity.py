"""Training on a device with memory and streams of its own gives the numbers of plain PyTorch on the CPU."""

from typing import Any

import pytest
from parity import check_equal, run_managed
from sim_tasks import expected, task
from simulated import SimulatedDevice

pytestmark = pytest.mark.own_process()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_gives_the_numbers_of_the_cpu(
    device: SimulatedDevice, placement: dict[str, Any], precision: str
) -> None:
    run, model = run_managed(task(precision), **placement)
    check_equal(run, expected(precision))
