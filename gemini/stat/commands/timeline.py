"""``gemini-stat timeline``: one step by moment."""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from gemini.stat.console import Exit, Usage, console, find, is_ascii, print_json, read, show
from gemini.stat.text import printable, size
from gemini.telemetry import history
from gemini.telemetry.documents import PHASES, TimelineView, read_chunks, read_timeline, timeline_of
from gemini.telemetry.reader import TIERS, Unreadable

HELP = "Model and non-model data by moment of one step; a moment is a unit's entry."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", default="latest", metavar="N", help="a number, 'latest' (default) or 'peak'")
    parser.add_argument("--csv", action="store_true", help="a row a moment")


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    found = read(path, options)
    timeline = _timeline(path, found.rank, options.step)
    chunks = read_chunks(path, found.rank)
    names = list(chunks.units) if chunks is not None else []
    content = as_object(timeline, names)
    rows = content["moments"]
    if options.json:
        print_json({"run_id": found.run_id, "rank": found.rank, **content})
    elif options.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "unit": _cell(row["unit"])} for row in rows)
    else:
        _show(timeline, names, options)
    return Exit.OK


def as_object(timeline: TimelineView, names: list[str]) -> dict[str, Any]:
    """A timeline with the names of its units, a row a moment."""
    return {
        "step": timeline.step,
        "tier": timeline.tier,
        "moment_count": timeline.moment_count,
        "peak_moment": timeline.peak,
        "moments": [_row(timeline, moment, names) for moment in range(len(timeline.phase))],
    }


def _timeline(path: Path, rank: int, wanted: str) -> TimelineView:
    if wanted == "latest":
        found = read_timeline(path, rank)
    elif wanted == "peak" or wanted.isdecimal():
        recorded = [view for r in history.records(path, rank) if r["type"] == "timeline" and (view := timeline_of(r))]
        if wanted == "peak":
            found = max(recorded, key=lambda view: view.total[view.peak], default=None)
        else:
            found = next((view for view in recorded if view.step == int(wanted)), None)
            if found is None and recorded:
                steps = ", ".join(str(view.step) for view in recorded[-12:])
                raise Usage(f"step {wanted} was not recorded by moment; these were: {steps}")
    else:
        raise Usage(f"--step expects a number, 'latest' or 'peak', got {wanted!r}")
    if found is None:
        raise Unreadable(f"{path} has no timeline yet: the first step records one")
    return found


def _row(timeline: TimelineView, moment: int, names: list[str]) -> dict[str, Any]:
    unit = timeline.unit[moment]
    return {
        "moment": moment,
        "phase": PHASES.get(timeline.phase[moment], "end"),
        "unit": names[unit] if 0 <= unit < len(names) else None,
        **{f"{tier}_bytes": timeline.tiers[tier][moment] for tier in TIERS},
        "non_model_bytes": timeline.non_model[moment],
    }


def _cell(text: str | None) -> str:
    """A spreadsheet runs what begins like a formula."""
    text = printable(text or "")
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _show(timeline: TimelineView, names: list[str], options: argparse.Namespace) -> None:
    from rich.console import Group
    from rich.text import Text

    from gemini.stat import panels

    out = console(options)
    plain = is_ascii(options)
    width = out.width
    title = f"step {timeline.step:,} by moment   {'# model + non-model' if plain else '█ model ▒ non-model'}"
    lines = [
        panels.heading(title, width, plain, f"{timeline.moment_count} moments"),
        *panels.timeline(timeline, names, None, width, 12, plain),
        Text(""),
        Text(f" {panels.describe_peak(timeline, names)}", style="bold"),
        Text(""),
        Text(f"   {'model':>11}{'non-model':>11}  moment", style="dim"),
    ]
    total = timeline.total
    for moment in sorted(sorted(range(len(total)), key=total.__getitem__, reverse=True)[:8]):
        unit = timeline.unit[moment]
        name = names[unit] if 0 <= unit < len(names) else "end of the step"
        mark = "*" if moment == timeline.peak else " "
        phase = PHASES.get(timeline.phase[moment], "")
        cells = f"{size(timeline.model[moment]):>11}{size(timeline.non_model[moment]):>11}"
        lines.append(Text(f" {mark} {cells}  {moment:>4} {phase} {printable(name, 60)}"[:width]))
    show(out, Group(*lines))
