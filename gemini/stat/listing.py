"""Many runs, a line each: ``gemini-stat ls``."""

import time
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from gemini.stat.sight import Sight
from gemini.stat.snapshot import STATUS_STYLES
from gemini.stat.text import UNKNOWN, duration, printable, seconds
from gemini.telemetry.discovery import UnreadableRun

_LONGEST_REASON = 300
_LONGEST_NAME = 40
_HEADINGS = ("status", "step", "time/step", "began", "pid", "run", "ranks", "script")


def render(runs: Sequence[Sight]) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    for justify in ("left", "right", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    # The only one that may wrap is the first that gives way where the line is too long.
    table.add_column(overflow="ellipsis", max_width=_LONGEST_NAME)
    table.add_row(*(Text(word, style="dim") for word in _HEADINGS))
    for sight in runs:
        run, identity, status = sight.run, sight.run.identity, sight.status
        table.add_row(
            Text(status.name, style=STATUS_STYLES[status].split()[-1]),
            UNKNOWN if sight.step is None else f"{sight.step:,}",
            seconds(run.stats.get("step/seconds")),
            UNKNOWN if identity.started is None else f"{duration(time.time() - identity.started).split()[0]} ago",
            UNKNOWN if identity.pid is None else str(identity.pid),
            Text(printable(identity.run_id, 40), style="cyan"),
            str(identity.world_size),
            Text(printable(identity.name, _LONGEST_NAME), no_wrap=True, overflow="ellipsis"),
        )
    return table


def unreadable(run: UnreadableRun) -> str:
    """A line on a run that is there and cannot be read."""
    return f"UNREADABLE  {printable(run.path.name, 60)}: {printable(run.reason, _LONGEST_REASON)}"
