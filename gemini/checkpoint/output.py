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

    Raises
    ------
    CheckpointError
        By every method, when the system refuses.
    """

    def __init__(self, path: Path, final: Path, nbytes: int = 0) -> None:
        self.final = final
        self.written = 0
        self.fault: CheckpointError | None = None
        """The first fault, for callers whose library hides it."""
        self._nbytes = nbytes
        self._lock = Lock()
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            if nbytes:
                _reserve(self._fd, nbytes)
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

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` from byte ``offset`` on; any thread may. Not mixed with `write`."""
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise self._failure(error) from error
        with self._lock:
            self.written += done

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
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def failure(path: Path, error: OSError, what: str) -> CheckpointError:
    """What the system said about a path."""
    return CheckpointError(f"{path} {what}: {error.strerror or error}. A checkpoint that was there before is as it was")


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's, which Python lacks; None elsewhere."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
