"""Worker threads that exist before the first task, and their end from wherever it is asked for."""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import thread as pools
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar
from weakref import ref

from gemini.process_wide import IO_STACK_BYTES, small_stacks
from gemini.system_limits import refused_thread

from .origin import Origin

_P = ParamSpec("_P")
_T = TypeVar("_T")

START_SECONDS = 30.0
END_SECONDS = 2.0
_ATTEMPTS = 100
"""How often it is tried to tell what became of a task, where memory is short."""

logger = logging.getLogger(__name__)


class _Task(Generic[_T]):
    """Work that waits until it is certain that its submission has not failed.

    The pool of the standard library may run out of memory when the task is in its queue already. The caller is told
    that it is not, and gives the memory that it works on to others.
    """

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._is_wanted = False
        self._undecided = threading.Lock()
        self._undecided.acquire()

    def __call__(self) -> _T:
        with self._undecided:
            if not self._is_wanted:
                raise CancelledError
        return self._work()

    def decide(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._undecided.release()


class Workers(ThreadPoolExecutor):
    """A pool that refuses tasks in a forked child, where no thread of it would ever do them.

    A task whose submission has failed is not done. A thread lives until the pool's end: one of the standard library
    ends when it runs out of memory between two tasks, and all who wait for the next one would wait forever.
    """

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, thread_name_prefix=f"gemini-memory-{name}")
        self._origin = Origin()

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> "Future[_T]":
        self._origin.refuse_elsewhere()
        task, is_wanted = _Task(partial(fn, *args, **kwargs)), False
        try:
            future = super().submit(task)
            is_wanted = True
        finally:
            task.decide(is_wanted)
        return future

    if sys.version_info < (3, 14):  # from then on tasks of the standard library are run otherwise

        def _adjust_thread_count(self) -> None:
            if len(self._threads) == self._max_workers:
                return
            name = f"{self._thread_name_prefix}_{len(self._threads)}"
            wake = partial(_wake, self._work_queue)
            thread = threading.Thread(name=name, target=_serve, args=(ref(self, wake), self._work_queue))
            thread.start()
            self._threads.add(thread)  # type: ignore[attr-defined]
            pools._threads_queues[thread] = self._work_queue  # type: ignore[index]


def _wake(queue: "SimpleQueue[Any]", _: object) -> None:
    queue.put(None)


def _serve(pool: "ref[Workers]", queue: "SimpleQueue[Any]") -> None:
    """Do tasks until the pool is shut down or gone, or the interpreter ends."""
    item = None
    while True:
        try:
            item = queue.get()
            if item is not None:
                item.run()
                item = None
            elif _is_over(pool()):
                queue.put(None)  # for the next thread
                return
        except BaseException as error:
            if item is not None:
                _conclude(item.future, error)
            item = None


def _is_over(pool: Workers | None) -> bool:
    return pool is None or pool._shutdown or pools._shutdown


def _conclude(future: "Future[Any]", error: BaseException) -> None:
    """Have those go on that wait for a task whose result could not be told."""
    for _ in range(_ATTEMPTS):
        try:
            if not future.done():
                future.set_exception(error)
                return
            with future._condition:
                for waiter in future._waiters:
                    waiter.event.set()
                future._condition.notify_all()
            return
        except BaseException as again:  # memory is short; the waiters must hear of it
            error = again


def start_workers(count: int, name: str, stack_bytes: int = 0) -> Workers:
    """A pool whose threads have all been started.

    Parameters
    ----------
    stack_bytes
        Of each thread; 0 for the system's default, all of which (8 MiB, usually) counts against RLIMIT_DATA.

    The standard pool starts a thread when a task finds none idle: in the middle of training, where a tight memory limit
    may refuse the thread its stack. Here that is an error before anything has been changed.

    Raises
    ------
    OutOfMemory, LimitError
        If the system refuses a thread its memory, or another thread.
    """
    pool = Workers(count, name)
    here = threading.Barrier(count + 1)  # each task holds its thread until all are there
    try:
        with small_stacks(stack_bytes):
            for _ in range(count):
                pool.submit(here.wait, START_SECONDS)
            here.wait(START_SECONDS)
    except RuntimeError as error:
        here.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise refused_thread(error, stack_bytes) from error
    try:
        _closer.start()
    except RuntimeError as error:
        pool.shutdown(wait=False)
        raise refused_thread(error, IO_STACK_BYTES) from error
    return pool


def close_in_background(work: Callable[[], object]) -> None:
    """Do ``work``, which ends threads or what they use, on a thread of its own, and wait for it for a while.

    A model that is dropped is closed by the garbage collector: on any thread and between any two instructions, also
    within `threading` while it holds its locks, or on the very thread that is to end. Joining there is a deadlock
    (seen: a collection in the start of another model's thread), and so are starting a thread and submitting a task. So
    one thread does all this work, in the order asked for, and the caller waits for two seconds at most. Putting into a
    ``SimpleQueue`` is made for finalizers. What the work itself asks for comes right after it.
    """
    _closer.close(work)


class _Closer:
    """The thread on which others are ended."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], object], threading.Event]] = SimpleQueue()
        self._further: deque[Callable[[], object]] = deque()
        """Asked for on the thread itself, which cannot wait for it."""
        self._ident = 0
        self._pid = 0
        self._is_late = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have the thread, in this process. Not for finalizers."""
        with self._lock:
            if self._pid != os.getpid():
                self._work = SimpleQueue()
                with small_stacks():
                    threading.Thread(target=self._run, name="gemini-memory-end", daemon=True).start()
                self._pid = os.getpid()

    def close(self, work: Callable[[], object]) -> None:
        if self._pid == os.getpid() and threading.get_ident() == self._ident:
            self._further.append(work)
        elif self._pid == os.getpid():
            over = threading.Event()
            self._work.put((work, over))
            if not self._is_late:  # one collection may close many models
                self._is_late = not over.wait(END_SECONDS)
        elif self._pid == 0:  # there was no thread to wait for yet; in a fork there is none, and its files are not ours
            work()

    def _run(self) -> None:
        self._ident = threading.get_ident()
        while True:
            work, over = self._work.get()
            self._do(work)
            while self._further:
                self._do(self._further.popleft())
            self._is_late = self._is_late and not self._work.empty()
            over.set()
            del work, over  # not to hold what was closed until the next one

    @staticmethod
    def _do(work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:
            logger.exception("closing failed")


_closer = _Closer()
"""One for the process, as finalizers, which may run anywhere, cannot be handed one."""
