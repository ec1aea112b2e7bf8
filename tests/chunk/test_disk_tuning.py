"""Measuring the disk: short, remembered, and never a reason not to train."""

import errno
import os
from pathlib import Path

import pytest

from gemini.chunk import Requests, tuned
from gemini.chunk import disk_tuning as tuning
from gemini.chunk.disk_tuning import DEFAULT, LEAST_TIER_BYTES, choose

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


def test_the_fewest_and_largest_requests_win_among_those_nearly_as_fast() -> None:
    rates = {Requests(MIB, 8): 100.0, Requests(MIB, 4): 95.0, Requests(4 * MIB, 4): 91.0, Requests(MIB, 2): 80.0}
    assert choose(rates) == Requests(4 * MIB, 4)
    assert choose({Requests(MIB, 2): 1.0}) == Requests(MIB, 2)
    assert choose({}) == DEFAULT


def test_a_real_measurement_gives_one_of_the_combinations_and_leaves_nothing_behind(tmp_path: Path) -> None:
    found = tuning.measure(tmp_path)
    assert found.nbytes in tuning.SIZES and found.depth in tuning.DEPTHS
    assert list(tmp_path.iterdir()) == []


def test_no_measurement_begins_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BUDGET_SECONDS", 0.0)
    assert tuning.measure(tmp_path) == DEFAULT


def test_a_folder_is_measured_once(tmp_path: Path, measurements: list[Path]) -> None:
    cache = tmp_path / "cache"
    for folder in ("a", "a", "b", "a"):
        assert tuned(tmp_path / folder, LEAST_TIER_BYTES, cache) == FOUND
    # Neither exists yet: what holds them is the same folder, on the same disk.
    assert measurements == [tmp_path / "a"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        assert tuned(tmp_path / folder, LEAST_TIER_BYTES, cache) == FOUND
    assert measurements == [tmp_path / "a", tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"version": 1, "nbytes": 1048576}', '{"version": 1, "nbytes": 7, "depth": 4}',
     '{"version": 0, "nbytes": 1048576, "depth": 4}', '{"version": 1, "nbytes": 1048576, "depth": 100000}'],
)  # fmt: skip
def test_a_damaged_memory_is_replaced(tmp_path: Path, measurements: list[Path], content: str) -> None:
    cache = tmp_path / "cache"
    tuned(tmp_path, LEAST_TIER_BYTES, cache)
    (entry,) = cache.iterdir()
    sound = entry.read_text()
    entry.write_text(content)
    assert tuned(tmp_path, LEAST_TIER_BYTES, cache) == FOUND
    assert len(measurements) == 2 and entry.read_text() == sound and list(cache.iterdir()) == [entry]


def test_a_small_tier_is_not_worth_it(tmp_path: Path, measurements: list[Path]) -> None:
    assert tuned(tmp_path, LEAST_TIER_BYTES - 1, tmp_path / "cache") == Requests()
    assert measurements == [] and not (tmp_path / "cache").exists()


def test_what_cannot_be_measured_gets_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert tuned(tmp_path, LEAST_TIER_BYTES, tmp_path / "cache") == DEFAULT


def test_what_cannot_be_remembered_is_used_all_the_same(tmp_path: Path, measurements: list[Path]) -> None:
    (tmp_path / "cache").write_text("not a folder")
    for _ in range(2):
        assert tuned(tmp_path, LEAST_TIER_BYTES, tmp_path / "cache") == FOUND
    assert len(measurements) == 2


def test_the_memory_is_in_the_users_cache_folder(
    tmp_path: Path, measurements: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    tuned(tmp_path, LEAST_TIER_BYTES)
    assert len(list((tmp_path / "xdg" / "gemini-memory" / "disk").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tuned(tmp_path, LEAST_TIER_BYTES)
    assert len(list((tmp_path / "home" / ".cache" / "gemini-memory" / "disk").iterdir())) == 1
