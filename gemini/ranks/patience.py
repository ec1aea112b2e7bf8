"""Waiting for other ranks: for a time that is bounded, and only for as long as they are there."""

import threading
import time
from collections.abc import Callable, Sequence

from ..errors import RankError
from .farewell import Farewell
from .mailbox import PING_SECONDS, Mailbox


class Patience:
    """Waits for ranks, for the timeout of the process group at most.

    Parameters
    ----------
    mailbox
        Knows the timeout, and can see whether a rank is still there.
    farewell
        Knows who has ended.
    """

    def __init__(self, mailbox: Mailbox, farewell: Farewell) -> None:
        self._mailbox = mailbox
        self._farewell = farewell

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self._mailbox.timeout.total_seconds()

    def wait(
        self,
        changed: threading.Condition,
        missing: Callable[[], Sequence[int]],
        late: Callable[[str], str],
        ended: Callable[[str], str] | None = None,
        signs_of_life: Callable[[], int] = int,
    ) -> None:
        """Wait until nothing is missing.

        Parameters
        ----------
        changed
            Notified when what is missing may have changed.
        missing
            The ranks (other than this one) that have not done yet what is waited for. Called with ``changed`` held.
        late, ended
            What to say, given the names of ranks, if they take too long, or if their program has ended. None if ranks
            whose program has ended still do what is waited for.
        signs_of_life
            A number; while it changes the time begins anew.

        Raises
        ------
        RankError
            If a rank is gone, has ended, or does not come in time.
        """
        signs, deadline = signs_of_life(), time.monotonic() + self.seconds
        next_look = time.monotonic() + PING_SECONDS
        while True:
            with changed:
                if not (indices := missing()):
                    return
            for index in indices if ended is not None else ():
                if (reason := self._farewell.reason(index)) is not None:
                    assert ended is not None
                    raise RankError(ended(f"{self._mailbox.names[index]} has ended ({reason})"))
            if (new_signs := signs_of_life()) != signs:
                signs, deadline = new_signs, time.monotonic() + self.seconds
            if time.monotonic() > deadline:
                raise RankError(late(", ".join(self._mailbox.names[index] for index in indices)))
            with changed:
                if missing() == indices:
                    changed.wait(PING_SECONDS)
            if time.monotonic() >= next_look:
                self._mailbox.check(indices)
                next_look = time.monotonic() + PING_SECONDS
