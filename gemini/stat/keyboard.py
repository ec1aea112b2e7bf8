"""Single keys from a terminal, which is as it was afterwards whatever happens."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keyboard() -> Iterator["Keys"]:
    """Keys come one by one and are not echoed; Ctrl-C still interrupts."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield Keys(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Keys:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def wait(self, seconds: float) -> str | None:
        """The next key, waiting at most ``seconds``; ``"q"`` when the terminal is gone. Arrow keys are skipped."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self._descriptor], [], [], left)
            if not ready:
                return None
            data = os.read(self._descriptor, 64)
            if not data:
                return "q"
            text = data.decode("utf-8", "replace")
            if not text.startswith("\x1b"):
                return text[0]
        return None
