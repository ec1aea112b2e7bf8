"""Disks that are full, fail, corrupt, or are slow."""

import ctypes
import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import WIDTH, batches, layers, mean_square
from parity import Task, check_parity

from gemini.activations import make
from gemini.activations.departures import Departures
from gemini.activations.disk import aligned
from gemini.activations.storage import SavedStorage
from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.chunk.disk_file import PAGE_BYTES, DiskFile
from gemini.errors import OffloadError
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.usefixtures("one_thread")

OFFLOAD = {"activation_policy": "offload"}


def task() -> Task:
    return Task(lambda: layers(4), batches(3), mean_square)


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "stay in memory" in record.message]


def test_what_a_full_disk_does_not_take_stays_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        if offset >= 3 * PAGE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING):
        model = check_parity(task(), offload_dir=tmp_path, **OFFLOAD)
    assert len(refusals(caplog)) == 1
    assert "No space left" in refusals(caplog)[0]
    assert model.memory_stats()["activation/leave_count"] > 0
    assert model.memory_stats()["activation/refuse_count"] > 0


def test_what_the_capacity_of_the_disk_does_not_take_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = check_parity(task(), offload_dir=tmp_path, disk_memory=2 * PAGE_BYTES, **OFFLOAD)
    assert boosted(model).manager.ledger.peak(Tier.DISK) <= 2 * PAGE_BYTES
    assert "disk_memory" in refusals(caplog)[0]


def test_a_disk_that_cannot_write_costs_only_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwritev", fails)
    model = check_parity(task(), offload_dir=tmp_path, **OFFLOAD)
    assert len(refusals(caplog)) == 1
    assert model.memory_stats()["activation/disk_bytes"] == 0


def test_a_disk_that_cannot_read_fails_backward_and_another_one_may_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers(3)
    plugin = GeminiPlugin(precision="fp32", offload_dir=tmp_path, telemetry=False, **OFFLOAD)
    model, *_ = Booster(plugin=plugin).boost(model, HybridAdam(model.parameters()))
    loss = mean_square(model, batches(1)[0])
    store = boosted(model).saving._store
    store.settle()
    store._returns.arrived_below(store._departures.finish(wait=True))

    def fails(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fails)
        with pytest.raises(OffloadError, match="reading at byte"):
            loss.backward(retain_graph=True)
    loss.backward()


def test_a_disk_that_corrupts_is_found_out_with_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = DiskFile.read

    def corrupts(self: DiskFile, offset: int, address: int, nbytes: int, what: str) -> None:
        read(self, offset, address, nbytes, what)
        torch.frombuffer((ctypes.c_char * 1).from_address(address), dtype=torch.uint8).add_(1)

    monkeypatch.setattr(DiskFile, "read", corrupts)
    with pytest.raises(OffloadError, match="are not what was written"):
        check_parity(task(), offload_dir=tmp_path, disk_checksums=True, **OFFLOAD)


def test_checksums_of_a_sound_disk_agree(tmp_path: Path) -> None:
    check_parity(task(), offload_dir=tmp_path, disk_checksums=True, **OFFLOAD)


@pytest.mark.parametrize("skip", [0, 64, 1000, 4095])
def test_memory_comes_back_at_the_same_place_of_a_page(skip: int) -> None:
    memory = aligned(5000, skip)
    assert memory.data_ptr() % PAGE_BYTES == skip
    assert memory.nbytes() == 5000


def test_no_more_is_on_its_way_than_the_limit_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, write, seen = 2 * batches(1)[0].nbytes, DiskFile.write, []
    begin = Departures._begin
    may_write = threading.Event()

    def noted(self: Departures, saved: SavedStorage) -> None:
        begin(self, saved)
        seen.append(sum(saved.nbytes for saved in self._under_way()))
        if seen[-1] >= limit:
            may_write.set()  # nothing had been written so far

    def waits(self: DiskFile, *arguments: Any) -> None:
        assert may_write.wait(60)
        write(self, *arguments)

    monkeypatch.setattr(make, "LIMIT_BYTES", limit)
    monkeypatch.setattr(Departures, "_begin", noted)
    monkeypatch.setattr(DiskFile, "write", waits)
    check_parity(task(), offload_dir=tmp_path, **OFFLOAD)
    assert max(seen) == limit


def test_a_policy_without_a_place_is_refused_before_anything_changes() -> None:
    model = layers(1)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="Set offload_dir to a folder"):
        Booster(plugin=GeminiPlugin(**OFFLOAD)).boost(model)
    assert type(model) is torch.nn.Sequential
    assert dict(model.named_parameters()) == before
    with pytest.raises(ValueError, match=r"activation_policy must be None or .*, got 'everything'"):
        GeminiPlugin(activation_policy="everything")


def test_the_file_grows_and_shrinks(tmp_path: Path) -> None:
    model = layers(3)
    plugin = GeminiPlugin(precision="fp32", offload_dir=tmp_path, telemetry=False, **OFFLOAD)
    model, *_ = Booster(plugin=plugin).boost(model, HybridAdam(model.parameters()))
    file = boosted(model).saving._store._below._places[0].file
    sizes = []
    for rows in (4, 64, 4, 4):
        model(torch.randn(rows, 64, WIDTH)).sum().backward()
        boosted(model).saving.rest(10.0)
        sizes.append(file.nbytes)
    assert sizes[1] > sizes[0]
    assert sizes[3] < sizes[1] // 2
