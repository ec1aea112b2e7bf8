"""How many bytes each tier may hold, and how many of them the user's own data (non-model data) need.

A budget is the room left under the *tightest* limit that applies to this process. Free RAM alone is the wrong number in
a container, under a batch system or after ``ulimit``: the process is killed long before the RAM is full.

All files are read below one ``root``, so the tests run on made-up ``/proc`` and ``/sys`` trees.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemini.environment import number_of_ranks
from gemini.lease.limits import ROOT, Limit, disk_limit, fields, machine, number, ram_limits, read, tightest
from gemini.lease.room import HOST_SHARE, LEAST_SHARE, capacity_of
from gemini.sizes import format_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Budget:
    """Bytes that a tier may hold, and the limit they come from."""

    bytes: int
    source: str
    """The limit in words, such as ``"80% of RLIMIT_DATA headroom (1.2 GiB of 2.0 GiB)"``."""


def host_headroom(*, root: Path = ROOT) -> tuple[int, str]:
    """Bytes of RAM that this process may still take, and the limit that says so."""
    limit = tightest(ram_limits(root))
    return limit.free, limit.name


def host_budget(
    fraction: float = HOST_SHARE, *, spare_bytes: int = 0, ranks: int | None = None, root: Path = ROOT
) -> Budget:
    """Room for model data in RAM: ``fraction`` of the smallest headroom of cgroup v2 and v1, RLIMIT_DATA, RLIMIT_AS and
    MemAvailable. What the machine shares is divided by ``ranks`` (None: by ``LOCAL_WORLD_SIZE``).

    The headroom is what is left *now*: the interpreter, the libraries and the user's data are already outside it.

    A share of a small headroom leaves less than every process needs (a thread that cannot start ends it): at least
    ``spare_bytes`` are left too, of each rank's part, though never more than three quarters of it.
    """
    _check_fraction(fraction)
    ranks = ranks or local_world_size()
    return _budget(tightest(ram_limits(root), ranks), fraction, ranks, spare_bytes)


def disk_budget(path: str | os.PathLike[str], fraction: float = 0.9) -> Budget:
    """Room on the file system of ``path`` (which need not exist yet), divided by ``LOCAL_WORLD_SIZE``."""
    _check_fraction(fraction)
    room = disk_limit(Path(path))
    return _budget(room, fraction, local_world_size())


def device_budget(device: "torch.device | str | int", fraction: float = 0.9) -> Budget:
    """Room on an accelerator: ``fraction`` of what is free, where other processes count as used.

    What torch's allocator holds in its cache but has not handed out is ours and counts as free.

    Raises
    ------
    ValueError
        The device is the CPU: then DEVICE is RAM and :func:`host_budget` bounds it.
    """
    import torch

    _check_fraction(fraction)
    device = torch.device(device)
    if device.type == "cpu":
        raise ValueError(f"expected an accelerator, got {device}; for RAM use host_budget()")
    return _budget(device_limit(device), fraction, 1)


def device_limit(device: "torch.device") -> Limit:
    """How much of an accelerator's memory is left to this process. Each rank has a device of its own."""
    from gemini.chunk import memory_of

    memory = memory_of(device)
    found, cached = memory.free(), memory.reserved_bytes - memory.allocated_bytes
    name = f"free memory of {device} by {found.reader}"
    pool = f"device {machine()} {memory.name}"
    return Limit(name, found.free + cached, found.total, shared=False, pool=pool)


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
    after a free stays counted: that errs on the safe side. What other models of the process take of RAM is theirs:
    ``elsewhere`` tells how much that is.

    One sample costs some 50 microseconds of system calls on CPU: for warm-up, not for every step.
    """

    def __init__(
        self, device: "torch.device | str" = "cpu", *, root: Path = ROOT, elsewhere: Callable[[], int] = lambda: 0
    ) -> None:
        import torch

        from gemini.chunk import memory_of

        of = torch.device(device)
        self._memory = None if of.type == "cpu" else memory_of(of)
        self._proc = root / "proc/self"
        self._elsewhere = elsewhere
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
            self._baseline = resident - self._file_bytes - model_bytes - self._elsewhere()

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
            peak -= self._elsewhere()
            self._file_bytes = files
        self.last_bytes = max(0, peak - self._baseline - model_bytes)
        self.peak_bytes = max(self.peak_bytes, self.last_bytes)
        self.mark()


def _budget(room: Limit, fraction: float, ranks: int, spare_bytes: int = 0) -> Budget:
    of_ranks = f", shared by {ranks} local ranks" if room.shared and ranks > 1 else ""
    limit = f"{room.name} ({format_bytes(room.free)} of {format_bytes(room.total)}{of_ranks})"
    free = room.per_rank(ranks)
    nbytes = capacity_of(free, fraction, spare_bytes)
    if nbytes == int(free * fraction):
        return Budget(nbytes, f"{fraction:.0%} of {limit}")
    if nbytes == free - spare_bytes:
        each = " per rank" if of_ranks else ""
        return Budget(nbytes, f"{limit}, less {format_bytes(spare_bytes)}{each} for what is not model data")
    return Budget(nbytes, f"{min(fraction, LEAST_SHARE):.0%} of {limit}, the rest for what is not model data")


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")


def local_world_size() -> int:
    """The ranks of this training on this machine."""
    return number_of_ranks("LOCAL_WORLD_SIZE")


def _resident_bytes(proc: Path) -> tuple[int, int, int]:
    """The resident set, its highest since the last reset (0 where it is not known), and the pages of files in it."""
    status = fields(read(proc / "status"))
    names = ("VmRSS:", "VmHWM:", "RssFile:")
    resident, highest, files = ((number(status.get(name, "")) or 0) * 1024 for name in names)
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
