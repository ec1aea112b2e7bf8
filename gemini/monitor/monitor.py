"""What a boosted model tells `gemini-stat`: steps, timelines, the chunk map, out-of-memory errors.

The training thread copies counters and goes on; names, sums and text are made on the telemetry thread.
"""

import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..chunk import GRADIENT, Chunk, ChunkManager, ChunkState, Tier, accelerator_in_use, memory_of
from ..config import GeminiConfig
from ..engine import Engine
from ..errors import is_out_of_memory
from ..memory.capacity import Capacities
from ..memory.prediction import Outlook, bytes_of_copies, measure, predict
from ..memory.timeline import Point, as_record
from ..memory.tracker import host_headroom
from ..packing.packing import Packing
from ..sizes import format_bytes
from ..step.managed_step import ChunkedStep
from ..telemetry.layout import chunks_file, oom_file, timeline_file
from ..telemetry.writer import TelemetryWriter
from ..units.units import Unit
from .stats import Reading, Statistics, Stats, read

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

    The telemetry thread holds this, and runtime and step lead to the model: hence weakly. A model that is collected
    before its run ended leaves its last quarter of a second unwritten.
    """

    def __init__(self, engine: Engine, step: ChunkedStep, statistics: Statistics) -> None:
        self._engine = weakref.ref(engine)
        self._step = weakref.ref(step)
        self._statistics = statistics
        self.unrecorded: tuple[int, float] | None = None
        """Number and seconds of the step; None if it was written."""
        self.outlook: Outlook | None = None
        """What was predicted after the warm-up and what was measured since; None until both are known."""

    def foresee(self, outlook: Outlook) -> None:
        """Take over what is known by now."""
        self.outlook = outlook

    def leave(self, number: int, seconds: float) -> None:
        """This step is not written, unless it stays the last one."""
        self.unrecorded = (number, seconds)

    def is_written(self) -> None:
        """The last step is written."""
        self.unrecorded = None

    def read(self, number: int, seconds: float) -> Reading | None:
        engine, step = self._engine(), self._step()
        return None if engine is None or step is None else read(engine, step, number, seconds, self.outlook)

    def stats(self) -> Stats | None:
        reading = None if self.unrecorded is None else self.read(*self.unrecorded)
        return None if reading is None else self._statistics.expand(reading)


class Monitor:
    """The telemetry of one boosted model.

    Parameters
    ----------
    writer
        Makes what records go to, given what tells it the statistics of the last step when the run ends.
    engine, step, statistics, units
        What is looked at. Nothing here keeps the model itself alive.
    """

    def __init__(
        self,
        writer: Callable[[Callable[[], Stats | None]], TelemetryWriter],
        engine: Engine,
        step: ChunkedStep,
        statistics: Statistics,
        units: Sequence[Unit],
    ) -> None:
        self._engine = engine
        self._statistics = statistics
        self._units = units
        self._last = LastStep(engine, step, statistics)
        self._description: Mapping[str, Any] = {}
        self._homes: dict[Tier, int] = dict.fromkeys(Tier, 0)
        """Bytes of homes and staging."""
        self._described_units = -1
        self._last_points: list[Point] = []
        self._last_step = 0
        self._last_time = float("-inf")
        self._peaks: tuple[int, ...] = (0,) * len(Tier)
        self._tier = engine.manager.ledger.bounded_by(Tier.DEVICE)
        self._is_ram = engine.manager.device.is_ram
        self.writer = writer(self._last.stats)

    @property
    def outlook(self) -> Outlook | None:
        """What was predicted after the warm-up and what was measured since; None until both are known."""
        return self._last.outlook

    def after_step(self, number: int, seconds: float) -> None:
        """Record the step, and the timeline of one that was sampled; choose whether the next one is."""
        engine, writer = self._engine, self.writer
        is_sampled = bool(engine.sampling.timeline.points)
        if not is_sampled and not writer.is_due and number > 1:
            self._last.leave(number, seconds)
            return
        self._last.is_written()
        if is_sampled:
            self._last_points = engine.sampling.take_timeline()
            if number > 1:
                self._look_back()
        reading = self._last.read(number, seconds)
        assert reading is not None  # runtime and step are what calls
        writer.record_step(partial(self._statistics.expand, reading))
        peaks = reading.memory[1]
        if is_sampled:
            self._last_step, self._last_time, self._peaks = number, time.monotonic(), peaks
            record = partial(as_record, self._last_points, number, self._tier)
            writer.record("timeline", record)
            writer.write_document(timeline_file, record)  # found also when its record is far from the file's end
            self._describe()
        asked = writer.is_dump_requested
        engine.sampling.record_step(asked or number == 1 or (self._is_ram and self._is_due(number, peaks)))

    def _is_due(self, step: int, peaks: tuple[int, ...]) -> bool:
        # Not on an accelerator, where sampling resets the allocator's peak statistics, which users read, too.
        if peaks != self._peaks and any(
            now > before * NEW_PEAK_RATIO for now, before in zip(peaks, self._peaks, strict=True)
        ):
            return True
        return step - self._last_step >= TIMELINE_STEPS and time.monotonic() - self._last_time >= TIMELINE_SECONDS

    def _look_back(self) -> None:
        """What the step that was sampled took, against what was predicted after the warm-up."""
        engine, measured = self._engine, measure(self._last_points, self._tier)
        if self.outlook is not None:
            self._last.foresee(self.outlook.after(measured))
            return
        followed, known = engine.pacing.cycle.followed, engine.sampling.profile.heaviest.get(True)
        if followed is None or known is None:
            return
        nbytes = {c.index: c.full_nbytes for c in engine.manager.chunks if not c.full_is_home}
        copies = bytes_of_copies(*followed, nbytes)
        unified = engine.manager.ledger.unified
        predicted = predict(self._homes, copies, known.moments, self._tier, unified)
        self._last.foresee(Outlook(predicted, measured))
        if logger.isEnabledFor(logging.INFO):
            for tier, before, now in zip(Tier, predicted.tiers, measured.tiers, strict=True):
                if now:
                    said, seen, off = format_bytes(before), format_bytes(now), before / now - 1
                    logger.info("%s: %s predicted, %s measured (%+.1f%%)", tier.value, said, seen, 100 * off)

    def describe(
        self, packing: Packing, config: GeminiConfig, capacities: Capacities, model: Mapping[str, Any] | None = None
    ) -> None:
        """Write down what was decided: enough to make the decision again. ``model`` is `model_facts`, told once."""
        known = {"model": self._description.get("model") if model is None else model}
        self._description = {**description(self._engine.manager, packing, config, capacities), **known}
        self._homes = {**packing.placement.nbytes}
        self._homes[Tier.HOST] += packing.staging_bytes
        self._described_units = -1
        self._describe()

    def _describe(self) -> None:
        """Records refer to units by index, and units grow while the warm-up watches."""
        if len(self._units) != self._described_units:
            self._described_units = len(self._units)
            names = [unit.name for unit in self._units]
            self.writer.write_document(chunks_file, {**self._description, "units": names})

    def on_error(self, error: BaseException | None) -> None:
        """An exception passes through the model: if it is for want of memory, record what there was. Never raises."""
        if error is None or not is_out_of_memory(error) or hasattr(error, _SEEN) or hasattr(error.__cause__, _SEEN):
            return
        try:
            setattr(error, _SEEN, True)  # here is where it began; on its way up it passes through other modules
            self._record_error(error)
        except Exception as failure:  # the error that the user must see is the other one
            logger.warning("an out-of-memory error could not be recorded: %r", failure)

    def _record_error(self, error: BaseException) -> None:
        record = self._oom_record(error)
        self.writer.record("oom", record)
        last = as_record(self._last_points, self._last_step, self._tier) if self._last_points else None
        self.writer.write_document(oom_file, {**record, "last_timeline": last})

    def _oom_record(self, error: BaseException) -> dict[str, Any]:
        manager, engine = self._engine.manager, self._engine
        visits = [visit.unit.name for visit in engine.visits.open]
        phase = "backward" if engine.visits.is_in_backward else "forward"
        points = engine.sampling.timeline.points
        return {
            "error": f"{type(error).__name__}: {error}"[:2000],
            "is_ours": hasattr(error, "tier") or type(error).__module__.startswith("gemini."),
            "unit": visits[-1] if visits else None,
            "phase": phase,
            "batch_shapes": [list(shape) for shape in engine.batch.shapes[:_SHAPES]] if engine.batch else [],
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
    for chunk in manager.chunks:
        group = chunk.layout.group
        marks = (" frozen" if not group.trainable else "") + (" fp32" if group.keeps_fp32 else "")
        buffers = dict(chunk.homes)
        if chunk.gradient is not None and chunk.gradient.buffer is not None:
            buffers[GRADIENT] = chunk.gradient.buffer
        for slot in chunk.layout.slots:
            parameters[slot.key] = {
                "name": slot.name,
                "shape": list(slot.shape),
                "chunk": chunk.index,
                "param_group": group.param_group,
                "trainable": group.trainable,
                "keeps_fp32": group.keeps_fp32,
            }
        chunks.append(
            {
                "numel": chunk.layout.numel,
                "used_numel": chunk.layout.used_numel,
                "full_bytes": chunk.full_nbytes,
                "homes": {name: home.tier.value for name, home in buffers.items()},
                "home_bytes": {name: home.nbytes for name, home in buffers.items()},
                "group": f"{group.param_group}{marks}",
            }
        )
    return {
        "chunks": chunks,
        "parameters": [parameters[key] for key in sorted(parameters)],
        "homes_bytes": {tier.value: packing.placement.nbytes[tier] for tier in Tier},
        "capacities": {
            tier.value: {"bytes": budget.bytes, "source": budget.source} for tier, budget in capacities.budgets.items()
        },
        "unified": capacities.unified,
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
