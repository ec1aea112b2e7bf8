"""What is known of one rank of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gemini.telemetry.run_status import RunStatus


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run says about itself when it begins."""

    run_id: str
    name: str
    pid: int | None
    host: str
    world_size: int
    restart: int
    """How often the launcher has started the job anew."""
    started: float | None
    """Seconds since the epoch."""
    facts: Mapping[str, Any]


class Window(NamedTuple):
    """The last steps, at least ten seconds and ten steps of them if there are as many."""

    before: Mapping[str, float]
    """Statistics of the step before them, for rates."""
    means: Mapping[str, float]
    """Over them, of ``step/seconds`` and ``step/wait_seconds``."""


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
    seen: float | None
    """Time of the newest record or heartbeat."""
    stats: Mapping[str, float]
    """Statistics of the newest step record, finite numbers only; keys as in `gemini.telemetry.statistics`."""
    window: Window
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
    def own_seconds(self) -> float | None:
        """What a step of the last ones took without the time spent waiting for other ranks; None if that is unknown."""
        seconds, waited = (self.window.means.get(f"step/{name}") for name in ("seconds", "wait_seconds"))
        return None if seconds is None or waited is None else max(0.0, seconds - waited)

    @property
    def is_live(self) -> bool:
        return self.status in (RunStatus.RUNNING, RunStatus.STALLED)
