"""Storages that graphs have saved, on their way to a tier below."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from weakref import ReferenceType, ref

from ..errors import OffloadError, OutOfMemory
from .below import Below
from .counts import ActivationCounts
from .place import Passage
from .state import SavedState
from .storage import SavedStorage

logger = logging.getLogger(__name__)


class Departures:
    """Has storages leave when nothing holds them but their graph, and no more at once than a limit allows.

    When a tensor is saved somebody uses it: the module that has made it, often the next one too, and it may be an entry
    of ``hidden_states`` that the user keeps. To copy such memory frees nothing, and somebody may change it.

    Parameters
    ----------
    below, counts
        Where storages go, and what is told of them.
    limit_bytes
        The most that may be on its way.
    """

    def __init__(self, below: Below, counts: ActivationCounts, limit_bytes: int) -> None:
        self._below = below
        self._counts = counts
        self._limit_bytes = limit_bytes
        self._staying: list[ReferenceType[SavedStorage]] = []
        """HERE, to be looked at again."""
        self._leaving: deque[tuple[ReferenceType[SavedStorage], Passage]] = deque()

    def consider(self, saved: SavedStorage) -> None:
        """Have a storage leave some time later."""
        self._staying.append(ref(saved))

    def begin(self, may_wait: bool) -> list[SavedStorage]:
        """Have those leave that only their graph holds, as far as the limit allows, or wait until it does.

        Returns
        -------
        list of SavedStorage
            Those whose copy is over by now.
        """
        arrived: list[SavedStorage] = []
        staying, self._staying = self._staying, []
        for at, reference in enumerate(staying):
            saved = reference()
            if saved is None or saved.state is not SavedState.HERE:
                continue
            if not saved.is_ours_alone:
                self._staying.append(reference)
                continue
            if self._is_full(saved.nbytes):
                if not may_wait:
                    self._staying += staying[at:]
                    break
                arrived += self._wait_for_room(saved.nbytes)
            self._begin(saved)
        return arrived

    def _begin(self, saved: SavedStorage) -> None:
        assert saved.memory is not None
        try:
            room = self._below.reserve(saved.memory)
        except (OutOfMemory, OffloadError) as error:
            self._refuse(error)
            return
        self._leaving.append((ref(saved), saved.leave(room)))
        self._counts.leaves(saved.nbytes)

    def _is_full(self, more_bytes: int) -> bool:
        leaving = sum(saved.nbytes for saved in self._under_way())
        return leaving > 0 and leaving + more_bytes > self._limit_bytes

    def _under_way(self) -> Iterator[SavedStorage]:
        for reference, _ in self._leaving:
            saved = reference()
            if saved is not None and saved.state is SavedState.LEAVING:
                yield saved

    def _wait_for_room(self, nbytes: int) -> list[SavedStorage]:
        begin, arrived = time.perf_counter(), []
        while self._is_full(nbytes):
            arrived += self._finish_first()
        self._counts.waited(to_leave=time.perf_counter() - begin)
        return arrived

    def finish(self, wait: bool = False) -> list[SavedStorage]:
        """Those whose copy is over by now; with ``wait`` all of them."""
        arrived: list[SavedStorage] = []
        while self._leaving and (wait or self._leaving[0][1].done()):
            arrived += self._finish_first()
        return arrived

    def _finish_first(self) -> list[SavedStorage]:
        reference, passage = self._leaving.popleft()
        saved = reference()
        if saved is None or saved.passage is not passage:
            return []  # its graph is gone, or it was called off
        try:
            passage.wait()
        except Exception as error:
            self._below.release(saved.remain())
            self._refuse(error)
            return []
        saved.copied()
        return [saved]

    def call_off(self, saved: SavedStorage) -> None:
        """Backward needs a storage that may be about to leave."""
        if saved.state is SavedState.LEAVING and saved.passage is not None and saved.passage.call_off():
            self._below.release(saved.remain())
            self.consider(saved)  # if its graph is kept it may leave in another forward

    def _refuse(self, error: Exception) -> None:
        if not self._counts.refuse_count:
            logger.warning("tensors saved for backward stay in memory, and training goes on: %s", error)
        self._counts.stays()
