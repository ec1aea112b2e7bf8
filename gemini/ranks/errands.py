"""What the first rank does for all, and the others wait for: writing files. Those that wait may be given a part of it.

::

    rank 0   save --> who waits? --> gives out tasks --> its own part --> all done? --> finished
    rank 1   save --> waits ----------> does a task ----------------------------------> goes on
    rank 2   still in another part of its program: what it would have done rank 0 does

How often the first rank has done a thing is counted, so that one who has come late to the last time does not count as
one who waits for this time.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from ..chunk.communicator import Word
from ..errors import RankError
from .mailbox import Mailbox
from .messages import Done, Finished, Task, Waiting
from .patience import Patience


class Errands:
    """Tells the others what has been done, waits for that, and does parts of it.

    Parameters
    ----------
    mailbox
        Brings the word.
    patience
        Waits for it.
    """

    def __init__(self, mailbox: Mailbox, patience: Patience) -> None:
        self._mailbox = mailbox
        self._patience = patience
        self._changed = threading.Condition()
        self._times: Counter[str] = Counter()
        """On the first rank, how often a thing has been finished; on the others, how often that has been waited for."""
        self._finished: dict[str, list[str]] = {}
        """What has been done, and how often: each time with why not, or nothing."""
        self._tasks: dict[str, Task] = {}
        self._waiting: dict[str, set[tuple[int, int]]] = {}
        """Which rank waits for a thing, and for which time."""
        self._done: dict[tuple[str, int], dict[int, Done]] = {}

    def received(self, sender: int, letter: Finished | Waiting | Task | Done) -> None:
        """Take in a letter."""
        with self._changed:
            match letter:
                case Finished():
                    self._finished.setdefault(letter.what, []).append(letter.error)
                case Waiting():
                    self._waiting.setdefault(letter.what, set()).add((sender, letter.time))
                case Task():
                    self._tasks[letter.what] = letter
                case Done():
                    self._done.setdefault((letter.what, letter.time), {})[sender] = letter
            self._changed.notify_all()

    # -- the first rank

    def helpers(self, what: str, among: Sequence[int], seconds: float) -> list[int]:
        """Those among some ranks that wait for a thing now, or come to it within this time."""
        deadline = time.monotonic() + seconds
        with self._changed:
            time_of_this = self._times[what]
            while True:
                waiting = self._waiting.get(what, set())
                found = [index for index in among if (index, time_of_this) in waiting]
                left = deadline - time.monotonic()
                if len(found) == len(among) or left <= 0:
                    self._waiting.pop(what, None)
                    return found
                self._changed.wait(left)

    def give_out(self, what: str, word: Word, to: Sequence[int]) -> None:
        """Have those that wait do their part."""
        for index in to:
            self._mailbox.post(index, Task(what, msgspec.msgpack.encode(word)))

    def take_back(self, what: str, among: Sequence[int], signs_of_life: Callable[[], int]) -> None:
        """Wait until these have done their parts.

        Raises
        ------
        RankError
            If one has failed, or is gone.
        """
        key, seconds = (what, self._times[what]), self._patience.seconds
        self._patience.wait(
            self._changed,
            lambda: [index for index in among if index not in self._done.get(key, {})],
            lambda names: f"{names} did not do their part of {what} within {seconds:g} s",
            lambda ended: f"{ended}, and was to do a part of {what}",
            signs_of_life,
        )
        with self._changed:
            done = self._done.pop(key, {})
        for index, letter in done.items():
            if letter.error:
                raise RankError(f"{self._mailbox.names[index]} failed in its part of {what}: {letter.error}")

    def finish(self, what: str, error: str) -> None:
        """Tell the others that this is done, or why not."""
        with self._changed:
            self._done.pop((what, self._times[what]), None)
            self._times[what] += 1
        self._mailbox.post_all(Finished(what, error))

    # -- the others

    def wait(self, what: str, help: Callable[[Word], None] | None, signs_of_life: Callable[[], int]) -> None:
        """Wait for the first rank to finish something: for as long as it gives signs of life, and the timeout.

        Parameters
        ----------
        help
            Does the part that the first rank gives out; None: it gives none.

        Raises
        ------
        RankError
            If it has failed, or is gone.
        """
        name, seconds = self._mailbox.names[0], self._patience.seconds
        with self._changed:
            time_of_this = self._times[what]
            is_late = bool(self._finished.get(what))
        if help is not None and not is_late:
            self._mailbox.post(0, Waiting(what, time_of_this))
        while True:
            self._patience.wait(
                self._changed,
                lambda: [] if self._finished.get(what) or what in self._tasks else [0],
                lambda _: (
                    f"{name}, which does {what} for all ranks, has not done so within {seconds:g} s: have it call the "
                    "same"
                ),
                lambda ended: f"{ended}, and was to do {what} for all ranks",
                signs_of_life,
            )
            with self._changed:
                task = self._tasks.pop(what, None)
            if task is None:
                break
            self._help(task, time_of_this, help)
        with self._changed:
            self._times[what] += 1
            error = self._finished[what].pop(0)
        if error:
            raise RankError(f"{name} failed in {what}: {error}")

    def _help(self, task: Task, time_of_this: int, help: Callable[[Word], None] | None) -> None:
        error = ""
        try:
            assert help is not None
            help(msgspec.msgpack.decode(task.word))
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
            if not isinstance(raised, Exception):
                raise
        finally:
            self._mailbox.post(0, Done(task.what, time_of_this, error))
