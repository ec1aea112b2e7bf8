"""Peaks measured once and kept in the repository; later ones may not be much above them."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from outcome import Check, Report, Settings

from gemini.sizes import format_bytes

_TOLERANCE_RATIO = 0.10
_TOLERANCE_BYTES = 8 << 20
"""Thread stacks and malloc's arenas come in pieces of this size."""


def load(file: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """Baselines by scenario and peak."""
    if not file.exists():
        return {}
    content: dict[str, dict[str, Any]] = json.loads(file.read_text()).get(_size(settings), {})
    return content


def compared(report: Report, known: Mapping[str, Any], *, updating: bool) -> Report:
    """The report with a check for each of its peaks."""
    checks = []
    for name, peak in report.peaks.items():
        if name in known:
            limit = known[name]["peak_bytes"] + known[name]["tolerance_bytes"]
            checks.append(Check(name, f"at most {format_bytes(limit)}", format_bytes(peak), peak <= limit))
        elif not updating:
            checks.append(Check(name, "a baseline", "none: run with --update-baseline", False))
        else:
            checks.append(Check(name, "new baseline", format_bytes(peak), True))
    return report.with_checks(*checks)


def update(file: Path, settings: Settings, reports: Sequence[Report]) -> None:
    """Write the peaks of ``reports``; other scenarios keep theirs."""
    if not any(report.peaks for report in reports):
        return
    content = json.loads(file.read_text()) if file.exists() else {}
    section = content.setdefault(_size(settings), {})
    for report in (report for report in reports if report.peaks):
        section[report.name] = {
            name: {"peak_bytes": peak, "tolerance_bytes": int(peak * _TOLERANCE_RATIO) + _TOLERANCE_BYTES}
            for name, peak in report.peaks.items()
        }
    _write(file, content, _size(settings))


def matrix(file: Path) -> dict[str, dict[str, Any]]:
    """Baselines of the matrix by case."""
    if not file.exists():
        return {}
    content: dict[str, dict[str, Any]] = json.loads(file.read_text()).get("matrix", {})
    return content


def update_matrix(file: Path, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Write these baselines; other cases keep theirs."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content.setdefault("matrix", {}).update(measured)
    _write(file, content, "matrix")


def _write(file: Path, content: dict[str, Any], section: str) -> None:
    """Write the file, and into it what has produced this section."""
    import torch

    content.setdefault("made", {})[section] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["scripts/oom_regression", *sys.argv[1:]]),
    }
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _size(settings: Settings) -> str:
    return "small" if settings.small else "full"
