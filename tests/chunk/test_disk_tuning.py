"""Measuring the disk: short, remembered, the same answer twice, and never a reason not to train."""

import errno
import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from gemini.chunk import Requests, tuned
from gemini.chunk import disk_tuning as tuning
from gemini.chunk.disk_probe import Traffic
from gemini.chunk.disk_tuning import COMBINATIONS, DEFAULT, LEAST_TIER_BYTES, choose

MIB = 1 << 20
FOUND = Requests(nbytes=4 * MIB, depth=8)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were measured; all with the same result."""
    folders: list[Path] = []

    def measure(folder: Path) -> Requests:
        folders.append(folder)
        return FOUND

    monkeypatch.setattr(tuning, "measure", measure)
    return folders


def test_the_fewest_and_largest_requests_win_among_those_as_fast_as_the_best() -> None:
    rates = {Requests(MIB, 8): 100.0, Requests(MIB, 4): 95.0, Requests(4 * MIB, 4): 91.0, Requests(MIB, 2): 80.0}
    assert choose([rates]) == Requests(4 * MIB, 4)
    assert choose([{Requests(MIB, 2): 1.0}]) == Requests(MIB, 2)
    assert choose([]) == choose([{}]) == DEFAULT


def test_what_rounds_differ_by_is_no_difference_between_requests() -> None:
    few, many = Requests(MIB, 2), Requests(MIB, 8)
    assert choose([{few: 80.0, many: 100.0}] * 3) == many
    noisy = [{few: 70.0, many: 110.0}, {few: 80.0, many: 100.0}, {few: 90.0, many: 90.0}]
    assert choose(noisy) == few
    assert choose([{few: 10.0, many: 200.0}, {few: 10.0, many: 100.0}, {few: 15.0, many: 50.0}]) == many


@pytest.mark.parametrize(
    ("best", "rate_of"),
    [
        # A virtual disk that is as fast with anything but small requests; a slow link that wants many; one spindle.
        (Requests(4 * MIB, 2), lambda one: 2.2 if one.nbytes >= MIB else 1.5),
        (Requests(4 * MIB, 8), lambda one: float(one.depth)),
        (Requests(4 * MIB, 2), lambda one: one.nbytes / MIB / one.depth),
    ],
)
def test_the_same_disk_gets_the_same_answer_in_spite_of_noise(best: Requests, rate_of) -> None:  # type: ignore[no-untyped-def]
    noise = random.Random(0)
    answers = {
        choose([{one: rate_of(one) * noise.uniform(0.95, 1.05) for one in COMBINATIONS} for _ in range(3)])
        for _ in range(200)
    }
    assert answers == {best}


def test_a_real_measurement_gives_one_of_the_combinations_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert tuning.measure(tmp_path, 32 * MIB, rounds=1, seconds=0.3) in COMBINATIONS
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_is_not_whole_counts_for_nothing_beside_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    class Disk:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Disk":
            return self

        def __exit__(self, *_: object) -> None: ...
        def rate(self, traffic: Traffic, lanes: int, block_bytes: int, nbytes: int, seconds: float) -> float:
            clock[0] += 1.0
            assert traffic is Traffic.MIXED
            # Whatever is measured in the second round looks ten times as fast.
            return 1.0 if clock[0] <= len(COMBINATIONS) else 10.0

    monkeypatch.setattr(tuning, "Probe", Disk)
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])
    assert tuning.measure(tmp_path, seconds=len(COMBINATIONS) + 4) == Requests(4 * MIB, 2)
    assert clock[0] == len(COMBINATIONS) + 4
    clock[0] = 0.0
    assert tuning.measure(tmp_path, seconds=0.0) == DEFAULT


def test_a_file_system_is_measured_once(tmp_path: Path, measurements: list[Path]) -> None:
    memory = tmp_path / "memory"
    (tmp_path / "b").mkdir()
    for folder in ("a", "b", "a"):  # the first does not exist yet: what holds it is on the same disk
        assert tuned(tmp_path / folder, LEAST_TIER_BYTES, memory) == FOUND
    assert measurements == [tmp_path / "a"]
    (entry,) = memory.glob("*.json")
    assert json.loads(entry.read_text())["measured_at"] > 0
    if os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev:
        tuned(Path("/dev/shm"), LEAST_TIER_BYTES, memory)
        assert measurements == [tmp_path / "a", Path("/dev/shm")] and len([*memory.glob("*.json")]) == 2


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"version": 2, "nbytes": 1048576}', '{"version": 2, "nbytes": 7, "depth": 4}',
     '{"version": 0, "nbytes": 1048576, "depth": 4}', '{"version": 2, "nbytes": 1048576, "depth": 100000}'],
)  # fmt: skip
def test_a_damaged_memory_is_replaced(tmp_path: Path, measurements: list[Path], content: str) -> None:
    memory = tmp_path / "memory"
    tuned(tmp_path, LEAST_TIER_BYTES, memory)
    (entry,) = memory.glob("*.json")
    entry.write_text(content)
    assert tuned(tmp_path, LEAST_TIER_BYTES, memory) == FOUND
    assert len(measurements) == 2 and json.loads(entry.read_text())["depth"] == FOUND.depth
    assert {path.suffix for path in memory.iterdir()} == {".json", ".lock"}


def _measured_by_a_rank(folder: Path, memory: Path, log: Path) -> None:
    def measure(folder: Path) -> Requests:
        with log.open("a") as file:
            file.write("measured\n")
        return FOUND

    tuning.measure = measure  # type: ignore[assignment]
    assert tuned(folder, LEAST_TIER_BYTES, memory) == FOUND


def test_of_ranks_that_begin_together_one_measures(tmp_path: Path) -> None:
    log, fork = tmp_path / "log", multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_measured_by_a_rank, args=(tmp_path, tmp_path / "memory", log)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert log.read_text() == "measured\n"


def test_a_small_tier_is_not_worth_it(tmp_path: Path, measurements: list[Path]) -> None:
    assert tuned(tmp_path, LEAST_TIER_BYTES - 1, tmp_path / "memory") == Requests()
    assert measurements == [] and not (tmp_path / "memory").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_cannot_be_measured_gets_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert tuned(tmp_path, LEAST_TIER_BYTES, tmp_path / "memory") == DEFAULT


def test_what_cannot_be_remembered_is_used_all_the_same(tmp_path: Path, measurements: list[Path]) -> None:
    (tmp_path / "memory").write_text("not a folder")
    for _ in range(2):
        assert tuned(tmp_path, LEAST_TIER_BYTES, tmp_path / "memory") == FOUND
    assert len(measurements) == 2
