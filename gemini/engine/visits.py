"""Which calls of units are under way, in forward and in backward."""

from collections.abc import Sequence
from threading import get_ident

from ..chunk import Chunk
from ..planning.trace import Moment, Phase
from ..units.units import Unit, Visit

MOMENTS_KEPT = 4096
"""A model has two for each of its units; where experts take turns, some more."""


class Visits:
    """The visits that are open, and by which of forward and backward."""

    def __init__(self) -> None:
        self.open: dict[Visit, list[Chunk]] = {}
        """Those whose chunks are pinned, outermost first -> what each has pinned: a visit may turn out to need more."""
        self.running: list[Visit] = []
        """Those whose forward is under way, innermost last."""
        self._moments: dict[tuple[Unit, Phase, tuple[tuple[Chunk, ...], ...]], Moment] = {}
        """Those of the last cycles: most come again in the next one."""
        self._of_backward: dict[int, dict[Visit, int]] = {}
        """Task of autograd -> those that it has come to and not left -> the thread that came to them; 0 if several."""
        self._thread = 0
        """The thread that runs the units in ``running``."""

    def begin_call(self, visit: Visit) -> None:
        """The forward of a unit begins."""
        self.running.append(visit)
        self._thread = get_ident()

    def call_of(self, unit: Unit) -> Visit | None:
        """The innermost call of a unit whose forward is under way."""
        return next((visit for visit in reversed(self.running) if visit.unit is unit), None)

    def end_call(self, unit: Unit) -> Visit | None:
        """The innermost call of a unit, whose forward is over; None if there is none."""
        at = len(self.running) - 1
        while at >= 0 and self.running[at].unit is not unit:
            at -= 1
        return self.running.pop(at) if at >= 0 else None

    @property
    def innermost(self) -> Visit | None:
        """The call whose forward this thread is in, if any."""
        return self.running[-1] if self.running and self._thread == get_ident() else None

    def moment(self, unit: Unit, phase: Phase, chunks: tuple[Chunk, ...]) -> Moment:
        """The moment at which a unit enters and these chunks are pinned beside those of the visits that are open."""
        groups: tuple[tuple[Chunk, ...], ...] = (chunks,)
        for pinned in self.open.values():
            if pinned:
                groups += (tuple(pinned),)
        moment = self._moments.get((unit, phase, groups))
        if moment is None:
            if len(self._moments) >= MOMENTS_KEPT:
                self._moments.clear()
            moment = Moment(unit.index, phase, frozenset(chunk.index for group in groups for chunk in group))
            self._moments[unit, phase, groups] = moment
        return moment

    def begin(self, visit: Visit) -> list[Chunk]:
        """Count a visit as open; its chunks are pinned next. Returns the list that is to have them then."""
        pinned: list[Chunk] = []
        self.open[visit] = pinned
        return pinned

    def end(self, visit: Visit) -> None:
        """Unpin what a visit has pinned, if it is open."""
        for chunk in self.open.pop(visit, ()):
            chunk.unpin()

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
        """Note that this thread, in the backward ``task``, comes to a visit; True if it is the first of that task."""
        here, visits = get_ident(), self._of_backward.get(task)
        if visits is None:
            self._of_backward[task] = {visit: here}
            return True
        visits[visit] = here if visits.get(visit, here) == here else 0
        return False

    def passed(self, task: int, number: int) -> Sequence[Visit]:
        """The visits of a backward that has run all of their nodes when this thread comes to the node of this number.

        They belong to it no longer. Of the nodes that are ready a thread of autograd runs the one that was made last.
        """
        visits, here = self._of_backward.get(task), get_ident()
        if not visits:
            return ()
        passed = [v for v, at in visits.items() if at == here and v.begin is not None and v.begin.number > number]
        for visit in passed:
            del visits[visit]
        return passed

    def of_backward(self, task: int) -> list[Visit]:
        """The visits that a backward has come to and not passed."""
        return list(self._of_backward.get(task, ()))

    def end_backward(self, task: int) -> None:
        """A backward is over, and its visits have been left."""
        self._of_backward.pop(task, None)

    def names(self) -> str:
        """The units that have chunks pinned, in words."""
        return ", ".join(visit.unit.name for visit, pinned in self.open.items() if pinned)
