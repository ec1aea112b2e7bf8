"""Which ranks run no backward for now: those that wait for a vote on the gradients, and those that have ended. Pure."""

from .rounds import FOREVER


class Pauses:
    """Remembers until which vote each rank pauses.

    Parameters
    ----------
    own
        The index of this rank.
    """

    def __init__(self, own: int) -> None:
        self._own = own
        self._until: dict[int, int] = {}
        """Rank -> the number of the vote that it waits for."""
        self._next_vote = 0
        """All votes on gradients before this one are over."""
        self._generation: int | None = None

    def begin(self, rank: int, until: int) -> None:
        """A rank runs no backward before this vote, or ever."""
        self._until[rank] = max(until, self._until.get(rank, 0))

    def begin_own(self, vote: int) -> None:
        """This rank is about to vote, on gradients."""
        self._next_vote = vote
        self.begin(self._own, vote)

    def end(self, generation: int | None = None) -> None:
        """The vote is over. If it was in vain, all ranks drop their gradients, and go on with this generation."""
        self._next_vote += 1
        self._generation = generation

    def take_generation(self) -> int | None:
        """The generation to go on with, if it has been agreed on since it was last asked for."""
        generation, self._generation = self._generation, None
        return generation

    @property
    def is_own(self) -> bool:
        """True if this rank pauses."""
        return self._until.get(self._own, -1) >= self._next_vote

    def ranks(self) -> list[int]:
        """The other ranks that pause, and this one if it has ended."""
        return [
            rank
            for rank, until in self._until.items()
            if until >= self._next_vote and (rank != self._own or until == FOREVER)
        ]

    def dooms(self, rank: int) -> bool:
        """True if what a rank sends of a later generation than ours is worth nothing.

        So it is while we wait for a vote that the rank has not come to: it will turn out that we differ. What it sends
        after that vote is of the generation that all go on with.
        """
        until = self._until.get(self._own, -1)
        return until == FOREVER or until >= self._next_vote > self._until.get(rank, -1)
