"""Rates per step and the risk of running out of memory, derived from two step records. Pure."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemini.telemetry.files import number, read_document
from gemini.telemetry.layout import TIERS, runs_folder
from gemini.telemetry.run_view import RunView

RISK_HIGH = 0.85
RISK_CRITICAL = 0.95
DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """Traffic of one direction between tiers."""

    source: str
    target: str
    bytes_per_step: float | None
    bytes_per_second: float | None
    """While it was moving, of one mover; None where that is not timed."""
    ceiling: float | None
    """Bytes per second of this link as ``gemini-stat bench`` measured them."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates over the steps in a window; None where there is no second step to compare with."""

    steps: int
    step_seconds: float | None
    links: tuple[Link, ...]
    needs: Mapping[str, float]
    """Outcome (resident, hit, late or miss) -> number per step."""
    hit_ratio: float | None
    """Share of the needs for which the full copy was there in time."""
    stall_seconds: float | None
    """Waiting per step."""
    stall_ratio: float | None
    stall_by_tier: Mapping[str, float]
    evictions: float | None
    disk_written_per_day: float | None
    risk: Mapping[str, float | None]
    """Tier -> share of what the process could have that it had at its peak: at 1 it is killed, or an allocation fails.

    Homes may fill their capacity to the last byte without any risk, so it is not the capacity that counts here.
    """


def rates(run: RunView, hardware: Mapping[str, float] | None = None) -> Rates:
    """Compare the newest step with the one before the window."""
    now, before, ceilings = run.stats, run.window.before, hardware or {}
    steps = int(now.get("step/count", 0) - before.get("step/count", 0)) if before else 0

    def delta(key: str) -> float | None:
        return None if steps <= 0 or key not in now else max(0.0, now[key] - before.get(key, 0.0))

    def per_step(key: str) -> float | None:
        value = delta(key)
        return None if value is None else value / steps

    kinds = ("resident", "hit", "late", "miss")
    needs = {kind: value for kind in kinds if (value := per_step(f"need/{kind}_count")) is not None}
    asked = sum(needs.values())
    stall = per_step("move/stall_seconds")
    step_seconds = now.get("step/seconds")
    written = per_step("move/disk_write_bytes")
    return Rates(
        steps=max(0, steps),
        step_seconds=step_seconds,
        links=tuple(_links(delta, steps, ceilings)),
        needs=needs,
        hit_ratio=(needs.get("resident", 0.0) + needs.get("hit", 0.0)) / asked if asked else None,
        stall_seconds=stall,
        stall_ratio=stall / step_seconds if stall is not None and step_seconds else None,
        stall_by_tier={tier: value for tier in TIERS if (value := per_step(f"stall/{tier}_seconds")) is not None},
        evictions=per_step("move/evict_count"),
        disk_written_per_day=written / step_seconds * DAY if written and step_seconds else None,
        risk=risk(run),
    )


def risk(run: RunView) -> dict[str, float | None]:
    process = run.process
    found: dict[str, float | None] = dict.fromkeys(TIERS)
    resident, peak, free = (process.get(key) for key in ("rss_bytes", "rss_peak_bytes", "free_bytes"))
    if resident is not None and free is not None and resident + free > 0:
        found["host"] = max(peak or 0.0, resident) / (resident + free)
    if run.stats.get("memory/unified"):
        found["device"] = found["host"]
    reserved, left = process.get("device_reserved_bytes"), process.get("device_free_bytes")
    if reserved is not None and left is not None and reserved + left > 0:
        found["device"] = reserved / (reserved + left)
    return found


def _links(delta: Callable[[str], float | None], steps: int, ceilings: Mapping[str, float]) -> list[Link]:
    if steps <= 0:
        return []
    found = []
    columns = [(tier, "device", f"upload/{tier}_bytes", f"upload/{tier}_seconds") for tier in TIERS]
    columns += [
        ("disk", "host", "move/disk_read_bytes", "move/disk_read_seconds"),
        ("host", "disk", "move/disk_write_bytes", "move/disk_write_seconds"),
    ]
    for source, target, bytes_key, seconds_key in columns:
        nbytes, seconds = delta(bytes_key), delta(seconds_key)
        if not nbytes:
            continue
        found.append(
            Link(
                source=source,
                target=target,
                bytes_per_step=nbytes / steps,
                bytes_per_second=nbytes / seconds if seconds else None,
                ceiling=ceilings.get(f"{source}_to_{target}"),
            )
        )
    return found


def hardware_file() -> Path:
    """Where ``gemini-stat bench`` leaves what it measured on this machine."""
    return runs_folder().parent / f"hardware-{os.uname().nodename}.json"


def read_hardware(path: Path | None = None) -> dict[str, float]:
    """Bytes per second by link, such as ``host_to_device``; empty before the first ``bench``."""
    try:
        content = read_document(path or hardware_file())
    except (OSError, ValueError):
        return {}
    links = content.get("bytes_per_second") if isinstance(content, dict) else None
    if not isinstance(links, dict):
        return {}
    return {str(key): found for key, value in links.items() if (found := number(value)) is not None and found > 0}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step's peak on the tier where units run, in bytes."""

    tier: str
    predicted: float
    """After the warm-up."""
    measured: float
    """The most of the steps since that were sampled."""
    non_model_growth: float
    """What of the difference is activations and temporaries."""

    @property
    def ratio(self) -> float:
        """Measured to predicted."""
        return self.measured / self.predicted


def prediction(stats: Mapping[str, float]) -> Prediction | None:
    """None before there is one."""
    tier = "host" if stats.get("memory/unified") else "device"
    predicted, measured = (stats.get(f"prediction/{tier}_{when}_bytes") for when in ("predicted", "measured"))
    if not predicted or not measured:
        return None
    before, now = (stats.get(f"prediction/non_model_{when}_bytes", 0.0) for when in ("predicted", "measured"))
    return Prediction(tier=tier, predicted=predicted, measured=measured, non_model_growth=now - before)
