"""Threads that share one flat buffer between them, for kernels that release the GIL."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

# Large enough that starting a slice (microseconds) does not count, small enough to balance threads that others slow.
_SLICE_NUMEL = 1 << 20
# Below this, waking another thread costs more than it saves.
_SMALLEST_SLICE_NUMEL = 1 << 16
# Slices start on this many elements: whole cache lines for every dtype, so that two threads never write the same one.
_ALIGN_NUMEL = 64


def available_threads() -> int:
    """Cores this process may use, divided between the processes of this machine; at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        cores = os.cpu_count() or 1
    try:
        processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        processes = 1
    return max(1, cores // processes)


def slice_numel(numel: int, threads: int) -> int:
    """Elements per slice, so that ``threads`` threads end at about the same time."""
    pieces = max(-(-numel // _SLICE_NUMEL), min(threads, numel // _SMALLEST_SLICE_NUMEL), 1)
    pieces = -(-pieces // threads) * threads if pieces > 1 else 1
    per_piece = -(-numel // pieces)
    return max(-(-per_piece // _ALIGN_NUMEL) * _ALIGN_NUMEL, _ALIGN_NUMEL)


class KernelPool:
    """Run a function over the slices of a buffer on several threads, the caller's among them.

    Slices are taken from a shared counter, so a slow thread takes fewer. Several callers at once are fine: each works
    through its own buffer even when all helpers are busy elsewhere.

    Parameters
    ----------
    threads
        How many threads work on one buffer, the caller included.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a pool needs at least 1 thread, got {threads}")
        self.threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1, thread_name_prefix="gemini-adam") if threads > 1 else None

    def run(self, work: Callable[[int, int], None], numel: int) -> None:
        """Call ``work(start, stop)`` for slices that cover ``range(numel)``; return when all are done.

        Raises
        ------
        Exception
            What ``work`` raised, after every slice that had begun has ended.
        """
        step = slice_numel(numel, self.threads)
        if self._helpers is None or numel <= step:
            if numel > 0:
                work(0, numel)
            return
        starts = itertools.count(0, step)  # next() on it is atomic

        def drain() -> None:
            while (start := next(starts)) < numel:
                work(start, min(start + step, numel))

        slices = -(-numel // step)
        helpers: list[Future[None]] = [self._helpers.submit(drain) for _ in range(min(self.threads, slices) - 1)]
        try:
            drain()
        finally:
            # One that has not begun has nothing left to do. The others still write to the buffers: wait.
            errors = [helper.exception() for helper in helpers if not helper.cancel()]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads."""
        if self._helpers is not None:
            self._helpers.shutdown()


_default: tuple[int, KernelPool] | None = None


def default_pool() -> KernelPool:
    """The pool of this process, made on first use. A forked child makes its own: threads do not survive a fork."""
    global _default
    if _default is None or _default[0] != os.getpid():
        # Two threads may come here at once; the loser's pool has started no thread yet and is collected.
        _default = (os.getpid(), KernelPool(available_threads()))
    return _default[1]
