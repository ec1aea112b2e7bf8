"""``gemini-stat explain-oom``: what there was when memory ran out, and the changes with which there would be enough."""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.chunk import StateSlot, Tier
from gemini.config import GeminiConfig
from gemini.errors import OutOfMemory
from gemini.packing.packing import decide
from gemini.planning.placement import AutoPlacementPolicy, PlacementPolicy, StaticPlacementPolicy
from gemini.sizes import format_bytes
from gemini.stat.console import Exit, find, print_json, read
from gemini.stat.text import printable, size
from gemini.telemetry.discovery import NoRun
from gemini.telemetry.documents import (
    ChunksView,
    ChunkView,
    TimelineView,
    read_chunks,
    read_oom,
    read_timeline,
    timeline_of,
)
from gemini.telemetry.reader import TIERS, RunView, number

from .demand import GUARD, as_argument, capacities, model_bytes

HELP = "What there was when memory ran out (or, of a run that goes on, at its peak), and what would have helped."
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that would have made it fit."""

    text: str
    arguments: str | None
    verified: bool
    """The trainer's own packing was asked and said yes; False where the change is outside of what it decides."""


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    found = read(path, options)
    oom, chunks = read_oom(path, found.rank), read_chunks(path, found.rank)
    timeline = _timeline(oom, path, found.rank)
    if oom is None and timeline is None:
        raise NoRun(f"{path} has recorded neither an out-of-memory error nor a timeline")
    changes = list(_changes(found, oom, chunks, timeline))[:3]
    holders = _holders(found, timeline)
    if options.json:
        print_json(
            {
                "run_id": found.run_id,
                "rank": found.rank,
                "error": None if oom is None else str(oom.get("error")),
                "phase": None if oom is None else oom.get("phase"),
                "unit": None if oom is None else oom.get("unit"),
                "tiers": _tiers(found, oom),
                "holders": [{"what": what, "bytes": nbytes} for what, nbytes in holders],
                "changes": [{"text": c.text, "arguments": c.arguments, "verified": c.verified} for c in changes],
            }
        )
    else:
        _show(found, oom, chunks, timeline, holders, changes)
    return Exit.OK


def _timeline(oom: Mapping[str, Any] | None, path: Path, rank: int) -> TimelineView | None:
    recorded = timeline_of(oom.get("last_timeline")) if oom is not None else None
    return recorded or read_timeline(path, rank)


def _tiers(run_: RunView, oom: Mapping[str, Any] | None) -> dict[str, dict[str, int]]:
    """Used and capacity when it happened, or now."""
    recorded = oom.get("tiers") if oom is not None else None
    found = {}
    for tier in TIERS:
        at = recorded.get(tier) if isinstance(recorded, dict) else None
        source = at if isinstance(at, dict) else {}
        found[tier] = {
            key: int(number(source.get(key)) or run_.stats.get(f"{tier}/{key}", 0.0))
            for key in ("used_bytes", "peak_bytes", "capacity_bytes")
        }
    return found


def _holders(run_: RunView, timeline: TimelineView | None) -> list[tuple[str, int]]:
    """Who has the memory, most first."""
    found = [
        ("optimizer states", int(run_.stats.get("model_data/optimizer_bytes", 0))),
        ("masters and frozen parameters", int(run_.stats.get("model_data/parameter_bytes", 0))),
        ("gradients", int(run_.stats.get("model_data/gradient_bytes", 0))),
    ]
    if timeline is not None:
        found.append(("activations and temporaries at the peak", timeline.non_model[timeline.peak]))
    unified = bool(run_.stats.get("memory/unified"))
    found.append(("full copies" + (" (in RAM)" if unified else ""), int(run_.stats.get("device/used_bytes", 0))))
    return sorted((item for item in found if item[1] > 0), key=lambda item: -item[1])


