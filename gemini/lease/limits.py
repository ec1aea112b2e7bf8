"""The limits on a process's RAM: how much of each is left, and which other processes live under the same one.

All files are read below one ``root``, so the tests run on made-up ``/proc`` and ``/sys`` trees.
"""

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")

# cgroup v1 writes "no limit" as a number near 2**63; no machine has an exbibyte of RAM.
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Limit:
    """How much of one limit is left."""

    name: str
    free: int
    total: int
    shared: bool
    """True when all local ranks live under this limit together, False when each has its own."""
    pool: str = ""
    """The same text for all processes of a machine that live under the limit together."""

    def per_rank(self, ranks: int) -> int:
        return self.free // ranks if self.shared else self.free


def ram_limits(root: Path = ROOT) -> list[Limit]:
    """All limits on this process's RAM: those of its control groups, its resource limits, the RAM that is available."""
    return [*_cgroup_limits(root, "self"), *_resource_limits(root), *_available_ram(root)]


def shared_ram_limits(pids: Iterable[int], root: Path = ROOT) -> dict[str, Limit]:
    """The limits on RAM that these processes may share with others, by pool."""
    found = [limit for pid in pids for limit in _cgroup_limits(root, str(pid))]
    return {limit.pool: limit for limit in (*found, *_available_ram(root))}


def disk_limit(folder: Path, root: Path = ROOT) -> Limit:
    """The room on the file system of a folder, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    room = os.statvfs(existing)
    # f_bavail, not f_bfree: the blocks reserved for root are not ours.
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    pool = f"disk {machine(root)} {os.stat(existing).st_dev}"
    return Limit(f"free disk of {folder}", free, total, shared=True, pool=pool)


def private_ram(pid: int | str = "self", root: Path = ROOT) -> int:
    """Bytes of RAM of a process without pages of files and shared memory; 0 where that is not to be seen."""
    words = read(root / f"proc/{pid}/statm").split()
    return (int(words[1]) - int(words[2])) * os.sysconf("SC_PAGE_SIZE") if len(words) > 2 else 0


def tightest(limits: list[Limit], ranks: int = 1) -> Limit:
    """The limit that leaves least to one of ``ranks``."""
    return min(limits, key=lambda limit: limit.per_rank(ranks))


@functools.cache
def machine(root: Path = ROOT) -> str:
    """A name of the machine that lasts until it boots: state folders may be shared by several machines."""
    return read(root / "proc/sys/kernel/random/boot_id").strip() or os.uname().nodename


def cgroup_folders(root: Path = ROOT, pid: str = "self") -> Iterator[tuple[str, Path]]:
    """The folders of the control groups that limit a process's RAM, from its own to the top, with their version.

    Inside a container /proc names the group as the host sees it, a path that may not exist below the container's
    mount. Going up skips what is missing and ends at the mount itself, which is then the container's own group.
    """
    for line in read(root / f"proc/{pid}/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts: tuple[str, ...] = ()
        if controllers == "":
            # A pure v2 machine, and the v2 half of a mixed one (there the memory controller usually belongs to v1).
            version, mounts = "v2", ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        elif "memory" in controllers.split(","):
            version, mounts = "v1", ("sys/fs/cgroup/memory",)
        relative = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for folder in (root / mount / relative, *(root / mount / parent for parent in relative.parents)):
                yield version, folder


_FILES = {
    "v1": (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    "v2": (("memory.max", "memory.high"), "memory.current"),
}
"""The files with the limits of a group, and the one with what it uses."""


def _cgroup_limits(root: Path, pid: str) -> Iterator[Limit]:
    """Every limit from the process's group to the top: any of them kills."""
    for version, folder in cgroup_folders(root, pid):
        limits, usage = _FILES[version]
        for file in limits:
            limit = number(read(folder / file))
            if limit is None or limit >= _UNLIMITED or (used := number(read(folder / usage))) is None:
                continue  # most groups have none: nothing more of them is read
            # The kernel drops file cache that was not used lately before it kills a process.
            reclaimable = field(read(folder / "memory.stat"), "total_inactive_file", "inactive_file")
            free = max(0, limit - max(0, used - reclaimable))
            yield Limit(f"cgroup {version} headroom", free, limit, shared=True, pool=_group(folder, root))


def _group(folder: Path, root: Path) -> str:
    """A control group's name. Its path depends on where it is seen from; its inode does not."""
    status = os.stat(folder)
    return f"cgroup {machine(root)} {status.st_dev}:{status.st_ino}"


def _resource_limits(root: Path) -> Iterator[Limit]:
    status = read(root / "proc/self/status")
    for line in read(root / "proc/self/limits").splitlines():
        for title, name, usage in (
            ("Max data size", "RLIMIT_DATA", "VmData:"),
            ("Max address space", "RLIMIT_AS", "VmSize:"),
        ):
            if not line.startswith(title):
                continue
            soft = number(line[len(title) :].split()[0])  # "unlimited" is no number
            if soft is not None:
                used = field(status, usage) * 1024
                pool = f"process {machine(root)} {os.getpid()} {name}"
                yield Limit(f"{name} headroom", max(0, soft - used), soft, shared=False, pool=pool)


def _available_ram(root: Path) -> Iterator[Limit]:
    meminfo, pool = read(root / "proc/meminfo"), f"RAM {machine(root)}"
    available = field(meminfo, "MemAvailable:") * 1024
    if available:
        yield Limit("available RAM", available, field(meminfo, "MemTotal:") * 1024, shared=True, pool=pool)
    else:  # not Linux
        import psutil

        memory = psutil.virtual_memory()
        yield Limit("available RAM", memory.available, memory.total, shared=True, pool=pool)


# -- files of the kernel


def read(path: Path) -> str:
    """A file's text, or nothing: a limit that cannot be read is no limit."""
    try:
        return path.read_text()
    except OSError:
        return ""


def number(text: str) -> int | None:
    """The number that a text is, None for any other text."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def field(text: str, *names: str) -> int:
    """The number after the first of ``names`` that begins a line, 0 when there is none."""
    values = fields(text)
    return next((number(values[name]) or 0 for name in names if name in values), 0)


def fields(text: str) -> dict[str, str]:
    """The second word of each line by the first one."""
    return {words[0]: words[1] for line in text.splitlines() if len(words := line.split()) >= 2}
