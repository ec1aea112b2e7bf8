"""Has memory that graphs have saved leave where that frees something, and come back ahead of backward.

::

    forward    block 0 ------ block 1 ------ block 2 ------ block 3
                      saved 0 --> below
                                     saved 1 --> below            at most `limit_bytes` on the way
    backward                                 block 3 ------ block 2 ------ block 1 ------ block 0
                                           saved 2 is called off     <-- saved 1
                                                                                 <-- saved 0     and on the way back

A storage waits until nothing holds it but the graph; whether that is so is looked at whenever another one is saved.
Parameters, buffers and constants never get there.
"""

import threading
import time
from collections.abc import Sequence
from weakref import WeakValueDictionary

from torch import UntypedStorage

from ..errors import is_out_of_memory
from ..torch_private import storage_key
from .below import Below
from .counts import ActivationCounts
from .departures import Departures
from .place import Place
from .returns import Returns
from .state import SavedState
from .storage import SavedStorage


class ActivationStore:
    """The mediator of what leaves, what comes back, and the room that is taken for it.

    Parameters
    ----------
    places
        The tiers below, the first choice first.
    limit_bytes
        The most that may be on its way out (forward waits then), and on its way back ahead of use.
    counts
        Go on with these; None: begin.
    """

    def __init__(self, places: Sequence[Place], limit_bytes: int, counts: ActivationCounts | None = None) -> None:
        self.counts = counts if counts is not None else ActivationCounts()
        self._below = Below(places, self.counts)
        self._departures = Departures(self._below, self.counts, limit_bytes)
        self._returns = Returns(self.counts, limit_bytes)
        self._known: WeakValueDictionary[int, SavedStorage] = WeakValueDictionary()
        """Key of a storage -> what is known of it; only right where that still has this storage."""
        self._last_number = 0
        self._lock = threading.RLock()
        """Backward runs on threads of autograd's own where there is a device."""

    def save(self, memory: UntypedStorage) -> SavedStorage:
        """Note that a graph holds one more tensor in this storage, and let others leave that only graphs hold."""
        with self._lock:
            self._below.note_stream()
            key = storage_key(memory)
            saved = self._known.get(key)
            if saved is None or saved.memory is not memory:
                self._known[key] = saved = SavedStorage(memory, self._below.abandoned)
                self._departures.consider(saved)
                self.counts.saved(saved.nbytes)
            self._last_number += 1
            saved.saved_again(self._last_number)
            self.settle(may_wait=True)
        return saved

    def settle(self, may_wait: bool = False) -> None:
        """Let all leave that only graphs hold, as far as the limit allows, or wait for others to have left."""
        with self._lock:
            self._look_around()
            self._returns.arrived_below(self._departures.begin(may_wait))

    def _look_around(self) -> None:
        self._below.reclaim()
        self._returns.arrived_below(self._departures.finish())
        self._returns.drop_used()

    def bring(self, saved: SavedStorage) -> UntypedStorage:
        """The memory of a storage, once it has its values.

        Raises
        ------
        OffloadError
            If it could not be read; a second backward tries again.
        RuntimeError
            torch's error if there is no memory for it.
        """
        with self._lock:
            self._look_around()
            self._departures.call_off(saved)
            was_there = self._need(saved)
            for coming in (saved, *self._returns.read_ahead(saved.number)):
                if coming.memory is not None:
                    self._known[storage_key(coming.memory)] = coming
            passage = saved.passage if saved.state is SavedState.COMING else None
            memory = saved.memory
            is_late = was_there and passage is not None and not passage.done()
            self.counts.needed(hit=was_there and not is_late, late=is_late, miss=not was_there)
        assert memory is not None
        if passage is not None:
            begin = time.perf_counter()
            try:
                passage.wait()
            except BaseException:
                with self._lock:
                    self._returns.has_failed(saved, passage)
                raise
            with self._lock:
                self._returns.has_come(saved, passage)
                self.counts.waited(to_return=time.perf_counter() - begin)
        return memory

    def _need(self, saved: SavedStorage) -> bool:
        try:
            return self._returns.need(saved)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._returns.arrived_below(self._departures.finish(wait=True))
        self._returns.drop_used(limit_bytes=0)
        return self._returns.need(saved)

    def rest(self, seconds: float = 0.0) -> None:
        """Give back what graphs have left behind.

        Parameters
        ----------
        seconds
            To wait, at most, for each copy that has begun and that nothing needs any more.
        """
        with self._lock:
            self._below.reclaim(seconds)
            if seconds:
                self._below.rest()

    def trim(self) -> None:
        """A training step begins: have places give the system what the last one did not need."""
        with self._lock:
            self._below.reclaim()
            self._below.trim()

    def close(self) -> None:
        """End threads. Graphs that outlive the model keep what they have, here and below."""
        self._below.close()
