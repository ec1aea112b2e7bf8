"""Threads that share the work on files with the calling thread."""

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from types import TracebackType
from typing import Generic, TypeVar

from gemini.cores import usable_cores
from gemini.process_wide import IO_STACK_BYTES, small_stacks

MOST_HELPERS = 3
"""More do not make one disk faster."""

B = TypeVar("B")


class Team(Generic[B]):
    """Does tasks on some threads, and on the calling one while these are busy. A context manager; it ends with them.

    Each task has a buffer to itself while it runs. The first error ends the work: tasks that have not begun are
    dropped, and `do` or `settle` raises it.

    Parameters
    ----------
    make_buffer
        Makes what a task works with, one for each thread.
    tell
        Told on the calling thread how many bytes have been done so far.
    begin
        Called first on each other thread.
    helpers
        Threads beside the calling one; None: as many as the cores allow. Fewer if the system refuses them.
    """

    def __init__(
        self,
        make_buffer: Callable[[], B],
        tell: Callable[[int], None] = lambda nbytes: None,
        begin: Callable[[], None] = lambda: None,
        helpers: int | None = None,
    ) -> None:
        self._buffer = make_buffer()
        self._tell = tell
        self._begin = begin
        self._changed = Condition()
        self._tasks: deque[Callable[[B], int]] = deque()
        self._running = 0
        self._done_bytes = 0
        self._fault: BaseException | None = None
        self._is_over = False
        wanted = min(usable_cores() - 1, MOST_HELPERS) if helpers is None else helpers
        self._threads = self._started(make_buffer, wanted)

    def __enter__(self) -> "Team[B]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            with self._changed:
                self._is_over = True
                self._tasks.clear()
                self._changed.notify_all()
            for thread in self._threads:
                thread.join()

    def do(self, task: Callable[[B], int]) -> None:
        """Have a task done, now or soon; it returns how many bytes it was.

        Raises
        ------
        BaseException
            Of this task, or of an earlier one.
        """
        with self._changed:
            is_taken = len(self._tasks) < len(self._threads)
            if is_taken:
                self._tasks.append(task)
                self._changed.notify()
            else:
                self._running += 1
        if not is_taken:
            self._work(task, self._buffer)
        self._report()

    def settle(self) -> None:
        """Return when all tasks are done.

        Raises
        ------
        BaseException
            The first error.
        """
        while (task := self._take()) is not None:
            self._work(task, self._buffer)
            self._report()
        with self._changed:
            while self._running:
                self._changed.wait()
        self._report()

    def _started(self, make_buffer: Callable[[], B], count: int) -> list[Thread]:
        threads: list[Thread] = []
        for _ in range(count):
            thread = Thread(target=self._help, args=(make_buffer(),), name="gemini-memory-file", daemon=True)
            try:
                with small_stacks(IO_STACK_BYTES):
                    thread.start()
            except RuntimeError:
                break  # a memory limit leaves no room for a stack
            threads.append(thread)
        return threads

    def _help(self, buffer: B) -> None:
        self._begin()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._is_over)
            task = self._take()
            if task is not None:
                self._work(task, buffer)
            elif self._is_over:
                return

    def _take(self) -> Callable[[B], int] | None:
        with self._changed:
            if not self._tasks:
                return None
            self._running += 1
            return self._tasks.popleft()

    def _work(self, task: Callable[[B], int], buffer: B) -> None:
        """Do a task that has been counted as running."""
        nbytes = 0
        fault: BaseException | None = None
        try:
            if self._fault is None:
                nbytes = task(buffer)
        except BaseException as error:
            fault = error
        with self._changed:
            self._running -= 1
            self._done_bytes += nbytes
            self._fault = self._fault or fault
            self._changed.notify_all()

    def _report(self) -> None:
        if self._fault is not None:
            raise self._fault
        self._tell(self._done_bytes)
