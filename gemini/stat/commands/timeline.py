"""``gemini-stat timeline``: one step by moment."""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import asdict, astuple, replace

from gemini.stat.console import Exit, Usage, console, find, is_ascii, print_json, show
from gemini.stat.outputs import Moment, Moments, RankPeak, RunMoments
from gemini.stat.over_ranks import spread
from gemini.stat.sight import read
from gemini.stat.text import cell, printable, size
from gemini.telemetry import history
from gemini.telemetry.documents import read_chunks, read_timeline, valid
from gemini.telemetry.files import Unreadable
from gemini.telemetry.ranks import Ranks
from gemini.telemetry.records import PHASES, Timeline

HELP = "Model and non-model data by moment of one step; a moment is a unit's entry."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", default="latest", metavar="N", help="a number, 'latest' (default) or 'peak'")
    parser.add_argument("--csv", action="store_true", help="a row a moment")


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    sight = read(path, options)
    found = sight.run
    timeline = _timeline(path, found.rank, options.step)
    names = _units(path, found.rank)
    peaks = [] if sight.ranks is None else list(_peaks(path, sight.ranks))
    if options.json:
        moments = asdict(moments_of(timeline, names))
        print_json(RunMoments(run_id=found.identity.run_id, rank=found.rank, ranks=peaks, **moments))
    elif options.csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(Moment.__struct_fields__)
        writer.writerows(
            astuple(replace(row, unit=cell(row.unit or ""))) for row in moments_of(timeline, names).moments
        )
    else:
        _show(timeline, names, peaks, options)
    return Exit.OK


def _units(path: Path, rank: int) -> list[str]:
    chunks = read_chunks(path, rank)
    return list(chunks.units) if chunks is not None else []


def _peaks(path: Path, ranks: Ranks) -> Iterator[RankPeak]:
    """Of each rank that has recorded a timeline."""
    for view in ranks.views:
        timeline = read_timeline(path, view.rank)
        if timeline is not None:
            moment = _row(timeline, timeline.peak, _units(path, view.rank))
            total = timeline.total_bytes[timeline.peak]
            yield RankPeak(view.rank, timeline.step, total, moment.phase, moment.unit)


def moments_of(timeline: Timeline, names: list[str]) -> Moments:
    """A timeline with the names of its units, a row a moment."""
    return Moments(
        step=timeline.step,
        tier=timeline.tier,
        moment_count=timeline.moment_count,
        peak_moment=timeline.peak,
        moments=[_row(timeline, moment, names) for moment in range(len(timeline.phase))],
    )


def _timeline(path: Path, rank: int, wanted: str) -> Timeline:
    if wanted == "latest":
        found = read_timeline(path, rank)
    elif wanted == "peak" or wanted.isdecimal():
        candidates = (valid(r, Timeline) for r in history.records(path, rank) if r["type"] == "timeline")
        recorded = [timeline for timeline in candidates if timeline is not None]
        if wanted == "peak":
            found = max(recorded, key=lambda view: view.total_bytes[view.peak], default=None)
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


def _row(timeline: Timeline, moment: int, names: list[str]) -> Moment:
    unit = timeline.unit[moment]
    return Moment(
        moment=moment,
        phase=PHASES[timeline.phase[moment]],
        unit=names[unit] if 0 <= unit < len(names) else None,
        device_bytes=timeline.device_bytes[moment],
        host_bytes=timeline.host_bytes[moment],
        disk_bytes=timeline.disk_bytes[moment],
        non_model_bytes=timeline.non_model_bytes[moment],
    )


def _show(timeline: Timeline, names: list[str], peaks: list[RankPeak], options: argparse.Namespace) -> None:
    from rich.console import Group
    from rich.text import Text

    from gemini.stat import panels

    out = console(options)
    plain = is_ascii(options)
    width = out.width
    of_rank = f" of rank {peaks[0].rank}" if peaks else ""
    title = f"step {timeline.step:,}{of_rank} by moment   {'# model + non-model' if plain else '█ model ▒ non-model'}"
    lines = [
        panels.heading(title, width, plain, f"{timeline.moment_count} moments"),
        *panels.timeline(timeline, names, None, width, 12, plain),
        Text(""),
        Text(f" {panels.describe_peak(timeline, names)}", style="bold"),
        *(Text(f" {line}"[:width]) for line in _peak_lines(peaks)),
        Text(""),
        Text(f"   {'model':>11}{'non-model':>11}  moment", style="dim"),
    ]
    total = timeline.total_bytes
    for moment in sorted(sorted(range(len(total)), key=total.__getitem__, reverse=True)[:8]):
        unit = timeline.unit[moment]
        name = names[unit] if 0 <= unit < len(names) else "end of the step"
        mark = "*" if moment == timeline.peak else " "
        phase = PHASES[timeline.phase[moment]]
        cells = f"{size(timeline.model_bytes[moment]):>11}{size(timeline.non_model_bytes[moment]):>11}"
        lines.append(Text(f" {mark} {cells}  {moment:>4} {phase} {printable(name, 60)}"[:width]))
    show(out, Group(*lines))


def _peak_lines(peaks: list[RankPeak]) -> Iterator[str]:
    """How the ranks' peaks differ, and where the highest one is."""
    over = spread({peak.rank: float(peak.peak_bytes) for peak in peaks})
    if over is None:
        return
    highest = next(peak for peak in peaks if peak.rank == over.max_rank)
    spread_text = f"min {size(over.min)}, median {size(over.median)}, max {size(over.max)}"
    yield f"peaks of {len(peaks)} ranks: {spread_text} on rank {over.max_rank}"
    where = printable(highest.unit or "the end of the step", 48)
    yield f"in {highest.phase} of {where} (--rank {over.max_rank} shows it)"
