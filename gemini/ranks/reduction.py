"""Gradients on their way to the owners of their extents, and their sums in the order of the ranks.

::

    our backward --send--> letter and tensor to each owner          a thread of ours takes the parts whose turn it is,
    their backwards -----> letters, in any order --> `Rounds` ----> receives each, has it summed, and says so

A rank may have little memory for gradients on their way, so that its backward waits for others to take them. What waits
for its turn is not taken. Therefore a rank that runs no backward for now says so: its turns are passed over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..chunk.communicator import Contribution, Delivery, Source
from .mailbox import Mailbox
from .messages import Part, Pause, Received, RoundEnd
from .patience import Patience
from .rounds import FOREVER, Rounds
from .shipping import Shipping
from .sums import Ours, Sums, Theirs


class Reduction:
    """Sends our gradients and sums those of all ranks.

    Parameters
    ----------
    mailbox
        Takes and brings letters and tensors.
    patience
        Waits for those of others.
    on_sum
        Called by the thread that sums when it has added something.
    """

    def __init__(self, mailbox: Mailbox, patience: Patience, on_sum: Callable[[], None]) -> None:
        self.rounds = 0
        """Of this generation: the backwards that we have run."""
        self._has_some = False
        """A backward of ours has contributed something in this generation."""
        self._until: int | None = None
        """The generation that all ranks have to go on with."""
        self._mailbox = mailbox
        self._patience = patience
        self._shipping = Shipping(mailbox, patience)
        self._sums = Sums(mailbox, on_sum)
        self._order: Rounds[Ours | Theirs] = Rounds(len(mailbox.names))
        self._early: list[tuple[int, Part | RoundEnd]] = []
        """Letters of a generation that we have not come to."""
        self._runs_none = False
        """No backward of ours comes before all have come together, or ever."""
        self._pausing: dict[int, int] = {}
        """Ranks that run no backward before this vote, or ever."""
        self._next_vote = 0
        """Or a number below it: the votes before are over."""

    @property
    def generation(self) -> int:
        """How often all gradients have been dropped."""
        return self._sums.generation

    def serve(self, source: Callable[[], Source | None]) -> None:
        """Have the sums added to this source, for as long as it is there."""
        with self._sums.changed:
            self._sums.serve(source)
            self._begin(0)

    # -- letters

    def received(self, sender: int, letter: Part | RoundEnd | Pause | Received) -> None:
        """Take in a letter."""
        if isinstance(letter, Received):
            self._shipping.received(sender, letter)
            return
        with self._sums.changed:
            if isinstance(letter, Pause):
                self._pausing[sender] = letter.number
                self._pass_over()
                return
            if not self._sums.has_source or (letter.generation > self.generation and not self._runs_none):
                self._early.append((sender, letter))
            else:
                self._take(sender, letter)

    def _take(self, sender: int, letter: Part | RoundEnd) -> None:
        is_current = letter.generation == self.generation
        if isinstance(letter, RoundEnd):
            if is_current:
                self._sums.put(item for _, item in self._order.ended(sender, letter.rounds))
        else:
            item = Theirs(sender, letter)  # what was dropped is received all the same: its sender waits for that
            self._sums.put(self._order.arrived(letter.chunk, sender, letter.round, item) if is_current else (item,))
        self._sums.changed.notify_all()

    # -- our backward

    def send(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Delivery:
        """See `Communicator.send`."""
        self._has_some = True
        gradient, extent = contribution.gradient, extents[self._mailbox.index % len(extents)]
        shipment = self._shipping.send(chunk, contribution, extents, self.generation, self.rounds)
        own = Contribution(contribution.present, gradient[extent.start : extent.stop], contribution.anew)
        shipment.goes(self._mailbox.index, None)
        with self._sums.changed:
            item = Ours(self.generation, chunk, own, shipment)
            self._sums.put(self._order.arrived(chunk, self._mailbox.index, self.rounds, item))
        return shipment

    def end_round(self) -> None:
        """See `Communicator.end_round`."""
        self._has_some = True
        with self._sums.changed:
            self.rounds += 1
            self._sums.put(item for _, item in self._order.ended(self._mailbox.index, self.rounds))
        self._mailbox.post_all(RoundEnd(self.generation, self.rounds))

    def pause(self, number: int) -> None:
        """Tell the others that we run no backward before all have voted on ``number``.

        Theirs of a generation that we have not come to are received from now on: they are dropped when all come
        together, since they are not of one generation then.
        """
        with self._sums.changed:
            self._runs_none, self._next_vote = True, number
            self._take_early()
        self._mailbox.post_all(Pause(number))

    def gone(self, rank: int) -> None:
        """A rank (maybe this one) has ended, and runs no backward any more."""
        with self._sums.changed:
            self._pausing[rank] = FOREVER
            self._runs_none |= rank == self._mailbox.index
            self._take_early()
            self._pass_over()

    def _pass_over(self) -> None:
        for rank, until in self._pausing.items():
            if until >= self._next_vote:
                self._sums.put(item for _, item in self._order.ended(rank, FOREVER))

    def _has_ended(self) -> bool:
        return self._pausing.get(self._mailbox.index) == FOREVER

    def _take_early(self) -> None:
        early, self._early = self._early, []
        for sender, letter in early:
            if not self._sums.has_source or (letter.generation > self.generation and not self._runs_none):
                self._early.append((sender, letter))
            else:
                self._take(sender, letter)

    # -- sums

    def come_to(self, rounds: int) -> None:
        """All ranks have run all their backwards, of which one has run this many: there is nothing else to sum."""
        with self._sums.changed:
            self.rounds, self._has_some = rounds, self._has_some or rounds > 0
            self._runs_none, self._next_vote = self._has_ended(), self._next_vote + 1
            self._sums.put(self._order.come_to(rounds))
            self._pass_over()

    def are_summed(self, chunk: int, rounds: int) -> bool:
        """True if these rounds have been summed here."""
        with self._sums.changed:
            return self._order.is_summed(chunk, rounds) and self._sums.is_idle

    def wait_for_sums(self, chunk: int, rounds: int) -> None:
        """Wait until these rounds have been summed here.

        Raises
        ------
        RankError
            If another rank is gone, or does not come so far in time.
        """
        self._wait(
            lambda: self._order.is_summed(chunk, rounds) and self._sums.is_idle, lambda: self._order.late(rounds)
        )

    def wait_for_all(self) -> None:
        """Wait until what was handed out has been summed here. Raises as `wait_for_sums`."""
        self._wait(lambda: self._sums.is_idle, list)

    def _wait(self, is_done: Callable[[], bool], late: Callable[[], list[int]]) -> None:
        def missing() -> list[int]:
            if self._sums.has_failed or is_done():
                return []
            return [rank for rank in late() if rank != self._mailbox.index] or self._mailbox.others

        self._patience.wait(
            self._sums.changed,
            missing,
            lambda names: (
                f"the gradients of {names} were not complete within {self._patience.seconds:g} s: look for a backward "
                "that is slow, or that only some ranks run"
            ),
        )
        self._sums.check()

    def forget_until(self, generation: int) -> None:
        """All gradients are to be dropped on all ranks, which then go on with this generation: see `forgetting`."""
        self._until, self._next_vote = generation, self._next_vote + 1

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """A context in which all gradients are dropped here; those of the next generation are summed after it."""
        with self._sums.pausing():
            yield
            with self._sums.changed:
                if self._until is not None or self._has_some:
                    self._begin(self.generation + 1 if self._until is None else self._until)
                    self._until = None
                    self._take_early()
                    self._pass_over()

    def _begin(self, generation: int) -> None:
        self._sums.begin(generation)
        self.rounds, self._has_some = 0, False
        self._runs_none = self._has_ended()
        before, self._order = self._order, Rounds(len(self._mailbox.names))
        self._sums.put(before.held_back())  # to be received, and dropped

    def close(self, seconds: float) -> None:
        """End the thread that sums."""
        self._sums.close(seconds)
