"""What training writes about itself: steps, timelines, the chunk map, out-of-memory errors."""

import json
import mmap
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from collected import collect_all
from loop import SMALL, WIDTH, batch, build
from torch import Tensor, nn
from two_owners import Owners

from gemini.boosted import Boosted, boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.errors import OutOfMemory
from gemini.memory.timeline import Point, as_record, pool
from gemini.monitor.decided import Decided
from gemini.monitor.probes import chunk_map
from gemini.nn.optimizer import HybridAdam
from gemini.telemetry import documents, reader
from gemini.telemetry.encoding import as_mapping, encode
from gemini.telemetry.layout import TIERS, chunks_file, oom_file, records_file, request_file, timeline_file
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.schema import records_schema
from gemini.telemetry.statistics import table


class Training:
    """A small boosted model that writes telemetry into a folder of its own."""

    def __init__(self, folder: Path, model: nn.Module | None = None, **plugin: Any) -> None:
        self.folder = folder
        model = build() if model is None else model
        self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=folder, **plugin))
        self.model, self.optimizer, *_ = self.booster.boost(model, HybridAdam(model.parameters(), lr=1e-3))
        writer = self.state.telemetry
        assert writer is not None
        writer._min_interval = 0.0
        self.writer = writer

    @property
    def state(self) -> Boosted:
        return boosted(self.model)

    def step(self, count: int = 1) -> None:
        for number in range(count):
            self.booster.backward(self.model(batch(number)).square().mean(), self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> list[dict[str, Any]]:
        self.writer.close()
        return [json.loads(line) for line in records_file(self.folder, 0).read_bytes().splitlines() if line]


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["type"] == kind]


def test_every_record_and_document_follows_the_schema(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", device_memory="36KiB", **SMALL)
    training.step(3)
    records = training.close()
    schema = records_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert {record["type"] for record in records} == {"start", "step", "timeline", "chunks", "process", "end"}
    for record in records:
        validator.validate(record)
    for path, name in ((chunks_file, "chunks_file"), (timeline_file, "timeline_file")):
        content = json.loads(path(tmp_path / "run", 0).read_text())
        jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]}).validate(content)
    step = of_type(records, "step")[0]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**step, "stats": {**step["stats"], "device/used_bytes": "many"}})


