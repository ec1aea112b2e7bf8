"""Bringing chunks to DEVICE and keeping them there: for units, for code outside of them, until the next step."""

from collections.abc import Sequence

from ..chunk import Chunk, ChunkManager
from ..errors import OutOfMemory
from ..updates.gradients import Gradients
from .device_room import DeviceRoom


class Pins:
    """Fetches and pins chunks, and what it takes to have them fit.

    Parameters
    ----------
    manager, gradients, room
        Has the chunks, shows their gradients, and may take room back from the model's own computation.
    """

    def __init__(self, manager: ChunkManager, gradients: Gradients, room: DeviceRoom) -> None:
        self.held: dict[Chunk, None] = {}
        """Pinned until the next step, because nothing will tell when the last use is over."""
        self._manager = manager
        self._gradients = gradients
        self._room = room

    def fetch(self, chunk: Chunk, keep: Sequence[Chunk] = (), overdraw: bool = False) -> None:
        """Start to bring a chunk; ``keep`` and ``overdraw`` are those of `ChunkManager.fetch`."""
        try:
            # What is held for later has taken the room of what is needed now.
            self._manager.fetch(chunk, keep, overdraw=overdraw or bool(self.held))
        except OutOfMemory:
            if not self._room.take_back():  # parameters must be there, whatever the model's own computation needs
                raise
            self._manager.fetch(chunk, keep)

    def pin(self, chunk: Chunk, keep: Sequence[Chunk]) -> None:
        """Wait for a chunk that was fetched, and keep it."""
        self._manager.pin(chunk, keep)
        self._gradients.reveal(chunk)  # from here on nobody can tell us that ``p.grad`` is asked for

    def bring(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Pin chunks for code outside of any unit, beyond the capacity if need be. `let_go` ends it."""
        self._manager.device.take_over()
        pinned: list[Chunk] = []
        try:
            for chunk in chunks:
                chunk.settle()
                self.fetch(chunk, chunks, overdraw=True)
                self.pin(chunk, chunks)
                pinned.append(chunk)
        except BaseException:
            self.let_go(pinned)
            raise
        return pinned

    def let_go(self, chunks: Sequence[Chunk]) -> None:
        """Unpin what `bring` pinned."""
        for chunk in chunks:
            chunk.unpin()
        self._manager.eviction.repay()

    def hold(self, chunks: Sequence[Chunk]) -> None:
        """Bring chunks and keep them until `release_held`."""
        for chunk in chunks:
            if chunk not in self.held:
                self.fetch(chunk, chunks, overdraw=True)
                self.pin(chunk, chunks)
                self.held[chunk] = None

    def release_held(self) -> None:
        """Unpin what was held: the step is over, and no graph from before it can be used any more."""
        for chunk in self.held:
            chunk.unpin()
        self.held.clear()
