"""One step by moment: how many bytes of model and non-model data there were while each unit ran."""

from dataclasses import dataclass, field, replace

from ..chunk import Ledger, Tier
from ..planning.trace import Phase
from ..telemetry import records

MAX_POINTS = 512
_LONGEST = 1 << 16
"""Moments kept of a step that does not end, such as the evaluation of a model without an optimizer."""


@dataclass(frozen=True, slots=True)
class Point:
    """One moment: from a unit's entry to the next unit's."""

    unit: int
    """Index of the unit; -1 for the end of the step, when the last unit has left."""
    phase: str
    """``"forward"``, ``"backward"`` or ``"end"``."""
    used: tuple[int, ...]
    """Bytes of model data on each tier, in the order of `Tier`, as the ledger counts them."""
    non_model: int = 0
    """Peak bytes of non-model data while it lasted."""


@dataclass(slots=True, eq=False)
class Timeline:
    """Records the moments of those steps that are sampled; sampling costs some 50 microseconds a moment."""

    ledger: Ledger
    points: list[Point] = field(default_factory=list)

    def add(self, unit: int, phase: Phase) -> None:
        """A unit has entered and has its chunks."""
        if len(self.points) < _LONGEST:
            self.points.append(Point(unit, phase.value, self._used()))

    def close(self, non_model_bytes: int) -> None:
        """End the current moment; ``non_model_bytes`` is its peak."""
        if self.points:
            self.points[-1] = replace(self.points[-1], non_model=non_model_bytes)

    def take(self, non_model_bytes: int) -> list[Point]:
        """End the step and return its moments, the last one being the step's end."""
        self.close(non_model_bytes)
        points, self.points = self.points, []
        if points:
            points.append(Point(-1, "end", self._used()))
        return points

    def _used(self) -> tuple[int, ...]:
        return tuple(self.ledger.used(tier) for tier in Tier)


def pool(points: list[Point], tier: int, limit: int = MAX_POINTS) -> list[Point]:
    """At most ``limit`` points. Of neighbours that are pooled the one with the most bytes stays, so no peak is lost."""
    size = -(-len(points) // limit) if points else 1
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [max(group, key=lambda point: point.used[tier] + point.non_model) for group in groups]


def as_record(points: list[Point], step: int, tier: Tier) -> records.Timeline:
    """Columns, because they take a third of the bytes of rows. ``tier`` is where units run, and non-model data lie."""
    index = tuple(Tier).index(tier)
    pooled = pool(points, index)
    peak = max(range(len(points)), key=lambda i: points[i].used[index] + points[i].non_model)
    device, host, disk = ([point.used[i] for point in pooled] for i in range(len(Tier)))
    return records.Timeline(
        step=step,
        tier="host" if tier is Tier.HOST else "device",
        moment_count=len(points),
        peak_moment=peak,
        unit=[point.unit for point in pooled],
        phase="".join(point.phase[0] for point in pooled),
        device_bytes=device,
        host_bytes=host,
        disk_bytes=disk,
        non_model_bytes=[point.non_model for point in pooled],
    )
