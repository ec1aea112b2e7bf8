"""A disk is measured around the page cache, in bounded time and space, and says why where it cannot be."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemini.chunk import disk_file
from gemini.chunk.disk_file import Requests
from gemini.chunk.disk_probe import LEAST_SPAN_BYTES, Probe, Traffic
from gemini.errors import OffloadError

MIB = 1 << 20


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, int, int]]:
    """Every request that the system gets: its kind, whether it goes around the page cache, its offset and bytes."""
    seen: list[tuple[str, bool, int, int]] = []

    def watched(name: str):  # type: ignore[no-untyped-def]
        real = getattr(os, name)

        def call(fd: int, buffers: list[memoryview], at: int) -> int:
            is_direct = bool(os.O_DIRECT & _flags(fd))
            seen.append((name, is_direct, at, buffers[0].nbytes))
            return int(real(fd, buffers, at))

        return call

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(disk_file.os, name, watched(name))
    return seen


def _flags(fd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Probe]:
    with Probe(tmp_path, LEAST_SPAN_BYTES, lanes=3, block_bytes=MIB, fill_seconds=5.0) as made:
        yield made


def test_all_of_it_goes_around_the_page_cache(moved: list[tuple[str, bool, int, int]], probe: Probe) -> None:
    if not probe.is_direct:
        pytest.skip("this file system has no O_DIRECT")
    for traffic in Traffic:
        assert probe.rate(traffic, 3, MIB, 8 * MIB, 5.0) > 0
    assert moved and all(is_direct for _, is_direct, _, _ in moved)


def test_mixed_traffic_reads_as_much_as_it_writes_in_different_places(
    moved: list[tuple[str, bool, int, int]], probe: Probe
) -> None:
    moved.clear()
    probe.rate(Traffic.MIXED, 1, MIB, 8 * MIB, 5.0)
    reads = [at for name, _, at, _ in moved if name == "preadv"]
    writes = [at for name, _, at, _ in moved if name == "pwritev"]
    assert len(reads) == len(writes) == 4 and not set(reads) & set(writes)


def test_measurements_one_after_the_other_go_through_all_of_the_file(
    moved: list[tuple[str, bool, int, int]], probe: Probe
) -> None:
    moved.clear()
    for _ in range(4):
        probe.rate(Traffic.READ, 1, MIB, 8 * MIB, 5.0)
    assert sorted({at for _, _, at, _ in moved}) == list(range(0, LEAST_SPAN_BYTES, MIB))


def test_a_measurement_ends_when_its_time_is_up(moved: list[tuple[str, bool, int, int]], probe: Probe) -> None:
    moved.clear()
    probe.rate(Traffic.WRITE, 1, MIB, 1 << 50, 0.05)
    assert 0 < len(moved) < 100_000


def test_a_slow_disk_gets_a_shorter_file(tmp_path: Path) -> None:
    with Probe(tmp_path, 64 * MIB, lanes=1, block_bytes=MIB, fill_seconds=0.0) as probe:
        assert probe.span_bytes == LEAST_SPAN_BYTES


def test_where_there_is_less_room_the_file_is_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.posix_fallocate

    def quota(fd: int, offset: int, length: int) -> None:
        if length > 40 * MIB:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", quota)
    with Probe(tmp_path, 128 * MIB, lanes=1, block_bytes=MIB, fill_seconds=5.0) as probe:
        assert probe.span_bytes == 32 * MIB


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OffloadError, match=rf"{os.strerror(number)}.*takes 32 MiB or more: free some"):
        Probe(tmp_path, 128 * MIB, lanes=1, block_bytes=MIB, fill_seconds=5.0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match=r"/proc/no.*cannot be used"):
        Probe(Path("/proc/no"), LEAST_SPAN_BYTES, lanes=1, block_bytes=MIB, fill_seconds=1.0)
    if os.geteuid():
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(OffloadError, match="give a folder that you may write to"):
            Probe(tmp_path, LEAST_SPAN_BYTES, lanes=1, block_bytes=MIB, fill_seconds=1.0)


def test_without_o_direct_what_was_written_is_on_the_disk_before_the_clock_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_file, "_open_direct", lambda fd: -1)
    settled = []
    monkeypatch.setattr(disk_file.DiskFile, "settle", lambda file: settled.append(file))
    with Probe(tmp_path, LEAST_SPAN_BYTES, 2, MIB, 5.0, Requests(MIB, 2)) as probe:
        assert not probe.is_direct and len(settled) == 1
        probe.rate(Traffic.MIXED, 2, MIB, 4 * MIB, 5.0)
        assert len(settled) == 2
