"""One run on one screen: what ``gemini-stat`` prints. Fits 80 columns and 24 lines."""

import time
from collections.abc import Iterator, Mapping
from itertools import islice

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gemini.stat import rank_panels
from gemini.stat.over_ranks import OverRanks
from gemini.stat.rates import prediction
from gemini.stat.sight import Sight
from gemini.stat.text import UNKNOWN, count, duration, percent, printable, seconds, size
from gemini.telemetry.layout import TIERS
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import RunView

STATUS_STYLES = {
    RunStatus.RUNNING: "bold black on green",
    RunStatus.STALLED: "bold black on yellow",
    RunStatus.FINISHED: "bold black on cyan",
    RunStatus.CRASHED: "bold white on red",
    RunStatus.UNKNOWN: "bold black on white",
}

_FULL_RATIO = 0.95
_HIGH_RATIO = 0.85
_MAX_FACTS = 12
_UNIFIED = " device and host are one RAM: host counts both, device only the full copies"


def render(sight: Sight, console: Console, plain: bool) -> RenderableType:
    """Everything that is known about a run; what is not is shown as ``-``. ``plain``: without block characters."""
    run = sight.run
    parts: list[RenderableType] = [_title(sight), _state(sight)]
    if sight.ranks is not None:
        parts += _ranks(OverRanks.of(sight.ranks), console.width, plain)
    elif run.stats:
        parts += [_heading("memory by tier", plain), _tiers(run, console.width, plain)]
        if run.stats.get("memory/unified"):
            parts.append(Text(_UNIFIED, style="dim"))
        parts += [_heading("chunks and data", plain), _cells(run.stats)]
    else:
        parts.append(Text(" no step recorded yet", style="dim"))
    if run.identity.facts:
        parts += [_heading("set-up", plain), _facts(run.identity.facts)]
    if run.dropped_count:
        parts.append(Text(f" {run.dropped_count} records were dropped: the disk could not keep up", style="yellow"))
    return Group(*parts)


def _ranks(over: OverRanks, width: int, plain: bool) -> Iterator[RenderableType]:
    yield from rank_panels.notes(over, width)
    yield _heading("memory by tier, over ranks", plain)
    yield from rank_panels.tiers(over, width, plain)
    yield _heading("over ranks", plain)
    yield from rank_panels.numbers(over, width)
    yield _heading("ranks", plain)
    yield from rank_panels.ranks(over, width)


def _title(sight: Sight) -> Text:
    identity = sight.run.identity
    title = Text(" ", no_wrap=True, overflow="ellipsis")
    title.append(printable(identity.name, 40) or "run", style="bold")
    title.append(f"  {printable(identity.run_id, 60)}", style="cyan")
    if sight.rank_text:
        title.append(f"  {sight.rank_text}")
    return title


def _state(sight: Sight) -> Text:
    run, identity, status = sight.run, sight.run.identity, sight.status
    state = Text(" ")
    state.append(f" {status.name} ", style=STATUS_STYLES[status])
    items = []
    if sight.step is not None:
        items.append(f"step {sight.step:,}")
    if "step/seconds" in run.stats:
        items.append(f"{seconds(run.stats['step/seconds'])}/step")
    if identity.started is not None:
        until = time.time() if sight.is_live else run.updated
        items.append(f"{'up' if sight.is_live else 'ran'} {duration((until or identity.started) - identity.started)}")
    if not sight.is_live and run.updated is not None:
        items.append(f"{duration(time.time() - run.updated)} ago")
    if identity.pid is not None and sight.ranks is None:
        items.append(f"pid {identity.pid}")
    state.append("  " + "   ".join(items))
    if sight.reason:
        bad = status in (RunStatus.CRASHED, RunStatus.STALLED)
        state.append(f"\n {printable(sight.reason)}", style="red" if bad else "dim")
    return state


def _heading(title: str, plain: bool) -> Rule:
    return Rule(Text(f" {title}", style="bold"), align="left", style="dim", characters="-" if plain else "─")


