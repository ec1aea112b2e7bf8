"""What a boosted model tells `gemini-stat`: steps, timelines, the chunk map, out-of-memory errors.

The training thread copies counters and goes on; names, sums and text are made on the telemetry thread.
"""

import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..chunk import GRADIENT, Chunk, ChunkManager, ChunkState, MemoryMap, Tier, accelerator_in_use, memory_of
from ..config import GeminiConfig
from ..engine import Engine, StepFacts
from ..errors import is_out_of_memory
from ..memory.capacity import Capacities
from ..memory.prediction import Outlook, bytes_of_copies, measure, predict
from ..memory.timeline import Point, as_record
from ..memory.tracker import host_headroom
from ..packing.packing import Packing
from ..sizes import format_bytes
from ..telemetry.layout import chunks_file, oom_file, timeline_file
from ..telemetry.probes import Fields
from ..telemetry.writer import TelemetryWriter
from ..units.units import Unit
from .stats import Statistics, Stats, read

logger = logging.getLogger(__name__)

TIMELINE_STEPS = 50
TIMELINE_SECONDS = 10.0
"""A timeline is recorded every so many steps, if so many seconds have passed as well, ..."""
NEW_PEAK_RATIO = 1.01
"""... and when a tier's peak has grown by that much since the last one."""

_SHAPES = 16
"""Of a batch, at most so many are recorded."""
_SEEN = "_gemini_memory_recorded"

HOME_LETTERS = {Tier.DEVICE: "d", Tier.HOST: "h", Tier.DISK: "k"}
STATE_LETTERS = {ChunkState.FETCHING: ">", ChunkState.IN_USE: "*", ChunkState.IN_USE_UPDATING: "*"}
"""In a chunk map; a chunk at home is its home's letter, one whose full copy is there that letter in upper case."""


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


@dataclass(frozen=True, slots=True)
class Decided:
    """What was known when a model was boosted: enough to make the decision again."""

    config: GeminiConfig
    capacities: Capacities
    model: Mapping[str, Any] | None
    """See `model_facts`."""

    def document(self, manager: ChunkManager, packing: Packing, units: Sequence[Unit]) -> Fields:
        """All of it as one JSON object. Records refer to units by index."""
        described = description(manager, packing, self.config, self.capacities)
        return {**described, "model": self.model, "units": [unit.name for unit in units]}


