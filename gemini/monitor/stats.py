"""A run in numbers: the flat dict behind ``model.memory_stats()``, telemetry and ``gemini-stat``.

In two halves, because the training thread pays for the first only: `Reading` copies the counters that change with every
step, in microseconds; `Statistics` gives them names and adds what has to be summed over all chunks.
"""

import weakref
from collections.abc import Mapping
from dataclasses import asdict
from operator import attrgetter
from typing import NamedTuple

from ..activations import ActivationCounts
from ..chunk import SHADOW, ChunkManager, MemoryMap, Tier
from ..engine import Engine, StepFacts
from ..memory.prediction import Outlook
from ..sizes import format_bytes

Stats = dict[str, int | float]


class Reading(NamedTuple):
    """The counters at one moment. Seconds and bytes are totals since `boost`, as everywhere."""

    memory: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """See `Ledger.counters`."""
    moves: tuple[int, ...]
    """The fields of `MoveCounts` that `_MOVES` names."""
    waited: tuple[float, ...]
    """Seconds that visits waited for full copies of each tier."""
    stall_seconds: float
    upload_bytes: tuple[int, ...]
    upload_seconds: tuple[float, ...]
    """Of full copies, by tier of origin."""
    disk: tuple[int, float, int, float]
    """Bytes and seconds read, bytes and seconds written."""
    non_model_peak_bytes: int
    step: StepFacts
    outlook: Outlook | None


# One call of C each: after 50 ms of computing, every line of Python costs a cache miss or two.
_MOVES = attrgetter(
    "prefetch_used", "late_prefetch_count", "miss_count", "fetch_count", "fetch_bytes", "prefetch_count", "evict_count",
)  # fmt: skip
_DISK = attrgetter("read_bytes", "read_seconds", "written_bytes", "write_seconds")
_NO_DISK = (0, 0.0, 0, 0.0)
_TIERS = tuple(Tier)


def read(engine: Engine, step: StepFacts) -> Reading:
    """Copy the counters; some microseconds, whatever the size of the model."""
    manager = engine.manager
    moves, uploads = manager.moves, manager.device.uploads
    return Reading(
        manager.ledger.counters(),
        (manager.access_count, *_MOVES(moves)),
        tuple(moves.waited_seconds.values()),
        engine.stall_seconds,
        tuple(uploads.nbytes.values()),
        tuple(uploads.seconds.values()),
        _NO_DISK if manager.disk is None else _DISK(manager.disk),
        engine.sampling.meter.peak_bytes,
        step,
        engine.listener.outlook,
    )


class Statistics:
    """Turns readings into flat dicts. Holds the manager weakly: a thread may have it longer than the model lives."""

    def __init__(self, manager: ChunkManager, activations: ActivationCounts) -> None:
        self._manager = weakref.ref(manager)
        self._activations = activations
        self._ledger = manager.ledger
        self._of_layout = of_layout(manager)

    def refresh(self) -> None:
        """Some chunks were built anew."""
        manager = self._manager()
        if manager is not None:
            self._of_layout = of_layout(manager)

    def expand(self, reading: Reading) -> Stats:
        """The flat dict of a reading. ``chunk/resident_count`` and ``activation/...`` are of now, not of its moment."""
        stats: Stats = {}
        for tier, (used, peak, capacity) in self._ledger.read_counters(reading.memory).items():
            stats[f"{tier.value}/used_bytes"] = used
            stats[f"{tier.value}/peak_bytes"] = peak
            stats[f"{tier.value}/capacity_bytes"] = capacity
        stats |= self._of_layout
        stats["device/overdraft_peak_bytes"] = self._ledger.peak_overdraft(Tier.DEVICE)
        manager = self._manager()
        if manager is not None:
            stats["chunk/resident_count"] = sum(c.is_resident for c in manager.chunks)

        (access_count, prefetched, late, missed, fetch_count, fetch_bytes, prefetch_count, evict_count) = reading.moves
        stats["need/count"] = access_count
        stats["need/resident_count"] = max(0, access_count - prefetched - missed)
        stats["need/hit_count"] = prefetched - late
        stats["need/late_count"] = late
        stats["need/miss_count"] = missed

        stats["move/fetch_count"] = fetch_count
        stats["move/fetch_bytes"] = fetch_bytes
        stats["move/prefetch_count"] = prefetch_count
        stats["move/prefetch_hit_ratio"] = prefetched / fetch_count if fetch_count else 1.0
        stats["move/evict_count"] = evict_count
        stats["move/disk_read_bytes"], stats["move/disk_read_seconds"] = reading.disk[:2]
        stats["move/disk_write_bytes"], stats["move/disk_write_seconds"] = reading.disk[2:]
        stats["move/stall_seconds"] = reading.stall_seconds
        columns = zip(_TIERS, reading.waited, reading.upload_bytes, reading.upload_seconds, strict=True)
        for tier, waited, nbytes, seconds in columns:
            stats[f"stall/{tier.value}_seconds"] = waited
            stats[f"upload/{tier.value}_bytes"] = nbytes
            stats[f"upload/{tier.value}_seconds"] = seconds

        stats |= {f"activation/{name}": value for name, value in asdict(self._activations).items()}
        stats["non_model/peak_bytes"] = reading.non_model_peak_bytes
        step = reading.step
        stats["step/count"] = step.number
        stats["step/seconds"] = step.seconds
        stats["step/skipped_count"] = step.skipped_count
        at_times = ("loss_scale", step.loss_scale), ("grad_norm", step.grad_norm), ("wait_seconds", step.wait_seconds)
        stats |= {f"step/{name}": value for name, value in at_times if value is not None}
        if reading.outlook is not None:
            for name, peaks in reading.outlook._asdict().items():
                for tier, nbytes in zip(Tier, peaks.tiers, strict=True):
                    stats[f"prediction/{tier.value}_{name}_bytes"] = nbytes
                stats[f"prediction/non_model_{name}_bytes"] = peaks.non_model
        return stats


