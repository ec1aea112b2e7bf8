"""What a boosted model tells `gemini-stat`: steps, timelines, the chunk map, out-of-memory errors.

The training thread copies counters and goes on; names, sums and text are made on the telemetry thread.
"""

import logging
import time
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from msgspec.structs import asdict
from torch import nn

from ..chunk import ChunkManager, Tier
from ..engine import Engine, StepFacts
from ..errors import is_out_of_memory
from ..memory.prediction import Outlook, bytes_of_copies, measure, predict
from ..memory.timeline import Point, as_record
from ..packing.packing import Packing
from ..sizes import format_bytes
from ..telemetry import records
from ..telemetry.layout import chunks_file, oom_file, timeline_file
from ..telemetry.writer import TelemetryWriter
from ..units.units import Unit
from .decided import Decided
from .job import this_job
from .probes import chunk_map, probes, process_memory
from .stats import Statistics, Stats, read

logger = logging.getLogger(__name__)

TIMELINE_STEPS = 50
TIMELINE_SECONDS = 10.0
"""A timeline is recorded when this many steps and this many seconds have passed since the last one, ..."""
NEW_PEAK_RATIO = 1.01
"""... and when a tier's peak is this much higher than at the last one."""

_SHAPES = 16
"""The most shapes that are recorded of a batch."""
_SEEN = "_gemini_memory_recorded"


