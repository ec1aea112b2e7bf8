"""The manager's side of one boosted model, and how to get there from the model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .chunk import ChunkManager, ChunkPlan
from .config import GeminiConfig
from .engine import Engine
from .memory.capacity import Capacities
from .memory.tracker import NonModelMeter
from .monitor.monitor import Monitor
from .monitor.stats import Statistics, Stats, read
from .nn.optimizer.managed import ManagedOptimizer
from .packing.packing import Packing
from .runtime.forward import ForwardHooks
from .runtime.outside import Outside
from .step.managed_step import ChunkedStep
from .telemetry.writer import TelemetryWriter
from .updates.values import Values


@dataclass(eq=False)
class Boosted:
    """All that belongs to one boosted model."""

    original_class: type[nn.Module]
    """The user's class of the model."""
    config: GeminiConfig
    capacities: Capacities
    packing: Packing
    manager: ChunkManager
    values: Values
    engine: Engine
    hooks: ForwardHooks
    outside: Outside
    step: ChunkedStep
    meter: NonModelMeter
    statistics: Statistics
    monitor: Monitor | None
    """None: nobody wants to know."""
    optimizer: ManagedOptimizer | None = None
    """The optimizer that updates the parameters; None for inference. Its states are here even if the user lets go."""
    step_count: int = 0
    step_seconds: float = 0.0
    _last_step: float = field(default_factory=time.perf_counter)

    @property
    def telemetry(self) -> TelemetryWriter | None:
        return None if self.monitor is None else self.monitor.writer

    def stats(self) -> Stats:
        """See `GeminiModule.memory_stats`."""
        outlook = None if self.monitor is None else self.monitor.outlook
        return self.statistics.expand(read(self.engine, self.step, self.step_count, self.step_seconds, outlook))

    def rebuilt(self, plans: Sequence[ChunkPlan]) -> None:
        """Some chunks have other plans than when the model was boosted."""
        self.packing = self.packing.with_plans(plans)
        self.statistics.refresh()
        if self.monitor is not None:
            self.monitor.describe(self.packing, self.config, self.capacities)

    def after_step(self) -> None:
        """Count the step and tell the telemetry."""
        now = time.perf_counter()
        self.step_count += 1
        self.step_seconds = now - self._last_step
        self._last_step = now
        if self.monitor is not None:
            self.monitor.after_step(self.step_count, self.step_seconds)


def is_boosted(model: nn.Module) -> bool:
    """True if the model has been through `Booster.boost`."""
    return isinstance(model.__dict__.get("_gemini"), Boosted)


def boosted(model: nn.Module) -> Boosted:
    """The manager's side of a boosted model.

    Raises
    ------
    TypeError
        If the model has not been through `Booster.boost`.
    """
    found = model.__dict__.get("_gemini")
    if not isinstance(found, Boosted):
        raise TypeError(f"expected a model that booster.boost returned, got a plain {type(model).__name__}")
    return found
