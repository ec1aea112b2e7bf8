"""Signals: who handles them for a while, and where they have to wait.

Python runs the handler of a signal on the main thread, between any two instructions, and what it raises (for Ctrl-C a
KeyboardInterrupt) comes out of whatever runs there. Code that takes a lock, borrows a buffer and hands it on cannot be
written so that each of its instructions may be its last. So our code runs *uninterrupted*: a signal that comes
meanwhile is held, and raised again when the section ends. Between sections, in code of the user's, it comes at once.

::

    user's forward        hook of ours          user's forward
    -----------------|=======================|-----------------
          signal comes ^  held ............. ^ raised here

Sections are short. Who waits longer than `PATIENCE_SECONDS` and asks again, is heard at once.

[Note: Handlers] Signals are held by handlers of ours, which are there only while a section runs, or while the model's
forward or backward does (`watched`), since setting them for each hook would cost more than the hook. Outside of both
the user's handlers are where the user has put them. Between the sections of a ``watched`` ours hand on to the user's.
"""

import _signal  # type: ignore[import-not-found]  # ``signal`` makes enums of answers, which takes ten times as long
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]

PATIENCE_SECONDS = 5.0
"""A signal that comes again so long after it was held interrupts at once, whatever that leaves behind."""

_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS}
_HELD = sorted(int(number) for number in signal.valid_signals() - _FAULTS - {signal.SIGKILL, signal.SIGSTOP})


class _Uninterrupted:
    """A section that no signal interrupts: a context, or a decorator. Sections may be nested.

    On other threads than the main one, to which no signal comes, it does nothing.
    """

    def __init__(self) -> None:
        self._sections = 0
        """How many are open, one inside the other."""
        self._watches = 0
        self._is_standing_in = False
        self._handlers: dict[int, Handler] = {}
        """The user's, for which ours stand in, or have done so: somebody may keep ours and set it again."""
        self._came: dict[int, float] = {}
        """Signals that are held, and when they came."""

    def __enter__(self) -> None:
        if threading.get_ident() != _MAIN_THREAD:
            return
        if not self._is_standing_in:
            self._stand_in()
        self._sections += 1  # from here on nothing interrupts

    def __exit__(self, *exc: object) -> None:
        if threading.get_ident() != _MAIN_THREAD:
            return
        self._sections -= 1  # from here on everything does, also in what follows: each line may be the last one
        if not self._sections:
            if self._came:
                self._raise_held()
            elif not self._watches:
                self._stand_back()

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            with self:
                return function(*args, **kwargs)

        return run

    def let_in(self) -> None:
        """Have held signals reach their handlers now: at a place of a long section where it may end with an error."""
        if threading.get_ident() == _MAIN_THREAD:
            while self._came:
                number = next(iter(self._came))
                del self._came[number]
                if number in self._handlers:
                    self._handlers[number](number, sys._getframe(1))

    def in_methods(self, *names: str) -> Callable[[type[T]], type[T]]:
        """Decorates these methods of a class."""

        def decorate(cls: type[T]) -> type[T]:
            for name in names:
                setattr(cls, name, self(vars(cls)[name]))
            return cls

        return decorate

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context within which sections cost less. See [Note: Handlers]."""
        if threading.get_ident() != _MAIN_THREAD:
            yield
            return
        watches = self._watches
        try:
            try:
                self._stand_in()
                self._watches = watches + 1
                yield
            finally:
                self._watches = watches
        finally:
            self._watches = watches  # an interrupt may have come before the same line above
            if not (watches or self._sections):
                self._stand_back()

    def _stand_in(self) -> None:
        """Put our handler in the place of all that are written in Python."""
        for number in _HELD:
            handler = _signal.getsignal(number)
            if callable(handler) and handler != self._handle:
                self._handlers[number] = handler
                _signal.signal(number, self._handle)
        self._is_standing_in = True

    def _stand_back(self) -> None:
        """Undo `_stand_in`, but where somebody has set another handler since."""
        self._is_standing_in = False
        for number, handler in self._handlers.items():
            if _signal.getsignal(number) == self._handle:
                _signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._sections:
            now = time.monotonic()
            if now - self._came.setdefault(number, now) < PATIENCE_SECONDS:
                return
        self._came.pop(number, None)  # one that was held and is about to be raised is this one, too
        handler = self._handlers.get(number)
        if handler is not None:
            handler(number, frame)

    def _raise_held(self) -> None:
        """Before ours are taken back: what comes meanwhile goes through them, and is not raised a second time later."""
        try:
            while self._came:
                number = next(iter(self._came))
                del self._came[number]
                signal.raise_signal(number)
        finally:
            if not self._watches:
                self._stand_back()


_MAIN_THREAD = threading.main_thread().ident

uninterrupted = _Uninterrupted()
"""A section that no signal interrupts: ``with uninterrupted: ...``, or a decorator."""


@contextmanager
def signals_to(handler: Handler) -> Iterator[None]:
    """A context in which SIGINT and SIGTERM come to ``handler``; on another than the main thread they do not."""
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is None:
                continue  # code in C has set a handler, which could not be set again
            try:
                before[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread: the program around us handles signals
                break
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
