"""Where a forward (and backward) stands against the plans there are, and what becomes of a step that leaves them."""

from collections.abc import Callable, Collection, Iterator

from .planner import Actions, Plan, Planner
from .trace import Moment, Phase, Trace

MakePlanner = Callable[[Trace], Planner]

PLANS_KEPT = 8
"""Of each kind. Batches of a few kinds, experts in a few combinations: each keeps its own."""
MOST_MOMENTS = 100_000
"""The moments after which a cycle ends: where the model itself is never called, nothing else ends it."""
_NOTHING = Actions()


class Cycle:
    """The clock of one model.

    Cycles with gradients and cycles without have plans of their own. A cycle begins with the plan that came next when
    the last two were followed before, else with the last one. Where it leaves it, another plan that began in the same
    way takes over; else it goes on with the same one from the next place where that fits again. What was recorded
    becomes a plan, if it is not one yet.
    """

    def __init__(self) -> None:
        self.with_gradients = False
        self._planners: dict[bool, list[Planner]] = {True: [], False: []}
        self._moments: list[Moment] = []
        """Those of the cycle under way: if it leaves the plan they become the next one."""
        self._followers: dict[tuple[Planner | None, Planner], Planner] = {}
        """What came after two plans in a row, when they last did: kinds of cycles that take turns are foreseen."""
        self._last: dict[bool, tuple[Planner | None, Planner] | None] = {True: None, False: None}
        """The two plans that were followed last."""
        self._resident: Collection[int] = ()
        self._position = 0
        self._plan: Plan | None = None

    @property
    def is_complete(self) -> bool:
        """True if a whole cycle lies in the recording: a forward, and with gradients a backward."""
        moments = reversed(self._moments)
        return bool(self._moments) and (not self.with_gradients or any(m.phase is Phase.BACKWARD for m in moments))

    def is_over(self, unit: int, with_gradients: bool) -> bool:
        """True if a call of this unit by itself (outside of the model's forward) begins another cycle."""
        moments = self._moments
        if not moments or with_gradients != self.with_gradients or len(moments) > MOST_MOMENTS:
            return True
        return moments[0].unit == unit or moments[-1].phase is Phase.BACKWARD

    def expected(self, with_gradients: bool) -> Planner | None:
        """The plan that the next cycle of this kind will begin with."""
        last = self._last[with_gradients]
        foreseen = self._followers.get(last) if last is not None else None
        return foreseen or next(iter(self._planners[with_gradients]), None)

    @property
    def followed(self) -> tuple[Plan, Collection[int]] | None:
        """The plan of the cycle under way, and the chunks that were there when it began; None without a plan."""
        return None if self._plan is None else (self._plan, self._resident)

    def moments(self) -> Iterator[Moment]:
        """Every moment known, of plans and of the cycle under way."""
        for planner in self.planners():
            yield from planner.trace.moments
        yield from self._moments

    def unplanned(self) -> tuple[Moment, ...]:
        """The moments of the cycle under way; none where a plan begins with the same ones."""
        done = tuple(self._moments)
        planners = self._planners[self.with_gradients]
        return () if any(planner.trace.moments[: len(done)] == done for planner in planners) else done

    def planners(self) -> Iterator[Planner]:
        """Every plan there is."""
        return (planner for planners in self._planners.values() for planner in planners)

    def units(self) -> set[int]:
        """The units that have entered in the cycle under way."""
        return {moment.unit for moment in self._moments}

    def advance(self, moment: Moment) -> Actions:
        """Record a moment. Returns what the plan says for it; nothing where it does not know it."""
        self._moments.append(moment)
        plan, position = self._plan, self._position
        if plan is None:
            return _NOTHING
        moments = plan.trace.moments
        if position >= len(moments) or moments[position] != moment:
            position = self._rejoin(plan, moment)
            if position < 0:
                return _NOTHING
            plan = self._plan or plan
        self._position = position + 1
        return plan.actions[position]

    def _rejoin(self, plan: Plan, moment: Moment) -> int:
        """Find where to go on, in another plan or farther on in this one; -1 if nowhere."""
        done = tuple(self._moments)
        for planner in self._planners[self.with_gradients]:
            if planner.trace.moments[: len(done)] == done:
                self._plan = planner.plan(self._resident)
                return len(done) - 1
        try:
            return plan.trace.moments.index(moment, self._position)
        except ValueError:
            return -1

    def restart(self, with_gradients: bool, make_planner: MakePlanner, resident: Collection[int]) -> None:
        """The next cycle begins: plan anew if what was recorded is no plan yet, and plan from what is there."""
        is_complete = self.is_complete
        trace, self._moments = Trace(tuple(self._moments)), []
        planners = self._planners[self.with_gradients]
        if is_complete:
            known = next((planner for planner in planners if planner.trace == trace), None)
            if known is not None:
                planners.remove(known)
            else:
                known = _planned(make_planner, trace)
            if known is not None:
                planners.insert(0, known)
                self._note(known)
            if len(planners) > PLANS_KEPT:
                planners.pop()
                self._forget_followers()
        self.with_gradients = with_gradients
        planner = self.expected(with_gradients)
        self._resident = resident
        self._plan = planner.plan(resident) if planner is not None else None
        self._position = 0

    def _note(self, planner: Planner) -> None:
        last = self._last[self.with_gradients]
        if last is not None:
            self._followers[last] = planner
        self._last[self.with_gradients] = (last[1] if last is not None else None, planner)

    def _forget_followers(self) -> None:
        self._followers.clear()
        self._last = {True: None, False: None}

    def between(self) -> Actions:
        """What to do for the next training cycle before it begins."""
        planner = self.expected(with_gradients=True)
        if planner is None:
            return _NOTHING
        if self.with_gradients and self._plan is not None:
            return self._plan.between
        return Actions(prefetch=planner.first)

    def keeps(self, chunk: int) -> bool:
        """True if the plan of this cycle has a full copy there at its end; without a plan any may be."""
        return self._plan is None or chunk in self._plan.end

    def replan(self, make_planner: MakePlanner) -> None:
        """Make every plan anew, because the capacity is another one. The cycle under way goes on without."""
        for planners in self._planners.values():
            planned = [_planned(make_planner, planner.trace) for planner in planners]
            planners[:] = [planner for planner in planned if planner is not None]
        self._forget_followers()
        self._plan = None


def _planned(make_planner: MakePlanner, trace: Trace) -> Planner | None:
    try:
        return make_planner(trace)
    except ValueError:  # a moment outgrew the device since; fetching on demand will say so, or manage
        return None
