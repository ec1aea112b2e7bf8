"""The room that saved tensors take on the tiers below."""

from collections.abc import Sequence
from queue import Empty, SimpleQueue

from torch import UntypedStorage

from ..errors import OffloadError, OutOfMemory
from .counts import ActivationCounts
from .place import Passage, Place, Room
from .storage import Abandoned


class Below:
    """Takes room in the first place that has some, and gives back what graphs leave behind when they go.

    Parameters
    ----------
    places
        The tiers below, the first choice first; at least one.
    counts
        Told what is taken.
    """

    def __init__(self, places: Sequence[Place], counts: ActivationCounts) -> None:
        self.abandoned: Abandoned = SimpleQueue()
        """Filled by the finalizers of storages."""
        self._places = places
        self._counts = counts
        self._ending: list[tuple[Passage, Room]] = []
        """Left behind with a copy still under way."""

    def reserve(self, memory: UntypedStorage) -> Room:
        """Take room for a storage.

        Raises
        ------
        OutOfMemory, OffloadError
            What the last of the places says, if none has room.
        """
        *others, last = self._places
        for place in others:
            try:
                return self._taken(place.reserve(memory))
            except (OutOfMemory, OffloadError):
                pass
        return self._taken(last.reserve(memory))

    def _taken(self, room: Room) -> Room:
        self._counts.takes(room.tier, room.taken_bytes)
        return room

    def note_stream(self) -> None:
        """The calling thread saves what it computes in its current stream."""
        for place in self._places:
            place.note_stream()

    def release(self, room: Room) -> None:
        """Give room back."""
        room.release()
        self._counts.takes(room.tier, -room.taken_bytes)

    def reclaim(self, seconds: float = 0.0) -> None:
        """Give back what is left behind.

        Parameters
        ----------
        seconds
            To wait, at most, for each copy that has begun and that nothing needs any more.
        """
        while True:
            try:
                passage, room = self.abandoned.get_nowait()
            except Empty:
                break
            if passage is None or passage.call_off():
                self.release(room)
            else:
                self._ending.append((passage, room))
        ending, self._ending = self._ending, []
        for passage, room in ending:
            if seconds:
                passage.rest(seconds)
            if passage.done():
                self.release(room)
            else:
                self._ending.append((passage, room))

    def rest(self) -> None:
        """Wait for what still uses room that was released."""
        for place in self._places:
            place.rest()

    def trim(self) -> None:
        """Give the system what nothing has needed lately."""
        for place in self._places:
            place.trim()

    def close(self) -> None:
        """End threads."""
        for place in self._places:
            place.close()
