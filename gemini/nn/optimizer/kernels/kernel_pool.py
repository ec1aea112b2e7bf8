"""Threads that share one flat buffer between them, for kernels that release the GIL."""

import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

from gemini.cores import usable_cores

_Item = TypeVar("_Item")

# Up to this for each thread, all get the same: a thread that others slow does not make up for more slices.
_SLICE_NUMEL = 1 << 20
# Below this, waking another thread costs more than it saves.
_SMALLEST_SLICE_NUMEL = 1 << 16
# Slices start on this many elements: whole blocks of 8-bit states, and whole cache lines for every dtype, so that two
# threads never write the same one.
_ALIGN_NUMEL = 256


def slices(numel: int, threads: int) -> list[slice]:
    """What the threads take of a buffer, one after the other.

    In a long buffer they get ever shorter, half of an equal share of what is left each time: few starts (microseconds
    each), and yet all threads end at about the same time, also when one is three times as slow as the others. This is
    factoring (Hummel, Schonberg and Flynn, 1992) without its batches. One thread takes all at once.
    """
    found: list[slice] = []
    equal = -(-numel // max(min(threads, numel // _SMALLEST_SLICE_NUMEL), 1))
    start = 0
    while start < numel:
        wanted = equal
        if threads > 1 and numel > threads * _SLICE_NUMEL:
            wanted = max((numel - start) // (2 * threads), _SMALLEST_SLICE_NUMEL)
        stop = min(start + -(-wanted // _ALIGN_NUMEL) * _ALIGN_NUMEL, numel)
        found.append(slice(start, stop))
        start = stop
    return found


class KernelPool:
    """Run a function over the slices of a buffer on several threads, the caller's among them.

    Slices are taken from a shared counter, so a slow thread takes fewer. Several callers at once are fine: each works
    through its own buffer even when all helpers are busy elsewhere.

    All threads are started here, not when they are first needed: that is in the middle of an update, half of which
    would be done when the system refuses one. Where it refuses one now, those that there are do the work.

    Parameters
    ----------
    threads
        How many threads work on one buffer, the caller included.

    Attributes
    ----------
    threads
        How many there are.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a pool needs at least 1 thread, got {threads}")
        self._helpers = _started(threads - 1)
        self.threads = 1 + len(self._helpers)
        self._last_cut: tuple[int, list[slice]] = (0, [])

    def cut(self, numel: int) -> list[slice]:
        """The slices of a buffer for `run`; one, if more threads would not make it faster. Not to be changed."""
        last, found = self._last_cut
        if numel != last:  # most chunks are as long as the one before
            found = slices(numel, self.threads)
            self._last_cut = (numel, found)
        return found

    def cut_rows(self, numels: Sequence[int]) -> list[slice]:
        """Neighbouring buffers for each thread, of about as many elements; see `cut`."""
        count = max(min(self.threads, sum(numels) // _SMALLEST_SLICE_NUMEL), 1)
        ends = list(accumulate(numels))
        bounds = [bisect_left(ends, ends[-1] * i // count) for i in range(count)] if ends else [0]
        return [slice(*pair) for pair in pairwise([*bounds, len(ends)])]

    def run(self, work: Callable[[_Item], None], items: Sequence[_Item]) -> None:
        """Call ``work`` with each item; return when all are done.

        Raises
        ------
        Exception
            What ``work`` raised, after every call that had begun has ended.
        """
        if self.threads == 1 or len(items) <= 1:
            for item in items:
                work(item)
            return
        left = iter(items)  # next() on it is atomic

        def drain() -> None:
            for item in left:
                work(item)

        begun: list[Future[None]] = []
        try:
            begun.extend(helper.submit(drain) for helper in self._helpers[: len(items) - 1])
            drain()
        finally:
            # One that has not begun has nothing left to do. The others still write to the buffers: wait.
            errors = [future.exception() for future in begun if not future.cancel()]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads."""
        for helper in self._helpers:
            helper.shutdown()


def _started(count: int) -> list[ThreadPoolExecutor]:
    """So many running threads, each an executor of its own: one executor for all starts a thread when none is idle."""
    helpers: list[ThreadPoolExecutor] = []
    try:
        for i in range(count):
            helper = ThreadPoolExecutor(1, thread_name_prefix=f"gemini-adam-{i}")
            helper.submit(keep_to_one_thread).result()
            helpers.append(helper)
    except RuntimeError:  # the system refuses a thread
        pass
    return helpers


def keep_to_one_thread() -> None:
    """Have torch run the operations of the calling thread on this thread alone, for good.

    Each thread that calls torch has OpenMP start a team of its own, as large as the process's number of threads. Teams
    of background threads compete with the one that trains: their members spin at the end of every operation.

    ``torch.set_num_threads`` sets both this thread's number and the one with which new threads begin; a thread that
    lives for that alone puts the latter back.
    """
    of_process = torch.get_num_threads()  # asking is what gives a new thread its number; later, it would undo this
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=(of_process,))
    restoring.start()
    restoring.join()


_default: tuple[int, KernelPool] | None = None
_default_lock = threading.Lock()


def default_pool() -> KernelPool:
    """The pool of this process, made on first use. A forked child makes its own: threads do not survive a fork."""
    global _default
    with _default_lock:
        if _default is None or _default[0] != os.getpid():
            _default = (os.getpid(), KernelPool(usable_cores()))
        return _default[1]


def _after_fork() -> None:
    global _default_lock
    _default_lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
