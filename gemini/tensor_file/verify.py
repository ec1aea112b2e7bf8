"""Are all tensors of a file as they were written? Several threads read it, each into one small buffer."""

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock

from gemini.cores import usable_cores
from gemini.process_wide import IO_STACK_BYTES, small_stacks

from .crc import combined
from .header import Header, Malformed, StoredTensor

RUN_BYTES = 16 << 20
"""What a thread takes at a time."""
BUFFER_BYTES = 256 << 10
"""Small enough for the second-level cache, from where the checksum reads it."""
_THREADS_LIMIT = 4
"""More do not make one disk faster."""

_Part = tuple[int, int, int]
"""Index of a tensor, CRC-32 of a part of it, and the part's length."""


def damaged(fd: int, header: Header) -> list[str]:
    """Names of the tensors whose bytes do not have their checksum; none where the file has no checksums.

    Raises
    ------
    Malformed
        If the file became shorter.
    OSError
        As the system says.
    """
    if header.checksums is None:
        return []
    names = list(header.tensors)
    found = _checksums(fd, list(header.tensors.values()))
    return [name for name, crc, due in zip(names, found, header.checksums, strict=True) if crc != due]


def _checksums(fd: int, tensors: Sequence[StoredTensor]) -> list[int]:
    crcs = [0] * len(tensors)
    for index, crc, nbytes in _Reading(fd, tensors).parts():
        crcs[index] = combined(crcs[index], crc, nbytes)
    return crcs


class _Reading:
    """Runs of bytes that threads take in turns."""

    def __init__(self, fd: int, tensors: Sequence[StoredTensor]) -> None:
        self._fd = fd
        self._order = sorted((i for i, t in enumerate(tensors) if t.end > t.begin), key=lambda i: tensors[i].begin)
        self._begins = [tensors[i].begin for i in self._order]
        self._ends = [tensors[i].end for i in self._order]
        begin, end = (self._begins[0], self._ends[-1]) if self._order else (0, 0)
        self._runs = [(at, min(at + RUN_BYTES, end)) for at in range(begin, end, RUN_BYTES)]
        self._parts: list[list[_Part]] = [[] for _ in self._runs]
        self._next = 0
        self._lock = Lock()

    def parts(self) -> Iterator[_Part]:
        """Those of each tensor in their order."""
        threads = min(usable_cores(), _THREADS_LIMIT, len(self._runs)) - 1
        if threads > 0:
            with small_stacks(IO_STACK_BYTES), ThreadPoolExecutor(threads, "gemini-memory-verify") as pool:
                futures = []
                with suppress(RuntimeError):  # a limit that leaves no room for stacks
                    futures += [pool.submit(self._work) for _ in range(threads)]
                self._work()
            for future in futures:
                future.result()
        else:
            self._work()
        for parts in self._parts:
            yield from parts

    def _work(self) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        try:
            while (run := self._take()) is not None:
                self._parts[run] = self._read(buffer, *self._runs[run])
        except BaseException:
            with self._lock:
                self._next = len(self._runs)  # the others need not go on
            raise

    def _take(self) -> int | None:
        with self._lock:
            run = self._next
            self._next += 1
        return run if run < len(self._runs) else None

    def _read(self, buffer: memoryview, at: int, stop: int) -> list[_Part]:
        parts: list[_Part] = []
        place = bisect_right(self._begins, at) - 1
        crc = nbytes = 0
        while at < stop:
            count = os.preadv(self._fd, [buffer[: stop - at]], at)
            if not count:
                raise Malformed("it became shorter while it was read")
            done = 0
            while done < count:
                part = buffer[done : min(count, self._ends[place] - at)]
                crc, nbytes = zlib.crc32(part, crc), nbytes + len(part)
                done += len(part)
                if at + done == self._ends[place]:
                    parts.append((self._order[place], crc, nbytes))
                    place, crc, nbytes = place + 1, 0, 0
            at += count
        if nbytes:
            parts.append((self._order[place], crc, nbytes))
        return parts
