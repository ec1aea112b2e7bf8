"""The machine on a screen: each memory that runs share in a line, and each lease."""

import time

from rich.table import Table
from rich.text import Text

from gemini.lease.machine import Machine
from gemini.lease.pools import Pool
from gemini.lease.standing import DEVICE, DISK, HOST, Standing
from gemini.stat.text import UNKNOWN, duration, printable, size

_HEADINGS = ("pid", "rank", "began", "host", "used", "wish", "device", "disk", "script")


def memories(machine: Machine, width: int) -> list[Text]:
    """A line for each memory."""
    return [Text(f" {_line(pool)}"[:width], no_wrap=True) for pool in machine.pools]


def _line(pool: Pool) -> str:
    count = len(pool.members)
    runs = f"{count} lease{'' if count == 1 else 's'}"
    name, free, left = printable(pool.limit.name, 40), size(pool.limit.free), size(pool.left_for(""))
    return f"{name} {size(pool.limit.total)}: {free} free, {size(pool.promised)} promised ({runs}), {left} left"


def leases(machine: Machine) -> Table:
    """A row for each lease: what is promised to it of each memory, and of RAM what it uses and can make use of."""
    table = Table.grid(padding=(0, 1), pad_edge=False)
    for _ in _HEADINGS[:-1]:
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row(*(Text(word, style="dim") for word in _HEADINGS))
    for standing in machine.leases.values():
        table.add_row(*_row(standing))
    return table


def _row(standing: Standing) -> list[str]:
    host, device, disk = (standing.holdings.get(memory) for memory in (HOST, DEVICE, DISK))
    return [
        str(standing.pid),
        str(standing.rank) if standing.ranks > 1 else UNKNOWN,
        f"{duration(time.time() - standing.started).split()[0]} ago",
        size(None if host is None else host.held),
        size(None if host is None else host.used),
        size(None if host is None else host.wish),
        size(None if device is None else device.held),
        size(None if disk is None else disk.held),
        printable(standing.program, 24) + (" (waits)" if standing.is_waiting else ""),
    ]
