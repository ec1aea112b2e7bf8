"""What the first rank does alone, and the others wait for: writing files."""

import threading
from collections.abc import Callable

from ..errors import RankError
from .mailbox import Mailbox
from .messages import Finished
from .patience import Patience


class Errands:
    """Tells the others what has been done, and waits for that.

    Parameters
    ----------
    mailbox
        Brings the word.
    patience
        Waits for it.
    """

    def __init__(self, mailbox: Mailbox, patience: Patience) -> None:
        self._mailbox = mailbox
        self._patience = patience
        self._changed = threading.Condition()
        self._finished: dict[str, list[str]] = {}
        """What has been done, and how often: each time with why not, or nothing."""

    def received(self, letter: Finished) -> None:
        """Take in a letter."""
        with self._changed:
            self._finished.setdefault(letter.what, []).append(letter.error)
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
        name, seconds = self._mailbox.names[0], self._patience.seconds
        self._patience.wait(
            self._changed,
            lambda: [] if self._finished.get(what) else [0],
            lambda _: (
                f"{name}, which does {what} for all ranks, has not done so within {seconds:g} s: have it call the same"
            ),
            lambda ended: f"{ended}, and was to do {what} for all ranks",
            signs_of_life,
        )
        with self._changed:
            error = self._finished[what].pop(0)
        if error:
            raise RankError(f"{name} failed in {what}: {error}")
