"""The disk tier: one preallocated, nameless file, read and written at explicit offsets.

Space is taken with ``posix_fallocate`` when a buffer is made, so that a full disk is an error before training and
never a signal in the middle of it (a sparse memory map dies of SIGBUS). The file has no name (``O_TMPFILE``, or
unlinked at once), so nothing is left behind by a crash.
"""

import ctypes
import errno
import os
import tempfile
import time
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from gemini.errors import OffloadError, OutOfMemory

from .ledger import Ledger, mib
from .tier import Tier

PAGE_BYTES = 4096


class DiskBackend:
    """Makes disk buffers in one folder.

    Parameters
    ----------
    folder
        Where the file lives; made if it does not exist.
    ledger
        Asked for every byte.

    Raises
    ------
    OffloadError
        If the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.folder = folder
        self.read_bytes = 0
        self.written_bytes = 0
        self.read_seconds = 0.0
        """Of all threads together, as below; bytes by seconds is what one of them achieves."""
        self.write_seconds = 0.0
        self._ledger = ledger
        self._end = 0
        self._lock = Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = _open_nameless(folder)
        except OSError as error:
            raise OffloadError(
                error.errno,
                f"offload_dir {str(folder)!r} cannot be used ({error.strerror}); give a folder that you may write to",
            ) from error

    def allocate(self, numel: int, dtype: torch.dtype, what: str) -> "DiskBuffer":
        """Take room for ``numel`` zeros.

        Raises
        ------
        OutOfMemory
            If the ledger or the file system has no room.
        """
        nbytes = numel * dtype.itemsize
        room = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        self._ledger.take(Tier.DISK, nbytes, what)
        offset = self._end
        try:
            if room:
                os.posix_fallocate(self._fd, offset, room)
        except OSError as error:
            self._ledger.give(Tier.DISK, nbytes)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OffloadError(
                    error.errno, f"{self.folder}: {error.strerror}, taking {mib(nbytes)} for {what}"
                ) from error
            raise OutOfMemory(
                f"disk tier out of memory. {what} needs {mib(nbytes)} in {str(self.folder)!r}, the file system is full "
                f"after {mib(offset)} of ours ({error.strerror}); free some room, or set offload_dir to another disk"
            ) from error
        self._end = offset + room
        return DiskBuffer(self, offset, numel, dtype)

    def pread(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` from the file."""
        done = 0
        begin = time.perf_counter()
        while done < len(out):
            count = self._attempt("reading", os.preadv, [out[done:]], offset + done)
            if count == 0:
                raise OffloadError(
                    errno.EIO, f"{self.folder}: the offload file ends at byte {offset + done}; was it truncated?"
                )
            done += count
        with self._lock:
            self.read_bytes += done
            self.read_seconds += time.perf_counter() - begin

    def pwrite(self, offset: int, source: memoryview) -> None:
        """Write ``source`` to the file."""
        done = 0
        begin = time.perf_counter()
        while done < len(source):
            count = self._attempt("writing", os.pwritev, [source[done:]], offset + done)
            if count == 0:
                raise OffloadError(errno.EIO, f"{self.folder}: nothing was written at byte {offset + done}")
            done += count
        with self._lock:
            self.written_bytes += done
            self.write_seconds += time.perf_counter() - begin

    def _attempt(self, verb: str, call, buffers: list[memoryview], offset: int) -> int:  # type: ignore[no-untyped-def]
        try:
            return int(call(self._fd, buffers, offset))
        except OSError as error:
            raise OffloadError(
                error.errno, f"{self.folder}: {verb} at byte {offset} failed: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Give the file back to the system. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class DiskBuffer:
    """A home in the file of a `DiskBackend`."""

    tier = Tier.DISK
    tensor: Tensor | None = None

    def __init__(self, backend: DiskBackend, offset: int, numel: int, dtype: torch.dtype) -> None:
        self.numel = numel
        self.dtype = dtype
        self._backend = backend
        self._offset = offset

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int, out: Tensor) -> None:
        self._backend.pread(self._place(start, out), self._bytes_of(out))

    def write(self, start: int, source: Tensor) -> None:
        self._backend.pwrite(self._place(start, source), self._bytes_of(source))

    def _place(self, start: int, tensor: Tensor) -> int:
        assert 0 <= start and start + tensor.numel() <= self.numel, "this would be another buffer's"
        return self._offset + start * self.dtype.itemsize

    def _bytes_of(self, tensor: Tensor) -> memoryview:
        assert tensor.dtype is self.dtype and tensor.is_contiguous() and tensor.device.type == "cpu"
        # Not ``tensor.numpy()``: that makes the storage unresizable for good, and full copies are resized.
        raw = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
        return memoryview(raw).cast("B")


def _open_nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(prefix="gemini-memory-", dir=folder)
    os.unlink(name)
    return fd