def test_what_is_recorded_is_what_the_model_says(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", device_memory="36KiB", **SMALL)
    training.step(4)
    training.state.manager.settle()
    stats = training.model.memory_stats()
    recorded = of_type(training.close(), "step")[-1]["stats"]
    waits = {key for key in stats if "seconds" in key or key.startswith(("move/", "need/", "upload/"))}
    at_rest = {"device/used_bytes", "chunk/resident_count"}  # the next cycle's first fetches began after the step
    assert {k: v for k, v in recorded.items() if k not in waits | at_rest} == {
        k: v for k, v in stats.items() if k not in waits | at_rest
    }
    assert set(recorded) == set(stats)
    assert stats["need/count"] == sum(stats[f"need/{kind}_count"] for kind in ("resident", "hit", "late", "miss"))
    assert stats["need/miss_count"] > 0
    assert sum(stats[f"upload/{tier}_bytes"] for tier in TIERS) == stats["move/fetch_bytes"]


def test_what_is_measured_is_what_the_table_describes(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", device_memory="36KiB", **SMALL)
    training.step(3)
    training.close()
    described = {line.key: line for line in table()}
    # Of fp16, where a norm was asked for, and of several ranks.
    at_times = {"step/loss_scale", "step/grad_norm", "step/wait_seconds"}
    assert set(training.model.memory_stats()) == set(described) - at_times
    assert all(line.text for line in described.values())


def test_the_last_step_is_recorded_although_it_came_too_soon(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.writer._min_interval = 3600.0
    training.step(20)
    expected = training.model.memory_stats()["need/count"]
    steps = [record["stats"] for record in of_type(training.close(), "step")]
    assert [stats["step/count"] for stats in steps] == [1, 20]
    assert steps[-1]["need/count"] == expected


def test_disk_reads_are_counted_with_their_time(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", host_memory="300KiB", offload_dir=tmp_path / "disk", **SMALL)
    training.step(3)
    training.state.manager.settle()
    stats = training.model.memory_stats()
    assert stats["disk/used_bytes"] > 0
    assert stats["move/disk_read_seconds"] > 0
    assert stats["move/disk_write_seconds"] > 0
    training.close()


def test_the_warm_up_and_the_first_planned_step_leave_a_timeline(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", device_memory="36KiB", **SMALL)
    training.step(5)
    units = [unit.name for unit in training.state.hooks._units.all]
    records = training.close()
    assert [record["step"] for record in of_type(records, "timeline")] == [1, 2]
    timeline = documents.read_timeline(tmp_path / "run", 0)
    assert timeline is not None
    forward = [unit for unit, phase in zip(timeline.unit, timeline.phase, strict=True) if phase == "f"]
    assert forward == list(range(len(units)))
    assert timeline.phase == "f" * len(units) + "b" * len(units) + "e"
    assert timeline.device_bytes[0] > 0
    chunks = documents.read_chunks(tmp_path / "run", 0)
    assert chunks is not None
    assert list(chunks.units) == units
    assert [p.name for p in chunks.parameters] == [name for name, _ in training.model.named_parameters()]
    assert sum(chunk.used_numel for chunk in chunks.chunks) == sum(p.numel() for p in training.model.parameters())


class Greedy(nn.Module):
    """Takes 64 MiB for a moment in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        # Not from malloc, which may have as much left over from earlier tests: the resident set would not grow.
        with closing(mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as memory:
            memory.write(bytes([1]) * len(memory))
        return self.c(y)  # type: ignore[no-any-return]


def test_the_timeline_says_where_non_model_data_peak(tmp_path: Path) -> None:
    collect_all()  # what earlier tests left would else go in the middle, and take its part of the resident set with it
    training = Training(tmp_path / "run", Greedy())
    training.step(2)
    training.close()
    timeline = documents.read_timeline(tmp_path / "run", 0)
    assert timeline is not None
    assert timeline.non_model_bytes[timeline.peak] >= 60 << 20
    chunks = documents.read_chunks(tmp_path / "run", 0)
    assert chunks is not None
    assert chunks.units[timeline.unit[timeline.peak]] == "b"  # from its entry to that of c
    assert timeline.phase[timeline.peak] == "f"
    assert min(timeline.non_model_bytes) < 32 << 20


def test_a_timeline_can_be_asked_for(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.step(3)
    assert not training.state.engine.sampling.is_on
    request_file(tmp_path / "run").touch()
    channel = training.writer._channel
    assert channel is not None
    for _ in range(600):  # the telemetry thread looks every two seconds
        if channel.is_dump_requested:
            break
        threading.Event().wait(0.01)
    training.step(2)
    assert [record["step"] for record in of_type(training.close(), "timeline")] == [1, 2, 5]
    assert not request_file(tmp_path / "run").exists()


def test_timelines_change_no_number(tmp_path: Path) -> None:
    losses = []
    for sampled in (False, True):
        torch.manual_seed(0)
        training = Training(tmp_path / str(sampled), device_memory="36KiB", **SMALL)
        torch.manual_seed(3)
        for number in range(4):
            training.state.engine.sampling.record_step(sampled)
            loss = training.model(batch(number)).square().mean()
            losses.append(loss.item())
            training.booster.backward(loss, training.optimizer)
            training.optimizer.step()
            training.optimizer.zero_grad()
        training.close()
    assert losses[:4] == losses[4:]


def test_an_evaluation_is_no_part_of_a_step(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.step(1)
    with torch.no_grad():
        training.model(batch(0))
    training.step(1)
    first, second = of_type(training.close(), "timeline")
    assert first["phase"] == second["phase"]


class Refuses(nn.Module):
    def __init__(self, error: Callable[[], BaseException]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), Inner(error)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))  # type: ignore[no-any-return]


class Inner(nn.Linear):
    def __init__(self, error: Callable[[], BaseException]) -> None:
        super().__init__(WIDTH, WIDTH)
        self.error = error
        self.is_full = False

    def forward(self, input: Tensor) -> Tensor:
        if self.is_full:
            raise self.error()
        return super().forward(input)


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2),
        (lambda: MemoryError(), 2),
        (lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 12 bytes"), 2),
        (lambda: OutOfMemory("device tier out of memory. a needs 1 MiB"), 1),
        (lambda: ValueError("not a matter of memory"), 0),
    ],
)
def test_an_out_of_memory_error_in_forward_is_recorded_where_it_began(
    tmp_path: Path, error: Callable[[], BaseException], times: int
) -> None:
    training = Training(tmp_path / "run", Refuses(error))
    training.step(2)
    training.model.inner.is_full = True
    with pytest.raises((type(error()), OutOfMemory)):  # the runtime turns errors about memory into ours
        training.step()
    training.model.inner.is_full = False
    training.step()  # training goes on
    records = of_type(training.close(), "oom")
    assert len(records) == times  # the forward runs once more where that may help
    assert oom_file(tmp_path / "run", 0).exists() == bool(times)
    if times:
        found = documents.read_oom(tmp_path / "run", 0)
        assert found is not None
        jsonschema.Draft202012Validator(records_schema()).validate(records[0])
        assert found.unit == "inner"
        assert found.phase == "forward"
        assert found.error.startswith(type(error()).__name__)
        assert found.last_timeline is not None
        assert found.last_timeline.step == 2
        assert found.tiers["host"].used_bytes > 0


def test_an_out_of_memory_error_in_backward_is_recorded(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.step(2)
    output = training.model(batch(0))
    output.register_hook(lambda gradient: (_ for _ in ()).throw(MemoryError("no more")))
    with pytest.raises((MemoryError, OutOfMemory)):
        training.booster.backward(output.square().mean(), training.optimizer)
    (record,) = of_type(training.close(), "oom")
    assert "no more" in record["error"]


def test_the_chunk_map_tells_homes_and_copies(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", device_memory="36KiB", **SMALL)
    training.step(2)
    manager = training.state.manager
    letters = documents.states_of(chunk_map(manager.chunks))
    assert len(letters) == len(manager.chunks)
    for chunk, letter in zip(manager.chunks, letters, strict=True):
        assert letter.isupper() == chunk.is_resident or letter == ">"
    assert set(letters.lower()) <= set("dhk>*")
    assert set("hH") & set(letters)
    training.close()


def test_telemetry_keeps_no_model_alive(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.step(2)
    channel = training.writer._channel
    assert channel is not None
    del training
    collect_all()
    channel._thread.join(10)
    assert not channel._thread.is_alive()
    assert reader.read_run(tmp_path / "run").status is RunStatus.FINISHED


def test_pooling_keeps_the_peak() -> None:
    points = [Point(i, "forward", (i % 7, 0, 0), 0) for i in range(5000)]
    points[3333] = replace(points[3333], non_model=1000)
    pooled = pool(points, 0)
    assert len(pooled) <= 512
    assert max(p.used[0] + p.non_model for p in pooled) == 1000 + points[3333].used[0]
    record = as_record(points, 7, Tier.DEVICE)
    assert (record.moment_count, record.peak_moment) == (5000, 3333)
    assert len(encode(as_mapping(record))) <= 16 << 10


def test_what_a_rank_waited_for_others_is_written_where_it_is_known(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.step()
    assert "step/wait_seconds" not in training.model.memory_stats()
    engine = training.state.engine
    engine.step_ended(lambda step: step._replace(wait_seconds=0.25))
    assert training.model.memory_stats()["step/wait_seconds"] == 0.25
    last = [record for record in training.close() if record["type"] == "step"][-1]
    assert last["stats"]["step/wait_seconds"] == 0.25


def test_of_shared_chunks_the_part_that_is_at_home_is_written(tmp_path: Path) -> None:
    def shared() -> tuple[nn.Module, HybridAdam]:
        model = build()
        return model, HybridAdam(model.parameters(), lr=1e-3)

    owners = Owners(2, shared, lambda model, number: model(batch(number)).square().mean(), precision="fp32")
    for model in owners.models:
        state = boosted(model)
        decided = Decided.of(model, state.config, state.capacities)
        document = decided.document(state.manager, state.packing, [])
        assert document.config["owners"] == 2
        for chunk, described in zip(state.manager.chunks, document.chunks, strict=True):
            assert described.extent == [chunk.extent.start, chunk.extent.stop]
            assert described.home_bytes["master"] == 4 * len(chunk.extent)
