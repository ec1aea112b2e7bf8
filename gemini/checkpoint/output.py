"""One file being written: every byte counted, forced to the disk at the end, faults in our words."""

import errno
import os
from pathlib import Path
from types import TracebackType

from gemini.errors import CheckpointError
from gemini.sizes import format_bytes

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
        """Write all of ``data`` from byte ``offset`` on. Not mixed with `write`."""
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self.written += done

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
