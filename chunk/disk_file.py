"""A nameless, preallocated file that is read and written at explicit offsets, around the page cache where that works.

Space is taken with ``posix_fallocate``, so that a full disk is an error before training and never a signal in the
middle of it (a sparse memory map dies of SIGBUS). The file has no name (``O_TMPFILE``, or unlinked at once), so nothing
is left behind by a crash.

Large transfers between whole pages go around the page cache (``O_DIRECT``): what goes through it is copied once more,
takes RAM beside the budgets of the tiers (a cgroup counts it, and throttles processes that dirty it), and drives out
what other programs have there. What O_DIRECT cannot do (the partial pages at the ends of a range, memory that is not
aligned like the file, file systems that refuse it) goes through the page cache; the kernel keeps both views of the file
the same as long as no page is used in both ways at once, and no two ranges that are in use together share a page.
"""

import ctypes
import errno
import mmap
import os
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from gemini.errors import OffloadError
from gemini.process_wide import IO_STACK_BYTES
from gemini.safe_files import OWN_FOLDER

from .origin import Origin
from .workers import start_workers

PAGE_BYTES = 4096
LEAST_DIRECT_BYTES = 1 << 16
"""Below, a direct transfer's latency costs more than the copy that it saves."""


_CURES = {
    errno.EMFILE: "raise this process's limit of open files (ulimit -n), or close some",
    errno.ENFILE: "raise the system's limit of open files (fs.file-max), or end programs that have many open",
    errno.ENOSPC: "free some room, or give a folder on another disk",
    errno.EDQUOT: "free some room or raise the quota, or give a folder on another disk",
    errno.EIO: "give a folder on another disk",
}


@dataclass(frozen=True, slots=True)
class Requests:
    """How a transfer is cut up."""

    nbytes: int = 1 << 20
    """Of one request at most, a multiple of the page size."""
    depth: int = 1
    """How many of them the disk is given at once. 1: no threads are made for it."""


@dataclass(frozen=True, slots=True)
class _Request:
    is_direct: bool
    offset: int
    address: int
    nbytes: int


