"""A trace of some streamed steps for chrome://tracing or Perfetto, and how much of the moves is beside computing."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_device import Device
from gpu_settings import Settings, Size
from gpu_step import WARM_UP, config_of, managed, placed

STEPS = 2
Span = tuple[float, float]


def run(device: Device, settings: Settings, size: Size, file: Path) -> Iterator[dict[str, Any]]:
    """Where the trace is, and the share of the moves' time in which kernels ran, too; None without kernels."""
    if device.device.type == "sim":
        yield {"absent": "the simulated device has no profiler"}
        return
    config = config_of(size, settings)
    largest = max(4 * size.hidden**2, settings.vocabulary * size.hidden)
    step, model = managed(config, placed("streamed", config.parameter_count(), largest))
    shape = (max(1, settings.tokens[0] // settings.length), min(settings.tokens[0], settings.length))
    tokens = torch.randint(0, settings.vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(device.device)
    for _ in range(WARM_UP):
        step(tokens)
    device.synchronize()
    activities = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step(tokens)
        device.synchronize()
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for event in profile.events() or []:
        if "CPU" not in str(event.device_type):
            is_move = event.name.lower().startswith(("memcpy htod", "memcpy dtoh"))
            spans[is_move].append((event.time_range.start, event.time_range.end))
    stats = model.memory_stats()
    yield {
        "trace": str(file),
        "bytes": file.stat().st_size,
        "moves_beside_kernels": share_beside(spans[True], spans[False]),
        "prefetch_hit_ratio": stats["move/prefetch_hit_ratio"],
        "stall_seconds": stats["move/stall_seconds"],
    }


def share_beside(moves: Iterable[Span], kernels: Iterable[Span]) -> float | None:
    """How much of the time of the moves lies in the time of kernels; None if there are no moves."""
    merged, busy = _merged(moves), _merged(kernels)
    total = sum(end - begin for begin, end in merged)
    if not total:
        return None
    shared, at = 0.0, 0
    for begin, end in merged:
        while at < len(busy) and busy[at][1] <= begin:
            at += 1
        here = at
        while here < len(busy) and busy[here][0] < end:
            shared += min(end, busy[here][1]) - max(begin, busy[here][0])
            here += 1
    return shared / total


def _merged(spans: Iterable[Span]) -> list[Span]:
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
