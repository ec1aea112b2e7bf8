"""Clocks that jump, disks and folders that go, limits that are reached: while a training goes on."""

import errno
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, check_same

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OffloadError

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]
DISK = PLACEMENTS["disk"]


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
@pytest.mark.parametrize("name", ["time", "monotonic", "perf_counter"])
def test_a_clock_that_jumps_changes_no_number(
    name: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clock, calls = getattr(time, name), [0]

    def jumping() -> float:
        calls[0] += 1
        return float(clock()) + (seconds if calls[0] // 7 % 2 else 0.0)

    plain = Trained(None)
    ours = Trained({**DISK, "activation_policy": "offload"})
    for step in range(5):
        if step == 1:
            monkeypatch.setattr(time, name, jumping)
        assert plain_step(plain, step) == plain_step(ours, step)
    monkeypatch.undo()
    check_same(ours, plain)


def plain_step(run: Trained, step: int) -> float:
    torch.manual_seed(step)
    return run.step(step)


class Told(Trained):
    """Writes telemetry."""

    def __init__(self, folder: str) -> None:
        super().__init__(None)
        self.is_managed = True
        self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=folder))
        self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("what", ["full", "broken", "deleted", "read-only"])
def test_telemetry_that_cannot_be_written_costs_one_warning(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, ours = Trained(None), Told(str(tmp_path / "run"))
    for step in range(6):
        if step == 2:
            if what == "deleted":
                shutil.rmtree(tmp_path / "run")
            elif what == "read-only":
                monkeypatch.setattr(os, "open", broken)
            else:
                monkeypatch.setattr(os, "write", full if what == "full" else broken)
        assert plain_step(plain, step) == plain_step(ours, step)
    telemetry = boosted(ours.model).telemetry
    assert telemetry is not None
    telemetry.close()  # writes what is left
    monkeypatch.undo()
    warnings = [r.message for r in caplog.records if r.levelno >= logging.WARNING and "telemetry" in r.message]
    assert len(warnings) == 1 or (what in ("deleted", "read-only") and not warnings)  # the file is open, and goes on
    check_same(ours, plain)


def delete_folder(ours: Trained) -> None:
    shutil.rmtree("disk")


def no_more_files(ours: Trained) -> None:
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@pytest.mark.parametrize("happens", [delete_folder, no_more_files])
def test_what_happens_around_the_disk_tier_while_it_is_used_changes_nothing(
    happens: Callable[[Trained], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, ours = Trained(None), Trained({**DISK, "activation_policy": "offload"})
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for step in range(5):
            if step == 2:
                happens(ours)
            assert plain_step(plain, step) == plain_step(ours, step)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    check_same(ours, plain)


def test_a_file_that_another_process_cuts_off_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = Trained(DISK)
    for step in range(2):
        plain_step(ours, step)
    boosted(ours.model).manager.settle()
    disk = boosted(ours.model).manager.disk
    assert disk is not None
    os.ftruncate(disk.file._fd, 0)
    with pytest.raises(OffloadError, match="was it truncated"):
        for step in range(2, 5):
            plain_step(ours, step)
