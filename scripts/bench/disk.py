"""How fast the disk of a folder is, in the ways in which the disk tier could use it.

    python scripts/bench disk [FOLDER] [--gigabytes 4]

Threads read and write a preallocated file in order, ``preadv`` and ``pwritev`` and nothing else: around the page cache
(O_DIRECT) and through it, reading and writing alone and both at once. Through the page cache the time includes
``fsync`` after writing, and the file's pages are dropped before reading; what fits into free RAM and stays there is
faster, as long as nobody else wants that RAM. What the disk tier's own code gets of it is in `disk_rate.py`.
"""

import argparse
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REQUEST_BYTES = 1 << 20
DEPTH = 8


@contextmanager
def scratch(folder: Path, nbytes: int, direct: bool) -> Iterator[int]:
    """A descriptor of a preallocated file that is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        fd = os.open(file.name, os.O_RDWR | (os.O_DIRECT if direct else 0))
        try:
            yield fd
        finally:
            os.close(fd)


def seconds(fd: int, reads: range, writes: range, depth: int = DEPTH, request_bytes: int = REQUEST_BYTES) -> float:
    """Time to read one range of bytes and write another, with ``depth`` requests of each kind at once."""

    def work(call, begins: Iterator[int], lock: threading.Lock) -> None:  # type: ignore[no-untyped-def]
        memory = mmap.mmap(-1, request_bytes)
        while True:
            with lock:
                at = next(begins, None)
            if at is None:
                return
            moved = call(fd, [memory], at)
            assert moved == request_bytes, f"{moved} bytes at {at}"

    threads = []
    for call, span in ((os.preadv, reads), (os.pwritev, writes)):
        begins, lock = iter(range(span.start, span.stop, request_bytes)), threading.Lock()
        threads += [threading.Thread(target=work, args=(call, begins, lock)) for _ in range(depth)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=4.0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    nbytes = int(options.gigabytes * 1e9) // (2 * REQUEST_BYTES) * 2 * REQUEST_BYTES
    half, nothing = nbytes // 2, range(0)
    table: list[dict[str, str]] = []

    def show(what: str, took: float) -> None:
        table.append({"how": what, "GB/s": f"{nbytes / took / 1e9:.2f}"})

    with scratch(options.folder, nbytes, direct=True) as fd:
        show("direct, first write to preallocated space", seconds(fd, nothing, range(nbytes)))
        for depth in (1, 2, 4, 8):
            show(f"direct, read, {depth} requests at once", seconds(fd, range(nbytes), nothing, depth))
            show(f"direct, write, {depth} requests at once", seconds(fd, nothing, range(nbytes), depth))
            show(
                f"direct, half read and half written, {depth} + {depth} at once",
                seconds(fd, range(half), range(half, nbytes), depth),
            )
    with scratch(options.folder, nbytes, direct=False) as fd:
        took = seconds(fd, nothing, range(nbytes))
        show("page cache, write, not yet on the disk", took)
        begin = time.perf_counter()
        os.fsync(fd)
        show("page cache, write and fsync", took + time.perf_counter() - begin)
        show("page cache, read what is still there", seconds(fd, range(nbytes), nothing))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        show("page cache, read after dropping it", seconds(fd, range(nbytes), nothing))
    return {"table": table, "bytes": nbytes}
