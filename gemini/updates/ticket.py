"""The promise that the update of one chunk will be over."""

import threading
from collections.abc import Callable


class Ticket:
    """What `Chunk.update` holds while an update is not over.

    Parameters
    ----------
    retry
        Has all that failed tried again.
    block_count
        How many pieces the update has.
    """

    def __init__(self, retry: Callable[[], None], block_count: int) -> None:
        self._retry = retry
        self._blocks_left = block_count
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Return when the update is over; raise what stopped it, and have it tried again meanwhile."""
        with self._changed:
            # A condition, not an event: a waiter that wakes after another has begun the retry must wait for that.
            self._changed.wait_for(self.done)
            error = self._error
        if error is not None:
            self._retry()
            raise error

    def done(self) -> bool:
        """True if `wait` would return or raise at once."""
        return self.is_over or self._error is not None

    @property
    def is_over(self) -> bool:
        """True if nothing of it is left to do."""
        return self._blocks_left == 0

    def finish_block(self) -> None:
        """One piece less is left."""
        with self._changed:
            self._blocks_left -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Something stopped it."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def reopen(self) -> None:
        """It is tried again."""
        with self._changed:
            self._error = None
