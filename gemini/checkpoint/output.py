"""One file being written: every byte counted, forced to the disk at the end, faults in our words."""

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import TracebackType

from gemini.errors import CheckpointError
from gemini.sizes import format_bytes

from .progress import Tell, unseen

PAGE_BYTES = 4096
LEAST_DIRECT_BYTES = 1 << 16
"""Below, a direct write's latency costs more than the copy that it saves."""
_SYNC_FILE_RANGE_WRITE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Output:
    """A new file, writable like a Python file. A context manager that syncs and closes.

    Parameters
    ----------
    path
        The file to make.
    final
        Where it will end up, for messages.
    nbytes
        Room to reserve before the first byte, so that a full disk is known before an hour of writing; 0: none.
    tell
        For the writer of the file, to show how far it is.

    Raises
    ------
    CheckpointError
        By every method, when the system refuses.
    """

    def __init__(self, path: Path, final: Path, nbytes: int = 0, tell: Tell = unseen) -> None:
        self.path = path
        self.final = final
        self.tell = tell
        self.written = 0
        self.fault: CheckpointError | None = None
        """The first fault, for callers whose library hides it."""
        self._nbytes = nbytes
        self._lock = Lock()
        self._fd = self._direct_fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            if nbytes:
                _reserve(self._fd, nbytes)
                self._direct_fd = _open_direct(path)
        except OSError as error:
            self._close()
            raise self._failure(error) from error

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
        except OSError as fault:
            raise self._failure(fault) from fault
        finally:
            self._close()

    def write(self, data: bytes | memoryview) -> int:
        """Append all of ``data``."""
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.write(self._fd, view[done:])
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self.written += done
        return done

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` from byte ``offset`` on; any thread may. Not mixed with `write`.

        What fills pages of the file, and lies in memory as in these, goes around the page cache where the file system
        can do that: it takes no RAM and no second copy, and drives nothing out (measured: less than half of the time).
        """
        begin, end = _whole_pages(offset, data) if self._direct_fd >= 0 else (len(data), len(data))
        try:
            self._write_at(self._fd, offset, data[:begin])
            self._write_at(self._direct_fd, offset + begin, data[begin:end])
            self._write_at(self._fd, offset + end, data[end:])
        except OSError as error:
            raise self._failure(error) from error
        with self._lock:
            self.written += len(data)

    def _write_at(self, fd: int, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(fd, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or fd == self._fd:
                    raise
                fd = self._fd  # an alignment that this file system does not take
            if done % PAGE_BYTES:
                fd = self._fd  # the rest does not begin with a page

    def begin_writeback(self, offset: int, nbytes: int) -> None:
        """Have the system begin to write these bytes to the disk, so that little is left for the sync at the end."""
        if (sync_file_range := _sync_file_range()) is not None:
            sync_file_range(self._fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)  # what fails here, fails in the sync

    def flush(self) -> None:
        """Nothing is held back."""

    def _failure(self, error: OSError) -> CheckpointError:
        of = f" of {self._nbytes}" if self._nbytes else ""
        self.fault = failure(self.final, error, f"could not be written (after {self.written}{of} bytes)")
        if error.errno in _FULL and self._nbytes:
            need = f"the file needs {self._nbytes} bytes ({format_bytes(self._nbytes)})"
            self.fault = CheckpointError(f"{self.fault}; {need}")
        return self.fault

    def _close(self) -> None:
        fds, self._fd, self._direct_fd = (self._fd, self._direct_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def failure(path: Path, error: OSError, what: str) -> CheckpointError:
    """What the system said about a path."""
    return CheckpointError(f"{path} {what}: {error.strerror or error}. A checkpoint that was there before is as it was")


def make_parent(path: Path, final: Path) -> None:
    """Have the folder of a new file be there.

    Raises
    ------
    CheckpointError
        When the system refuses.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise failure(final, error, "cannot be written") from error


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _open_direct(path: Path) -> int:
    """The same file without the page cache, or -1 where the file system cannot do that."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return -1


def _whole_pages(offset: int, data: memoryview) -> tuple[int, int]:
    """Where the pages of the file that ``data`` fills begin and end in it; an empty range if they cannot be direct."""
    begin = -(-offset // PAGE_BYTES) * PAGE_BYTES - offset
    end = (offset + len(data)) // PAGE_BYTES * PAGE_BYTES - offset
    if end - begin < LEAST_DIRECT_BYTES:
        return len(data), len(data)
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    return (len(data), len(data)) if (offset - address) % PAGE_BYTES else (begin, end)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's, which Python lacks; None elsewhere."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
