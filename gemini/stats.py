"""A run in numbers: the flat dict behind ``model.memory_stats()``, telemetry and ``gemini-stat``."""

from collections.abc import Mapping

from .chunk import ChunkManager, ChunkState, Role, Tier
from .sizes import format_bytes


def manager_stats(manager: ChunkManager) -> dict[str, int | float]:
    """What can be read off the chunks: bytes, counts. Bytes are per tier as the ledger counts them.

    Where DEVICE and HOST are the same RAM (``memory/unified`` is 1), the numbers of HOST cover both and those of DEVICE
    are the full copies' part.
    """
    ledger, moves, chunks = manager.ledger, manager.moves, manager.chunks
    stats: dict[str, int | float] = {}
    for tier in Tier:
        stats[f"{tier.value}/used_bytes"] = ledger.used(tier)
        stats[f"{tier.value}/peak_bytes"] = ledger.peak(tier)
        stats[f"{tier.value}/capacity_bytes"] = ledger.capacity(tier)
    stats["memory/unified"] = int(ledger.unified)

    total = sum(c.layout.numel for c in chunks)
    stats["chunk/count"] = len(chunks)
    stats["chunk/numel"] = max((c.layout.numel for c in chunks), default=0)
    stats["chunk/waste_ratio"] = 1.0 - sum(c.layout.used_numel for c in chunks) / total if total else 0.0
    for tier in Tier:
        stats[f"chunk/{tier.value}_count"] = sum(c.homes[Role.MASTER].tier is tier for c in chunks)
    stats["chunk/resident_count"] = sum(c.state is not ChunkState.HOME for c in chunks)

    parameters = sum(c.homes[Role.MASTER].nbytes for c in chunks)
    optimizer = sum(c.homes[role].nbytes for c in chunks for role in (Role.EXP_AVG, Role.EXP_AVG_SQ) if role in c.homes)
    gradients = sum(c.gradient.buffer.nbytes for c in chunks if c.gradient is not None)
    stats["model_data/parameter_bytes"] = parameters
    stats["model_data/gradient_bytes"] = gradients
    stats["model_data/optimizer_bytes"] = optimizer
    stats["model_data/total_bytes"] = parameters + gradients + optimizer

    stats["move/fetch_count"] = moves.fetch_count
    stats["move/fetch_bytes"] = moves.fetch_bytes
    stats["move/prefetch_count"] = moves.prefetch_count
    stats["move/prefetch_hit_ratio"] = moves.prefetch_used / moves.fetch_count if moves.fetch_count else 1.0
    stats["move/evict_count"] = moves.evict_count
    stats["move/disk_read_bytes"] = manager.disk.read_bytes if manager.disk is not None else 0
    stats["move/disk_write_bytes"] = manager.disk.written_bytes if manager.disk is not None else 0
    return stats


def summary(stats: Mapping[str, int | float]) -> str:
    """The statistics as a small table."""
    lines = [f"{'tier':<8}{'used':>12}{'peak':>12}{'capacity':>12}{'peak/capacity':>15}"]
    for tier in Tier:
        used, peak, capacity = (int(stats[f"{tier.value}/{key}_bytes"]) for key in ("used", "peak", "capacity"))
        share = f"{peak / capacity:.0%}" if capacity else "-"
        lines.append(
            f"{tier.value:<8}{format_bytes(used):>12}{format_bytes(peak):>12}{format_bytes(capacity):>12}{share:>15}"
        )
    if stats["memory/unified"]:
        lines.append("device and host are the same RAM: host covers both, device is the full copies' part")
    homes = ", ".join(f"{stats[f'chunk/{tier.value}_count']} on {tier.value}" for tier in Tier)
    lines.append(
        f"chunks: {stats['chunk/count']} of up to {stats['chunk/numel']} elements ({homes}), "
        f"waste {stats['chunk/waste_ratio']:.1%}"
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
