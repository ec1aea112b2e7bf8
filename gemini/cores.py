"""How many cores this process may use. Needs no torch.

Three things bound it: the affinity (``taskset``, a cpuset, a launcher that binds ranks), the processor time that a
container may use (``docker --cpus``, Kubernetes limits), which the affinity does not show, and the other ranks on the
machine. Threads beyond that do not help: they wait for each other, and under a quota all of them are stopped together
for the rest of each period.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gemini.environment import number_of_ranks


def usable_cores(root: Path = Path("/")) -> int:
    """Threads that a process of this rank should compute with; at least 1.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.

    Raises
    ------
    ValueError
        If ``LOCAL_WORLD_SIZE`` is no whole number.
    """
    try:
        mine = len(os.sched_getaffinity(0))
        parents = len(os.sched_getaffinity(os.getppid()))
    except (AttributeError, OSError):  # not on every platform; a parent that is gone or in another namespace
        mine = parents = _all_cores()
    return share(mine, parents, cpu_quota(root), number_of_ranks("LOCAL_WORLD_SIZE"))


def share(mine: int, parents: int, quota: float | None, ranks: int) -> int:
    """Threads for one of ``ranks`` processes.

    Parameters
    ----------
    mine, parents
        Cores in the affinity of this process and of the one that started it. Fewer than the parent has were given to
        this rank alone; the same ones are shared by all ranks.
    quota
        Cores' worth of processor time for all ranks together, or None.
    """
    cores = mine if mine < parents else mine // ranks
    if quota is not None:
        cores = min(cores, int(quota) // ranks)
    return max(1, cores)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of processor time that cgroups allow (v2 ``cpu.max``, v1 ``cpu.cfs_quota_us``); None: no limit."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                for folder in _upwards(root / mount, path):
                    yield from _ratio(*_read(folder / "cpu.max").split()[:2])
        elif "cpu" in controllers.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/cpu", path):
                yield from _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """From the process's group to the top: each limits those below it. In a container the lower ones may be missing."""
    relative = PurePosixPath(path.lstrip("/"))
    yield from (mount / relative, *(mount / parent for parent in relative.parents))


def _ratio(quota: str = "", period: str = "") -> Iterator[float]:
    """``"200000", "100000"`` are two cores; ``"max"``, ``"-1"`` and what is missing are no limit."""
    if quota.strip().isdecimal() and period.strip().isdecimal() and int(period) > 0:
        yield int(quota) / int(period)


def _all_cores() -> int:
    return os.cpu_count() or 1


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
