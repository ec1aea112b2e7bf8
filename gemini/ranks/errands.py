"""What the first rank does alone, and the others wait for: writing files."""

import threading
import time
from collections.abc import Callable

from ..errors import RankError
from .farewell import Farewell
from .mailbox import PING_SECONDS, Mailbox
from .messages import Finished


class Errands:
    """Tells the others what has been done, and waits for that.

    Parameters
    ----------
    mailbox
        Brings the word.
    farewell
        Knows who has ended.
    """

    def __init__(self, mailbox: Mailbox, farewell: Farewell) -> None:
        self._mailbox = mailbox
        self._farewell = farewell
        self._changed = threading.Condition()
        self._finished: dict[str, str] = {}

    def received(self, letter: Finished) -> None:
        """Take in a letter."""
        with self._changed:
            self._finished[letter.what] = letter.error
            self._changed.notify_all()

    def finish(self, what: str, error: str) -> None:
        """Tell the others that this is done, or why not."""
        self._mailbox.post_all(Finished(what, error))

    def wait(self, what: str, signs_of_life: Callable[[], int]) -> None:
        """Wait for the first rank to finish something: for as long as it gives signs of life, and the timeout.

        Raises
        ------
        RankError
            If it has failed, or is gone.
        """
        name, seconds = self._mailbox.names[0], self._mailbox.timeout.total_seconds()
        last_signs, deadline = signs_of_life(), time.monotonic() + seconds
        while True:
            with self._changed:
                self._changed.wait_for(lambda: what in self._finished, PING_SECONDS)
                error = self._finished.pop(what, None)
            if error is not None:
                if error:
                    raise RankError(f"{name} failed in {what}: {error}")
                return
            if (reason := self._farewell.reason(0)) is not None:
                raise RankError(f"{name}, which does {what} for all ranks, has ended ({reason})")
            self._mailbox.check([0])
            if (signs := signs_of_life()) != last_signs:
                last_signs, deadline = signs, time.monotonic() + seconds
            if time.monotonic() > deadline:
                raise RankError(
                    f"{name}, which does {what} for all ranks, has not done so within {seconds:g} s: have it call the "
                    "same"
                )
