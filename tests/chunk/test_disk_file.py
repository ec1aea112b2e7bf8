"""The file of the disk tier: every byte where it belongs, around the page cache where that works."""

import ctypes
import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gemini.chunk.disk_file import LEAST_DIRECT_BYTES, PAGE_BYTES, DiskFile, Requests
from gemini.errors import OffloadError

pytestmark = pytest.mark.timeout(60)

ROOM = 1 << 20
REQUESTS = Requests(nbytes=8 * PAGE_BYTES, depth=3)


class Memory:
    """Page-aligned bytes."""

    def __init__(self, nbytes: int = ROOM) -> None:
        self.bytes = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskFile]:
    found = DiskFile(tmp_path, REQUESTS, direct=request.param)
    if request.param and not found.is_direct:
        pytest.skip(f"the file system of {tmp_path} has no O_DIRECT")
    found.reserve(0, ROOM)
    yield found
    found.close()


def is_cached(file: DiskFile, offset: int) -> bool:
    """Whether the page cache holds the page of this byte. Asking brings nothing there, as reading would."""
    mapped = mmap.mmap(file._fd, ROOM)
    first, page = ctypes.c_char.from_buffer(mapped), offset // PAGE_BYTES * PAGE_BYTES
    vector = ctypes.c_ubyte()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    assert mincore(ctypes.c_void_p(ctypes.addressof(first) + page), ctypes.c_size_t(1), ctypes.byref(vector)) == 0
    del first
    mapped.close()
    return bool(vector.value & 1)


@pytest.mark.parametrize("seed", range(4))
def test_ranges_of_any_size_and_place_in_file_and_memory_are_exact(file: DiskFile, seed: int) -> None:
    draw = random.Random(seed)
    memory, expected = Memory(), bytearray(ROOM)
    for _ in range(60):
        nbytes = draw.choice([0, 1, 100, PAGE_BYTES, 20_000, 150_000, draw.randrange(300_000)])
        at = draw.randrange(ROOM - nbytes + 1)
        # In half of the cases memory is aligned as the file is, which is what direct transfers need.
        place = draw.choice([at % PAGE_BYTES, draw.randrange(PAGE_BYTES)])
        if draw.random() < 0.5:
            data = draw.randbytes(nbytes)
            memory.bytes[place : place + nbytes] = data
            file.write(at, memory.address + place, nbytes, "x")
            expected[at : at + nbytes] = data
        memory.bytes[:] = b"?" * ROOM
        file.read(at, memory.address + place, nbytes, "x")
        assert memory.bytes[place : place + nbytes] == expected[at : at + nbytes]
        assert memory.bytes[:place].strip(b"?") == memory.bytes[place + nbytes :].strip(b"?") == b""


def test_whole_pages_go_around_the_page_cache_and_nothing_else_does(file: DiskFile) -> None:
    memory = Memory()
    begin, nbytes = PAGE_BYTES - 100, 64 * PAGE_BYTES  # a partial page at each end
    for move in (file.write, file.read):
        move(begin, memory.address + begin, nbytes, "x")
        inside = [is_cached(file, at) for at in range(PAGE_BYTES, begin + nbytes - PAGE_BYTES, PAGE_BYTES)]
        assert inside == [not file.is_direct] * len(inside)
        assert is_cached(file, begin) and is_cached(file, begin + nbytes - 1)
    small = LEAST_DIRECT_BYTES - PAGE_BYTES
    file.write(512 << 10, memory.address, small, "x")
    assert is_cached(file, 512 << 10)


def test_both_ways_see_what_the_other_wrote(file: DiskFile) -> None:
    memory, unaligned = Memory(), Memory()
    for round_ in range(20):
        memory.bytes[: 1 << 18] = bytes([round_]) * (1 << 18)
        file.write(0, memory.address, 1 << 18, "x")
        file.read(0, unaligned.address + 1, 1 << 18, "x")
        assert unaligned.bytes[1 : 1 + (1 << 18)] == memory.bytes[: 1 << 18]
        unaligned.bytes[1:101] = b"y" * 100
        file.write(5000, unaligned.address + 1, 100, "x")
        file.read(0, memory.address, 1 << 18, "x")
        assert memory.bytes[5000:5100] == b"y" * 100 and memory.bytes[5100] == round_


