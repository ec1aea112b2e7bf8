"""The JSON files beside the records: chunks and units, the last timeline, the last out-of-memory error.

Whatever is in them is checked here, so that what comes out has the right types and lengths.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.telemetry.layout import chunks_file, oom_file, timeline_file
from gemini.telemetry.reader import TIERS, check_version, number, numbers, read_regular

_LONGEST = 1 << 20
PLAIN_ROLES = ("master", "master_low", "gradient", "shadow")
"""Roles of homes that are not states of the optimizer."""
PHASES = {"f": "forward", "b": "backward", "e": "end"}


@dataclass(frozen=True, kw_only=True)
class ChunkView:
    """One chunk as `boost` built it."""

    numel: int
    used_numel: int
    full_bytes: int
    homes: Mapping[str, str]
    """Role -> tier."""
    home_bytes: Mapping[str, int]
    group: str
    parameters: Sequence[str]

    @property
    def states(self) -> Sequence[str]:
        """The optimizer's, by its own words."""
        return [role for role in self.homes if role not in PLAIN_ROLES]


@dataclass(frozen=True, kw_only=True)
class ChunksView:
    """What records refer to by number, and what it takes to decide the packing again."""

    chunks: Sequence[ChunkView]
    units: Sequence[str]
    parameters: Sequence[Mapping[str, Any]]
    capacities: Mapping[str, int]
    unified: bool
    config: Mapping[str, Any]
    ram_bytes: int
    """What the limit on RAM left to this rank before the training began; 0 where it is not known."""
    device_limit_bytes: int
    """What model and other data may take of the accelerator; 0 where it is not known."""
    model: Mapping[str, Any]
    """What it takes to build a model of transformers; empty for others."""


@dataclass(frozen=True, kw_only=True)
class TimelineView:
    """One step by moment; all sequences have one length."""

    step: int
    moment_count: int
    """Before pooling: how many moments the step had."""
    unit: Sequence[int]
    phase: str
    """A letter a moment, see `PHASES`."""
    tier: str
    """Where units run and non-model data lie; ``"host"`` where that is the same RAM as the device."""
    tiers: Mapping[str, Sequence[int]]
    """Tier -> bytes of model data."""
    non_model: Sequence[int]

    @property
    def model(self) -> Sequence[int]:
        """Bytes of model data on the tier where units run."""
        return self.tiers[self.tier]

    @property
    def total(self) -> list[int]:
        """All bytes on the tier where units run."""
        return [used + other for used, other in zip(self.model, self.non_model, strict=True)]

    @property
    def peak(self) -> int:
        """The moment with the most bytes."""
        total = self.total
        return max(range(len(total)), key=total.__getitem__)


def read_chunks(run: Path, rank: int) -> ChunksView | None:
    """What is known about the chunks, or None where nothing (readable) was written."""
    content = _document(chunks_file(run, rank))
    if content is None or not isinstance(content.get("chunks"), list):
        return None
    parameters = [item for item in _list(content.get("parameters")) if isinstance(item, dict)]
    names: dict[int, list[str]] = {}
    for item in parameters:
        index = number(item.get("chunk"))
        if index is not None:
            names.setdefault(int(index), []).append(str(item.get("name", "")))
    chunks = [_chunk(item, names.get(i, [])) for i, item in enumerate(content["chunks"]) if isinstance(item, dict)]
    capacities = {
        tier: int(number(item.get("bytes")) or 0)
        for tier, item in _dict(content.get("capacities")).items()
        if tier in TIERS and isinstance(item, dict)
    }
    return ChunksView(
        chunks=chunks,
        units=[str(name) for name in _list(content.get("units"))],
        parameters=parameters,
        capacities=capacities,
        unified=bool(content.get("unified")),
        config=_dict(content.get("config")),
        ram_bytes=int(number(content.get("ram_bytes")) or 0),
        device_limit_bytes=int(number(content.get("device_limit_bytes")) or 0),
        model=_dict(content.get("model")),
    )


def read_timeline(run: Path, rank: int) -> TimelineView | None:
    """The timeline recorded last."""
    return timeline_of(_document(timeline_file(run, rank)))


def read_oom(run: Path, rank: int) -> Mapping[str, Any] | None:
    """The last out-of-memory error, as it was written."""
    return _document(oom_file(run, rank))


def timeline_of(record: Mapping[str, Any] | None) -> TimelineView | None:
    """A timeline record, or None if it is none."""
    if not record:
        return None
    phase = record.get("phase")
    columns = {
        name: _ints(record.get(name)) for name in ("unit", "non_model_bytes", *(f"{tier}_bytes" for tier in TIERS))
    }
    if not isinstance(phase, str) or not phase or any(len(column) != len(phase) for column in columns.values()):
        return None
    return TimelineView(
        step=int(number(record.get("step")) or 0),
        moment_count=int(number(record.get("moment_count")) or len(phase)),
        unit=columns["unit"],
        phase=phase,
        tier="host" if record.get("tier") == "host" else "device",
        tiers={tier: columns[f"{tier}_bytes"] for tier in TIERS},
        non_model=columns["non_model_bytes"],
    )


def states_of(text: str, limit: int = _LONGEST) -> str:
    """A chunk map as one letter a chunk: ``"2h1*"`` is ``"hh*"``. What is malformed ends it."""
    letters: list[str] = []
    length = 0
    digits = ""
    for char in text:
        if char.isascii() and char.isdecimal():
            digits += char
            continue
        if not digits or len(digits) > 9 or length + int(digits) > limit:
            break
        letters.append((char if char.isascii() and char.isprintable() else "?") * int(digits))
        length += int(digits)
        digits = ""
    return "".join(letters)


def _document(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    check_version(content, path)
    return content


def _chunk(item: Mapping[str, Any], names: Sequence[str]) -> ChunkView:
    return ChunkView(
        numel=int(number(item.get("numel")) or 0),
        used_numel=int(number(item.get("used_numel")) or 0),
        full_bytes=int(number(item.get("full_bytes")) or 0),
        homes={str(role): str(tier) for role, tier in _dict(item.get("homes")).items()},
        home_bytes={role: int(nbytes) for role, nbytes in numbers(item.get("home_bytes")).items()},
        group=str(item.get("group", "")),
        parameters=names,
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _ints(value: object) -> list[int]:
    found = [number(item) for item in _list(value)]
    return [] if any(item is None for item in found) else [int(item) for item in found if item is not None]
