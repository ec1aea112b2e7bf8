"""Agreement: every rank says what it is about to do, and goes on when all have said the same.

::

    rank 0   optimizer.step() number 7 --.                 .--> goes on
    rank 1   optimizer.step() number 7 --+--> all the same +--> goes on
    rank 2   optimizer.step() number 7 --'                 '--> goes on

Each rank sees what all have said and comes to the same conclusion. Where they differ, all raise the same error.
"""

import threading
from collections.abc import Sequence

import msgspec

from ..chunk.communicator import Word
from ..errors import RankError
from .mailbox import Mailbox
from .messages import Vote, Withdrawal
from .patience import Patience


class Votes:
    """Votes of one rank and those that it has from others.

    Parameters
    ----------
    mailbox
        Brings them.
    patience
        Waits for those of others.
    """

    def __init__(self, mailbox: Mailbox, patience: Patience) -> None:
        self.number = 0
        self._mailbox = mailbox
        self._patience = patience
        self._changed = threading.Condition()
        self._votes: dict[int, dict[int, Vote]] = {}
        """Number -> rank -> its vote."""
        self._withdrawn: dict[int, set[int]] = {}

    def received(self, sender: int, letter: Vote | Withdrawal) -> None:
        """Take in a letter."""
        with self._changed:
            if isinstance(letter, Vote):
                self._votes.setdefault(letter.number, {})[sender] = letter
            else:
                self._withdrawn.setdefault(letter.number, set()).add(sender)
            self._changed.notify_all()

    def notice(self) -> None:
        """Something else has come that those who wait may want to know."""
        with self._changed:
            self._changed.notify_all()

    def agree(self, doing: str, word: Word, epoch: int) -> Sequence[Word]:
        """See `Communicator.agree`."""
        number, self.number = self.number, self.number + 1
        own = Vote(number, epoch, doing, msgspec.msgpack.encode(word))
        self._mailbox.post_all(own)
        try:
            self._wait(number, doing)
        except RankError:
            self._withdraw(number)
            raise
        with self._changed:
            votes = self._votes.pop(number, {})
            withdrawn = self._withdrawn.pop(number, set())
        votes[self._mailbox.index] = own
        if withdrawn:
            names = ", ".join(self._mailbox.names[index] for index in sorted(withdrawn))
            raise RankError(f"{names} waited for the other ranks at {doing} in vain and went on without it; so do we")
        if len({(vote.doing, vote.epoch) for vote in votes.values()}) > 1:
            raise RankError(self._differences(votes))
        return [msgspec.msgpack.decode(votes[index].word) for index in sorted(votes)]

    def _wait(self, number: int, doing: str) -> None:
        seconds = self._patience.seconds
        self._patience.wait(
            self._changed,
            lambda: self._missing(number),
            lambda names: (
                f"{names} did not come to {doing} within {seconds:g} s, the timeout of the process group. All ranks do "
                "this together: look for what only some ranks do, or give launch_from_torch a longer timeout"
            ),
            lambda ended: (
                f"{ended}, and this rank is at {doing}, which all ranks do together. Have every rank do the same "
                "number of steps: give each the same number of batches (booster.plugin.prepare_dataloader does), or "
                "stop all at the shortest"
            ),
        )

    def _missing(self, number: int) -> list[int]:
        there = {*self._votes.get(number, ()), *self._withdrawn.get(number, ())}
        return [index for index in self._mailbox.others if index not in there]

    def _withdraw(self, number: int) -> None:
        for index in self._mailbox.others:
            if not self._mailbox.is_lost(index):
                try:
                    self._mailbox.post(index, Withdrawal(number))
                except RankError:
                    continue  # one error is enough

    def _differences(self, votes: dict[int, Vote]) -> str:
        said = "; ".join(f"{self._mailbox.names[index]}: {votes[index].doing}" for index in sorted(votes))
        if len({vote.doing for vote in votes.values()}) > 1:
            return f"the ranks are about to do different things, and none has done any of them: {said}"
        epochs = ", ".join(f"{self._mailbox.names[index]}: {votes[index].epoch}" for index in sorted(votes))
        return (
            f"at {votes[self._mailbox.index].doing} the ranks have changed the model a different number of times "
            f"({epochs}): one of them has failed in between. Start again from the last checkpoint"
        )
