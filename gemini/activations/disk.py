"""Saved tensors on DISK, written and read where they lie in RAM.

A storage's bytes lie in the file as they lie in memory: at the same offset from a page boundary. So they go around the
page cache (see `DiskFile`) without a copy in between, and come back to memory that is aligned as theirs was, which some
kernels' results depend on.
"""

import errno
import sys
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, UntypedStorage

from gemini.chunk import (
    IO_STACK_BYTES,
    PAGE_BYTES,
    Checksums,
    DiskFile,
    FreeRoom,
    Ledger,
    Requests,
    Tier,
    close_in_background,
    start_workers,
)

from ..errors import OffloadError, OutOfMemory
from ..sizes import format_bytes
from .place import Passage

T = TypeVar("T")
_WHAT = "tensors saved for backward"


class ActivationFile:
    """A file of its own in the folder of the DISK tier, which grows with what is stored and shrinks again (a `Place`).

    Parameters
    ----------
    folder, requests
        See `DiskFile`.
    ledger
        Asked for every byte.
    checksums
        Compare what is read with the CRC-32 of what was written.

    Raises
    ------
    OffloadError
        If the folder cannot be made or written to.
    OutOfMemory
        If the system refuses a thread.
    """

    def __init__(self, folder: Path, ledger: Ledger, requests: Requests | None = None, checksums: bool = False) -> None:
        self.file = DiskFile(folder, requests)
        self.ledger = ledger
        self.checksums = checksums
        self._writer = start_workers(1, "activations-out", IO_STACK_BYTES)
        self._reader = start_workers(1, "activations-in", IO_STACK_BYTES)
        self._is_closed = False
        self._gaps = FreeRoom(sys.maxsize)
        self._end = 0
        """The byte where the last of the tensors stored since the last `trim` ends."""

    def reserve(self, memory: UntypedStorage) -> "FileRoom":
        return self.room_for(memory.data_ptr(), memory.nbytes())

    def room_for(self, address: int, size: int) -> "FileRoom":
        """Room for ``size`` bytes of RAM that begin at ``address``. Raises as `Place.reserve`."""
        skip = address % PAGE_BYTES
        nbytes = -(-(skip + size) // PAGE_BYTES) * PAGE_BYTES
        self.ledger.take(Tier.DISK, nbytes, _WHAT)
        offset = self._gaps.take(nbytes)
        assert offset is not None, "the last gap has no end"
        try:
            self.file.reserve(offset, nbytes)
        except OSError as error:
            self.give(offset, nbytes)
            raise self._refused(error, nbytes) from error
        self._end = max(self._end, offset + nbytes)
        return FileRoom(self, offset, nbytes, skip, size)

    def _refused(self, error: OSError, nbytes: int) -> Exception:
        folder = str(self.file.folder)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OffloadError(error.errno, f"{folder}: {error.strerror}, taking {format_bytes(nbytes)} for {_WHAT}")
        return OutOfMemory(
            f"disk tier out of memory. {_WHAT} need {format_bytes(nbytes)} in {folder!r}, the file system is full "
            f"after {format_bytes(self.file.nbytes)} of them ({error.strerror}); free some room, or set offload_dir to "
            "another disk"
        )

    def give(self, offset: int, nbytes: int) -> None:
        """Have bytes of the file for others."""
        self._gaps.give(offset, nbytes)
        self.ledger.give(Tier.DISK, nbytes)

    def note_stream(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def trim(self) -> None:
        """Cut off what has not been used since the last time, once nothing is stored and it is worth while."""
        if self._gaps.is_whole:
            if 2 * self._end < self.file.nbytes:
                self.file.shrink(self._end)
            self._end = 0

    def write(self, work: Callable[[], None]) -> "Underway[None]":
        """Have the writing thread do this."""
        return Underway(self._writer.submit(work))

    def read(self, work: Callable[[], T]) -> "Underway[T]":
        """Have the reading thread do this, or this one once it is closed: a graph may outlive its model."""
        if not self._is_closed:
            return Underway(self._reader.submit(work))
        done: Future[T] = Future()
        done.set_result(work())
        return Underway(done)

    def close(self) -> None:
        self._is_closed = True
        for workers in (self._writer, self._reader):
            close_in_background(partial(workers.shutdown, wait=True))


class FileRoom:
    """The bytes of one storage in the file (a `Room`).

    Parameters
    ----------
    file
        Whose bytes they are.
    offset, taken_bytes
        Whole pages of the file.
    skip, nbytes
        Where in them the storage begins, which is how its memory lies in a page; its size.
    """

    tier = Tier.DISK

    def __init__(self, file: ActivationFile, offset: int, taken_bytes: int, skip: int, nbytes: int) -> None:
        self._nbytes = nbytes
        self._file = file
        self._offset = offset
        self.taken_bytes = taken_bytes
        self._skip = skip
        self._checksums = Checksums() if file.checksums else None

    def store(self, memory: UntypedStorage) -> Passage:
        return self._file.write(partial(self.write, memory))

    def load(self) -> tuple[UntypedStorage, Passage]:
        memory = aligned(self._nbytes, self._skip)
        return memory, self._file.read(partial(self.read, memory))

    def write(self, memory: UntypedStorage | Tensor) -> None:
        """Write RAM here; returns when it is written."""
        address = memory.data_ptr()
        self._file.file.write(self._offset + self._skip, address, self._nbytes, _WHAT)
        if self._checksums is not None:
            self._checksums.remember(0, address, self._nbytes)

    def read(self, memory: UntypedStorage | Tensor) -> None:
        """Fill RAM from here; returns when it is filled."""
        address = memory.data_ptr()
        self._file.file.read(self._offset + self._skip, address, self._nbytes, _WHAT)
        if self._checksums is not None and self._checksums.disagreeing(0, address, self._nbytes):
            raise OffloadError(
                errno.EIO,
                f"{self._file.file.folder}: {format_bytes(self._nbytes)} of {_WHAT} are not what was written there; "
                "the disk corrupts data, or something else writes to it. Set offload_dir to another disk and go on "
                "from the last checkpoint",
            )

    def release(self) -> None:
        self._file.give(self._offset, self.taken_bytes)


class Underway(Generic[T]):
    """Work of a worker thread, whose task holds the memory (a `Passage`)."""

    def __init__(self, future: "Future[T]") -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def has_result(self) -> bool:
        """True if the work is over and went well."""
        return self._future.done() and not self._future.cancelled() and self._future.exception() is None

    def result(self) -> T:
        """What the work returns, when it is over; raises what went wrong."""
        return self._future.result()

    def wait(self) -> None:
        self._future.result()

    def error(self) -> BaseException | None:
        """What went wrong in work that is over. It is not raised here, or it would hold the frames of callers."""
        return self._future.exception()

    def rest(self, seconds: float) -> None:
        wait([self._future], None if seconds == float("inf") else seconds)

    def call_off(self) -> bool:
        return self._future.cancel()


def aligned(nbytes: int, skip: int) -> UntypedStorage:
    """A storage in RAM that begins ``skip`` bytes into a page.

    Raises
    ------
    RuntimeError
        torch's error if there is no memory.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if memory.data_ptr() % PAGE_BYTES != skip:  # large blocks of torch mostly begin at the same place of a page
        room = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8, device="cpu")
        begin = (skip - room.data_ptr()) % PAGE_BYTES
        memory = torch.frombuffer(room.numpy(), dtype=torch.uint8, count=nbytes, offset=begin)
    return memory.untyped_storage()
