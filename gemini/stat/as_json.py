"""Runs as JSON objects for scripts: snake_case names, ints for bytes, floats for seconds, null for what is unknown."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemini.stat.rates import risk
from gemini.telemetry.reader import TIERS, RunView

if TYPE_CHECKING:
    from gemini.stat.screen import Shown

_GROUPS: dict[str, tuple[str, ...]] = {
    "chunk": ("count", "numel", "waste_ratio", "device_count", "host_count", "disk_count", "resident_count"),
    "need": ("count", "resident_count", "hit_count", "late_count", "miss_count"),
    "stall": ("device_seconds", "host_seconds", "disk_seconds"),
    "upload": (
        "device_bytes",
        "device_seconds",
        "host_bytes",
        "host_seconds",
        "disk_bytes",
        "disk_seconds",
    ),
    "model_data": ("total_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes"),
    "non_model": ("peak_bytes",),
    "prediction": tuple(f"{what}_{when}_bytes" for what in (*TIERS, "non_model") for when in ("predicted", "measured")),
    "move": (
        "fetch_count",
        "fetch_bytes",
        "prefetch_count",
        "prefetch_hit_ratio",
        "evict_count",
        "disk_read_bytes",
        "disk_write_bytes",
        "disk_read_seconds",
        "disk_write_seconds",
        "stall_seconds",
    ),
}

_PROCESS = (
    "rss_bytes",
    "rss_peak_bytes",
    "free_bytes",
    "device_free_bytes",
    "device_total_bytes",
    "device_reserved_bytes",
)


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
        **brief(run),
        "rank": run.rank,
        "world_size": run.world_size,
        "tiers": {tier: _tier(run, tier) for tier in TIERS},
        **{group: {name: _value(run.stats, group, name) for name in names} for group, names in _GROUPS.items()},
        "device_and_host_are_one": None if unified is None else bool(unified),
        "process": {name: _int(run.process.get(name)) for name in _PROCESS},
        "oom_risk": risk(run),
        "chunk_map": run.states or None,
        "dropped_count": run.dropped_count,
        "facts": dict(run.facts),
        "summary": dict(run.summary) or None,
    }


def row(shown: "Shown") -> dict[str, Any]:
    """What ``dmon`` shows, flat enough for a line."""
    run, found = shown.run, shown.rates
    return {
        "t": time.time(),
        "run_id": run.run_id,
        "rank": run.rank,
        "status": run.status.value,
        "step": run.step,
        "step_seconds": _float(run.stats.get("step/seconds")),
        "tiers": {tier: _tier(run, tier) for tier in TIERS},
        "rss_bytes": _int(run.process.get("rss_bytes")),
        "non_model_peak_bytes": _int(run.stats.get("non_model/peak_bytes")),
        "oom_risk": dict(found.risk),
        **derived(shown),
    }


def derived(shown: "Shown") -> dict[str, Any]:
    """Rates of the last steps, per step and per second."""
    found = shown.rates
    return {
        "window_steps": found.steps,
        "hit_ratio": found.hit_ratio,
        "stall_seconds_per_step": found.stall_seconds,
        "stall_ratio": found.stall_ratio,
        "links": [
            {
                "src": link.source,
                "dst": link.target,
                "bytes_per_step": link.bytes_per_step,
                "bytes_per_second": link.bytes_per_second,
                "ceiling_bytes_per_second": link.ceiling,
            }
            for link in found.links
        ],
        "advice": [
            {"urgent": advice.is_urgent, "text": advice.text, "arguments": advice.arguments} for advice in shown.advices
        ],
    }


def listing(runs: list[RunView]) -> dict[str, Any]:
    return {"runs": [brief(run) for run in runs]}


def failure(code: int, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


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
