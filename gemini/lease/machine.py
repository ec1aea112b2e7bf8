"""The machine as ``gemini-stat`` shows it: each memory that runs share, and who holds what of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemini.lease.folder import LeaseFolder
from gemini.lease.holder import namespace_of_this_process, with_growth
from gemini.lease.limits import ROOT, Limit, private_ram, shared_ram_limits
from gemini.lease.pools import Pool
from gemini.lease.standing import HOST, Standing


@dataclass(frozen=True, slots=True)
class Machine:
    """What the leases of this user on this machine say now."""

    leases: Mapping[str, Standing]
    """By name, the earliest first."""
    pools: tuple[Pool, ...]
    """The RAM of the machine first, then each other memory that somebody holds a part of."""


def read_machine(folder: LeaseFolder | None = None, root: Path = ROOT) -> Machine:
    """See who holds what, and what is free."""
    here = namespace_of_this_process()
    found = {
        name: with_growth(each, private_ram(each.pid, root)) if each.namespace == here else each
        for name, each in (folder or LeaseFolder()).standings().items()
    }
    leases = {name: found[name] for name in sorted(found, key=lambda name: (found[name].started, name))}
    ram = shared_ram_limits([each.pid for each in leases.values() if each.namespace == here], root)
    pools = [Pool.of(limit, HOST, leases) for limit in reversed(ram.values())]  # the machine's own is the last one
    for standing in leases.values():
        for memory, holding in standing.holdings.items():
            for pool, seen in holding.seen.items():
                if all(pool != other.limit.pool for other in pools):
                    limit = Limit(seen.name, seen.free, seen.total, True, pool)
                    pools.append(Pool.of(limit, memory, leases))
    return Machine(leases, tuple(pool for pool in pools if pool.members or pool is pools[0]))
