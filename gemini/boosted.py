"""The manager's side of one boosted model, and how to get there from the model."""

from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import nn

from .activations import Saving
from .chunk import ChunkManager
from .config import GeminiConfig
from .engine import Engine
from .memory.capacity import Capacities
from .monitor.stats import Statistics, Stats, read
from .nn.optimizer.managed import ManagedOptimizer
from .packing.packing import Packing
from .runtime.forward import ForwardHooks
from .runtime.outside import Outside
from .runtime.tenancy import Tenancy
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
    manager: ChunkManager
    values: Values
    engine: Engine
    tenancy: Tenancy
    hooks: ForwardHooks
    outside: Outside
    step: ChunkedStep
    statistics: Statistics
    saving: Saving
    attached: ExitStack = field(default_factory=ExitStack)
    """Closed when the model is to be a plain one again: takes the hooks off it and ends the threads."""
    optimizer: ManagedOptimizer | None = None
    """The optimizer that updates the parameters; None for inference. Its states are here even if the user lets go."""

    @property
    def telemetry(self) -> TelemetryWriter | None:
        return self.engine.listener.writer

    @property
    def packing(self) -> Packing:
        """The plans of the chunks, as they are now."""
        return self.step.packing

    @property
    def step_count(self) -> int:
        return self.engine.step.number

    def stats(self) -> Stats:
        """See `GeminiModule.memory_stats`."""
        self.saving.rest()
        return self.statistics.expand(read(self.engine, self.step.facts(self.engine.step)))

    def serve(self, optimizer: ManagedOptimizer) -> None:
        """Be trained by this optimizer from now on."""
        self.optimizer = optimizer


def is_boosted(model: nn.Module) -> bool:
    """True if `Booster.boost` returned the model."""
    return isinstance(model.__dict__.get("_gemini"), Boosted)


def boosted(model: nn.Module) -> Boosted:
    """The manager's side of a boosted model.

    Raises
    ------
    TypeError
        If `Booster.boost` did not return the model.
    """
    found = model.__dict__.get("_gemini")
    if not isinstance(found, Boosted):
        raise TypeError(f"expected a model that booster.boost returned, got a plain {type(model).__name__}")
    return found
