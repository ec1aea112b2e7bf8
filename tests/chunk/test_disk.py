"""The disk tier: exact, preallocated, nameless, and clear about what went wrong."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemini.chunk import DiskBackend, Ledger, MemoryMap, Tier
from gemini.errors import OffloadError, OutOfMemory

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool
]  # fmt: skip


def ledger(nbytes: int = 1 << 20) -> Ledger:
    return Ledger({Tier.DISK: nbytes}, MemoryMap.EMULATED)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskBackend]:
    backend = DiskBackend(tmp_path, ledger())
    yield backend
    backend.close()


def values(numel: int, dtype: torch.dtype) -> Tensor:
    return (
        (torch.randint(0, 100, (numel,)) % 7).to(dtype) if not dtype.is_floating_point else torch.randn(numel).to(dtype)
    )


# -- content


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_come_back_exactly_from_any_offset(disk: DiskBackend, dtype: torch.dtype) -> None:
    disk.allocate(3, torch.uint8, "an odd neighbour")
    buffer = disk.allocate(1001, dtype, "test")
    after = disk.allocate(100, dtype, "neighbour")
    expected = torch.zeros(1001, dtype=dtype)
    for start, count in ((0, 1001), (1, 1), (7, 13), (999, 2), (500, 0)):
        value = values(count, dtype)
        buffer.write(start, value)
        expected[start : start + count] = value
    for start, count in ((0, 1001), (3, 1), (11, 501), (1000, 1), (1001, 0)):
        out = torch.ones(count, dtype=dtype)
        buffer.read(start, out)
        assert torch.equal(out, expected[start : start + count])
    out = torch.ones(100, dtype=dtype)
    after.read(0, out)
    assert not out.any()


def test_parts_of_larger_tensors_can_be_read_into_and_written_from(disk: DiskBackend) -> None:
    buffer = disk.allocate(10, torch.float32, "test")
    source, out = torch.arange(30.0), torch.zeros(30)
    buffer.write(0, source[10:20])
    buffer.read(0, out[5:15])
    assert torch.equal(out[5:15], source[10:20]) and not out[:5].any() and not out[15:].any()


def test_a_new_buffer_reads_as_zeros_and_says_what_it_is(disk: DiskBackend) -> None:
    buffer = disk.allocate(100, torch.float32, "test")
    out = torch.ones(100)
    buffer.read(0, out)
    assert not out.any()
    assert (buffer.tier, buffer.tensor, buffer.nbytes, buffer.numel, buffer.dtype) == (
        Tier.DISK, None, 400, 100, torch.float32
    )  # fmt: skip


@pytest.mark.parametrize("start", [-1, 91])
def test_a_buffer_does_not_reach_into_its_neighbours(disk: DiskBackend, start: int) -> None:
    disk.allocate(100, torch.float32, "before")
    buffer = disk.allocate(100, torch.float32, "test")
    disk.allocate(100, torch.float32, "after")
    for move in (buffer.read, buffer.write):
        with pytest.raises(AssertionError, match="another buffer's"):
            move(start, torch.ones(10))


def test_an_empty_buffer_is_fine(disk: DiskBackend) -> None:
    buffer = disk.allocate(0, torch.float32, "test")
    buffer.write(0, torch.empty(0))
    buffer.read(0, torch.empty(0))


def test_tensors_that_were_read_or_written_can_still_be_resized(disk: DiskBackend) -> None:
    buffer = disk.allocate(10, torch.float32, "test")
    tensor = torch.ones(10)
    buffer.write(0, tensor)
    buffer.read(0, tensor)
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0


def test_the_bytes_moved_are_counted(disk: DiskBackend) -> None:
    buffer = disk.allocate(100, torch.float32, "test")
    buffer.write(0, torch.ones(100))
    buffer.read(10, torch.ones(20))
    assert (disk.written_bytes, disk.read_bytes) == (400, 80)


def test_several_threads_may_read_and_write_different_parts(disk: DiskBackend) -> None:
    buffer = disk.allocate(40_000, torch.float32, "test")

    def work(i: int) -> None:
        for j in range(10):
            at = i * 10_000 + j * 1000
            buffer.write(at, torch.full((1000,), float(at)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    out = torch.empty(40_000)
    buffer.read(0, out)
    assert torch.equal(out, torch.arange(0, 40_000, 1000).float().repeat_interleave(1000))
    assert disk.written_bytes == 160_000


def test_a_system_that_moves_few_bytes_at_a_time_changes_nothing(
    disk: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:7]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: write(fd, [buffers[0][:5]], offset))
    buffer = disk.allocate(100, torch.float32, "test")
    value, out = torch.randn(100), torch.empty(100)
    buffer.write(0, value)
    buffer.read(0, out)
    assert torch.equal(out, value)


# -- errors


def test_a_file_cut_short_is_an_error_and_not_garbage(disk: DiskBackend) -> None:
    buffer = disk.allocate(4096, torch.float32, "test")
    os.ftruncate(disk.file._fd, 5000)
    with pytest.raises(OffloadError, match=r"ends at byte 5000; was it truncated\?") as raised:
        buffer.read(0, torch.empty(4096))
    assert raised.value.errno == errno.EIO


@pytest.mark.timeout(20)
def test_a_system_that_writes_nothing_is_an_error_and_not_a_loop(
    disk: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = disk.allocate(10, torch.float32, "test")
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 0)
    with pytest.raises(OffloadError, match="nothing was written"):
        buffer.write(0, torch.ones(10))


@pytest.mark.parametrize(("name", "verb"), [("preadv", "reading"), ("pwritev", "writing")])
def test_an_error_of_the_system_names_folder_direction_and_offset(
    disk: DiskBackend, monkeypatch: pytest.MonkeyPatch, name: str, verb: str
) -> None:
    disk.allocate(10, torch.float32, "test")
    buffer = disk.allocate(10, torch.float32, "test")

    def fail(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OffloadError, match=f"{verb} at byte 4100 failed: Input/output error") as raised:
        (buffer.read if name == "preadv" else buffer.write)(1, torch.ones(2))
    assert str(disk.folder) in str(raised.value) and raised.value.errno == errno.EIO


def test_a_folder_below_a_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OffloadError, match="cannot be used") as raised:
            DiskBackend(folder, ledger())
        assert str(folder) in str(raised.value) and "give a folder that you may write to" in str(raised.value)


def test_a_folder_that_does_not_exist_is_made(tmp_path: Path) -> None:
    backend = DiskBackend(tmp_path / "a" / "b", ledger())
    assert (tmp_path / "a" / "b").is_dir()
    backend.close()


def test_a_full_ledger_refuses_before_the_file_grows(disk: DiskBackend) -> None:
    disk.allocate(1000, torch.float32, "first")
    size = os.fstat(disk.file._fd).st_size
    with pytest.raises(OutOfMemory, match=r"exp_avg of chunk 3 needs .* set disk_memory to"):
        disk.allocate(1 << 20, torch.float32, "exp_avg of chunk 3")
    assert os.fstat(disk.file._fd).st_size == size


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, OutOfMemory), (errno.EDQUOT, OutOfMemory), (errno.EFBIG, OutOfMemory), (errno.EIO, OffloadError)],
)
def test_space_that_is_refused_is_not_counted_and_the_next_buffer_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    counts = ledger()
    backend = DiskBackend(tmp_path, counts)

    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        with pytest.raises(kind, match=os.strerror(number)) as raised:
            backend.allocate(1000, torch.float32, "the masters")
    assert str(tmp_path) in str(raised.value) and "the masters" in str(raised.value)
    if kind is OutOfMemory:
        assert "set offload_dir to another disk" in str(raised.value)
    assert counts.used(Tier.DISK) == 0
    buffer = backend.allocate(1000, torch.float32, "test")
    buffer.write(0, torch.ones(1000))
    backend.close()


# -- files that are really full, processes that are really killed

FILL = """
import sys, torch
from pathlib import Path
from gemini.chunk import DiskBackend, Ledger, MemoryMap, Tier
from gemini.errors import OutOfMemory
ledger = Ledger({Tier.DISK: 1 << 40}, MemoryMap.EMULATED)
disk = DiskBackend(Path(sys.argv[1]), ledger)
kept = [disk.allocate(50_000, torch.float32, "first")]
kept[0].write(0, torch.arange(50_000.))
try:
    disk.allocate(1 << 20, torch.float32, "second")
