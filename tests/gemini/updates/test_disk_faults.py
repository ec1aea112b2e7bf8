"""Training on a disk that fails: an error of the step, after which it goes on as if nothing had been."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, check_same
from parity import check_at_rest
from torch import nn

from gemini.boosted import boosted
from gemini.chunk import DiskBuffer
from gemini.errors import OffloadError
from gemini.updates.trial import Trial

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


class Faults:
    """Makes one call to the disk fail, or all of them."""

    def __init__(self) -> None:
        self.fails_at = -1
        self.is_broken = False
        self.calls = 0
        self.kind = errno.EIO
        self._lock = threading.Lock()

    def check(self) -> None:
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
        if self.is_broken or number == self.fails_at:
            raise OSError(self.kind, os.strerror(self.kind))

    def arm(self, fails_at: int) -> None:
        with self._lock:
            self.calls, self.fails_at = 0, fails_at


@contextmanager
def faults() -> Iterator[Faults]:
    found, read, write = Faults(), os.preadv, os.pwritev

    def failing_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        found.check()
        return read(fd, buffers, offset)

    def failing_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        try:
            found.check()
        except OSError:
            write(fd, [bytes(len(buffers[0]))], offset)  # any part of a range may have changed
            raise
        return write(fd, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", failing_read)
        patch.setattr(os, "pwritev", failing_write)
        yield found


def until_it_works(work: Callable[[], Any], errors: list[str], give_up: Callable[[], None] = lambda: None) -> Any:
    """Do it again after an error of the disk, as a training script would."""
    while True:
        try:
            return work()
        except OffloadError as error:
            errors.append(str(error))
            give_up()


def one_step(run: Trained, number: int, errors: list[str]) -> float:
    def forward_and_backward() -> float:
        torch.manual_seed(number)  # dropout, the same in each attempt
        loss = run.loss(number)
        run.backward(loss)
        return loss.item()

    loss: float = until_it_works(forward_and_backward, errors, run.optimizer.zero_grad)
    until_it_works(run.optimizer.step, errors)
    run.optimizer.zero_grad()
    return loss


class Deep(Trained):
    """Masters have room in RAM beside what the disk takes for itself, and not all moments have."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(layer for _ in range(3) for layer in list(super(Deep, self).build_model())[:-2]))


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        pytest.param("fp32", {}, marks=pytest.mark.heavy),
        pytest.param("bf16", {"max_norm": 0.1}, marks=pytest.mark.heavy),
        ("bf16", {"disk_checksums": True}),
        ("bf16", {"split_master": True, "host_memory": "640KiB"}),
    ],
    ids=["fp32", "bf16, clipped", "bf16, checksums", "bf16, split masters"],
)
def test_after_a_failure_of_any_one_call_of_a_step_training_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    placement, make = {**PLACEMENTS["disk"], **options}, Deep if "split_master" in options else Trained
    sound, run = make(placement, precision), make(placement, precision)
    errors: list[str] = []
    for number in range(2):
        assert one_step(run, number, errors) == one_step(sound, number, [])
    assert errors == [] and run.model.memory_stats()["move/disk_read_bytes"] > 0
    failed_calls, number = 0, 2
    while True:  # a step for each call that a step makes
        expected = one_step(sound, number, [])
        check_at_rest(sound.model)  # nothing of it reads or writes any more
        with faults() as disk:
            disk.arm(failed_calls)
            before = len(errors)
            loss = one_step(run, number, errors)
            until_it_works(lambda: run.model.memory_stats() and check_at_rest(run.model), errors)
            was_called = disk.calls > failed_calls
        assert loss == expected
        if not was_called:
            break
        # None, if it was of an update that began ahead of the step, which then does it.
        assert len(errors) <= before + 1, f"call {failed_calls}: {errors[before:]}"
        assert len(errors) == before or ("Input/output error" in errors[-1] and "of chunk" in errors[-1])
        failed_calls, number = failed_calls + 1, number + 1
    assert failed_calls > 20 and len(errors) > failed_calls // 2
    assert any(chunk.is_split for chunk in boosted(run.model).manager.chunks) == ("split_master" in options)
    check_same(run, sound)


def test_a_gradient_that_cannot_be_written_is_told_once_however_late_its_update_learns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {**PLACEMENTS["disk"], "disk_checksums": True}
    sound, run = Trained(options, "bf16"), Trained(options, "bf16")
    errors: list[str] = []
    for number in range(2):
        assert one_step(run, number, errors) == one_step(sound, number, errors)
    begun, decided = threading.Event(), threading.Event()
    last = "gradient of chunk 0"  # the others are told in backward, after which all gradients are dropped

    def begins(trial: Trial, start: int) -> bool:
        result = begin(trial, start)
        if trial.chunk.index == 0:
            begun.set()
        return result

    def learns_late(trial: Trial) -> bool:
        if trial.chunk.index == 0:
            decided.wait(20)
        return fail(trial)

    def decides(decide: Callable[[Trial], Any]) -> Callable[[Trial], Any]:
        def decided_now(trial: Trial) -> Any:
            result = decide(trial)
            if trial.chunk.index == 0:
                decided.set()
            return result

        return decided_now

    def fails_once(buffer: DiskBuffer, *arguments: Any) -> None:
        if last in buffer.what and not failed:
            failed.append(buffer.what)
            begun.wait(20)
            raise OffloadError(errno.EIO, f"it is {buffer.what}")
        write(buffer, *arguments)

    failed: list[str] = []
    write, begin, fail = DiskBuffer.write, Trial.begin, Trial.fail
    expected = one_step(sound, 2, [])
    with monkeypatch.context() as patch:
        patch.setattr(DiskBuffer, "write", fails_once)
        patch.setattr(Trial, "begin", begins)
        patch.setattr(Trial, "fail", learns_late)
        for name in ("confirm", "call_off"):
            patch.setattr(Trial, name, decides(getattr(Trial, name)))
        assert one_step(run, 2, errors) == expected
        until_it_works(lambda: run.model.memory_stats() and check_at_rest(run.model), errors)
    assert failed and begun.is_set() and len(errors) == 1, errors
    assert one_step(run, 3, errors) == one_step(sound, 3, errors)
    check_same(run, sound)


def test_as_long_as_the_disk_is_full_each_step_says_so_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sound, run = Trained(PLACEMENTS["disk"]), Trained(PLACEMENTS["disk"])
    for number in range(2):
        one_step(run, number, [])
        one_step(sound, number, [])
    check_at_rest(run.model)
    with faults() as disk:
        disk.is_broken, disk.kind = True, errno.ENOSPC
        for _ in range(3):
            with pytest.raises(OffloadError, match="No space left on device"):
                run.step(2)
            run.optimizer.zero_grad()
    assert one_step(run, 2, []) == one_step(sound, 2, [])
    check_same(run, sound)
