"""What hears of a training's steps and errors, and changes nothing."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..memory.prediction import Outlook
from ..packing.packing import Packing
from ..telemetry.writer import TelemetryWriter

if TYPE_CHECKING:
    from .engine import Engine


class StepFacts(NamedTuple):
    """What an optimizer's step tells of itself."""

    number: int
    """Steps since boost, with this one."""
    seconds: float
    """Since the end of the step before it."""
    skipped_count: int
    loss_scale: float | None
    grad_norm: float | None
    wait_seconds: float | None = None
    """How long of ``seconds`` this rank waited for others; None if it waits for none or nobody measured it."""


class Steps:
    """Counts steps, and takes their time."""

    def __init__(self) -> None:
        self.last = StepFacts(0, 0.0, 0, None, None)
        self._end = time.perf_counter()

    def ended(self, wait_seconds: float | None, facts: Callable[[StepFacts], StepFacts]) -> StepFacts:
        """One more step is over, which adds its own facts."""
        now = time.perf_counter()
        seconds, self._end = now - self._end, now
        step = self.last._replace(number=self.last.number + 1, seconds=seconds, wait_seconds=wait_seconds)
        self.last = facts(step)
        return self.last


class Listener(Protocol):
    """Hears of one boosted model."""

    @property
    def outlook(self) -> Outlook | None:
        """What was predicted after the warm-up and what was measured since; None until both are known."""

    @property
    def writer(self) -> TelemetryWriter | None:
        """Where records go to, if anywhere."""

    def step_ended(self, engine: "Engine", step: StepFacts) -> bool:
        """A step is over. Returns True if each moment of the next one is to be sampled."""

    def failed(self, engine: "Engine", error: BaseException | None) -> None:
        """An exception passes through the model, whose visits are still open."""

    def rebuilt(self, packing: Packing) -> None:
        """Some chunks have other plans than before."""
