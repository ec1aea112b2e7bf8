"""The numbers of several ranks side by side: each with its least, its middle and its greatest. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from gemini.stat.rates import Rates, rates
from gemini.stat.text import count, percent, seconds, size
from gemini.telemetry.ranks import Ranks, median
from gemini.telemetry.run_view import RunView

STRAGGLER_RATIO = 1.05
"""A rank is called a straggler where a step takes it this many times what it takes the median one."""


class Spread(NamedTuple):
    """A number over ranks."""

    min: float
    median: float
    max: float
    min_rank: int
    max_rank: int


class Measure(NamedTuple):
    """A number that each rank has."""

    key: str
    label: str
    show: Callable[[float | None], str]
    of: Callable[[RunView, Rates], float | None]


def _stat(key: str) -> Callable[[RunView, Rates], float | None]:
    return lambda run, _: run.stats.get(key)


def _peak(tier: str) -> Callable[[RunView, Rates], float | None]:
    return lambda run, _: run.peaks.get(tier)


def highest_risk(found: Rates) -> float | None:
    """The share of what the process could have that it had, of the tier that is nearest to its end."""
    return max((risk for risk in found.risk.values() if risk is not None), default=None)


MEASURES: tuple[Measure, ...] = (
    Measure("step", "steps", count, _stat("step/count")),
    Measure("step_seconds", "a step", seconds, lambda run, _: run.window.means.get("step/seconds")),
    Measure("own_seconds", "its own part", seconds, lambda run, _: run.own_seconds),
    Measure("wait_seconds", "waiting for ranks", seconds, lambda run, _: run.window.means.get("step/wait_seconds")),
    Measure("stall_seconds", "waiting for chunks", seconds, lambda _, found: found.stall_seconds),
    Measure("hit_ratio", "not waited for", percent, lambda _, found: found.hit_ratio),
    Measure("device_used_bytes", "device used", size, _stat("device/used_bytes")),
    Measure("device_peak_bytes", "device peak", size, _peak("device")),
    Measure("host_used_bytes", "host used", size, _stat("host/used_bytes")),
    Measure("host_peak_bytes", "host peak", size, _peak("host")),
    Measure("disk_used_bytes", "disk used", size, _stat("disk/used_bytes")),
    Measure("disk_peak_bytes", "disk peak", size, _peak("disk")),
    Measure("model_data_bytes", "model data", size, _stat("model_data/total_bytes")),
    Measure("non_model_peak_bytes", "non-model peak", size, _stat("non_model/peak_bytes")),
    Measure("rss_bytes", "process", size, lambda run, _: run.process.get("rss_bytes")),
    Measure("oom_risk", "risk", percent, lambda _, found: highest_risk(found)),
)
"""All numbers that are compared. A new one is one line here: text, JSON, its schema and the page follow."""


def spread(values: Mapping[int, float | None]) -> Spread | None:
    """Of the ranks that have the number; None if none has. Of equal ranks the lowest counts."""
    known = {rank: value for rank, value in values.items() if value is not None}
    if not known:
        return None
    least, greatest = min(known, key=lambda r: (known[r], r)), max(known, key=lambda r: (known[r], -r))
    return Spread(known[least], median(known.values()), known[greatest], least, greatest)


@dataclass(frozen=True)
class OverRanks:
    """All ranks of a run, with their rates."""

    ranks: Ranks
    rates: Sequence[Rates]
    """In the order of the views."""

    @staticmethod
    def of(ranks: Ranks) -> "OverRanks":
        return OverRanks(ranks, [rates(view) for view in ranks.views])

    def values(self, of: Callable[[RunView, Rates], float | None]) -> dict[int, float | None]:
        """A number by rank."""
        return {view.rank: of(view, found) for view, found in zip(self.ranks.views, self.rates, strict=True)}

    @cached_property
    def spreads(self) -> Mapping[str, Spread]:
        """By the keys of `MEASURES`; what no rank has is left out."""
        found = {measure.key: spread(self.values(measure.of)) for measure in MEASURES}
        return {key: value for key, value in found.items() if value is not None}

    @property
    def straggler_text(self) -> str:
        """Which rank the others wait for; empty where they wait for none, or do not tell."""
        found = self.ranks.straggler
        if found is None or found.ratio < STRAGGLER_RATIO:
            return ""
        own = seconds(found.own_seconds)
        return f"rank {found.rank}: {own} of its own a step, {found.ratio:.2f} times the median"