def _changes(
    run_: RunView, oom: Mapping[str, Any] | None, chunks: ChunksView | None, timeline: TimelineView | None
) -> Iterator[Change]:
    tiers = _tiers(run_, oom)
    unified = chunks.unified if chunks is not None else bool(run_.stats.get("memory/unified"))
    where = "host" if unified or _tier_of(oom) == "host" else "device"
    non_model = max(timeline.non_model, default=0) if timeline is not None else 0
    missing = max(_missing(oom), _MIB)
    if chunks is not None:
        yield from _smaller_budget(chunks, tiers, where, missing)
        yield from _more_room(chunks, tiers, where, missing, str((oom or {}).get("error", "")))
    if non_model:
        ratio = max(0.0, 1 - (missing * (1 + GUARD)) / non_model)
        if ratio > 0:
            text = (
                f"batches of {ratio:.0%} of the size: activations took {format_bytes(non_model)} "
                f"and {format_bytes(missing)} were missing"
            )
            yield Change(text=text, arguments=None, verified=False)
    yield Change(
        text="recompute activations in backward (model.gradient_checkpointing_enable())", arguments=None, verified=False
    )


def _smaller_budget(
    chunks: ChunksView, tiers: Mapping[str, Mapping[str, int]], where: str, missing: int
) -> Iterator[Change]:
    """Less model data where memory ran out, and the rest one tier down."""
    limits = _limits(chunks)
    capacity = limits[Tier(where)]
    smaller = min(tiers[where]["used_bytes"], capacity) - round(missing * (1 + GUARD))
    moved = capacity - smaller
    name = f"{where}_memory"
    if smaller > 0 and _packs(chunks, {**limits, Tier(where): smaller}):
        yield Change(
            text=f"{format_bytes(missing)} less of model data on {where}; the rest has room elsewhere",
            arguments=f"{name}={as_argument(smaller)}",
            verified=True,
        )
        return
    disk = limits[Tier.DISK] + 2 * moved
    if smaller > 0 and _packs(chunks, {**limits, Tier(where): smaller, Tier.DISK: disk}):
        yield Change(
            text=f"{format_bytes(missing)} less of model data on {where}, {format_bytes(disk)} of disk for the rest",
            arguments=f'{name}={as_argument(smaller)}, offload_dir=..., disk_memory="{-(-disk // _MIB)}MiB"',
            verified=True,
        )


def _more_room(
    chunks: ChunksView, tiers: Mapping[str, Mapping[str, int]], where: str, missing: int, error: str
) -> Iterator[Change]:
    """What our own errors say outright, or the capacity that was missing."""
    named = re.search(r"set (device|host|disk)_memory to (\d+) bytes", error)
    tier, nbytes = (named[1], int(named[2])) if named else (where, tiers[where]["capacity_bytes"] + missing)
    limits = {**_limits(chunks), Tier(tier): nbytes}
    yield Change(
        text=f"{format_bytes(nbytes)} for model data on {tier}, if there is so much",
        arguments=f'{tier}_memory="{-(-nbytes // _MIB)}MiB"',
        verified=_packs(chunks, limits),
    )


def _packs(chunks: ChunksView, limits: Mapping[Tier, int]) -> bool:
    """Ask the trainer's packing about the recorded parameters."""
    model = skeleton(chunks)
    groups = recorded_groups(chunks, model)
    try:
        packing = decide(
            model, groups, _config(chunks), capacities(limits, chunks.unified), lambda group: tuple(group["slots"])
        )
    except OutOfMemory:
        return False
    needed = model_bytes(packing, limits, chunks.unified)
    return all(needed[tier] <= limits[tier] for tier in Tier if not (chunks.unified and tier is Tier.DEVICE))


