"""Which calls of units are under way, in forward and in backward."""

import threading

from ..chunk import ChunkManager
from ..units.units import Unit, Visit


class Visits:
    """The visits that are open, and by which of forward and backward.

    Parameters
    ----------
    manager
        Has the chunks that visits pin.
    """

    def __init__(self, manager: ChunkManager) -> None:
        self.open: dict[Visit, None] = {}
        """Those whose chunks are pinned, outermost first."""
        self.running: list[Visit] = []
        """Those whose forward is under way, innermost last."""
        self._manager = manager
        self._of_backward: dict[int, list[Visit]] = {}
        """Task of autograd -> those that it has come to."""
        self._thread = 0
        """The thread that runs the units in ``running``."""

    def begin_call(self, visit: Visit) -> None:
        """The forward of a unit begins."""
        self.running.append(visit)
        self._thread = threading.get_ident()

    def call_of(self, unit: Unit) -> Visit | None:
        """The innermost call of a unit whose forward is under way."""
        return next((visit for visit in reversed(self.running) if visit.unit is unit), None)

    @property
    def innermost(self) -> Visit | None:
        """The call whose forward this thread is in, if any."""
        return self.running[-1] if self.running and self._thread == threading.get_ident() else None

    def begin(self, visit: Visit) -> None:
        """Count a visit as open; its chunks are pinned next."""
        visit.open()
        self.open[visit] = None

    def end(self, visit: Visit) -> None:
        """Unpin what an open visit has pinned."""
        del self.open[visit]
        for chunk in visit.close():
            self._manager.unpin(chunk)

    def end_all(self) -> None:
        """Unpin all that visits have pinned, and forget what is under way."""
        self._of_backward.clear()
        self.running.clear()
        for visit in list(self.open):
            self.end(visit)

    # -- backward

    @property
    def is_in_backward(self) -> bool:
        """True from the first unit of a backward to its end, and after a backward that never ended."""
        return bool(self._of_backward)

    def join_backward(self, task: int, visit: Visit) -> bool:
        """Note that ``visit`` belongs to the backward ``task``; True if it is the first of that task."""
        is_first = task not in self._of_backward
        self._of_backward.setdefault(task, []).append(visit)
        return is_first

    def end_backward(self, task: int) -> list[Visit]:
        """The visits that belong to a backward, which is over."""
        return self._of_backward.pop(task, [])

    def names(self) -> str:
        """The units that have chunks pinned, in words."""
        return ", ".join(visit.unit.name for visit in self.open if visit.pinned)
