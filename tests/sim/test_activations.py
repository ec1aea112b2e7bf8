"""Saved tensors leave a device with memory and streams of its own, and come back, in any order of streams."""

from pathlib import Path

import pytest
from parity import check_equal, run_managed
from sim_tasks import PLACEMENTS, SEED, expected, in_folder, task
from simulated import SimulatedDevice

from gemini.activations import leavers, make
from gemini.boosted import boosted

pytestmark = pytest.mark.own_process()

OFFLOAD = {"activation_policy": "offload"}
ORDERS = [(SEED, 0.0, 1.0), (SEED, 0.3, 0.5), (SEED + 1, 0.0, 0.5), (SEED + 2, 0.3, 1.0), (SEED + 3, 0.6, 0.5)]


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leavers, "LEAST_BYTES", 0)


@pytest.mark.parametrize("name", ["device", "host", "disk"])
def test_training_gives_the_numbers_of_the_cpu(device: SimulatedDevice, tmp_path: Path, name: str) -> None:
    run, model = run_managed(task(), **OFFLOAD, **in_folder(PLACEMENTS[name], tmp_path))
    check_equal(run, expected())
    stats = model.memory_stats()
    assert stats["activation/leave_count"] > 0 < stats["activation/return_count"]


@pytest.mark.parametrize(("order", "limit"), list(zip(ORDERS, [1, 4000, 1 << 20, 4000, 1 << 20], strict=True)), ids=str)
def test_no_order_of_streams_changes_numbers(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, order: tuple[int, float, float], limit: int
) -> None:
    monkeypatch.setattr(make, "LIMIT_BYTES", limit)
    device.seed(*order)
    run, model = run_managed(task(), **OFFLOAD)
    check_equal(run, expected())
    boosted(model).saving.rest(10.0)
    assert boosted(model).saving.counts.host_bytes == 0
