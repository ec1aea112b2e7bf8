"""All ranks of a run together: how it goes, and which of them to look at."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from gemini.telemetry.layout import HEARTBEAT_SECONDS
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import Identity, RunView
from gemini.telemetry.starts import ranks_of

TAIL_BYTES = 256 << 10
"""Of each rank's file: what a process at rest says of itself every half a minute lies in there."""
_MOST_REASONS = 3
MOST_STEPS = 48
"""Of each rank: those of ten seconds. There may be many ranks, and they are looked at every second."""


class Straggler(NamedTuple):
    """The rank that the others wait for."""

    rank: int
    own_seconds: float
    """Of a step, without the time that it waited for others itself."""
    ratio: float
    """To the median over ranks."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Every rank of a run that has written here, each by itself."""

    views: tuple[RunView, ...]
    """In the order of ranks, at least one."""

    @property
    def path(self) -> Path:
        return self.views[0].path

    @property
    def identity(self) -> Identity:
        """What the lowest rank has said of the run."""
        return self.views[0].identity

    @property
    def is_live(self) -> bool:
        """True while any rank lives, also if others are dead."""
        return any(view.is_live for view in self.views)

    @property
    def world_size(self) -> int:
        return max(view.identity.world_size for view in self.views)

    @property
    def missing(self) -> list[int]:
        """Ranks that have not begun, or write into the file system of another machine."""
        here = {view.rank for view in self.views}
        return [rank for rank in range(min(self.world_size, 1 << 16)) if rank not in here]

    @property
    def hosts(self) -> list[str]:
        """The machines, in the order of their lowest ranks."""
        return list(dict.fromkeys(view.identity.host for view in self.views))

    @property
    def step(self) -> int | None:
        """The last step that all ranks have recorded."""
        steps = [view.step for view in self.views]
        known = [step for step in steps if step is not None]
        return min(known) if len(known) == len(steps) else None

    @property
    def status(self) -> RunStatus:
        """A rank that is dead is worse than one that makes no step, and that worse than one that does."""
        found = {view.status for view in self.views}
        order = (RunStatus.CRASHED, RunStatus.STALLED, RunStatus.RUNNING, RunStatus.UNKNOWN, RunStatus.FINISHED)
        return next(status for status in order if status in found)

    @property
    def reason(self) -> str:
        """Explains the status, with the ranks that it is for; empty where it needs no explanation."""
        if len(self.views) == 1:
            return self.views[0].reason
        status = self.status
        bad = sorted((view for view in self.views if view.status is status), key=lambda view: view.seen or 0.0)
        parts = []
        if status is RunStatus.CRASHED:
            # The others fail because of the first one, and later; which it was within a heartbeat, nobody can tell.
            first = [view for view in bad if (view.seen or 0.0) - (bad[0].seen or 0.0) <= HEARTBEAT_SECONDS]
            last = [view for view in bad if view not in first]
            reasons = list(dict.fromkeys(view.reason for view in first))[:_MOST_REASONS]
            parts += [_told("crashed", [view for view in first if view.reason == reason]) for reason in reasons]
            parts.append(f"then {ranks_text(last)}" if last else "")
        elif status is RunStatus.RUNNING:
            elsewhere = [view for view in bad if view.reason]
            parts.append(f"{ranks_text(elsewhere)} judged by heartbeat" if elsewhere else "")
        elif status is not RunStatus.FINISHED:
            parts.append(_told(status.value, bad))
        others = sorted((view for view in self.views if view.status is not status), key=_by_status)
        for other, views in groupby(others, key=_by_status):
            if status is not RunStatus.RUNNING:
                parts.append(f"{ranks_text(list(views))} {other}")
            elif other == RunStatus.UNKNOWN.value:
                parts.append(_told(other, list(views)))
        return "; ".join(part for part in parts if part)

    @property
    def straggler(self) -> Straggler | None:
        """The rank with the longest time of its own in a step; None where not every rank tells how long it waits."""
        own = {view.rank: seconds for view in self.views if (seconds := view.own_seconds) is not None}
        if len(own) < max(2, len(self.views)):
            return None
        rank = max(own, key=lambda key: (own[key], -key))
        middle = median(own.values())
        return Straggler(rank, own[rank], own[rank] / middle) if middle > 0 else None

    @property
    def worst(self) -> RunView:
        """The rank to look at first: a crashed one, one that makes no step, one that is behind, the straggler."""
        order = (RunStatus.CRASHED, RunStatus.STALLED, RunStatus.UNKNOWN)

        def badness(view: RunView) -> tuple[int, float, float, int]:
            urgency = len(order) - order.index(view.status) if view.status in order else 0
            return (urgency, -float(view.step or 0), view.own_seconds or 0.0, -view.rank)

        return max(self.views, key=badness)


def read_ranks(path: Path, *, tail_bytes: int = TAIL_BYTES) -> Ranks:
    """Read every rank of the run that is in the folder now.

    Raises
    ------
    Unreadable
        As `read_run`.
    """
    ranks = ranks_of(path) or [0]
    views = (read_run(path, rank, tail_bytes=tail_bytes, most_steps=MOST_STEPS) for rank in ranks)
    return Ranks(views=tuple(views))


def median(values: Iterable[float]) -> float:
    """The middle one, or the mean of the two in the middle. (The module ``statistics`` takes long to import.)"""
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def ranks_text(views: Sequence[RunView]) -> str:
    """``"rank 3"``, ``"ranks 0-2, 5"``."""
    return numbers_text([view.rank for view in views])


def numbers_text(ranks: Sequence[int]) -> str:
    """Ranks in order, neighbours as a range."""
    parts = []
    for _, group in groupby(enumerate(sorted(ranks)), key=lambda item: item[1] - item[0]):
        run = [rank for _, rank in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _by_status(view: RunView) -> str:
    return view.status.value


def _told(what: str, views: Sequence[RunView]) -> str:
    return f"{ranks_text(views)} {what}" + (f": {views[0].reason}" if views[0].reason else "")
