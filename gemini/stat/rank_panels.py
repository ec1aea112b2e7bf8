"""Several ranks as text: their tiers, the numbers over all of them, and a line for each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from rich.text import Text

from gemini.stat.over_ranks import MEASURES, OverRanks, Spread, spread
from gemini.stat.panels import bar
from gemini.stat.rates import RISK_HIGH, Rates
from gemini.stat.text import UNKNOWN, count, percent, printable, seconds, size
from gemini.telemetry.layout import TIERS
from gemini.telemetry.ranks import Straggler, numbers_text
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import RunView

STATUS_COLORS = {
    RunStatus.RUNNING: "green",
    RunStatus.STALLED: "yellow",
    RunStatus.FINISHED: "cyan",
    RunStatus.CRASHED: "bold red",
    RunStatus.UNKNOWN: "dim",
}


class _Column(NamedTuple):
    title: str
    width: int
    show: Callable[[float | None], str]
    of: Callable[[RunView, Rates], float | None]


_OF_KEY = {measure.key: measure for measure in MEASURES}


def _column(title: str, width: int, key: str) -> _Column:
    return _Column(title, width, _OF_KEY[key].show, _OF_KEY[key].of)


_NARROW = (
    _Column("step", 8, count, _OF_KEY["step"].of),
    _column("own part", 10, "own_seconds"),
    _column("for ranks", 11, "wait_seconds"),
    _column("device", 11, "device_used_bytes"),
    _column("host", 11, "host_used_bytes"),
    _Column("risk", 6, lambda value: percent(value, 0), _OF_KEY["oom_risk"].of),
)
_WIDE = (
    *_NARROW[:3],
    _column("for chunks", 11, "stall_seconds"),
    *_NARROW[3:5],
    _column("disk", 11, "disk_used_bytes"),
    _column("non-model", 11, "non_model_peak_bytes"),
    _NARROW[5],
)


def tiers(over: OverRanks, width: int, plain: bool) -> list[Text]:
    """A line a tier: the fullest rank's bar, then what ranks use, from the least to the most."""
    bar_width = max(8, min(50, width - 72))
    titles = f"{'min used':>11}{'median':>11}{'max':>11}{'capacity':>11}{'peak':>11}{'risk':>8}"
    lines = [Text(f" {'':<7}{'':<{bar_width}}{titles}"[:width], style="dim")]
    for tier in TIERS:
        used = over.spreads.get(f"{tier}_used_bytes")
        capacity = spread(over.values(partial(_capacity, tier)))
        if used is None or not (used.max or (capacity is not None and capacity.max)):
            lines.append(Text(f" {tier:<7}not used", style="dim"))
            continue
        peak = over.spreads.get(f"{tier}_peak_bytes")
        risk = spread(over.values(partial(_risk, tier)))
        line = Text(f" {tier:<7}", style="bold")
        line.append_text(bar(used.max, peak and peak.max, capacity and capacity.max, bar_width, plain))
        cells = (used.min, used.median, used.max, capacity and capacity.max, peak and peak.max)
        line.append("".join(f"{size(cell):>11}" for cell in cells), style="default")
        mark = "!" if risk is not None and risk.max >= RISK_HIGH else " "
        line.append(f"{percent(risk and risk.max, 0):>7}{mark}", style="bold red" if mark == "!" else "default")
        line.truncate(width)
        lines.append(line)
    return lines


def _capacity(tier: str, run: RunView, _: Rates) -> float | None:
    return run.stats.get(f"{tier}/capacity_bytes")


def _risk(tier: str, _: RunView, found: Rates) -> float | None:
    return found.risk.get(tier)


