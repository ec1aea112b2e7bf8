"""The homes of one chunk, and who is told before the values in them change."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from .buffer import Buffer


class Watcher(Protocol):
    """Wants to know before values at home change."""

    def before_change(self, start: int, stop: int) -> None:
        """Elements ``[start, stop)`` of the chunk's layout are about to change; they may when this returns."""

    def changed_unannounced(self, positions: Iterable[int]) -> None:
        """Parameters at these positions were changed in place, and nobody could tell before."""


class Homes(dict[str, Buffer]):
    """A chunk's homes by the names of their buffers.

    Whatever changes values in them calls `before_change` first: an update, a load, an edit. The exception are
    operations in place on a pinned parameter that is its own home: they are found later, by its version.
    """

    def __init__(self, homes: Mapping[str, Buffer]) -> None:
        super().__init__(homes)
        self.edited_in_place: set[int] = set()
        """Positions of parameters that are their own home and were changed in place once, as by ``max_norm``."""
        self.changes = 0
        """How often values in them were about to change."""
        self._watcher: Watcher | None = None

    @property
    def are_watched(self) -> bool:
        """True if somebody is told before values change."""
        return self._watcher is not None

    def watch(self, watcher: Watcher | None) -> None:
        """Tell ``watcher`` before values change from now on; None: nobody."""
        self._watcher = watcher

    def before_change(self, start: int, stop: int) -> None:
        """Values of elements ``[start, stop)`` of the layout are about to change. See `Watcher`."""
        self.changes += 1
        if (watcher := self._watcher) is not None:
            watcher.before_change(start, stop)

    def note_edits(self, positions: Iterable[int]) -> None:
        """Parameters that are their own home were changed in place."""
        self.edited_in_place.update(positions)
        if (watcher := self._watcher) is not None:
            watcher.changed_unannounced(positions)
