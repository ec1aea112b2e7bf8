"""Agreement: every rank says what it is about to do, and goes on when all have said the same.

::

    rank 0   optimizer.step() number 7 --.                 .--> goes on
    rank 1   optimizer.step() number 7 --+--> all the same +--> goes on
    rank 2   optimizer.step() number 7 --'                 '--> goes on

Each rank sees what all have said and comes to the same conclusion. Where they differ, all raise the same error.
"""

import threading
import time
from collections.abc import Sequence

import msgspec

from ..chunk.communicator import Word
from ..errors import RankError
from .farewell import Farewell
from .mailbox import PING_SECONDS, Mailbox
from .messages import Vote, Withdrawal


class Votes:
    """Votes of one rank and those that it has from others.

    Parameters
    ----------
    mailbox
        Brings them.
    farewell
        Knows who has ended.
    """

    def __init__(self, mailbox: Mailbox, farewell: Farewell) -> None:
        self.number = 0
        self._mailbox = mailbox
        self._farewell = farewell
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
        deadline = time.monotonic() + self._mailbox.timeout.total_seconds()
        while missing := self._missing(number):
            for index in missing:
                if (reason := self._farewell.reason(index)) is not None:
                    raise RankError(
                        f"{self._mailbox.names[index]} has ended ({reason}), and this rank is at {doing}, which all "
                        "ranks do together. Have every rank do the same number of steps: give each the same number of "
                        "batches (booster.plugin.prepare_dataloader does), or stop all at the shortest"
                    )
            if time.monotonic() > deadline:
                names = ", ".join(self._mailbox.names[index] for index in missing)
                raise RankError(
                    f"{names} did not come to {doing} within {self._mailbox.timeout.total_seconds():g} s, the timeout "
                    "of the process group. All ranks do this together: look for what only some ranks do, or give "
                    "launch_from_torch a longer timeout"
                )
            with self._changed:
                if self._missing(number) == missing:
                    self._changed.wait(PING_SECONDS)
            self._mailbox.check(missing)

    def _missing(self, number: int) -> list[int]:
        with self._changed:
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
