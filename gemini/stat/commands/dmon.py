"""``gemini-stat dmon``: a row every few seconds, for logs, pipes and narrow windows."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from gemini.arguments.command_line import option
from gemini.arguments.rules import Whole
from gemini.stat import as_json
from gemini.stat.console import INTERVAL, Exit, Usage, find, of_run, print_json_line
from gemini.stat.follow import Follower
from gemini.stat.over_ranks import OverRanks, highest_risk, spread
from gemini.stat.rates import Rates
from gemini.stat.screen import Shown
from gemini.stat.text import UNKNOWN, count, percent, seconds, size
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import RunView

HELP = "Prints a row every few seconds until the run has ended."

Number = Callable[[RunView, Rates], float | None]
Column = tuple[str, int, Callable[[float | None], str], Number]


def _stat(key: str) -> Number:
    return lambda run, _: run.stats.get(key)


def _fetched(found: Rates) -> float:
    return sum(link.bytes_per_step or 0.0 for link in found.links if link.target == "device")


def _speed(found: Rates, source: str, target: str) -> float | None:
    links = (link for link in found.links if (link.source, link.target) == (source, target))
    return next((link.bytes_per_second for link in links if link.bytes_per_second), None)


def _per_second(value: float | None) -> str:
    return UNKNOWN if value is None else f"{size(value)}/s"


GROUPS: dict[str, list[Column]] = {
    "t": [
        ("device", 10, size, _stat("device/used_bytes")),
        ("host", 10, size, _stat("host/used_bytes")),
        ("disk", 10, size, _stat("disk/used_bytes")),
        ("non-model", 10, size, _stat("non_model/peak_bytes")),
    ],
    "c": [("copies", 7, count, _stat("chunk/resident_count"))],
    "m": [
        ("hit", 6, lambda value: percent(value, 0), lambda _, found: found.hit_ratio),
        ("waited", 9, seconds, lambda _, found: found.stall_seconds),
    ],
    "b": [
        ("fetched", 12, lambda value: f"{size(value)}/st", lambda _, found: _fetched(found)),
        ("from disk", 12, _per_second, lambda _, found: _speed(found, "disk", "host")),
        ("to disk", 12, _per_second, lambda _, found: _speed(found, "host", "disk")),
    ],
    "r": [
        ("rss", 10, size, lambda run, _: run.process.get("rss_bytes")),
        ("risk", 6, lambda value: percent(value, 0), lambda _, found: highest_risk(found)),
    ],
}
RANKED: list[Column] = [
    ("own part", 9, seconds, lambda run, _: run.own_seconds),
    ("for ranks", 9, seconds, lambda run, _: run.window.means.get("step/wait_seconds")),
]
"""What is shown of several ranks beside the columns chosen."""
_STEP: Column = ("step", 8, count, _stat("step/count"))
_STEP_SECONDS: Column = ("s/step", 9, seconds, _stat("step/seconds"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-d", "--interval", type=option(INTERVAL), default=1.0, metavar="S", help="seconds between rows (1)"
    )
    parser.add_argument("-c", "--count", type=option(Whole(1)), metavar="N", help="stop after N rows")
    parser.add_argument(
        "-s",
        "--select",
        default="tmr",
        metavar="LETTERS",
        help="t tiers, c chunks, m misses, b bandwidth, r risk (tmr)",
    )


def run(options: argparse.Namespace) -> Exit:
    if unknown := set(options.select) - set(GROUPS):
        raise Usage(f"--select knows the letters {''.join(GROUPS)}, got {''.join(sorted(unknown))!r}")
    chosen = [column for letter in options.select for column in GROUPS[letter]]
    follower = Follower(find(options), options)
    row = 0
    while True:
        shown = follower.look()
        if options.json:
            print_json_line(as_json.row(shown))
        else:
            over = shown.over_ranks
            columns = [_STEP, _STEP_SECONDS, *(RANKED if over is not None else ()), *chosen]
            if row % 20 == 0 and (row == 0 or sys.stdout.isatty()):
                print(_header(columns, over is not None), flush=True)
            rows = [_row(shown, columns)] if over is None else _rows(shown, over, columns)
            print(*rows, sep="\n", flush=True)
        row += 1
        if row == options.count or shown.sight.status in (RunStatus.FINISHED, RunStatus.CRASHED):
            return of_run(shown.sight.status)
        time.sleep(options.interval)


def _header(columns: list[Column], is_ranked: bool) -> str:
    of_ranks = "  over ranks" if is_ranked else ""
    return f"#  {'time':>8}{of_ranks}" + "".join(f"{name:>{width + 1}}" for name, width, _, _ in columns)


def _row(shown: Shown, columns: list[Column]) -> str:
    cells = "".join(f"{show(of(shown.run, shown.rates)):>{width + 1}}" for _, width, show, of in columns)
    return f"{_begin(shown)}{cells}"


def _rows(shown: Shown, over: OverRanks, columns: list[Column]) -> Iterator[str]:
    """The least, the middle and the most of each column; the last row also names the straggler."""
    spreads = [spread(over.values(of)) for _, _, _, of in columns]
    for name in ("min", "median", "max"):
        cells = [
            f"{UNKNOWN if found is None else show(getattr(found, name)):>{width + 1}}"
            for (_, width, show, _), found in zip(columns, spreads, strict=True)
        ]
        straggler = over.ranks.straggler if name == "max" and over.straggler_text else None
        yield f"{_begin(shown)}  {name:<10}{''.join(cells)}" + (f"  rank {straggler.rank}" if straggler else "")


def _begin(shown: Shown) -> str:
    return f"{_MARKS.get(shown.sight.status, '?')}  {time.strftime('%H:%M:%S')}"


_MARKS: Mapping[RunStatus, str] = {
    RunStatus.RUNNING: "R",
    RunStatus.FINISHED: "F",
    RunStatus.CRASHED: "X",
    RunStatus.STALLED: "S",
}
