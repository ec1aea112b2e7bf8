"""The promise that the update of one chunk will be over."""

import threading
from collections.abc import Callable

from ..chunk import Transfer


class Ticket:
    """What `Chunk.update` holds while an update is not over.

    Of a chunk on DEVICE an update that is over has been launched; who waits for it is held behind it on the device.

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
        self._lock = threading.RLock()  # entered itself: to leave a `Condition` takes memory, which may have run out
        self._changed = threading.Condition(self._lock)
        self._error: BaseException | None = None
        self._end: Transfer | None = None
        """Of the last piece: pieces are done in order."""

    def wait(self) -> None:
        """Return when the update is over; raise what stopped it, and have it tried again meanwhile."""
        with self._lock:
            # A condition, not an event: a waiter that wakes after another has begun the retry must wait for that.
            self._changed.wait_for(self.done)
            error = self._error
        if error is not None:
            self._retry()
            raise error
        if self._end is not None:
            self._end.wait()

    def done(self) -> bool:
        """True if `wait` would return or raise at once."""
        return self.is_over or self._error is not None

    def rest(self, seconds: float) -> None:
        """Return when nothing of it is under way, or after so long. Raises nothing, and has nothing tried again."""
        with self._lock:
            self._changed.wait_for(self.done, seconds)

    @property
    def is_over(self) -> bool:
        """True if nothing of it is left to do."""
        return self._blocks_left == 0

    def finish_block(self, end: Transfer | None) -> None:
        """One piece less is left. ``end`` is its end on the device; None if it was done here."""
        with self._lock:
            self._end = end
            self._blocks_left -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Something stopped it."""
        with self._lock:
            self._error = error
            self._changed.notify_all()

    def reopen(self) -> None:
        """It is tried again."""
        with self._lock:
            self._error = None
