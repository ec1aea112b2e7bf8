"""What each thread is recording on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .tape import Tape


class Session(threading.local):
    """The tape this thread records on, and, weakly, the one it recorded on last."""

    tape: Tape | None = None
    last: Callable[[], Tape | None] = staticmethod(lambda: None)


session = Session()


def active_tape() -> Tape | None:
    """Return the tape that this thread records on, or None outside of a context."""
    return session.tape