def numbers(over: OverRanks, width: int) -> list[Text]:
    """A line for each number that ranks have: the least, the middle, the most, and which rank has that."""
    lines = [Text(f" {'':<19}{'min':>11}{'median':>11}{'max':>11}  rank of max", style="dim")]
    for measure in MEASURES:
        found = over.spreads.get(measure.key)
        if found is None or not found.max:
            continue
        cells = "".join(f"{measure.show(value):>11}" for value in (found.min, found.median, found.max))
        line = Text(f" {measure.label:<19}", style="dim")
        line.append(cells, style="default")
        line.append("" if found.min == found.max else f"  {found.max_rank}", style="bold")
        lines.append(line[:width])
    return lines


def ranks(over: OverRanks, width: int, limit: int | None = None) -> list[Text]:
    """The least, the middle and the most of each column, then a line a rank; ``limit`` cuts lines of ranks off."""
    columns = _WIDE if width >= 112 else _NARROW
    several_hosts = len(over.ranks.hosts) > 1
    head = f"   {'rank':<7}{'status':<9}" + "".join(f"{column.title:>{column.width}}" for column in columns)
    lines = [Text(head[:width], style="dim")]
    of_columns = [over.values(column.of) for column in columns]
    spreads = [spread(values) for values in of_columns]
    for name in ("min", "median", "max"):
        cells = [_cell(column, found and getattr(found, name)) for column, found in zip(columns, spreads, strict=True)]
        lines.append(Text(f"   {name:<16}{''.join(cells)}"[:width], style="bold"))
    shown = _most_telling(over, limit)
    straggler = over.ranks.straggler if over.straggler_text else None
    for view in shown:
        mark = "*" if straggler is not None and view.rank == straggler.rank else " "
        line = Text(f" {mark} {view.rank:<7}", style="bold yellow" if mark == "*" else "default")
        line.append(f"{view.status.value:<9}", style=STATUS_COLORS[view.status])
        for column, values, found in zip(columns, of_columns, spreads, strict=True):
            line.append(_cell(column, values[view.rank]), style=_style(view.rank, found, column, straggler))
        if several_hosts:
            line.append(f"  {printable(view.identity.host, 24)}", style="dim")
        line.truncate(width)
        lines.append(line)
    left = len(over.ranks.views) - len(shown)
    if left:
        lines.append(Text(f"   and {left} more: -r N, or the key r, shows each"[:width], style="dim"))
    return lines


def notes(over: OverRanks, width: int) -> list[Text]:
    """Which rank the others wait for, and which ranks are not there."""
    found = []
    if over.straggler_text:
        text = f" straggler {over.straggler_text}"
        waits = over.spreads.get("wait_seconds")
        more = f"; the others wait up to {seconds(waits.max)}" if waits is not None else ""
        found.append(Text(text + more if len(text + more) <= width else text, style="bold yellow"))
    if over.ranks.missing:
        text = f" {numbers_text(over.ranks.missing)}: not begun, or in the file system of another machine"
        found.append(Text(text, style="dim"))
    return found


def _most_telling(over: OverRanks, limit: int | None) -> Sequence[RunView]:
    """All, or those that differ most: dead ones, the ends of the spreads."""
    views = over.ranks.views
    if limit is None or len(views) <= limit:
        return views
    ends = [rank for found in over.spreads.values() for rank in (found.max_rank, found.min_rank)]
    worst = sorted(views, key=lambda view: (view.status is RunStatus.RUNNING, -ends.count(view.rank), view.rank))
    return sorted([over.ranks.worst, *(v for v in worst if v is not over.ranks.worst)][: max(0, limit - 1)], key=_rank)


def _rank(view: RunView) -> int:
    return view.rank


def _cell(column: _Column, value: float | None) -> str:
    return f"{UNKNOWN if value is None else column.show(value):>{column.width}}"


def _style(rank: int, found: Spread | None, column: _Column, straggler: Straggler | None) -> str:
    if straggler is not None and rank == straggler.rank and column.title == "own part":
        return "bold yellow"
    if column.title == "risk" and found is not None and found.max_rank == rank and found.max >= RISK_HIGH:
        return "bold red"
    return "default"
