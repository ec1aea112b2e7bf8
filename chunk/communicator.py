"""The seam for several owners: what a chunk needs of the others that keep an extent of it.

Everything is asked of all owners in the same order, so it may be a collective. Sums are made in the order of the
owners, on the owner of the extent: their number never changes numbers.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .extent import SOLE, Owner
from .memory import Transfer


class Span(NamedTuple):
    """Values of one chunk, each of them at home with one owner."""

    chunk: int
    name: str
    """``"master"``, ``"gradient"`` or a state of the optimizer."""
    start: int
    """Where in the chunk's layout they begin (for values of blocks of elements: the number of the block)."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one owner's backward adds to the gradient of an extent."""

    present: Set[int]
    """Positions of the slots that have a gradient."""
    gradient: Tensor | None
    """Flat, of the extent; None if no slot has one. What lies in other slots means nothing."""


class Arriving(Protocol):
    """Contributions on their way to the owner of an extent."""

    def wait(self) -> Sequence[Contribution]:
        """One of each owner, in their order."""


class Communicator(Protocol):
    """The other owners."""

    owner: Owner

    def gather(self, span: Span, whole: Tensor, parts: Sequence[range]) -> None:
        """Fill ``whole`` (flat, on any device) with what the others have; our own part is in place.

        Parameters
        ----------
        span
            Which values these are.
        parts
            What each owner has of ``whole``.
        """

    def exchange(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Arriving:
        """Send our gradient of a whole chunk, to each owner its extent. It may change as soon as this returns."""

    def agree_max(self, value: Tensor) -> Tensor:
        """The element-wise maximum over owners (an overflow seen by one is seen by all)."""


class SingleProcess:
    """The only owner: nothing is ever gathered or exchanged."""

    owner = SOLE

    def gather(self, span: Span, whole: Tensor, parts: Sequence[range]) -> None:
        raise NotImplementedError

    def exchange(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Arriving:
        raise NotImplementedError

    def agree_max(self, value: Tensor) -> Tensor:
        return value


ALONE = SingleProcess()


class Gathering:
    """A move to the part of a full copy that is at home here, and then the others' parts (a `Transfer`)."""

    def __init__(self, own: Transfer, gather: Callable[[], None]) -> None:
        self._own = own
        self._gather = gather

    def wait(self) -> None:
        # By the thread that uses the full copy: all owners come to the uses in the same order.
        self._own.wait()
        self._gather()

    def done(self) -> bool:
        return self._own.done()

    def rest(self, seconds: float) -> None:
        self._own.rest(seconds)
