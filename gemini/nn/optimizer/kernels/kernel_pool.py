"""Threads that share one flat buffer between them, for kernels that release the GIL."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

from gemini.cores import usable_cores
from gemini.process_wide import PerProcess, compute_on_this_thread

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
    """Running threads, each an executor of its own: one executor for all starts a thread when none is idle."""
    helpers: list[ThreadPoolExecutor] = []
    try:
        for i in range(count):
            helper = ThreadPoolExecutor(1, thread_name_prefix=f"gemini-adam-{i}")
            helper.submit(compute_on_this_thread, torch.get_num_threads, torch.set_num_threads).result()
            helpers.append(helper)
    except RuntimeError:  # the system refuses a thread
        pass
    return helpers


_of_process = PerProcess(lambda: KernelPool(usable_cores()))


def default_pool() -> KernelPool:
    """The pool of this process, whose optimizers update one after the other."""
    return _of_process.get()
