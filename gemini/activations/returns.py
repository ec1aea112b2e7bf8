"""Storages that graphs have saved, on their way back ahead of backward."""

from collections.abc import Iterable, Iterator
from weakref import ReferenceType, ref

from ..errors import is_out_of_memory
from .counts import ActivationCounts
from .order import AwayOrder
from .place import Passage
from .state import SavedState
from .storage import SavedStorage


class Returns:
    """Has storages come in the order in which backward will need them, no more ahead of it than a limit allows.

    Parameters
    ----------
    counts
        Told of what comes.
    limit_bytes
        The most that may be there or on its way ahead of use, and the most that stays after use while it could go.
    """

    def __init__(self, counts: ActivationCounts, limit_bytes: int) -> None:
        self._counts = counts
        self._limit_bytes = limit_bytes
        self._away = AwayOrder()
        self._ahead: dict[int, ReferenceType[SavedStorage]] = {}
        """By number: COMING or BACK, and not used since."""
        self._used: list[ReferenceType[SavedStorage]] = []
        """BACK and used: their graph is kept for another backward."""

    def arrived_below(self, stored: Iterable[SavedStorage]) -> None:
        """These are in both places now: let their memory go if nothing has it."""
        for saved in stored:
            if saved.was_used or saved.lies_in_tensors:
                self._used.append(ref(saved))
            else:
                self._drop(saved)

    def _drop(self, saved: SavedStorage) -> None:
        saved.drop()
        self._away.add(saved)

    def need(self, saved: SavedStorage) -> bool:
        """Backward has come to a storage: have it there or on its way. Returns False if it had to be asked for.

        Raises
        ------
        RuntimeError
            torch's error if there is no memory for it.
        """
        self._ahead.pop(saved.number, None)
        saved.used()
        if saved.state is SavedState.AWAY:
            self._drop_ahead()  # backward is somewhere else than it was thought to be
            self._come(saved)
            return False
        return True

    def _come(self, saved: SavedStorage) -> None:
        saved.come()
        self._away.discard(saved)
        self._counts.returns(saved.nbytes)

    def read_ahead(self, number: int) -> list[SavedStorage]:
        """Have those come that backward comes to after this number. Returns them."""
        self._ahead = {at: reference for at, reference in self._ahead.items() if reference() is not None}
        number = min((number, *self._ahead))
        begun: list[SavedStorage] = []
        while (following := self._away.below(number)) is not None:
            ahead = sum(saved.nbytes for saved in self._alive(self._ahead.values()))
            if ahead and ahead + following.nbytes > self._limit_bytes:
                break
            try:
                self._come(following)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break  # it was only for speed
            number = following.number
            self._ahead[number] = ref(following)
            begun.append(following)
        return begun

    def has_come(self, saved: SavedStorage, passage: Passage) -> None:
        """A copy is over that was waited for."""
        if saved.passage is passage:
            saved.copied()
            self._used.append(ref(saved))

    def has_failed(self, saved: SavedStorage, passage: Passage) -> None:
        """A copy has failed that was waited for; another backward may try again."""
        if saved.passage is passage:
            saved.fail_to_come()
            self._away.add(saved)

    def _drop_ahead(self) -> None:
        for saved in list(self._alive(self._ahead.values())):
            passage = saved.passage
            if saved.state is SavedState.COMING and passage is not None and passage.done():
                try:
                    passage.wait()
                except Exception:
                    self.has_failed(saved, passage)  # said when it is needed
                else:
                    saved.copied()
            if saved.state is SavedState.BACK:
                self._drop(saved)
        self._ahead.clear()

    def drop_used(self, limit_bytes: int | None = None) -> None:
        """Let go what was used and is still held by a graph, the oldest first, beyond what others may share soon."""
        if not self._used:
            return
        back = dict.fromkeys(saved for saved in self._alive(self._used) if saved.state is SavedState.BACK)
        excess = sum(saved.nbytes for saved in back) - (self._limit_bytes if limit_bytes is None else limit_bytes)
        self._used = []
        for saved in back:
            if excess > 0 and not saved.lies_in_tensors:
                self._drop(saved)
                excess -= saved.nbytes
            else:
                self._used.append(ref(saved))

    @staticmethod
    def _alive(references: Iterable[ReferenceType[SavedStorage]]) -> Iterator[SavedStorage]:
        for reference in references:
            saved = reference()
            if saved is not None:
                yield saved
