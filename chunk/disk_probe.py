"""A scratch file on a disk, read and written as a training does it: aligned, in blocks, both at once."""

import errno
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from itertools import count
from pathlib import Path

import torch

from gemini.errors import OffloadError

from .disk_file import DiskFile, Requests

LEAST_SPAN_BYTES = 32 << 20
_FILL_BYTES = 4 << 20
_WHAT = "a measurement of the disk"


class Traffic(Enum):
    """What a disk is asked to do."""

    READ = "read"
    WRITE = "write"
    MIXED = "mixed"
    """Each block read is followed by one that is written, as in the stream of updates."""


class Probe:
    """The file and the memory that it is read into and written from. A context manager.

    The memory begins with a page and holds random bytes: neither does the page cache serve it, nor is there anything
    for a disk to compress. Positions go on from one measurement to the next, so that what has just been moved is read
    or written again only after all the rest of the file.

    Parameters
    ----------
    folder
        Where the file lives. It has no name and is gone with the process.
    span_bytes
        Of the file; as much as there is room for, if that is less.
    lanes, block_bytes
        Blocks moved at once at most, and the bytes of one at most.
    fill_seconds
        After which the file is left as short as it is by then. What was not written is not read from a disk.
    requests
        How `DiskFile` cuts each block; None: not at all.

    Raises
    ------
    OffloadError
        If the folder cannot be written to, or has room for less than `LEAST_SPAN_BYTES`.
    """

    def __init__(
        self,
        folder: Path,
        span_bytes: int,
        lanes: int,
        block_bytes: int,
        fill_seconds: float,
        requests: Requests | None = None,
    ) -> None:
        self._block_bytes = block_bytes
        self._memory = torch.frombuffer(mmap.mmap(-1, max(lanes * block_bytes, _FILL_BYTES)), dtype=torch.uint8)
        self._memory.random_(generator=torch.Generator().manual_seed(0))  # the user's random state stays
        self._file = DiskFile(folder, requests or Requests(nbytes=max(block_bytes, _FILL_BYTES)))
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="gemini-memory-probe")
        try:
            self.span_bytes = self._fill(_reserve(self._file, span_bytes), fill_seconds)
            """Bytes of the file that are used."""
        except BaseException:
            self.close()
            raise
        self._read_at, self._write_at = 0, self.span_bytes // 2

    def _fill(self, span_bytes: int, seconds: float) -> int:
        """Write the file once, or as much as there is time for; the bytes written."""
        deadline, filled = time.perf_counter() + seconds, 0
        while filled < span_bytes and (filled < LEAST_SPAN_BYTES or time.perf_counter() < deadline):
            self._file.write(filled, self._memory.data_ptr(), min(_FILL_BYTES, span_bytes - filled), _WHAT)
            filled += _FILL_BYTES
        if not self.is_direct:
            self._file.settle()
        return min(filled, span_bytes)

    @property
    def is_direct(self) -> bool:
        """True if the page cache is not in the way."""
        return self._file.is_direct

    def rate(self, traffic: Traffic, lanes: int, block_bytes: int, nbytes: int, seconds: float) -> float:
        """Bytes a second, read and written together.

        Parameters
        ----------
        lanes, block_bytes
            Blocks that are moved at once, and the bytes of one; at most those that the probe was made for.
        nbytes, seconds
            It ends when either is over.
        """
        turns, deadline = count(), time.perf_counter() + seconds
        blocks = max(nbytes // block_bytes, 2)
        positions = {
            False: self._positions(self._read_at, block_bytes),
            True: self._positions(self._write_at, block_bytes),
        }

        def move(lane: int) -> int:
            address, moved = self._memory.data_ptr() + lane * self._block_bytes, 0
            while (turn := next(turns)) < blocks and time.perf_counter() < deadline:
                writes = traffic is Traffic.WRITE or (traffic is Traffic.MIXED and turn % 2 == 1)
                (self._file.write if writes else self._file.read)(next(positions[writes]), address, block_bytes, _WHAT)
                moved += block_bytes
            return moved

        begin = time.perf_counter()
        moved = sum(self._pool.map(move, range(lanes)))
        if not self.is_direct:
            self._file.settle()  # else it is the speed of RAM, as long as that has room
        taken = time.perf_counter() - begin
        self._read_at, self._write_at = next(positions[False]), next(positions[True])
        return moved / max(taken, 1e-9)

    def _positions(self, first: int, block_bytes: int) -> Iterator[int]:
        """Offsets of blocks from a position on, round and round the file."""
        blocks = self.span_bytes // block_bytes
        begin = first // block_bytes
        return ((begin + number) % blocks * block_bytes for number in count())

    def close(self) -> None:
        """Give the file back. Idempotent."""
        self._pool.shutdown(wait=True)
        self._file.close()

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reserve(file: DiskFile, nbytes: int) -> int:
    """Take room in the file, by halves less where a file system or a quota has no more; the bytes there are."""
    asked = nbytes
    while True:
        try:
            file.reserve(0, nbytes)
            return nbytes
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if not is_full or nbytes // 2 < LEAST_SPAN_BYTES:
                needs = f"a measurement takes {min(asked, LEAST_SPAN_BYTES) >> 20} MiB or more"
                raise OffloadError(
                    error.errno,
                    f"{str(file.folder)!r} cannot be measured ({os.strerror(error.errno or 0)}); {needs}: free some "
                    "room or raise the quota, or give a folder on another disk",
                ) from error
            nbytes //= 2
