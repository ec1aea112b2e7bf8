"""What the page shows: for the live server and for reports alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.stat import as_json
from gemini.stat.commands.chunks import rows_of
from gemini.stat.commands.timeline import moments_of
from gemini.stat.outputs import Chunk, Moments
from gemini.stat.screen import Shown
from gemini.telemetry import history
from gemini.telemetry.layout import TIERS

NEWEST_BYTES = 64 << 20
"""The page shows this much of the end of a long history, because parsing all of it takes too long."""
MAX_POINTS = 512


def snapshot(shown: Shown) -> dict[str, Any]:
    return {"snapshot": as_json.snapshot(shown.sight), "row": as_json.row(shown)}


def timeline(shown: Shown) -> Moments | None:
    if shown.timeline is None:
        return None
    names = list(shown.chunks.units) if shown.chunks is not None else []
    return moments_of(shown.timeline, names)


def chunks(shown: Shown) -> list[Chunk]:
    return [] if shown.chunks is None else rows_of(shown.chunks, shown.run.states)


def steps(run: Path, rank: int, max_points: int = MAX_POINTS) -> Mapping[str, list[float | None]]:
    """Columns over the steps; at most twice ``max_points`` long, peaks kept."""
    rows = history.thinned(history.steps(run, rank, newest_bytes=NEWEST_BYTES), max_points)
    # A restart counts its steps anew: what comes before it is another story.
    begin = 0
    for index in range(1, len(rows)):
        if rows[index][1].get("step/count", 0) < rows[index - 1][1].get("step/count", 0):
            begin = index
    kept = [stats for _, stats in rows[begin:]]
    columns: dict[str, list[float | None]] = {"step": [stats.get("step/count") for stats in kept]}
    for tier in TIERS:
        columns[f"{tier}_bytes"] = [stats.get(f"{tier}/used_bytes") for stats in kept]
    columns["step_seconds"] = [stats.get("step/seconds") for stats in kept]
    columns["stall_seconds"] = [stats.get("move/stall_seconds") for stats in kept]
    return columns