def of_layout(manager: ChunkManager) -> Stats:
    """What changes seldom: chunks, their homes, and the bytes of model data.

    Where DEVICE and HOST are the same RAM (``memory/unified`` is 1), the numbers of HOST cover both and those of DEVICE
    are the full copies' part. ``placement/offload_*_frac`` are what the arguments of these names came to: the share of
    home bytes off what computes, and the share of full copies for which there is no room to stay.
    """
    chunks = manager.chunks
    total = sum(c.layout.numel for c in chunks)
    stats: Stats = {"memory/unified": int(manager.ledger.memory is MemoryMap.UNIFIED)}
    stats["chunk/count"] = len(chunks)
    stats["chunk/numel"] = max((c.layout.numel for c in chunks), default=0)
    stats["chunk/waste_ratio"] = 1.0 - sum(c.layout.used_numel for c in chunks) / total if total else 0.0
    for tier in Tier:
        stats[f"chunk/{tier.value}_count"] = sum(c.tier is tier for c in chunks)
    parameters = sum(c.homes[spec.name].nbytes for c in chunks for spec in c.plan.codec.specs if spec.name != SHADOW)
    optimizer = sum(c.homes[spec.name].nbytes for c in chunks for spec in c.states)
    buffers = [c.gradient.buffer for c in chunks if c.gradient is not None and c.gradient.buffer is not None]
    gradients = sum(buffer.nbytes for buffer in buffers) or manager.gradient_pool.nbytes
    homes = [*(home for c in chunks for name, home in c.homes.items() if name != SHADOW), *buffers]
    total_bytes = sum(home.nbytes for home in homes)
    parts = [part for home in homes for part in home.parts]
    off = sum(part.nbytes for part in parts if not manager.ledger.memory.shares(part.tier, Tier.DEVICE))
    stats["placement/offload_optim_frac"] = off / total_bytes if total_bytes else 0.0
    copies = sum(c.full_nbytes for c in chunks)
    room = manager.ledger.free(Tier.DEVICE) + manager.full_copies.nbytes
    stats["placement/offload_param_frac"] = max(0.0, 1.0 - room / copies) if copies else 0.0
    stats["model_data/shadow_bytes"] = sum(c.homes[SHADOW].nbytes for c in chunks if SHADOW in c.homes)
    stats["model_data/parameter_bytes"] = parameters
    stats["model_data/gradient_bytes"] = gradients
    stats["model_data/optimizer_bytes"] = optimizer
    stats["model_data/total_bytes"] = parameters + gradients + optimizer
    return stats


def summary(stats: Mapping[str, int | float], sources: Mapping[Tier, str]) -> str:
    """The statistics as a small table, and where each capacity comes from."""
    lines = [f"{'tier':<8}{'used':>12}{'peak':>12}{'capacity':>12}{'peak/capacity':>15}"]
    for tier in Tier:
        used, peak, capacity = (int(stats[f"{tier.value}/{key}_bytes"]) for key in ("used", "peak", "capacity"))
        share = f"{peak / capacity:.0%}" if capacity else "-"
        lines.append(
            f"{tier.value:<8}{format_bytes(used):>12}{format_bytes(peak):>12}{format_bytes(capacity):>12}{share:>15}"
        )
    lines += [f"{tier.value} capacity: {source}" for tier, source in sources.items()]
    if stats["memory/unified"]:
        lines.append("device and host are the same RAM: host covers both, device is the full copies' part")
    homes = ", ".join(f"{stats[f'chunk/{tier.value}_count']} on {tier.value}" for tier in Tier)
    lines.append(
        f"chunks: {stats['chunk/count']} of up to {stats['chunk/numel']} elements ({homes}), "
        f"waste {stats['chunk/waste_ratio']:.1%}; {stats['placement/offload_optim_frac']:.1%} of the homes and "
        f"{stats['placement/offload_param_frac']:.1%} of the full copies are offloaded"
    )
    lines.append(
        f"model data: {format_bytes(stats['model_data/total_bytes'])} "
        f"(parameters {format_bytes(stats['model_data/parameter_bytes'])}, "
        f"gradients {format_bytes(stats['model_data/gradient_bytes'])}, "
        f"optimizer {format_bytes(stats['model_data/optimizer_bytes'])}); "
        f"non-model data: {format_bytes(stats['non_model/peak_bytes'])} at peak"
    )
    lines.append(
        f"moves: {stats['move/fetch_count']} fetches ({format_bytes(stats['move/fetch_bytes'])}), "
        f"{stats['move/prefetch_hit_ratio']:.0%} prefetched, {stats['move/evict_count']} evictions; disk "
        f"{format_bytes(stats['move/disk_read_bytes'])} read, {format_bytes(stats['move/disk_write_bytes'])} written; "
        f"{stats['move/stall_seconds']:.2f} s waited"
    )
    return "\n".join(lines)
