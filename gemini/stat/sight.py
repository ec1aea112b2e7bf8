"""What a command looks at: one rank of a run, and all of them where they are compared."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from gemini.telemetry.discovery import NoRun
from gemini.telemetry.ranks import Ranks, read_ranks
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import RunView

ALL, WORST = "all", "worst"


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A run as it was asked for."""

    run: RunView
    """The rank of which details are shown; the lowest where all are compared."""
    ranks: Ranks | None
    """All ranks, where several are compared; None where one is shown by itself."""
    is_worst: bool = False
    """The rank was chosen because it needs attention first."""

    @property
    def status(self) -> RunStatus:
        return self.run.status if self.ranks is None else self.ranks.status

    @property
    def reason(self) -> str:
        return self.run.reason if self.ranks is None else self.ranks.reason

    @property
    def step(self) -> int | None:
        """The last one; of several ranks the last one that all have done."""
        return self.run.step if self.ranks is None else self.ranks.step

    @property
    def is_live(self) -> bool:
        return self.run.is_live if self.ranks is None else self.ranks.is_live

    @property
    def rank_text(self) -> str:
        """Which of several ranks it is; empty in a run of one process."""
        world_size = self.run.identity.world_size
        if self.ranks is not None:
            here = len(self.ranks.views)
            return f"{world_size} ranks" if here == world_size else f"{here} of {world_size} ranks"
        if world_size < 2:
            return ""
        return f"rank {self.run.rank} of {world_size}" + (" (worst)" if self.is_worst else "")


def over(ranks: Ranks) -> Sight:
    """All ranks that there are, be it one."""
    return Sight(run=ranks.views[0], ranks=ranks if len(ranks.views) > 1 else None)


def read(path: Path, options: argparse.Namespace) -> Sight:
    """The rank that was asked for by its number or as the worst, or all of them.

    Raises
    ------
    NoRun
        There is no such rank.
    Unreadable
        The run's files are gone, damaged or too new.
    """
    wanted = options.rank or ALL
    if wanted not in (ALL, WORST):
        run = read_run(path, int(wanted))
        if run.updated is None:
            raise NoRun(f"{path} has no rank {wanted}")
        return Sight(run=run, ranks=None)
    ranks = read_ranks(path)
    if len(ranks.views) == 1:
        return Sight(run=read_run(path, ranks.views[0].rank), ranks=None)
    if wanted == WORST:
        return Sight(run=read_run(path, ranks.worst.rank), ranks=None, is_worst=True)
    return Sight(run=read_run(path, ranks.views[0].rank), ranks=ranks)
