"""Runs as objects for scripts: ints for bytes, floats for seconds, None for what is unknown."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemini.stat.outputs import Advice, Brief, Link, ProcessMemory, Row, Snapshot, TierState
from gemini.stat.rates import risk
from gemini.telemetry.layout import TIERS
from gemini.telemetry.run_view import RunView
from gemini.telemetry.statistics import (
    Chunks,
    ModelData,
    Moves,
    Needs,
    NonModel,
    Predictions,
    Stalls,
    Uploads,
    group_of,
)

if TYPE_CHECKING:
    from gemini.stat.screen import Shown


def brief(run: RunView) -> Brief:
    """A run as ``ls`` lists it."""
    return Brief(**_brief(run))


def _brief(run: RunView) -> dict[str, Any]:
    identity = run.identity
    return {
        "run_id": identity.run_id,
        "path": str(run.path),
        "name": identity.name,
        "status": run.status.value,
        "status_reason": run.reason or None,
        "pid": identity.pid,
        "host": identity.host or None,
        "started_at": identity.started,
        "updated_at": run.updated,
        "step": run.step,
        "step_seconds": run.stats.get("step/seconds"),
    }


def snapshot(run: RunView) -> Snapshot:
    """A run as a snapshot shows it."""
    stats, unified = run.stats, run.stats.get("memory/unified")
    return Snapshot(
        **_brief(run),
        rank=run.rank,
        world_size=run.identity.world_size,
        tiers=_tiers(run),
        chunk=group_of("chunk", Chunks, stats),
        need=group_of("need", Needs, stats),
        stall=group_of("stall", Stalls, stats),
        upload=group_of("upload", Uploads, stats),
        model_data=group_of("model_data", ModelData, stats),
        non_model=group_of("non_model", NonModel, stats),
        prediction=group_of("prediction", Predictions, stats),
        move=group_of("move", Moves, stats),
        device_and_host_are_one=None if unified is None else bool(unified),
        process=ProcessMemory(**{name: _int(run.process.get(name)) for name in ProcessMemory.__struct_fields__}),
        oom_risk=risk(run),
        chunk_map=run.states or None,
        dropped_count=run.dropped_count,
        facts=dict(run.identity.facts),
        summary=dict(run.summary) or None,
    )


def row(shown: "Shown") -> Row:
    """What ``dmon`` shows, flat enough for a line; rates are of the last steps, per step and per second."""
    run, found = shown.run, shown.rates
    return Row(
        t=time.time(),
        run_id=run.identity.run_id,
        rank=run.rank,
        status=run.status.value,
        step=run.step,
        step_seconds=run.stats.get("step/seconds"),
        tiers=_tiers(run),
        rss_bytes=_int(run.process.get("rss_bytes")),
        non_model_peak_bytes=_int(run.stats.get("non_model/peak_bytes")),
        oom_risk=dict(found.risk),
        window_steps=found.steps,
        hit_ratio=found.hit_ratio,
        stall_seconds_per_step=found.stall_seconds,
        stall_ratio=found.stall_ratio,
        links=[
            Link(link.source, link.target, link.bytes_per_step, link.bytes_per_second, link.ceiling)
            for link in found.links
        ],
        advice=[Advice(advice.is_urgent, advice.text, advice.arguments) for advice in shown.advices],
    )


def _tiers(run: RunView) -> dict[str, TierState]:
    return {tier: _tier(run.stats, run.peaks, tier) for tier in TIERS}


def _tier(stats: Mapping[str, float], peaks: Mapping[str, float], tier: str) -> TierState:
    used, capacity = (_int(stats.get(f"{tier}/{name}_bytes")) for name in ("used", "capacity"))
    ratio = used / capacity if used is not None and capacity else None
    return TierState(used_bytes=used, peak_bytes=_int(peaks.get(tier)), capacity_bytes=capacity, used_ratio=ratio)


def _int(value: float | None) -> int | None:
    return None if value is None else int(value)