def _tiers(run: RunView, width: int, plain: bool) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for _ in range(4):
        table.add_column(justify="right", no_wrap=True)
    # What the other columns and their gaps take; the bar gets the rest, though not the whole of a very wide screen.
    bar_width = max(8, min(60, width - 60))
    table.add_row("", "", *(Text(word, style="dim") for word in ("used", "capacity", "full", "peak")))
    for tier in TIERS:
        used = run.stats.get(f"{tier}/used_bytes")
        capacity = run.stats.get(f"{tier}/capacity_bytes")
        peak = run.peaks.get(tier)
        if not capacity and not used and not peak:
            table.add_row(f" {tier}", Text("not used", style="dim"), *[Text(UNKNOWN, style="dim")] * 4)
            continue
        ratio = used / capacity if capacity and used is not None else None
        peak_ratio = peak / capacity if capacity and peak is not None else None
        style = _fill_style(ratio)
        table.add_row(
            Text(f" {tier}", style="bold"),
            _bar(ratio, peak_ratio, bar_width, plain),
            Text(size(used), style=style),
            size(capacity),
            Text(percent(ratio, 0) + (" !" if ratio is not None and ratio >= _FULL_RATIO else ""), style=style),
            Text(size(peak), style=_fill_style(peak_ratio)),
        )
    return table


def _fill_style(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "bold red" if ratio >= _FULL_RATIO else "yellow" if ratio >= _HIGH_RATIO else "green"


def _bar(used: float | None, peak: float | None, width: int, plain: bool) -> Text:
    """Used, then how far the peak went beyond it, then what was never used."""
    full, beyond, rest = "#+." if plain else "█▒░"
    used_cells = _cells_of(used, width)
    peak_cells = max(0, _cells_of(peak, width) - used_cells)
    bar = Text()
    bar.append(full * used_cells, style=_fill_style(used))
    bar.append(beyond * peak_cells, style=_fill_style(peak))
    bar.append(rest * (width - used_cells - peak_cells), style="dim")
    return bar


def _cells_of(ratio: float | None, width: int) -> int:
    if not ratio or ratio < 0:
        return 0
    return min(width, max(1, round(ratio * width)))  # a little is not nothing


def _cells(stats: Mapping[str, float]) -> Table:
    """Label, then up to four values with what they are."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    for _ in range(5):
        table.add_column(no_wrap=True)
    for label, cells in _rows(stats):
        shown = [Text.assemble((value, "bold" if value != UNKNOWN else "dim"), f" {what}") for value, what in cells]
        table.add_row(Text(f" {label}", style="dim"), *shown)
    return table


def _rows(stats: Mapping[str, float]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    get = stats.get
    yield (
        "chunks",
        [
            (count(get("chunk/count")), f"of {count(get('chunk/numel'))} elements"),
            (percent(get("chunk/waste_ratio")), "waste"),
            (count(get("chunk/resident_count")), "copies on device"),
        ],
    )
    homes = [(count(get(f"chunk/{tier}_count")), f"on {tier}") for tier in TIERS]
    yield "  homes", homes
    kinds = [(size(get(f"model_data/{kind}_bytes")), f"{kind}s") for kind in ("parameter", "gradient")]
    yield "model data", [*kinds, (size(get("model_data/optimizer_bytes")), "optimizer")]
    yield "", [(size(get("model_data/total_bytes")), "in all")]
    yield "non-model", [(size(get("non_model/peak_bytes")), "at its peak")]
    if cells := _prediction(stats):
        yield "predicted", cells
    hits = (percent(get("move/prefetch_hit_ratio")), "prefetch hits")
    yield "moves", [(count(get("move/fetch_count")), "fetches"), (size(get("move/fetch_bytes")), "fetched"), hits]
    yield (
        "",
        [
            (count(get("move/prefetch_count")), "prefetches"),
            (count(get("move/evict_count")), "evictions"),
            (seconds(get("move/stall_seconds")), "stalled"),
        ],
    )
    if get("disk/capacity_bytes") or get("move/disk_read_bytes") or get("move/disk_write_bytes"):
        yield "disk", [(size(get("move/disk_read_bytes")), "read"), (size(get("move/disk_write_bytes")), "written")]


def _prediction(stats: Mapping[str, float]) -> list[tuple[str, str]]:
    """The predicted and the measured peak where units run."""
    found = prediction(stats)
    if found is None:
        return []
    return [
        (size(found.predicted), f"peak of {found.tier}"),
        (size(found.measured), "measured"),
        (f"{found.ratio - 1:+.0%}", "off"),
    ]


def _facts(facts: Mapping[str, object]) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in islice(_flat(facts), _MAX_FACTS):
        table.add_row(Text(f" {printable(name, 24)}", style="dim"), _fact(value))
    return table


def _flat(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Groups as ``group.name``: one level, whatever is deeper is shown as it is written."""
    for name, value in facts.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{name}.")
        elif value is not None and value != "":
            yield f"{prefix}{name}", value


def _fact(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return count(value)
    return printable(str(value), 160)
