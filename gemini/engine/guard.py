"""A lock of the engine's."""

import threading

from ..signals import uninterrupted


class Guard:
    """Held by one thread at a time, which may take it again. No signal interrupts the thread that has it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        uninterrupted.__enter__()
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
        uninterrupted.__exit__()