def recorded_groups(chunks: ChunksView, model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups, with ``slots`` for what it keeps in the chunks of each."""
    parameters = dict(model.named_parameters())
    groups: dict[int, dict[str, Any]] = {}
    for item in chunks.parameters:
        index = int(item["param_group"])
        if index >= 0:
            slots = _slots(chunks.chunks[int(item["chunk"])])
            groups.setdefault(index, {"params": [], "slots": slots})["params"].append(parameters[str(item["name"])])
    return [groups[index] for index in sorted(groups)]


def _slots(chunk: ChunkView) -> list[StateSlot]:
    """Only the bytes per element are recorded; packing looks at nothing else."""
    dtypes = {1: torch.uint8, 2: torch.bfloat16}
    sizes = {name: chunk.home_bytes.get(name, 0) // max(chunk.numel, 1) for name in chunk.states}
    return [StateSlot(name, dtypes.get(nbytes, torch.float32)) for name, nbytes in sizes.items()]


def skeleton(chunks: ChunksView) -> nn.Module:
    """Modules with the recorded parameters, on ``meta``: what packing looks at, and nothing else."""
    root = nn.Module()
    for item in chunks.parameters:
        *path, leaf = str(item["name"]).split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module._modules[part] = nn.Module()
            child = module._modules[part]
            assert child is not None
            module = child
        if item.get("keeps_fp32"):
            module.running_mean = True  # type: ignore[assignment]
        shape = tuple(int(n) for n in item["shape"])
        made = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=bool(item.get("trainable")))
        module._parameters[leaf] = made
    return root


def _config(chunks: ChunksView) -> GeminiConfig:
    recorded = chunks.config
    policy: PlacementPolicy = AutoPlacementPolicy()
    if recorded.get("policy") == "StaticPlacementPolicy":
        policy = StaticPlacementPolicy(
            offload_optim_frac=float(recorded.get("offload_optim_frac") or 0.0),
            offload_param_frac=float(recorded.get("offload_param_frac") or 0.0),
        )
    return GeminiConfig(
        precision=str(recorded.get("precision", "bf16")),
        policy=policy,
        max_prefetch=int(recorded.get("max_prefetch", 2)),
        chunk_numel=recorded.get("chunk_numel"),
    )


def _limits(chunks: ChunksView) -> dict[Tier, int]:
    return {tier: chunks.capacities.get(tier.value, 0) for tier in Tier}


def _tier_of(oom: Mapping[str, Any] | None) -> str:
    text = str((oom or {}).get("error", ""))
    named = re.search(r"\b(device|host|disk) tier out of memory", text)
    if named:
        return named[1]
    return "device" if "CUDA" in text else "host"


def _missing(oom: Mapping[str, Any] | None) -> int:
    """Bytes that could not be had, as far as the error says so."""
    text = str((oom or {}).get("error", ""))
    for pattern, scale in (
        (r"needs ([\d.]+) MiB", _MIB),
        (r"Tried to allocate ([\d.]+) GiB", 1 << 30),
        (r"Tried to allocate ([\d.]+) MiB", _MIB),
        (r"tried to allocate (\d+) bytes", 1),
    ):
        if match := re.search(pattern, text):
            return int(float(match[1]) * scale)
    return 0


def _show(
    run_: RunView,
    oom: Mapping[str, Any] | None,
    chunks: ChunksView | None,
    timeline: TimelineView | None,
    holders: list[tuple[str, int]],
    changes: list[Change],
) -> None:
    if oom is not None:
        print(f"{printable(str(oom.get('error')), 600)}")
        print(f"in {printable(str(oom.get('phase')))} of {printable(str(oom.get('unit') or 'no unit'), 120)}")
    else:
        print("no out-of-memory error was recorded; this is the present peak")
    print(f"\n{'':<8}{'used':>12}{'capacity':>12}")
    for tier, at in _tiers(run_, oom).items():
        if at["capacity_bytes"]:
            print(f"{tier:<8}{size(at['used_bytes']):>12}{size(at['capacity_bytes']):>12}")
    if timeline is not None:
        from gemini.stat.panels import describe_peak

        print(f"\nstep {timeline.step}: {describe_peak(timeline, chunks.units if chunks is not None else ())}")
    print("\nwho has it")
    for what, nbytes in holders:
        print(f"{size(nbytes):>12}  {what}")
    print("\nwhat would have helped")
    for index, change in enumerate(changes, 1):
        note = " (checked by the trainer's own packing)" if change.verified else ""
        print(f" {index}. {change.text}{note}")
        if change.arguments:
            print(f"    GeminiPlugin({change.arguments})")