class LastStep:
    """The step that came too soon after another to be written: the run's last one is, when it ends.

    The telemetry thread holds this, and the engine leads to the model: hence weakly. A model that is collected before
    its run ended leaves its last quarter of a second unwritten.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._unrecorded: tuple[weakref.ref[Engine], StepFacts] | None = None

    def leave(self, engine: Engine, step: StepFacts) -> None:
        """This step is not written, unless it stays the last one."""
        self._unrecorded = (weakref.ref(engine), step)

    def is_written(self) -> None:
        """The last step is written."""
        self._unrecorded = None

    def stats(self) -> Stats | None:
        """The statistics of the last step, if that is not written."""
        if self._unrecorded is None:
            return None
        reference, step = self._unrecorded
        engine = reference()
        return None if engine is None else self._statistics.expand(read(engine, step))


class Silent:
    """A `Listener` without telemetry.

    Parameters
    ----------
    statistics
        Kept up to date for ``model.memory_stats()``.
    """

    outlook: Outlook | None = None
    writer: TelemetryWriter | None = None

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def step_ended(self, engine: Engine, step: StepFacts) -> bool:
        return False

    def failed(self, engine: Engine, error: BaseException | None) -> None:
        pass

    def rebuilt(self, packing: Packing) -> None:
        self._statistics.refresh()


class Monitor:
    """Writes the telemetry of one boosted model (a `Listener`).

    Parameters
    ----------
    decided, packing
        What was decided when the model was boosted.
    manager, units, statistics
        The chunks, what brackets them, and their numbers. Nothing here keeps the model itself alive.
    """

    def __init__(
        self,
        decided: Decided,
        packing: Packing,
        manager: ChunkManager,
        units: Sequence[Unit],
        statistics: Statistics,
    ) -> None:
        self.outlook: Outlook | None = None
        self._manager = manager
        self._units = units
        self._statistics = statistics
        self._decided = decided
        self._packing = packing
        self._last = LastStep(statistics)
        self._described_units = -1
        self._last_points: list[Point] = []
        self._last_step = 0
        self._last_time = float("-inf")
        self._peaks: tuple[int, ...] = (0,) * len(Tier)
        folder = decided.config.telemetry if isinstance(decided.config.telemetry, Path) else None
        facts = decided.facts(packing)
        self.writer = TelemetryWriter(folder, this_job(), facts, probes=probes(manager), last=self._last.stats)
        self._describe()

    def step_ended(self, engine: Engine, step: StepFacts) -> bool:
        """Record the step, and the timeline of one that was sampled; choose whether the next one is."""
        writer = self.writer
        is_sampled = bool(engine.sampling.timeline.points)
        if not is_sampled and not writer.is_due and step.number > 1:
            self._last.leave(engine, step)
            return False
        self._last.is_written()
        if is_sampled:
            self._last_points = engine.sampling.take_timeline()
            if step.number > 1:
                self._look_back(engine)
        reading = read(engine, step)
        writer.record_step(partial(self._statistics.expand, reading))
        peaks = reading.memory[1]
        if is_sampled:
            self._last_step, self._last_time, self._peaks = step.number, time.monotonic(), peaks
            record = partial(as_record, self._last_points, step.number, self._tier)
            writer.record("timeline", record)
            writer.write_document(timeline_file, record)  # found also when its record is far from the file's end
            if len(self._units) != self._described_units:  # they grow while the warm-up watches
                self._describe()
        is_asked_for = writer.is_dump_requested
        # Not on an accelerator, where sampling resets the allocator's peak statistics, which users read, too.
        return is_asked_for or step.number == 1 or (self._manager.device.is_ram and self._is_due(step.number, peaks))

    def _is_due(self, step: int, peaks: tuple[int, ...]) -> bool:
        if peaks != self._peaks and any(
            now > before * NEW_PEAK_RATIO for now, before in zip(peaks, self._peaks, strict=True)
        ):
            return True
        return step - self._last_step >= TIMELINE_STEPS and time.monotonic() - self._last_time >= TIMELINE_SECONDS

    @property
    def _tier(self) -> Tier:
        """Where units run."""
        return self._manager.ledger.memory.compute_tier

    def _look_back(self, engine: Engine) -> None:
        """What the step that was sampled took, against what was predicted after the warm-up."""
        measured = measure(self._last_points, self._tier)
        if self.outlook is not None:
            self.outlook = self.outlook.after(measured)
            return
        followed, known = engine.pacing.cycle.followed, engine.sampling.profile.heaviest.get(True)
        if followed is None or known is None:
            return
        nbytes = {c.index: c.full_nbytes for c in self._manager.chunks if not c.full_is_home}
        copies = bytes_of_copies(*followed, nbytes)
        homes = dict(self._packing.placement.nbytes)
        homes[Tier.HOST] += self._packing.staging_bytes
        predicted = predict(homes, copies, known.moments, self._manager.ledger.memory)
        self.outlook = Outlook(predicted, measured)
        if logger.isEnabledFor(logging.INFO):
            for tier, before, now in zip(Tier, predicted.tiers, measured.tiers, strict=True):
                if now:
                    said, seen, off = format_bytes(before), format_bytes(now), before / now - 1
                    logger.info("%s: %s predicted, %s measured (%+.1f%%)", tier.value, said, seen, 100 * off)

    def rebuilt(self, packing: Packing) -> None:
        """Write down what the chunks are now."""
        self._packing = packing
        self._statistics.refresh()
        self._describe()

    def _describe(self) -> None:
        self._described_units = len(self._units)
        self.writer.write_document(chunks_file, self._decided.document(self._manager, self._packing, self._units))

    def failed(self, engine: Engine, error: BaseException | None) -> None:
        """Record what there was if an exception says that memory ran out. Never raises."""
        if error is None or not is_out_of_memory(error) or hasattr(error, _SEEN) or hasattr(error.__cause__, _SEEN):
            return
        try:
            setattr(error, _SEEN, True)  # here is where it began; on its way up it passes through other modules
            self._record_error(engine, error)
        except Exception as failure:  # the error that the user must see is the other one
            logger.warning("an out-of-memory error could not be recorded: %r", failure)

    def _record_error(self, engine: Engine, error: BaseException) -> None:
        record = self._oom_record(engine, error)
        self.writer.record("oom", record)
        last = as_record(self._last_points, self._last_step, self._tier) if self._last_points else None
        self.writer.write_document(oom_file, records.OutOfMemoryDocument(**asdict(record), last_timeline=last))

    def _oom_record(self, engine: Engine, error: BaseException) -> records.OutOfMemory:
        manager, batch = self._manager, engine.sampling.batch
        points, ledger = engine.sampling.timeline.points, manager.ledger
        return records.OutOfMemory(
            error=f"{type(error).__name__}: {error}"[:2000],
            is_ours=hasattr(error, "tier") or type(error).__module__.startswith("gemini."),
            unit=_failed_unit(engine, error),
            phase="backward" if engine.visits.is_in_backward else "forward",
            batch_shapes=[list(shape) for shape in batch.shapes[:_SHAPES]] if batch else [],
            tiers={t.value: records.TierUse(ledger.used(t), ledger.peak(t), ledger.capacity(t)) for t in Tier},
            non_model_peak_bytes=engine.sampling.meter.peak_bytes,
            moments_before=as_record(points, self._last_step + 1, self._tier) if points else None,
            states=chunk_map(manager.chunks),
            in_use=[c.index for c in manager.chunks if c.pins][:64],
            process=process_memory(),
        )


def _failed_unit(engine: Engine, error: BaseException) -> str | None:
    """The name of the innermost unit that an error has passed through, else of the one that was entered last.

    Where a coarser module has the hooks, only the traceback knows its units.
    """
    name = next((visit.unit.name for visit in reversed(engine.visits.open)), None)
    traceback = error.__traceback__
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and (unit := engine.units.of.get(running)) is not None:
            name = unit.name
        traceback = traceback.tb_next
    return name
