"""Are all tensors of a file as they were written? Several threads read it, each into one small buffer."""

import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

from ..team import Team
from .crc import Sums
from .header import Header, Malformed, StoredTensor

RUN_BYTES = 16 << 20
"""What a thread takes at a time."""
BUFFER_BYTES = 256 << 10
"""Small enough for the second-level cache, from where the checksum reads it."""


def damaged(fd: int, header: Header, tell: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """Names of the tensors whose bytes do not have their checksum; none where the file has no checksums.

    Parameters
    ----------
    tell
        Told how many bytes have been read so far.

    Raises
    ------
    Malformed
        If the file became shorter.
    OSError
        As the system says.
    """
    if header.checksums is None:
        return []
    reading = _Reading(fd, list(header.tensors.values()))
    with Team(_buffer, tell) as team:
        for run in reading.runs:
            team.do(partial(reading.read, run))
    found = reading.sums.all()
    return [name for name, crc, due in zip(header.tensors, found, header.checksums, strict=True) if crc != due]


def _buffer() -> memoryview:
    return memoryview(bytearray(BUFFER_BYTES))


class _Reading:
    """Sums the tensors of one file, in runs of its bytes."""

    def __init__(self, fd: int, tensors: Sequence[StoredTensor]) -> None:
        self._fd = fd
        self._order = sorted((i for i, t in enumerate(tensors) if t.end > t.begin), key=lambda i: tensors[i].begin)
        self._begins = [tensors[i].begin for i in self._order]
        self._ends = [tensors[i].end for i in self._order]
        begin, end = (self._begins[0], self._ends[-1]) if self._order else (0, 0)
        self.runs = [range(at, min(at + RUN_BYTES, end)) for at in range(begin, end, RUN_BYTES)]
        self.sums = Sums(len(tensors))

    def read(self, run: range, buffer: memoryview) -> int:
        """Sum the bytes of a run; returns how many there are."""
        place = bisect_right(self._begins, run.start) - 1
        at, crc, nbytes = run.start, 0, 0
        while at < run.stop:
            count = os.preadv(self._fd, [buffer[: run.stop - at]], at)
            if not count:
                raise Malformed("it became shorter while it was read")
            stop = at + count
            while at < stop:
                part = buffer[at - stop + count : min(count, self._ends[place] - stop + count)]
                crc, nbytes = zlib.crc32(part, crc), nbytes + len(part)
                at += len(part)
                if at == self._ends[place] or at == run.stop:
                    self.sums.add(at - nbytes, self._order[place], crc, nbytes)
                    place, crc, nbytes = place + 1, 0, 0
        return len(run)
