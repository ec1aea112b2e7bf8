"""Runs as JSON objects for scripts: snake_case names, ints for bytes, floats for seconds, null for what is unknown."""

from collections.abc import Mapping
from typing import Any

from gemini.telemetry.reader import TIERS, RunView

SCHEMA_VERSION = 1
"""Raised when a field goes or changes its meaning; fields may be added without."""

_GROUPS: dict[str, tuple[str, ...]] = {
    "chunk": ("count", "numel", "waste_ratio", "device_count", "host_count", "disk_count", "resident_count"),
    "model_data": ("total_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes"),
    "non_model": ("peak_bytes",),
    "move": (
        "fetch_count",
        "fetch_bytes",
        "prefetch_count",
        "prefetch_hit_ratio",
        "evict_count",
        "disk_read_bytes",
        "disk_write_bytes",
        "stall_seconds",
    ),
}


def brief(run: RunView) -> dict[str, Any]:
    """A run as ``ls`` lists it."""
    return {
        "run_id": run.run_id,
        "path": str(run.path),
        "name": run.name,
        "status": run.status.value,
        "status_reason": run.reason or None,
        "pid": run.pid,
        "host": run.host or None,
        "started_at": run.started,
        "updated_at": run.updated,
        "step": run.step,
        "step_seconds": _float(run.stats.get("step/seconds")),
    }


def snapshot(run: RunView) -> dict[str, Any]:
    """A run as a snapshot shows it."""
    unified = run.stats.get("memory/unified")
    return {
        "schema_version": SCHEMA_VERSION,
        **brief(run),
        "rank": run.rank,
        "world_size": run.world_size,
        "tiers": {tier: _tier(run, tier) for tier in TIERS},
        **{group: {name: _value(run.stats, group, name) for name in names} for group, names in _GROUPS.items()},
        "device_and_host_are_one": None if unified is None else bool(unified),
        "dropped_count": run.dropped_count,
        "facts": dict(run.facts),
        "summary": dict(run.summary) or None,
    }


def listing(runs: list[RunView]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "runs": [brief(run) for run in runs]}


def failure(code: int, message: str) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "error": {"code": code, "message": message}}


def _tier(run: RunView, tier: str) -> dict[str, int | float | None]:
    used, capacity = (_value(run.stats, tier, name) for name in ("used_bytes", "capacity_bytes"))
    return {
        "used_bytes": used,
        "peak_bytes": _int(run.peaks.get(tier)),
        "capacity_bytes": capacity,
        "used_ratio": used / capacity if used is not None and capacity else None,
    }


def _value(stats: Mapping[str, float], group: str, name: str) -> int | float | None:
    value = stats.get(f"{group}/{name}")
    return _float(value) if name.endswith(("_ratio", "_seconds")) else _int(value)


def _int(value: float | None) -> int | None:
    return None if value is None else int(value)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
