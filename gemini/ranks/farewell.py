"""The end: a rank serves the others until they need nothing any more, also when its own program is over."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..errors import RankError
from ..process_wide import small_stacks
from .mailbox import PING_SECONDS, Mailbox
from .messages import Goodbye, Ping

_LOOK_SECONDS = 1.0
"""How often the thread that says goodbye looks whether it is needed any more."""
_SECONDS_AFTER_AN_ERROR = 10.0
"""How long a rank that has failed serves the others: they find out at the next thing that all do together."""
END_SECONDS = 5.0
"""How long a thread may take to end; the last letters and tensors are under way."""


class Farewell:
    """Says goodbye, and knows who has.

    Parameters
    ----------
    mailbox
        Brings and takes goodbyes.
    retire
        Called when this rank is about to say goodbye.
    end
        Called when neither this rank nor any other needs anything.
    """

    def __init__(self, mailbox: Mailbox, retire: Callable[[], None], end: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._retire = retire
        self._end = end
        self._changed = threading.Condition()
        self._goodbyes: dict[int, str] = {}
        self._has_left = False
        self._close: Callable[[], None] | None = None

    def begin(self) -> None:
        """Start the thread that keeps the process until the others are served. It is no daemon for this reason."""
        with small_stacks():
            threading.Thread(target=self._stay, name="gemini-memory-goodbye", daemon=False).start()

    def received(self, sender: int, letter: Goodbye) -> None:
        """Take in a letter."""
        with self._changed:
            self._goodbyes[sender] = letter.reason
            self._changed.notify_all()

    def reason(self, index: int) -> str | None:
        """Why a rank has said goodbye; None if it has not."""
        return self._goodbyes.get(index)

    def is_over(self) -> bool:
        """True if neither we nor any other rank needs anything."""
        return self._has_left and len(self._goodbyes) == len(self._mailbox.others)

    def leave(self, close: Callable[[], None]) -> None:
        """The model is gone here; ``close`` is called when the others need nothing of it."""
        with self._changed:
            is_over = self.is_over() or self._has_left
            self._close = None if is_over else close
        if is_over:
            close()
        else:
            self._say_goodbye("its model is gone")

    def _stay(self) -> None:
        main = threading.main_thread()
        while main.is_alive() and not self.is_over():
            main.join(_LOOK_SECONDS)
        error = getattr(sys, "last_value", None)
        self._say_goodbye("its program has ended" + (f" with {type(error).__name__}: {error}" if error else ""))
        self._serve(
            min(self._mailbox.timeout.total_seconds(), _SECONDS_AFTER_AN_ERROR if error else threading.TIMEOUT_MAX)
        )
        for index in self._mailbox.others:  # the other's thread may wait for one more letter
            with suppress(RankError):
                self._mailbox.post(index, Ping())
        if not all(map(self._mailbox.is_lost, self._mailbox.others)):  # else nothing wakes it up
            self._mailbox.join(END_SECONDS)
        self._end()
        with self._changed:
            close, self._close = self._close, None
        if close is not None:
            close()

    def _serve(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_over() and time.monotonic() < deadline:
            try:
                self._mailbox.check([index for index in self._mailbox.others if index not in self._goodbyes])
            except RankError:
                return
            with self._changed:
                self._changed.wait_for(self.is_over, PING_SECONDS)

    def _say_goodbye(self, reason: str) -> None:
        with self._changed:
            if self._has_left:
                return
            self._has_left = True
        self._retire()
        for index in self._mailbox.others:
            try:
                self._mailbox.post(index, Goodbye(reason))
            except RankError as error:
                with self._changed:
                    self._goodbyes.setdefault(index, str(error))
