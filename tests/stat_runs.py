"""Runs made up for the tests of gemini-stat, written as training writes them."""

import threading
from pathlib import Path
from typing import Any

from gemini.telemetry.job import Job
from gemini.telemetry.layout import chunks_file, timeline_file
from gemini.telemetry.records import ChunkMap, Process, Timeline
from gemini.telemetry.run_folder import write_document
from gemini.telemetry.writer import TelemetryWriter

GIB = 1 << 30
RUN_ID = "20260101T000000Z-7"
UNITS = ["wte", *(f"h.{i}.{name}" for i in range(4) for name in ("attn", "mlp")), "ln_f"]
MOMENTS = 2 * len(UNITS)

PREDICTION = {"prediction/device_predicted_bytes": 20.0 * GIB, "prediction/device_measured_bytes": 21.0 * GIB}


def stats(step: int, **changes: float) -> dict[str, float]:
    """Of one step of a run that fetches, stalls and streams from disk."""
    return {
        "step/count": step,
        "step/seconds": 0.214,
        "step/skipped_count": 0,
        "device/used_bytes": 20 * GIB,
        "device/peak_bytes": 23 * GIB,
        "device/capacity_bytes": 24 * GIB,
        "host/used_bytes": 41 * GIB,
        "host/peak_bytes": 43 * GIB,
        "host/capacity_bytes": 64 * GIB,
        "disk/used_bytes": 210 * GIB,
        "disk/peak_bytes": 210 * GIB,
        "disk/capacity_bytes": 500 * GIB,
        "memory/unified": 0,
        "chunk/count": 64,
        "chunk/numel": 1 << 24,
        "chunk/waste_ratio": 0.018,
        "chunk/device_count": 8,
        "chunk/host_count": 40,
        "chunk/disk_count": 16,
        "chunk/resident_count": 12,
        "model_data/total_bytes": 271 * GIB,
        "model_data/parameter_bytes": 26 * GIB,
        "model_data/gradient_bytes": 13 * GIB,
        "model_data/optimizer_bytes": 232 * GIB,
        "non_model/peak_bytes": 4 * GIB,
        "need/count": 607 * step,
        "need/resident_count": 410 * step,
        "need/hit_count": 188 * step,
        "need/late_count": 7 * step,
        "need/miss_count": 2 * step,
        "move/fetch_count": 197 * step,
        "move/fetch_bytes": 6 * GIB * step,
        "move/prefetch_count": 195 * step,
        "move/prefetch_hit_ratio": 0.954,
        "move/evict_count": 197 * step,
        "move/disk_read_bytes": GIB * step,
        "move/disk_read_seconds": 0.4 * step,
        "move/disk_write_bytes": GIB * step,
        "move/disk_write_seconds": 0.5 * step,
        "move/stall_seconds": 0.05 * step,
        "stall/device_seconds": 0.0,
        "stall/host_seconds": 0.01 * step,
        "stall/disk_seconds": 0.04 * step,
        "upload/device_bytes": 0,
        "upload/device_seconds": 0.0,
        "upload/host_bytes": 5 * GIB * step,
        "upload/host_seconds": 0.25 * step,
        "upload/disk_bytes": GIB * step,
        "upload/disk_seconds": 0.4 * step,
        **changes,
    }


def timeline(step: int) -> dict[str, Any]:
    """Activations that grow in forward and shrink in backward."""
    half = MOMENTS // 2
    return {
        "step": step,
        "tier": "device",
        "moment_count": MOMENTS + 1,
        "peak_moment": half - 1,
        "unit": [*range(half), *reversed(range(half)), -1],
        "phase": "f" * half + "b" * half + "e",
        "device_bytes": [16 * GIB] * (MOMENTS + 1),
        "host_bytes": [41 * GIB] * (MOMENTS + 1),
        "disk_bytes": [210 * GIB] * (MOMENTS + 1),
        "non_model_bytes": [*(i * GIB // 2 for i in range(half)), *(i * GIB // 2 for i in reversed(range(half))), 0],
    }


def chunks() -> dict[str, Any]:
    tiers = ["device"] * 8 + ["host"] * 40 + ["disk"] * 16
    return {
        "v": 1,
        "t": 0.0,
        "rank": 0,
        "chunks": [
            {
                "numel": 1 << 24,
                "used_numel": (1 << 24) - 32 * i,
                "full_bytes": 1 << 25,
                "homes": dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "gradient"), tier),
                "home_bytes": {"master": 1 << 26, "exp_avg": 1 << 26, "exp_avg_sq": 1 << 26, "gradient": 1 << 25},
                "group": "0",
            }
            for i, tier in enumerate(tiers)
        ],
        "parameters": [
            {
                "name": f"h.{i // 16}.w{i % 16}",
                "shape": [4096, 4096],
                "chunk": i,
                "param_group": 0,
                "trainable": True,
                "keeps_fp32": False,
            }
            for i in range(64)
        ],
        "units": UNITS,
        "homes_bytes": {"device": 8 * GIB, "host": 40 * GIB, "disk": 210 * GIB},
        "capacities": {tier: {"bytes": GIB, "source": "argument"} for tier in ("device", "host", "disk")},
        "unified": False,
        "config": {"max_prefetch": 2, "precision": "bf16"},
    }


def make_run(steps: int = 12, status: str | None = "finished", folder: Path | None = None, **changes: float) -> Path:
    """A run with everything in it; ``status`` None leaves it open, and the caller must close what it gets."""
    return _make(steps, folder, Job(), changes, status)[0]


def open_run(
    steps: int = 12, folder: Path | None = None, rank: int = 0, ranks: int = 1, restart: int = 0, **changes: float
) -> TelemetryWriter:
    return _make(steps, folder, job_of(rank, ranks, restart), changes, None)[1]


def job_of(rank: int, ranks: int, restart: int = 0) -> Job:
    """One rank of a made-up job."""
    run_id = RUN_ID if ranks > 1 else None
    return Job(rank=rank, world_size=ranks, restart=restart, run_id=run_id, attempt=str(restart))


def _make(
    steps: int, folder: Path | None, job: Job, changes: dict[str, float], status: str | None
) -> tuple[Path, TelemetryWriter]:
    probes = {
        "chunks": lambda: ChunkMap("8D4H1>1*34h16k"),
        "process": lambda: Process(45 * GIB, 60 * GIB, "cgroup v2"),
    }
    rank = job.rank
    writer = TelemetryWriter(folder, job, {"model": "GPT", "steps": 2000}, probes=probes, min_interval_seconds=0)
    for step in range(1, steps + 1):
        writer.record_step(stats(step, **changes))
    writer.record("timeline", Timeline(**timeline(2)))
    run = writer.run_dir
    assert run is not None
    write_document(chunks_file(run, rank), chunks())
    write_document(timeline_file(run, rank), {"v": 1, "t": 0.0, "rank": rank, **timeline(2)})
    if status is not None:
        writer.close(status)
    else:
        wait_until_written(writer)
    return run, writer


def wait_until_written(writer: TelemetryWriter) -> None:
    """Return when what was handed over is in the files."""
    written = threading.Event()

    def mark() -> ChunkMap:
        written.set()  # records are made one after the other: what came before is written
        return ChunkMap("64h")

    writer.record("mark", mark)
    assert written.wait(30)
