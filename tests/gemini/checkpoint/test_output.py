"""Bytes of one file: around the page cache where that works, and the same bytes where it does not."""

import errno
import mmap
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest

from gemini.checkpoint.output import PAGE_BYTES, Output

NBYTES = 300_000


def write(path: Path, data: bytes) -> None:
    """In pieces that begin and end anywhere, each at its place in pages of memory."""
    memory = memoryview(mmap.mmap(-1, NBYTES + PAGE_BYTES))
    memory[: len(data)] = data
    cuts = [0, 5, PAGE_BYTES, 150_001, 150_002, len(data)]
    with Output(path, path, len(data)) as out:
        for begin, end in sorted(pairwise(cuts), key=lambda cut: -cut[0]):
            out.write_at(begin, memory[begin:end])
            out.begin_writeback(begin, end - begin)
        assert out.written == len(data)


@pytest.fixture
def data() -> bytes:
    return random.Random(0).randbytes(NBYTES)


def test_pieces_at_any_place_make_the_file(tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == data


def test_a_file_system_that_opens_but_does_not_write_directly_gets_the_same_bytes(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def through_the_cache_only(fd: int, data: memoryview, offset: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, data[:10_000], offset)  # and fewer bytes than asked for

    monkeypatch.setattr(os, "pwrite", through_the_cache_only)
    write(tmp_path / "x", data)
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == data


def test_one_that_does_not_open_so_gets_the_same_bytes(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    write(tmp_path / "x", data)
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == data


def is_direct(fd: int) -> bool:
    flags = next(line for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if line.startswith("flags"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)
