"""A refusal of the system is an error that names the limit, and what to raise it by."""

import errno
from pathlib import Path

import pytest

from gemini import system_limits
from gemini.errors import GeminiError, LimitError, OffloadError, OutOfMemory, is_out_of_memory
from gemini.memory import system_memory
from gemini.memory.system_memory import check_least_room, more_room, refused_memory
from gemini.system_limits import refused, refused_thread, soft_limit

REFUSED = RuntimeError("can't start new thread")
MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tpython\nVmSize:\t204800 kB\nVmData:\t102400 kB\nThreads:\t7\n")
    return tmp_path


def limited(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    monkeypatch.setattr(system_limits, "soft_limit", limits.get)


def test_a_thread_that_there_is_no_memory_for_is_out_of_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, used in (("RLIMIT_DATA", 100 * MIB), ("RLIMIT_AS", 200 * MIB)):
        limited(monkeypatch, **{name: used + 8 * MIB})
        error = refused_thread(REFUSED, 8 * MIB, root)
        assert isinstance(error, OutOfMemory)
        assert f"{name} ({108 if name == 'RLIMIT_DATA' else 208}.0 MiB) leaves less; raise {name} by" in str(error)


def test_a_thread_beyond_their_number_says_nothing_of_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, RLIMIT_DATA=200 * MIB, RLIMIT_NPROC=7)
    error = refused_thread(REFUSED, 8 * MIB, root)
    assert isinstance(error, LimitError) and "host_memory" not in str(error)
    assert "it has 7. Its user may have 7 processes" in str(error) and "raise RLIMIT_NPROC (ulimit -u) by 64" in str(
        error
    )


def test_a_refused_file_names_its_limit_also_as_the_cause_of_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, RLIMIT_NOFILE=1024)
    cause = OSError(errno.EMFILE, "Too many open files", "place")
    ours = OffloadError(errno.EMFILE, "no disk tier")
    ours.__cause__ = cause
    for error in (cause, ours):
        told = refused(error)
        assert isinstance(told, LimitError) and "it may have 1024 (RLIMIT_NOFILE); raise RLIMIT_NOFILE" in str(told)
    assert "fs.file-max" in str(refused(OSError(errno.ENFILE, "File table overflow")))
    for other in (OSError(errno.EACCES, "no"), RuntimeError("x"), GeminiError("x")):
        assert refused(other) is None


def test_a_limit_is_a_number_or_none() -> None:
    assert soft_limit("RLIMIT_NOFILE") is None or (soft_limit("RLIMIT_NOFILE") or 0) > 0


def test_mmap_without_memory_is_out_of_memory_and_an_error_of_ours_is_what_it_says() -> None:
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.EIO, "Input/output error"))
    assert not is_out_of_memory(OffloadError(errno.ENOMEM, "of a file system"))


def test_the_limit_is_to_be_raised_where_it_is_lower_than_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_memory, "host_headroom", lambda: (100 * MIB, "RLIMIT_DATA headroom"))
    assert more_room(20 * MIB) is None
    assert more_room(100 * MIB) == f"raise RLIMIT_DATA by {(256 + 16) * MIB} bytes"
    error = refused_memory(MemoryError(), 100 * MIB, 100 * MIB)
    assert isinstance(error, OutOfMemory) and f"raise RLIMIT_DATA by {(256 + 16) * MIB} bytes or more" in str(error)
    monkeypatch.setattr(system_memory, "host_headroom", lambda: (100 * MIB, "available RAM"))
    assert more_room(100 * MIB) == "give this process 272.0 MiB more of RAM (it is short of available RAM)"


def test_a_room_too_small_for_anything_is_refused_with_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_memory, "host_headroom", lambda: (5 * MIB, "RLIMIT_DATA headroom"))
    with pytest.raises(OutOfMemory, match=r"raise RLIMIT_DATA by \d+ bytes or more, a floor"):
        check_least_room()
    monkeypatch.setattr(system_memory, "host_headroom", lambda: (33 * MIB, "RLIMIT_DATA headroom"))
    check_least_room()