class DiskFile:
    """The file.

    Parameters
    ----------
    folder
        Where it lives; made if it does not exist.
    requests
        How transfers are cut up.
    direct
        Go around the page cache where that is possible.

    Raises
    ------
    OffloadError
        If the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, requests: Requests | None = None, direct: bool = True) -> None:
        self.folder = folder
        self.nbytes = 0
        """Of the file."""
        self.read_bytes = 0
        self.written_bytes = 0
        self.read_seconds = 0.0
        """Of all callers together, as below; bytes by seconds is what one of them achieves."""
        self.write_seconds = 0.0
        self._requests = requests or Requests()
        self._origin = Origin()
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._direct_fd = -1
        try:
            folder.mkdir(OWN_FOLDER, parents=True, exist_ok=True)
            self._fd = _open_nameless(folder)
        except OSError as error:
            raise OffloadError(
                error.errno,
                f"offload_dir {str(folder)!r} cannot be used ({error.strerror}); "
                f"{_CURES.get(error.errno or 0, 'give a folder that you may write to')}",
            ) from error
        if direct:
            self._direct_fd = _open_direct(self._fd)
        if self._requests.depth > 1:
            # The thread that asks for a transfer does a part of it, too.
            self._pool = start_workers(self._requests.depth - 1, "disk", IO_STACK_BYTES)

    @property
    def is_direct(self) -> bool:
        """True while large transfers go around the page cache."""
        return self._direct_fd >= 0

    def reserve(self, offset: int, nbytes: int) -> None:
        """Have the file reach to ``offset + nbytes``. Where it did not, it is zero.

        Raises
        ------
        OSError
            As the system says.
        """
        if offset + nbytes > self.nbytes:
            os.posix_fallocate(self._fd, offset, nbytes)
            self.nbytes = offset + nbytes

    def shrink(self, nbytes: int) -> None:
        """Give the system what lies beyond the first ``nbytes``, if there is anything."""
        if nbytes < self.nbytes:
            os.ftruncate(self._fd, nbytes)
            self.nbytes = nbytes

    def read(self, offset: int, address: int, nbytes: int, what: str) -> None:
        """Fill memory from the file.

        Raises
        ------
        OffloadError
            If the system fails to; it names ``what``.
        """
        begin = time.perf_counter()
        self._transfer(self._read, offset, address, nbytes, what)
        with self._lock:
            self.read_bytes += nbytes
            self.read_seconds += time.perf_counter() - begin

    def write(self, offset: int, address: int, nbytes: int, what: str) -> None:
        """Write memory to the file.

        Raises
        ------
        OffloadError
            If the system fails to; any part of the range may have been written then.
        """
        self._origin.refuse_elsewhere()  # the file is the parent's, too
        begin = time.perf_counter()
        self._transfer(self._write, offset, address, nbytes, what)
        with self._lock:
            self.written_bytes += nbytes
            self.write_seconds += time.perf_counter() - begin

    def settle(self) -> None:
        """Have what was written on the disk, and nothing of the file in the page cache.

        Raises
        ------
        OSError
            As the system says.
        """
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def clear(self, offset: int, nbytes: int, what: str) -> None:
        """Write zeros (which no statistic counts).

        Raises
        ------
        OffloadError
            As `write`.
        """
        self._origin.refuse_elsewhere()
        step = min(nbytes, self._requests.nbytes * self._requests.depth)
        zeros = mmap.mmap(-1, max(step, 1))  # aligned for the disk; pages that are only read take no memory
        address = ctypes.addressof(ctypes.c_char.from_buffer(zeros))
        for at in range(0, nbytes, step or 1):
            self._transfer(self._write, offset + at, address, min(step, nbytes - at), what)

    def _transfer(self, do, offset: int, address: int, nbytes: int, what: str) -> None:  # type: ignore[no-untyped-def]
        first, *rest = self._cut(offset, address, nbytes) or [_Request(False, offset, address, 0)]
        pool = self._pool
        if pool is None or not rest:
            for request in (first, *rest):
                do(request, what)
            return
        futures: list[Future[None]] = []
        try:
            futures.extend(pool.submit(do, request, what) for request in rest)
            do(first, what)
        finally:
            wait(futures)  # also after an error: nobody may use the memory once the caller has it back
        for future in futures:
            future.result()

    def _cut(self, offset: int, address: int, nbytes: int) -> list[_Request]:
        """Direct requests for the whole pages, if they are many and memory is aligned as the file is."""
        stop = offset + nbytes
        begin, end = -(-offset // PAGE_BYTES) * PAGE_BYTES, stop // PAGE_BYTES * PAGE_BYTES
        if not self.is_direct or (offset - address) % PAGE_BYTES or end - begin < LEAST_DIRECT_BYTES:
            begin, end = stop, stop
        step = self._requests.nbytes
        cuts = [
            *((False, at, min(at + step, begin)) for at in range(offset, begin, step)),
            *((True, at, min(at + step, end)) for at in range(begin, end, step)),
            *((False, at, stop) for at in (end,) if at < stop),
        ]
        return [_Request(is_direct, at, address + at - offset, until - at) for is_direct, at, until in cuts]

    def _read(self, request: _Request, what: str) -> None:
        self._do("reading", os.preadv, request, what)

    def _write(self, request: _Request, what: str) -> None:
        self._do("writing", os.pwritev, request, what)

    def _do(self, verb: str, call, request: _Request, what: str) -> None:  # type: ignore[no-untyped-def]
        # Not ``tensor.numpy()``: that makes the storage unresizable for good, and full copies are resized.
        memory = memoryview((ctypes.c_char * request.nbytes).from_address(request.address)).cast("B")
        fd = self._direct_fd if request.is_direct else self._fd
        done = 0
        while done < request.nbytes:
            at = request.offset + done
            try:
                count = int(call(fd, [memory[done:]], at))
            except OSError as error:
                if error.errno == errno.EINVAL and fd == self._direct_fd != self._fd:
                    fd = self._fd  # alignment that this file system does not take
                    continue
                raise OffloadError(
                    error.errno, f"{self.folder}: {verb} at byte {at} failed: {error.strerror}; it is {what}"
                ) from error
            if count == 0:
                problem = (
                    f"the offload file ends at byte {at}; was it truncated?"
                    if verb == "reading"
                    else f"nothing was written at byte {at}"
                )
                raise OffloadError(errno.EIO, f"{self.folder}: {problem} It is {what}")
            done += count
            if done % PAGE_BYTES:
                fd = self._fd  # the rest does not begin with a page

    def close(self) -> None:
        """Give the file back to the system, once nobody uses it any more. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)
        self._close_files()

    def _close_files(self) -> None:
        fds, self._fd, self._direct_fd = (self._fd, self._direct_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self._close_files()  # the threads of a pool that is gone end by themselves


def _open_nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(prefix="gemini-memory-", dir=folder)
    os.unlink(name)
    return fd


def _open_direct(fd: int) -> int:
    """The same file without the page cache, or -1 where the file system cannot do that."""
    try:
        # A descriptor of its own: one file description is either direct or not, for all who use it.
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return -1
    # What goes through the page cache is the ends of ranges: reading on from there would read what is read directly.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return direct
