"""A storage that a graph has saved, however many tensors of the graph lie in it."""

import sys
from queue import SimpleQueue
from weakref import ReferenceType, ref

from torch import Tensor, UntypedStorage

from ..torch_private import storage_uses
from .original import Original
from .place import Passage, Room
from .state import SavedState, changed

Abandoned = SimpleQueue[tuple[Passage | None, Room]]
"""What storages leave behind whose graph is gone. A queue made for finalizers, which may come at any place."""

_OWN_REFERENCES = 2
"""References from Python to a storage object that nobody but its `SavedStorage` has: its attribute and an argument."""


class SavedStorage:
    """The graph holds it, through the tensors that it has saved; everything else holds it weakly.

    Parameters
    ----------
    memory
        The storage, which this keeps alive while it is needed here.
    abandoned
        Gets what is to be given back when the graph has let this go.
    """

    __slots__ = (
        *("__weakref__", "_abandoned", "_originals"),
        *("memory", "nbytes", "number", "passage", "room", "state", "was_used"),
    )

    def __init__(self, memory: UntypedStorage, abandoned: Abandoned) -> None:
        self.memory: UntypedStorage | None = memory
        self.nbytes = memory.nbytes()
        self.number = -1
        """Grows with each tensor that is saved; a backward needs the highest first."""
        self.state = SavedState.HERE
        self.room: Room | None = None
        self.passage: Passage | None = None
        """The copy under way."""
        self.was_used = False
        """Backward has come to it."""
        self._abandoned = abandoned
        self._originals: list[ReferenceType[Original]] = []
        """Weakly: what graphs have saved holds them, and a tensor may hold the graph that this belongs to."""

    def __del__(self) -> None:
        if self.room is not None:
            self._abandoned.put((self.passage, self.room))

    @property
    def is_ours_alone(self) -> bool:
        """True if nothing but this holds the memory, so that letting it go frees it and nobody can change it."""
        return not self.lies_in_tensors and sys.getrefcount(self.memory) <= _OWN_REFERENCES

    @property
    def lies_in_tensors(self) -> bool:
        """True if some tensor holds the memory: one of the program's, or one that backward has got again."""
        if self.memory is None:
            return False
        while any(original.let_go() for original in self._held()):
            pass  # a view is gone, and with it a reference to what it was a view of
        return storage_uses(self.memory) > 1

    def original(self, tensor: Tensor) -> Original:
        """What holds a tensor of the graph that lies in it, while somebody else has that."""
        original = next((each for each in self._held() if each.is_of(tensor)), None)
        if original is None:
            original = Original(tensor)
            self._originals.append(ref(original))
        return original

    def _held(self) -> list[Original]:
        held = [original for original in (reference() for reference in self._originals) if original is not None]
        if len(held) < len(self._originals):
            self._originals = [ref(original) for original in held]
        return held

    def saved_again(self, number: int) -> None:
        """One more tensor of the graph lies in it."""
        self.number = number

    def used(self) -> None:
        """Backward has come to it."""
        self.was_used = True

    def leave(self, room: Room) -> Passage:
        """HERE -> LEAVING."""
        assert self.memory is not None
        passage = room.store(self.memory)
        self.state = changed(self.state, SavedState.LEAVING)
        self.room, self.passage = room, passage
        return passage

    def remain(self) -> Room:
        """LEAVING -> HERE: the copy was called off, or failed. Returns the room, to be given back."""
        self.state = changed(self.state, SavedState.HERE)
        room, self.room, self.passage = self.room, None, None
        assert room is not None
        return room

    def copied(self) -> None:
        """LEAVING or COMING -> BACK: the values are in both places."""
        self.state = changed(self.state, SavedState.BACK)
        self.passage = None

    def drop(self) -> None:
        """BACK -> AWAY: let the memory go."""
        self.state = changed(self.state, SavedState.AWAY)
        self.memory = None

    def come(self) -> Passage:
        """AWAY -> COMING. Raises torch's error if there is no memory; nothing has changed then."""
        assert self.room is not None
        memory, passage = self.room.load()
        self.state = changed(self.state, SavedState.COMING)
        self.memory, self.passage = memory, passage
        return passage

    def fail_to_come(self) -> None:
        """COMING -> AWAY."""
        self.state = changed(self.state, SavedState.AWAY)
        self.memory = self.passage = None
