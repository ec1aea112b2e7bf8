"""Runs as objects for scripts: ints for bytes, floats for seconds, None for what is unknown."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemini.stat.outputs import (
    Advice,
    AllRanks,
    Brief,
    Link,
    ProcessMemory,
    RankState,
    Row,
    Snapshot,
    Spread,
    Straggler,
    TierState,
)
from gemini.stat.over_ranks import MEASURES, OverRanks
from gemini.stat.rates import risk
from gemini.stat.sight import Sight
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


def brief(sight: Sight) -> Brief:
    """A run as ``ls`` lists it."""
    return Brief(**_brief(sight))


def _brief(sight: Sight) -> dict[str, Any]:
    run, identity = sight.run, sight.run.identity
    return {
        "run_id": identity.run_id,
        "path": str(run.path),
        "name": identity.name,
        "status": sight.status.value,
        "status_reason": sight.reason or None,
        "pid": identity.pid,
        "host": identity.host or None,
        "started_at": identity.started,
        "updated_at": run.updated,
        "step": sight.step,
        "step_seconds": run.stats.get("step/seconds"),
        "world_size": identity.world_size,
    }


def snapshot(sight: Sight) -> Snapshot:
    """A run as a snapshot shows it."""
    run = sight.run
    stats, unified = run.stats, run.stats.get("memory/unified")
    return Snapshot(
        **_brief(sight),
        rank=run.rank,
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
        all_ranks=None if sight.ranks is None else all_ranks(OverRanks.of(sight.ranks)),
    )


def all_ranks(over: OverRanks) -> AllRanks:
    """Several ranks beside each other."""
    found = over.ranks.straggler
    columns = {measure.key: over.values(measure.of) for measure in MEASURES}
    return AllRanks(
        numbers={key: Spread(*value) for key, value in over.spreads.items()},
        straggler=None if found is None else Straggler(*found),
        ranks=[
            RankState(
                rank=view.rank,
                host=view.identity.host or None,
                pid=view.identity.pid,
                status=view.status.value,
                status_reason=view.reason or None,
                tiers=_tiers(view),
                oom_risk=risk(view),
                numbers={key: column[view.rank] for key, column in columns.items()},
            )
            for view in over.ranks.views
        ],
        missing=over.ranks.missing,
    )


def row(shown: "Shown") -> Row:
    """What ``dmon`` shows, flat enough for a line; rates are of the last steps, per step and per second."""
    run, found, over = shown.run, shown.rates, shown.over_ranks
    return Row(
        t=time.time(),
        run_id=run.identity.run_id,
        rank=run.rank,
        status=shown.sight.status.value,
        step=shown.sight.step,
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
        all_ranks=None if over is None else all_ranks(over),
    )


def _tiers(run: RunView) -> dict[str, TierState]:
    return {tier: _tier(run.stats, run.peaks, tier) for tier in TIERS}


def _tier(stats: Mapping[str, float], peaks: Mapping[str, float], tier: str) -> TierState:
    used, capacity = (_int(stats.get(f"{tier}/{name}_bytes")) for name in ("used", "capacity"))
    ratio = used / capacity if used is not None and capacity else None
    return TierState(used_bytes=used, peak_bytes=_int(peaks.get(tier)), capacity_bytes=capacity, used_ratio=ratio)


def _int(value: float | None) -> int | None:
    return None if value is None else int(value)