def test_a_file_system_that_refuses_an_alignment_is_used_through_the_page_cache(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.preadv, os.pwritev

    def refusing(call: Callable[..., int]) -> Callable[..., int]:
        def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
            if fd == file._direct_fd:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(fd, buffers, offset)

        return refuse

    monkeypatch.setattr(os, "preadv", refusing(read))
    monkeypatch.setattr(os, "pwritev", refusing(write))
    memory = Memory()
    memory.bytes[:] = random.Random(0).randbytes(ROOM)
    file.write(0, memory.address, ROOM, "x")
    again = Memory()
    file.read(0, again.address, ROOM, "x")
    assert again.bytes[:] == memory.bytes[:]


def test_odd_counts_of_the_system_are_gone_on_from(file: DiskFile, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:5000]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: write(fd, [buffers[0][:7000]], offset))
    memory, again = Memory(), Memory()
    memory.bytes[:] = random.Random(0).randbytes(ROOM)
    file.write(0, memory.address, ROOM, "x")
    file.read(0, again.address, ROOM, "x")
    assert again.bytes[:] == memory.bytes[:]


def test_an_error_of_one_request_surfaces_after_all_others_are_over(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, seen, lock, write = 0, 0, threading.Lock(), os.pwritev

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal running, seen
        with lock:
            running, seen = running + 1, seen + 1
            fails = seen == 2
        try:
            if fails:
                raise OSError(errno.EIO, "Input/output error")
            return write(fd, buffers, offset)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(os, "pwritev", failing)
    memory = Memory()
    with pytest.raises(OffloadError, match=r"writing at byte \d+ failed: Input/output error; it is the masters"):
        file.write(0, memory.address, ROOM, "the masters")
    assert running == 0 and seen == ROOM // REQUESTS.nbytes
    assert file.written_bytes == 0
    file.write(0, memory.address, ROOM, "x")
    assert file.written_bytes == ROOM


def test_so_many_requests_run_at_once_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, together = DiskFile(tmp_path, REQUESTS), threading.Barrier(REQUESTS.depth)
    file.reserve(0, ROOM)

    def meet(fd: int, buffers: list[memoryview], offset: int) -> int:
        together.wait(30)  # breaks if fewer come
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", meet)
    file.read(0, Memory().address, REQUESTS.depth * REQUESTS.nbytes, "x")
    file.close()


def test_a_file_without_depth_has_no_threads_and_closing_ends_those_of_another(tmp_path: Path) -> None:
    def threads() -> int:
        return sum("gemini-memory-disk" in thread.name for thread in threading.enumerate())

    before = threads()
    plain = DiskFile(tmp_path)
    assert threads() == before
    plain.close()
    file = DiskFile(tmp_path, REQUESTS)
    assert threads() == before + REQUESTS.depth - 1
    file.close()
    file.close()
    assert threads() == before


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_used_says_what_would_help(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cures = {
        errno.EMFILE: "ulimit -n",
        errno.ENFILE: "fs.file-max",
        errno.ENOSPC: "free some room",
        errno.EDQUOT: "quota",
        errno.EIO: "another disk",
        errno.EACCES: "that you may write to",
    }

    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OffloadError) as caught:
        DiskFile(tmp_path)
    assert cures[number] in str(caught.value)
    assert ("that you may write to" in str(caught.value)) == (number == errno.EACCES)


def test_a_transfer_that_could_not_be_handed_over_leaves_nobody_using_the_memory(
    file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, begun, may_go_on = Memory(), threading.Event(), threading.Event()
    submit, read, count = ThreadPoolExecutor.submit, os.preadv, [0]

    def refuse_the_third(*args: object) -> object:
        count[0] += 1
        if count[0] == 3:
            assert begun.wait(20)  # by a worker
            may_go_on.set()
            raise MemoryError
        return submit(*args)  # type: ignore[arg-type]

    def slow(*args: Any) -> int:
        begun.set()
        assert may_go_on.wait(20)
        running.append(1)
        moved = read(*args)
        running.pop()
        return moved

    running: list[int] = []
    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse_the_third)
    with pytest.raises(MemoryError):
        file.read(0, memory.address, 8 * REQUESTS.nbytes, "test")
    assert not running
    pool = file._pool
    assert pool is not None and pool._work_queue.empty()
