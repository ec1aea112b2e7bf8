"""What each thread is recording on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .tape import Tape


class Session(threading.local):
    """The contexts this thread is in and the tape they record on, and, weakly, the tape it recorded on last."""

    tape: Tape | None = None
    last: Callable[[], Tape | None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.contexts: list[object] = []


session = Session()


def active_tape() -> Tape | None:
    """Return the tape that this thread records on, or None outside of a context."""
    return session.tape


def is_recording() -> bool:
    """Whether this thread is inside a ``LazyInitContext``."""
    return session.tape is not None