except OutOfMemory as error:
    print(error)
assert ledger.used(Tier.DISK) == 200_704  # whole pages
out = torch.empty(50_000)
kept[0].read(0, out)
assert torch.equal(out, torch.arange(50_000.))
"""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)


def test_a_file_size_limit_is_out_of_memory_before_training_and_never_a_signal(tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n" + FILL
    result = run([sys.executable, "-c", limited, str(tmp_path)])
    assert result.returncode == 0, result.stderr
    assert "second needs 4.0 MiB" in result.stdout and str(tmp_path) in result.stdout
    assert "set offload_dir to another disk" in result.stdout


def can_mount() -> bool:
    try:
        return run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="may not mount a tmpfs in a namespace of its own")
def test_a_full_file_system_is_out_of_memory_before_training_and_never_a_signal(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=1M tmpfs {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    result = run(["unshare", "-m", "sh", "-c", mount, sys.executable, FILL])
    assert result.returncode == 0, result.stderr
    assert "disk tier out of memory. second needs 4.0 MiB" in result.stdout
    assert "No space left on device" in result.stdout


HOLD = """
import sys, torch
from pathlib import Path
from gemini.chunk import DiskBackend, Ledger, MemoryMap, Requests, Tier
disk = DiskBackend(Path(sys.argv[1]), Ledger({Tier.DISK: 1 << 40}, MemoryMap.EMULATED), Requests(1 << 20, depth=4))
disk.allocate(1 << 20, torch.float32, "x").write(0, torch.ones(1 << 20))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_nothing_behind(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


# -- the file


@pytest.mark.parametrize("has_tmpfile", [True, False], ids=["O_TMPFILE", "unlinked"])
def test_the_file_has_no_name_and_is_closed_on_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tmpfile: bool
) -> None:
    if not has_tmpfile:
        original = os.open

        def without(path: object, flags: int, *rest: int, **options: object) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return original(path, flags, *rest, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", without)
    backend = DiskBackend(tmp_path, ledger())
    buffer = backend.allocate(10, torch.float32, "test")
    buffer.write(0, torch.ones(10))
    assert list(tmp_path.iterdir()) == []
    fd = backend.file._fd
    assert str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}")
    backend.close()
    backend.close()
    assert not os.path.exists(f"/proc/self/fd/{fd}") or str(tmp_path) not in os.readlink(f"/proc/self/fd/{fd}")
    with pytest.raises(OffloadError, match="Bad file descriptor"):
        buffer.read(0, torch.ones(10))


def test_a_forgotten_backend_closes_its_file(tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if
                   os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}"))  # fmt: skip

    backend = DiskBackend(tmp_path, ledger())
    assert open_files() > 0
    del backend
    gc.collect()
    assert open_files() == 0
