"""Where saved tensors go: the interface of a tier below the memory that computes."""

from typing import Protocol

from torch import UntypedStorage

from ..chunk import Tier


class Passage(Protocol):
    """A copy under way, in either direction. It holds on to the memory at its ends until it is over."""

    def done(self) -> bool:
        """True if `wait` would return at once."""

    def wait(self) -> None:
        """Return when the calling thread may use or drop what was copied; raise what went wrong."""

    def rest(self, seconds: float) -> None:
        """Return when it is over, well or not, or after so long."""

    def call_off(self) -> bool:
        """Have it not happen; False if it has begun, and goes on to its end."""


class Room(Protocol):
    """The bytes that one storage takes on the tier below."""

    @property
    def tier(self) -> Tier:
        """The tier that they are on."""

    @property
    def taken_bytes(self) -> int:
        """Bytes of the tier, as the ledger has them."""

    def store(self, memory: UntypedStorage) -> Passage:
        """Begin to copy ``memory`` here."""

    def load(self) -> tuple[UntypedStorage, Passage]:
        """Take memory that computes and begin to copy what is here to it.

        Raises
        ------
        RuntimeError
            torch's error if there is no memory.
        """

    def release(self) -> None:
        """Have the bytes for others. No passage may be under way."""


class Place(Protocol):
    """A tier that saved tensors may leave for."""

    def reserve(self, memory: UntypedStorage) -> Room:
        """Room for a storage of the memory that computes.

        Raises
        ------
        OutOfMemory, OffloadError
            If there is none.
        """

    def note_stream(self) -> None:
        """The calling thread has a graph save what it computes in its current stream."""

    def rest(self) -> None:
        """Wait for what still uses room that was released."""

    def trim(self) -> None:
        """Give the system what nothing has needed lately. Called between two steps."""

    def close(self) -> None:
        """End worker threads. What is stored can still be loaded."""
