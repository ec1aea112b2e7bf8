"""How many bytes each tier may hold, and how many of them the user's own data (non-model data) need.

A budget is the room left under the *tightest* limit that applies to this process. Free RAM alone is the wrong number in
a container, under a batch system or after ``ulimit``: the process is killed long before the RAM is full.

All files are read below one ``root``, so the tests run on made-up ``/proc`` and ``/sys`` trees.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from gemini.sizes import format_bytes

if TYPE_CHECKING:
    import torch

ROOT = Path("/")

# cgroup v1 writes "no limit" as a number near 2**63; no machine has an exbibyte of RAM.
_UNLIMITED = 1 << 60

NON_MODEL_HOST_BYTES = 256 << 20
"""RAM that a small training process takes besides model data, for the smallest model, too: thread stacks, the step
kernel's compilation, oneDNN's code and scratch, what malloc keeps. Under RLIMIT_DATA on two threads a GPT of 3.7M
parameters took 150 to 200 MiB besides its model data (a coarse difference of VmData); the rest is for activations."""
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class Budget:
    """Bytes that a tier may hold, and the limit they come from."""

    bytes: int
    source: str
    """The limit in words, such as ``"80% of RLIMIT_DATA headroom (1.2 GiB of 2.0 GiB)"``."""


@dataclass(frozen=True)
class _Headroom:
    """One limit: how much of it is left."""

    name: str
    free: int
    total: int
    shared: bool
    """True when all local ranks live under this limit together, False when each has its own."""

    def per_rank(self, ranks: int) -> int:
        return self.free // ranks if self.shared else self.free


def host_headroom(*, root: Path = ROOT) -> tuple[int, str]:
    """Bytes of RAM that this process may still take, and the limit that says so."""
    limits = [*_cgroup_headrooms(root), *_rlimit_headrooms(root), *_available_ram(root)]
    tightest = min(limits, key=lambda limit: limit.free)
    return tightest.free, tightest.name


def host_budget(fraction: float = 0.8, *, spare_bytes: int = 0, ranks: int | None = None, root: Path = ROOT) -> Budget:
    """Room for model data in RAM: ``fraction`` of the smallest headroom of cgroup v2 and v1, RLIMIT_DATA, RLIMIT_AS and
    MemAvailable. What the machine shares is divided by ``ranks`` (None: by ``LOCAL_WORLD_SIZE``).

    The headroom is what is left *now*: the interpreter, the libraries and the user's data are already outside it.

    A share of a small headroom leaves less than every process needs (a thread that cannot start ends it): at least
    ``spare_bytes`` are left too, of each rank's part, though never more than three quarters of it.
    """
    _check_fraction(fraction)
    ranks = ranks or _local_world_size()
    limits = [*_cgroup_headrooms(root), *_rlimit_headrooms(root), *_available_ram(root)]
    tightest = min(limits, key=lambda limit: limit.per_rank(ranks))
    return _budget(tightest, fraction, ranks, spare_bytes)


def disk_budget(path: str | os.PathLike[str], fraction: float = 0.9) -> Budget:
    """Room on the file system of ``path`` (which need not exist yet), divided by ``LOCAL_WORLD_SIZE``."""
    _check_fraction(fraction)
    existing = Path(path).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    stat = os.statvfs(existing)
    # f_bavail, not f_bfree: the blocks reserved for root are not ours.
    room = _Headroom(f"free disk of {path}", stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize, shared=True)
    return _budget(room, fraction, _local_world_size())


def device_budget(device: "torch.device | str | int", fraction: float = 0.9) -> Budget:
    """Room on an accelerator: ``fraction`` of what is free, where other processes count as used.

    What torch's allocator holds in its cache but has not handed out is ours and counts as free.

    Raises
    ------
    ValueError
        The device is the CPU: then DEVICE is RAM and :func:`host_budget` bounds it.
    """
    import torch

    from gemini.chunk import memory_of

    _check_fraction(fraction)
    device = torch.device(device)
    if device.type == "cpu":
        raise ValueError(f"expected an accelerator, got {device}; for RAM use host_budget()")
    memory = memory_of(device)
    found, cached = memory.free(), memory.reserved_bytes - memory.allocated_bytes
    name = f"free memory of {device} by {found.reader}"
    return _budget(_Headroom(name, found.free + cached, found.total, shared=False), fraction, 1)


class NonModelMeter:
    """Measures the peak of non-model data: activations, temporaries, workspaces, the user's own tensors.

    Time is cut into intervals in which the amount of model data does not change. In the warm-up step, at every moment::

        meter.sample(model_bytes)   # ends the interval: model_bytes is what was there during it
        ...evict, fetch...
        meter.mark()                # begins the next one, so that moves are not mistaken for activations

    On an accelerator an interval's non-model data are the allocator's peak minus ``model_bytes``, which must then be
    bytes that came from torch's allocator on that device. Sampling resets the allocator's peak statistics.

    On CPU they are what the peak resident set grew by since :meth:`start`, minus what the model data grew by. The
    interpreter and its libraries thereby drop out, as they do in :func:`host_budget`; so do pages of files, such as the
    20 MiB of kernels' code that a first step brings in (measured), which no limit counts or which are dropped before
    anyone is refused memory. The kernel keeps the peak (VmHWM) and lets us reset it; where it does not (``exact`` is
    then False), the current resident set stands in and temporaries inside an interval are missed. RSS counts touched
    pages only: ``model_bytes`` should leave out memory that was allocated but never written. Memory that malloc keeps
    after a free stays counted: that errs on the safe side.

    One sample costs some 50 microseconds of system calls on CPU: for warm-up, not for every step.
    """

    def __init__(self, device: "torch.device | str" = "cpu", *, root: Path = ROOT) -> None:
        import torch

        from gemini.chunk import memory_of

        of = torch.device(device)
        self._memory = None if of.type == "cpu" else memory_of(of)
        self._proc = root / "proc/self"
        self._baseline = 0
        self._file_bytes = 0
        """Pages of files in the resident set when the interval began."""
        self.exact = True
        self.peak_bytes = 0
        self.last_bytes = 0
        """The peak of the latest interval alone."""

    def start(self, model_bytes: int = 0) -> None:
        """Begin measuring, with ``model_bytes`` of model data on the device now."""
        self.peak_bytes = self.last_bytes = 0
        self.mark()
        # On a device whatever else is allocated already *is* non-model data and takes room from chunks: no baseline.
        if self._memory is None:
            resident, _, self._file_bytes = _resident_bytes(self._proc)
            self._baseline = resident - self._file_bytes - model_bytes

    def mark(self) -> None:
        """Begin an interval here; without it an interval begins at the previous sample."""
        if self._memory is not None:
            self._memory.reset_peak()
        else:
            self.exact = _reset_peak_resident(self._proc)

    def sample(self, model_bytes: int) -> None:
        """End the interval during which ``model_bytes`` of model data were on the device."""
        if self._memory is not None:
            peak = self._memory.peak_bytes
        else:
            resident, highest, files = _resident_bytes(self._proc)
            # Files' pages may have come or gone before or after the peak: on the safe side.
            peak = (highest if self.exact else resident) - min(files, self._file_bytes)
            self._file_bytes = files
        self.last_bytes = max(0, peak - self._baseline - model_bytes)
        self.peak_bytes = max(self.peak_bytes, self.last_bytes)
        self.mark()


def _budget(room: _Headroom, fraction: float, ranks: int, spare_bytes: int = 0) -> Budget:
    of_ranks = f", shared by {ranks} local ranks" if room.shared and ranks > 1 else ""
    limit = f"{room.name} ({format_bytes(room.free)} of {format_bytes(room.total)}{of_ranks})"
    free = room.per_rank(ranks)
    share, rest = int(free * fraction), free - spare_bytes
    if share <= rest:
        return Budget(share, f"{fraction:.0%} of {limit}")
    least = min(share, int(free * _LEAST_SHARE))
    if least < rest:
        each = " per rank" if of_ranks else ""
        return Budget(rest, f"{limit}, less {format_bytes(spare_bytes)}{each} for what is not model data")
    return Budget(least, f"{min(fraction, _LEAST_SHARE):.0%} of {limit}, the rest for what is not model data")


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")


def _local_world_size() -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    try:
        return max(1, int(text))
    except ValueError:
        raise ValueError(f"environment variable LOCAL_WORLD_SIZE must be a whole number, got {text!r}") from None


def _cgroup_headrooms(root: Path) -> Iterator[_Headroom]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            # A pure v2 machine, and the v2 half of a mixed one (there the memory controller usually belongs to v1).
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield from _walk_up(root / mount, path, "cgroup v2", ("memory.max", "memory.high"), "memory.current")
        elif "memory" in controllers.split(","):
            limits = ("memory.limit_in_bytes",)
            yield from _walk_up(root / "sys/fs/cgroup/memory", path, "cgroup v1", limits, "memory.usage_in_bytes")


def _walk_up(mount: Path, path: str, name: str, limits: tuple[str, ...], usage: str) -> Iterator[_Headroom]:
    """Every limit from the process's group to the top: any of them kills.

    Inside a container /proc names the group as the host sees it, a path that may not exist below the container's
    mount. Going up skips what is missing and ends at the mount itself, which is then the container's own group.
    """
    relative = PurePosixPath(path.lstrip("/"))
    for folder in (mount / relative, *(mount / parent for parent in relative.parents)):
        for file in limits:
            limit = _number(_read(folder / file))
            used = _number(_read(folder / usage))
            if limit is None or used is None or limit >= _UNLIMITED:
                continue
            # The kernel drops file cache that was not used lately before it kills a process.
            reclaimable = _field(_read(folder / "memory.stat"), "total_inactive_file", "inactive_file")
            yield _Headroom(f"{name} headroom", max(0, limit - max(0, used - reclaimable)), limit, shared=True)


def _rlimit_headrooms(root: Path) -> Iterator[_Headroom]:
    status = _read(root / "proc/self/status")
    for line in _read(root / "proc/self/limits").splitlines():
        for title, name, usage in (
            ("Max data size", "RLIMIT_DATA", "VmData:"),
            ("Max address space", "RLIMIT_AS", "VmSize:"),
        ):
            if not line.startswith(title):
                continue
            soft = _number(line[len(title) :].split()[0])  # "unlimited" is no number
            if soft is not None:
                used = _field(status, usage) * 1024
                yield _Headroom(f"{name} headroom", max(0, soft - used), soft, shared=False)


def _available_ram(root: Path) -> Iterator[_Headroom]:
    meminfo = _read(root / "proc/meminfo")
    available = _field(meminfo, "MemAvailable:") * 1024
    if available:
        yield _Headroom("available RAM", available, _field(meminfo, "MemTotal:") * 1024, shared=True)
    else:  # not Linux
        import psutil

        memory = psutil.virtual_memory()
        yield _Headroom("available RAM", memory.available, memory.total, shared=True)


def _resident_bytes(proc: Path) -> tuple[int, int, int]:
    """The resident set, its highest since the last reset (0 where it is not known), and the pages of files in it."""
    status = _fields(_read(proc / "status"))
    names = ("VmRSS:", "VmHWM:", "RssFile:")
    resident, highest, files = ((_number(status.get(name, "")) or 0) * 1024 for name in names)
    if resident:
        return resident, highest, files
    import psutil

    return int(psutil.Process().memory_info().rss), 0, 0


def _reset_peak_resident(proc: Path) -> bool:
    """Make VmHWM start again from the present RSS (``5``, Linux 4.0 and newer). False where that is not allowed."""
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    """A file's text, or nothing: a limit that cannot be read is no limit."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _field(text: str, *names: str) -> int:
    """The number after the first of ``names`` that begins a line, 0 when there is none."""
    values = _fields(text)
    return next((_number(values[name]) or 0 for name in names if name in values), 0)


def _fields(text: str) -> dict[str, str]:
    """The second word of each line by the first one."""
    return {words[0]: words[1] for line in text.splitlines() if len(words := line.split()) >= 2}
