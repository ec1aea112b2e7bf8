"""Saved tensors leave a device with memory and streams of its own, and come back, in any order of streams."""

import errno
import gc
import os
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from parity import check_equal, run_managed
from sim_tasks import PLACEMENTS, SEED, expected, in_folder, task
from simulated import SimulatedDevice
from torch import Tensor

from gemini.activations import leavers, make
from gemini.activations.host import HostPlace
from gemini.activations.host_blocks import HostBlocks
from gemini.boosted import boosted
from gemini.chunk import Tier
from gemini.errors import OutOfMemory

pytestmark = pytest.mark.own_process()

OFFLOAD = {"activation_policy": "offload"}
ORDERS = [(SEED, 0.0, 1.0), (SEED, 0.3, 0.5), (SEED + 1, 0.0, 0.5), (SEED + 2, 0.3, 1.0), (SEED + 3, 0.6, 0.5)]


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leavers, "LEAST_BYTES", 0)


@pytest.mark.parametrize("name", ["device", "host", "disk"])
def test_training_gives_the_numbers_of_the_cpu(device: SimulatedDevice, tmp_path: Path, name: str) -> None:
    more = {"host_memory": "400KiB"} if name == "disk" else {}  # RAM to pass through
    run, model = run_managed(task(), **OFFLOAD, **{**in_folder(PLACEMENTS[name], tmp_path), **more})
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


@pytest.mark.parametrize("order", ORDERS[:3], ids=str)
def test_what_finds_no_room_in_ram_goes_on_to_disk(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: tuple[int, float, float]
) -> None:
    monkeypatch.setattr(make, "EXPECTED_BYTES", 0)
    monkeypatch.setattr(make, "LIMIT_BYTES", 16384)
    take = HostBlocks.take

    def full(blocks: HostBlocks, nbytes: int) -> Tensor:
        if blocks._limit_bytes != 2 * 16384:  # of those that what goes to disk passes through
            raise OutOfMemory("full")
        return take(blocks, nbytes)

    monkeypatch.setattr(HostBlocks, "take", full)
    device.seed(*order)
    run, model = run_managed(task(), **OFFLOAD, offload_dir=tmp_path)
    check_equal(run, expected())
    saving = boosted(model).saving
    file = saving._store._below._places[1]._file.file
    assert file.written_bytes > 0 < file.read_bytes
    saving.rest(10.0)
    assert saving.counts.disk_bytes == 0
    assert boosted(model).manager.ledger.used(Tier.DISK) == 0


def test_what_cannot_be_written_to_disk_stays_in_ram(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(make, "EXPECTED_BYTES", 0)
    monkeypatch.setattr(os, "pwritev", fails)
    monkeypatch.setattr(HostPlace, "reserve", _only_passing(HostPlace.reserve))
    run, model = run_managed(task(), **OFFLOAD, offload_dir=tmp_path)
    check_equal(run, expected())
    assert len([record for record in caplog.records if "stay in RAM" in record.message]) == 1
    caplog.clear()
    alive = ref(model)
    del run, model
    gc.collect()
    assert alive() is None


def _only_passing(reserve: Any) -> Any:
    def reserving(place: HostPlace, memory: Any) -> Any:
        if place._blocks._limit_bytes > 2 * make.LIMIT_BYTES:
            raise OutOfMemory("full")
        return reserve(place, memory)

    return reserving
