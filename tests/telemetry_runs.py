"""Runs that record telemetry, here and in other processes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemini.telemetry.layout import records_file
from gemini.telemetry.writer import TelemetryWriter

STEP = {"step/count": 3, "step/seconds": 0.5, "device/used_bytes": 10, "device/peak_bytes": 20}


def open_writer(run_dir: Path | None = None, **facts: object) -> TelemetryWriter:
    return TelemetryWriter(run_dir, None, facts, min_interval_seconds=0)


def folder_of(telemetry: TelemetryWriter) -> Path:
    assert telemetry.run_dir is not None
    return telemetry.run_dir


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in records_file(run, 0).read_bytes().splitlines() if line]


def script(body: str, *, check: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run ``body`` in a child that has a writer ``w`` and has recorded a step."""
    code = (
        "import os, sys, signal\nfrom gemini.telemetry.writer import TelemetryWriter\n"
        f"w = TelemetryWriter(min_interval_seconds=0)\nw.record_step({STEP!r})\n{body}\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=check)


@contextmanager
def living_child() -> Iterator["subprocess.Popen[str]"]:
    """A run in another process that has written its step and waits for its stdin to close."""
    code = (
        "import sys, time\nfrom gemini.telemetry.records import ChunkMap\n"
        "from gemini.telemetry.writer import TelemetryWriter\n"
        f"w = TelemetryWriter(min_interval_seconds=0)\nw.record_step({STEP!r})\n"
        "while w._channel._queue.qsize(): time.sleep(0.001)\n"
        "w._channel.put('flushed', ChunkMap(''))\n"  # the step is in the file once this was taken from the queue
        "while w._channel._queue.qsize(): time.sleep(0.001)\n"
        "print(w.run_dir, flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()
            child.communicate(timeout=30)
