"""Which storages are away, in the order in which backward will come to them."""

from bisect import bisect_left
from weakref import ReferenceType, ref

from .storage import SavedStorage


class AwayOrder:
    """Storages by their number. Backward runs what was made last first, so it comes to the highest number first.

    Storages whose graph is gone are forgotten when they are met.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[int, ReferenceType[SavedStorage]]] = []

    def add(self, saved: SavedStorage) -> None:
        """A storage has gone away."""
        self._entries.insert(self._place(saved.number), (saved.number, ref(saved)))

    def discard(self, saved: SavedStorage) -> None:
        """A storage comes back."""
        at = self._place(saved.number)
        if at < len(self._entries) and self._entries[at][0] == saved.number:
            del self._entries[at]

    def below(self, number: int) -> SavedStorage | None:
        """The one that backward comes to next after this number; None if there is none."""
        at = self._place(number)
        while at > 0:
            at -= 1
            saved = self._entries[at][1]()
            if saved is not None:
                return saved
            del self._entries[at]
        return None

    def _place(self, number: int) -> int:
        return bisect_left(self._entries, number, key=lambda entry: entry[0])