class Monitor:
    """Writes the telemetry of one boosted model (a `Listener`).

    Parameters
    ----------
    writer
        Makes what records go to, given what tells it the statistics of the last step when the run ends.
    manager, units, statistics, decided, packing
        The chunks, what brackets them, their numbers, and what was decided about them. Nothing here keeps the model
        itself alive.
    """

    def __init__(
        self,
        writer: Callable[[Callable[[], Stats | None]], TelemetryWriter],
        manager: ChunkManager,
        units: Sequence[Unit],
        statistics: Statistics,
        decided: Decided,
        packing: Packing,
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
        self.writer = writer(self._last.stats)
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
        self.writer.write_document(oom_file, {**record, "last_timeline": last})

    def _oom_record(self, engine: Engine, error: BaseException) -> dict[str, Any]:
        manager = self._manager
        visits = [visit.unit.name for visit in engine.visits.open]
        phase = "backward" if engine.visits.is_in_backward else "forward"
        points = engine.sampling.timeline.points
        return {
            "error": f"{type(error).__name__}: {error}"[:2000],
            "is_ours": hasattr(error, "tier") or type(error).__module__.startswith("gemini."),
            "unit": visits[-1] if visits else None,
            "phase": phase,
            "batch_shapes": [list(shape) for shape in engine.sampling.batch.shapes[:_SHAPES]]
            if engine.sampling.batch
            else [],
            "tiers": {
                tier.value: {
                    "used_bytes": manager.ledger.used(tier),
                    "peak_bytes": manager.ledger.peak(tier),
                    "capacity_bytes": manager.ledger.capacity(tier),
                }
                for tier in Tier
            },
            "non_model_peak_bytes": engine.sampling.meter.peak_bytes,
            "moments_before": as_record(points, self._last_step + 1, self._tier) if points else None,
            "states": chunk_map(manager.chunks),
            "in_use": [c.index for c in manager.chunks if c.pins][:64],
            "process": process_memory(),
        }


def probes(manager: ChunkManager) -> dict[str, Any]:
    """What the telemetry thread looks at once a second."""
    return {"chunks": partial(_chunk_probe, weakref.ref(manager)), "process": process_memory}


def _chunk_probe(reference: "weakref.ref[ChunkManager]") -> dict[str, Any] | None:
    manager = reference()
    return None if manager is None else {"states": chunk_map(manager.chunks)}


def chunk_map(chunks: Sequence[Chunk]) -> str:
    """The chunks in order, run-length encoded: ``"12h3H1*"``."""
    runs: list[tuple[str, int]] = []
    for chunk in chunks:
        home = HOME_LETTERS[chunk.tier]
        letter = STATE_LETTERS.get(chunk.state) or (home.upper() if chunk.is_resident else home)
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return "".join(f"{count}{letter}" for letter, count in runs)


def process_memory() -> dict[str, Any]:
    """RAM of this process, and how much more the tightest limit on it allows."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    free, name = host_headroom()
    # Rounded, so that a process at rest says the same again and nothing is written.
    found: dict[str, Any] = {"rss_bytes": resident >> 20 << 20, "free_bytes": free >> 24 << 24, "limit": name}
    if (device := accelerator_in_use()) is not None:
        memory = memory_of(device)
        there = memory.free()
        found |= {"device_free_bytes": there.free >> 20 << 20, "device_total_bytes": there.total}
        found["device_reserved_bytes"] = memory.reserved_bytes
    return found


def model_facts(model: nn.Module) -> dict[str, Any] | None:
    """What it takes to build a model of transformers again; None for any other."""
    config = getattr(model, "config", None)
    try:
        content = json.loads(config.to_json_string())  # type: ignore[union-attr]
        assert isinstance(content["model_type"], str)
    except Exception:  # another library's configuration, or none
        return None
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second of transformers before 5, where
    recomputes = next((getattr(model, name) for name in names if hasattr(type(model), name)), False)  # only it is there
    return {"class": type(model).__name__, "config": content, "checkpointing": bool(recomputes)}


def description(
    manager: ChunkManager, packing: Packing, config: GeminiConfig, capacities: Capacities
) -> Mapping[str, Any]:
    """Chunks, parameters and what the user asked for, as one JSON object."""
    parameters: dict[int, dict[str, Any]] = {}
    chunks = []
    for chunk, plan in zip(manager.chunks, packing.plans, strict=True):
        keeps_fp32 = packing.groups[chunk.layout.slots[0].key].keeps_fp32
        marks = (" frozen" if not plan.is_trainable else "") + (" fp32" if keeps_fp32 else "")
        buffers = dict(chunk.homes)
        if chunk.gradient is not None and chunk.gradient.buffer is not None:
            buffers[GRADIENT] = chunk.gradient.buffer
        for slot in chunk.layout.slots:
            parameters[slot.key] = {
                "name": slot.name,
                "shape": list(slot.shape),
                "chunk": chunk.index,
                "param_group": plan.param_group,
                "trainable": plan.is_trainable,
                "keeps_fp32": keeps_fp32,
            }
        chunks.append(
            {
                "numel": chunk.layout.numel,
                "used_numel": chunk.layout.used_numel,
                "full_bytes": chunk.full_nbytes,
                "homes": {name: home.tier.value for name, home in buffers.items()},
                "home_bytes": {name: home.nbytes for name, home in buffers.items()},
                "group": f"{plan.param_group}{marks}",
            }
        )
    return {
        "chunks": chunks,
        "parameters": [parameters[key] for key in sorted(parameters)],
        "homes_bytes": {tier.value: packing.placement.nbytes[tier] for tier in Tier},
        "capacities": {
            tier.value: {"bytes": budget.bytes, "source": budget.source} for tier, budget in capacities.budgets.items()
        },
        "unified": capacities.memory is MemoryMap.UNIFIED,
        "ram_bytes": capacities.ram_bytes,
        "device_limit_bytes": capacities.device_limit_bytes,
        "config": {
            "precision": config.precision,
            "policy": type(config.policy).__name__,
            "offload_optim_frac": getattr(config.policy, "offload_optim_frac", None),
            "offload_param_frac": getattr(config.policy, "offload_param_frac", None),
            "max_prefetch": config.max_prefetch,
            "update_in_backward": config.update_in_backward,
            "split_master": config.split_master,
            "chunk_numel": config.chunk_numel,
            "device_memory": config.device_memory,
            "host_memory": config.host_memory,
            "disk_memory": config.disk_memory,
            "offload_dir": None if config.offload_dir is None else str(config.offload_dir),
            "pin_memory": config.pin_memory,
        },
    }
