"""Gradients on their way to the owners of their extents, and their sums in the order of the ranks.

::

    our backward --send--> letter and tensor to each owner          a thread of ours takes the parts whose turn it is,
    their backwards -----> letters, in any order --> `Rounds` ----> receives each, has it summed, and says so

A rank may have little memory for gradients on their way, so that its backward waits for others to take them. What waits
for its turn is not taken. Therefore a rank that runs no backward for now says so: its turns are passed over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..chunk.communicator import Contribution, Delivery, Source
from .mailbox import Mailbox
from .messages import Part, Pause, Received, RoundEnd
from .patience import Patience
from .pauses import Pauses
from .rounds import FOREVER, Rounds
from .shipping import Shipping
from .sums import Ours, Sums, Theirs


@dataclass(slots=True)
class _Generation:
    """Gradients between two times at which all are dropped."""

    number: int
    order: Rounds[Ours | Theirs]
    rounds: int = 0
    """Backwards that we have run."""
    has_some: bool = False
    """One of them has contributed something."""

    def contribute(self, rounds: int) -> None:
        """We have something of our own, beside this many rounds that are over."""
        self.rounds, self.has_some = rounds, True


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
        self._mailbox = mailbox
        self._patience = patience
        self._shipping = Shipping(mailbox, patience)
        self._sums = Sums(mailbox, on_sum)
        self._now = _Generation(0, Rounds(len(mailbox.names)))
        self._early: list[tuple[int, Part | RoundEnd]] = []
        """Letters of a generation that we have not come to."""
        self._pauses = Pauses(mailbox.index)

    @property
    def generation(self) -> int:
        """How often all gradients have been dropped."""
        return self._now.number

    @property
    def rounds(self) -> int:
        """Of this generation: the backwards that we have run."""
        return self._now.rounds

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
                self._pauses.begin(sender, letter.number)
                self._pass_over()
                return
            if self._is_early(sender, letter):
                self._early.append((sender, letter))
            else:
                self._take(sender, letter)

    def _is_early(self, sender: int, letter: Part | RoundEnd) -> bool:
        """Whether a letter has to wait.

        One of our generation waits for our first contribution, or for the vote: until then this rank may drop what it
        has, as with a ``zero_grad`` before its backward, and no rank begins a new generation for that.
        """
        if not self._sums.has_source:
            return True
        if letter.generation == self.generation:
            return not self._now.has_some and not self._pauses.is_own
        return letter.generation > self.generation and not self._pauses.dooms(sender)

    def _take(self, sender: int, letter: Part | RoundEnd) -> None:
        is_current = letter.generation == self.generation
        if isinstance(letter, RoundEnd):
            if is_current:
                self._sums.put(item for _, item in self._now.order.ended(sender, letter.rounds))
        else:
            item = Theirs(sender, letter)  # what was dropped is received all the same: its sender waits for that
            self._sums.put(self._now.order.arrived(letter.chunk, sender, letter.round, item) if is_current else (item,))
        self._sums.changed.notify_all()

    # -- our backward

    def send(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Delivery:
        """See `Communicator.send`."""
        self._now.contribute(self.rounds)
        gradient, extent = contribution.gradient, extents[self._mailbox.index % len(extents)]
        shipment = self._shipping.send(chunk, contribution, extents, self.generation, self.rounds)
        own = Contribution(contribution.present, gradient[extent.start : extent.stop], contribution.anew)
        shipment.goes(self._mailbox.index, None)
        with self._sums.changed:
            self._take_early()
            item = Ours(self.generation, chunk, own, shipment)
            self._sums.put(self._now.order.arrived(chunk, self._mailbox.index, self.rounds, item))
        return shipment

    def end_round(self) -> None:
        """See `Communicator.end_round`."""
        with self._sums.changed:
            self._now.contribute(self.rounds + 1)
            self._take_early()
            self._sums.put(item for _, item in self._now.order.ended(self._mailbox.index, self.rounds))
        self._mailbox.post_all(RoundEnd(self.generation, self.rounds))

    def pause(self, number: int) -> None:
        """Tell the others that we run no backward before all have voted on ``number``.

        Theirs of a generation that we have not come to are received from now on: they are dropped when all come
        together, since they are not of one generation then.
        """
        with self._sums.changed:
            self._pauses.begin_own(number)
            self._take_early()
        self._mailbox.post_all(Pause(number))

    def gone(self, rank: int) -> None:
        """A rank (maybe this one) has ended, and runs no backward any more."""
        with self._sums.changed:
            self._pauses.begin(rank, FOREVER)
            self._take_early()
            self._pass_over()

    def _pass_over(self) -> None:
        """Go on without the ranks that run no backward for now; of some we have yet to take what came before."""
        waiting = {sender for sender, letter in self._early if letter.generation == self.generation}
        for rank in self._pauses.ranks():
            if rank in waiting:
                continue
            self._sums.put(item for _, item in self._now.order.ended(rank, FOREVER))

    def _take_early(self) -> None:
        early, self._early = self._early, []
        for sender, letter in early:
            if self._is_early(sender, letter):
                self._early.append((sender, letter))
            else:
                self._take(sender, letter)
        if len(self._early) < len(early):
            self._pass_over()

    # -- sums

    def come_to(self, rounds: int) -> None:
        """All ranks have run all their backwards, of which one has run this many: there is nothing else to sum."""
        with self._sums.changed:
            if rounds:
                self._now.contribute(rounds)
            self._pauses.end()
            self._sums.put(self._now.order.come_to(rounds))
            self._pass_over()

    def are_summed(self, chunk: int, rounds: int) -> bool:
        """True if these rounds have been summed here."""
        with self._sums.changed:
            return self._now.order.is_summed(chunk, rounds) and self._sums.is_idle

    def wait_for_sums(self, chunk: int, rounds: int) -> None:
        """Wait until these rounds have been summed here.

        Raises
        ------
        RankError
            If another rank is gone, or does not come so far in time.
        """
        order = self._now.order
        self._wait(lambda: order.is_summed(chunk, rounds) and self._sums.is_idle, lambda: order.late(rounds))

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
        with self._sums.changed:
            self._pauses.end(generation)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """A context in which all gradients are dropped here; those of the next generation are summed after it."""
        with self._sums.pausing():
            yield
            with self._sums.changed:
                if (agreed := self._pauses.take_generation()) is not None or self._now.has_some:
                    self._begin(self.generation + 1 if agreed is None else agreed)
                    self._take_early()
                    self._pass_over()

    def _begin(self, generation: int) -> None:
        before = self._now.order
        self._sums.begin(generation)
        self._now = _Generation(generation, Rounds(len(self._mailbox.names)))
        self._sums.put(before.held_back())  # to be received, and dropped

    def close(self, seconds: float) -> None:
        """End the thread that sums."""
        self._sums.close(seconds)
