"""Threads that share the work on files."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Thread
from types import TracebackType
from typing import Generic, TypeVar

from gemini.cores import usable_cores
from gemini.process_wide import IO_STACK_BYTES, small_stacks
from gemini.signals import uninterrupted

MOST_THREADS = 4
"""More do not make one disk faster."""

B = TypeVar("B")


class Team(Generic[B]):
    """Does tasks on some threads; on the calling one only if the system refuses them all. A context manager.

    Each task has a buffer to itself while it runs. The first error ends the work: tasks that have not begun are
    dropped, and `do` or `settle` raises it. Within the context signals are heard in `do` and `settle` only, so that all
    threads have ended when it is left.

    Parameters
    ----------
    make_buffer
        Makes what a task works with, one for each thread.
    tell
        Told on the calling thread how many bytes have been done so far.
    begin
        Called first on each thread; a RuntimeError of it is ignored.
    count
        Threads; None: one more than there are cores, as they wait for the disk as well. Fewer if the system refuses
        them.
    """

    def __init__(
        self,
        make_buffer: Callable[[], B],
        tell: Callable[[int], None] = lambda nbytes: None,
        begin: Callable[[], None] = lambda: None,
        count: int | None = None,
    ) -> None:
        self._buffer = make_buffer()
        self._tell = tell
        self._begin = begin
        self._changed = Condition()
        self._tasks: deque[Callable[[B], int]] = deque()
        self._unfinished = 0
        self._done_bytes = 0
        self._fault: BaseException | None = None
        self._is_over = False
        self._make_buffer = make_buffer
        self._count = min(usable_cores() + 1, MOST_THREADS) if count is None else count
        self._threads: list[Thread] = []

    def __enter__(self) -> "Team[B]":
        uninterrupted.__enter__()
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._end()

    def do(self, task: Callable[[B], int]) -> None:
        """Have a task done soon; it returns how many bytes it was. Waits while as many wait as there are threads.

        Raises
        ------
        BaseException
            Of this task, or of an earlier one.
        """
        if self._threads:
            self._wait_until(lambda: len(self._tasks) < len(self._threads))
            with self._changed:
                self._tasks.append(task)
                self._unfinished += 1
                self._changed.notify_all()
        else:
            self._unfinished += 1
            self._work(task, self._buffer)
            self._wait_until(lambda: True)

    def settle(self) -> None:
        """Return when all tasks are done.

        Raises
        ------
        BaseException
            The first error.
        """
        self._wait_until(lambda: not self._unfinished)

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while True:
            uninterrupted.let_in()
            with self._changed:
                if not (is_over := is_so() or self._fault is not None):
                    self._changed.wait()
            if self._fault is not None:
                raise self._fault
            self._tell(self._done_bytes)
            if is_over:
                return

    def _start(self) -> None:
        for _ in range(self._count):
            thread = Thread(target=self._help, args=(self._make_buffer(),), name="gemini-memory-file", daemon=True)
            try:
                with small_stacks(IO_STACK_BYTES):
                    thread.start()
            except RuntimeError:
                break  # a memory limit leaves no room for a stack
            self._threads.append(thread)

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._tasks.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        uninterrupted.__exit__()

    def _help(self, buffer: B) -> None:
        with suppress(RuntimeError):
            self._begin()
        while (task := self._next()) is not None:
            self._work(task, buffer)

    def _next(self) -> Callable[[B], int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or self._is_over)
            return self._tasks.popleft() if self._tasks else None

    def _work(self, task: Callable[[B], int], buffer: B) -> None:
        nbytes = 0
        fault: BaseException | None = None
        try:
            if self._fault is None:
                nbytes = task(buffer)
        except BaseException as error:
            fault = error
        with self._changed:
            self._unfinished -= 1
            self._done_bytes += nbytes
            self._fault = self._fault or fault
            self._changed.notify_all()
