"""What is known of one rank of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.telemetry.run_status import RunStatus


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run says about itself when it begins."""

    run_id: str
    name: str
    pid: int | None
    host: str
    world_size: int
    started: float | None
    """Seconds since the epoch."""
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """State of one rank as its files describe it."""

    path: Path
    rank: int
    identity: Identity
    status: RunStatus
    reason: str
    """Explains the status; empty where the status needs no explanation."""
    updated: float | None
    """Time of the newest record, in seconds since the epoch."""
    stats: Mapping[str, float]
    """Statistics of the newest step record, finite numbers only; keys as in `gemini.telemetry.statistics`."""
    before: Mapping[str, float]
    """Statistics of a step at least ten seconds and ten steps earlier, else of the first one read, for rates."""
    states: str
    """The newest chunk map, run-length encoded; empty before the first."""
    process: Mapping[str, float]
    """Fields of the newest process record; ``rss_peak_bytes`` is the highest resident size in the records read."""
    peaks: Mapping[str, float]
    """Tier -> highest ``peak_bytes`` in the records read, because training may reset its peaks."""
    summary: Mapping[str, float]
    dropped_count: int

    @property
    def step(self) -> int | None:
        count = self.stats.get("step/count")
        return None if count is None else int(count)

    @property
    def is_live(self) -> bool:
        return self.status in (RunStatus.RUNNING, RunStatus.STALLED)
