"""The order in which gradients are summed, whatever the order in which they come. Pure: no torch, no threads.

A round is one backward of each rank. For every chunk the contributions of rank 0 come first, then those of rank 1 and
so on; then those of the next round. One process that accumulates the same micro-batches adds in that order, too.
"""

from typing import Generic, TypeVar

Item = TypeVar("Item")

FOREVER = 1 << 60
"""More than any number of rounds or votes."""


class Rounds(Generic[Item]):
    """Holds contributions back until it is their turn.

    Parameters
    ----------
    ranks
        How many contribute.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._next: dict[int, int] = {}
        """Chunk -> its turn: the number of the round times the ranks, plus the rank."""
        self._ended = [0] * ranks
        """Rounds that each rank has ended."""
        self._waiting: dict[int, dict[int, list[Item]]] = {}
        """Chunk -> turn -> what came before it was its turn."""

    def arrived(self, chunk: int, rank: int, round_number: int, item: Item) -> list[Item]:
        """A contribution is there. Returns what is to be summed now, in order.

        What a rank sends for a turn that is over (a reentrant checkpoint brings a gradient twice) is summed at once.
        """
        turn = round_number * self._ranks + rank
        self._next.setdefault(chunk, 0)
        if turn < self._next[chunk]:
            return [item]
        self._waiting.setdefault(chunk, {}).setdefault(turn, []).append(item)
        return self._advance(chunk)

    def ended(self, rank: int, rounds: int) -> list[tuple[int, Item]]:
        """A rank has ended this many rounds. Returns what is to be summed now, each with its chunk."""
        if rounds <= self._ended[rank]:
            return []
        self._ended[rank] = rounds
        return [(chunk, item) for chunk in self._next for item in self._advance(chunk)]

    def come_to(self, rounds: int) -> list[Item]:
        """All ranks go on from this round, and there is nothing else of those before. Returns what is to be summed."""
        self._ended = [rounds] * self._ranks
        found = [item for chunk in self._next for item in self._advance(chunk)]
        self._next = dict.fromkeys(self._next, rounds * self._ranks)
        return found

    def late(self, rounds: int) -> list[int]:
        """The ranks that have not ended this many rounds."""
        return [rank for rank, ended in enumerate(self._ended) if ended < rounds]

    def held_back(self) -> list[Item]:
        """What has not been handed out."""
        return [item for turns in self._waiting.values() for items in turns.values() for item in items]

    def have_ended(self, rounds: int) -> bool:
        """True if every rank has ended this many rounds."""
        return min(self._ended) >= rounds

    def is_summed(self, chunk: int, rounds: int) -> bool:
        """True if everything of these rounds has been handed out for a chunk."""
        return self._next.get(chunk, 0) >= rounds * self._ranks or self.have_ended(rounds)

    def _advance(self, chunk: int) -> list[Item]:
        found: list[Item] = []
        waiting = self._waiting.get(chunk, {})
        while True:
            turn = self._next[chunk]
            if turn in waiting:
                found += waiting.pop(turn)
            elif not waiting or self._ended[turn % self._ranks] <= turn // self._ranks:
                return found
            self._next[chunk] = turn + 1
