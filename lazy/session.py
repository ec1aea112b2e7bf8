"""The tape on which a thread records."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from .tape import Tape


class Session(threading.local):
    """The contexts this thread is in and the tape they record on, and, weakly, the tape it recorded on last."""

    tape: Tape | None = None
    last: Callable[[], Tape | None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.contexts: list[object] = []

    def begin(self, tape: Tape) -> None:
        """Record on a tape from now on."""
        self.tape, self.last = tape, weakref.ref(tape)

    def end(self) -> None:
        """Record no more."""
        self.tape = None


session = Session()
"""Each thread sees one of its own. Global, since torch calls us with a function and its arguments only."""


def active_tape() -> Tape | None:
    """Return the tape that this thread records on, or None outside of a context."""
    return session.tape


def is_recording() -> bool:
    """True inside a ``LazyInitContext``."""
    return session.tape is not None
