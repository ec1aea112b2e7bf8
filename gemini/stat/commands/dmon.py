"""``gemini-stat dmon``: a row every few seconds, for logs, pipes and narrow windows."""

import argparse
import sys
import time
from collections.abc import Callable

from gemini.stat import as_json
from gemini.stat.console import Exit, Usage, find, of_run, print_json_line
from gemini.stat.follow import Follower
from gemini.stat.screen import Shown
from gemini.stat.text import UNKNOWN, count, percent, seconds, size
from gemini.telemetry.run_status import RunStatus

HELP = "Prints a row every few seconds until the run has ended."

Column = tuple[str, int, Callable[[Shown], str]]


def _stat(key: str, show: Callable[[float | None], str] = size) -> Callable[[Shown], str]:
    return lambda shown: show(shown.run.stats.get(key))


GROUPS: dict[str, list[Column]] = {
    "t": [
        ("device", 10, _stat("device/used_bytes")),
        ("host", 10, _stat("host/used_bytes")),
        ("disk", 10, _stat("disk/used_bytes")),
        ("non-model", 10, _stat("non_model/peak_bytes")),
    ],
    "c": [("copies", 7, _stat("chunk/resident_count", count))],
    "m": [
        ("hit", 6, lambda shown: percent(shown.rates.hit_ratio, 0)),
        ("waited", 9, lambda shown: seconds(shown.rates.stall_seconds)),
    ],
    "b": [
        ("fetched", 12, lambda shown: _link(shown, "device")),
        ("from disk", 12, lambda shown: _speed(shown, "disk", "host")),
        ("to disk", 12, lambda shown: _speed(shown, "host", "disk")),
    ],
    "r": [
        ("rss", 10, lambda shown: size(shown.run.process.get("rss_bytes"))),
        ("risk", 6, lambda shown: percent(_worst(shown), 0)),
    ],
}


def _worst(shown: Shown) -> float | None:
    return max((risk for risk in shown.rates.risk.values() if risk is not None), default=None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--interval", type=float, default=1.0, metavar="S", help="seconds between rows (1)")
    parser.add_argument("-c", "--count", type=int, metavar="N", help="stop after N rows")
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
    if options.interval <= 0 or (options.count is not None and options.count <= 0):
        raise Usage("--interval and --count must be positive")
    columns = [column for letter in options.select for column in GROUPS[letter]]
    follower = Follower(find(options), options)
    row = 0
    while True:
        shown = follower.look()
        if options.json:
            print_json_line(as_json.row(shown))
        else:
            if row % 20 == 0 and (row == 0 or sys.stdout.isatty()):
                print(_header(columns), flush=True)
            print(_row(shown, columns), flush=True)
        row += 1
        if row == options.count or shown.run.status in (RunStatus.FINISHED, RunStatus.CRASHED):
            return of_run(shown.run)
        time.sleep(options.interval)


def _header(columns: list[Column]) -> str:
    return (
        "#  " + f"{'time':>8}{'step':>9}{'s/step':>10}" + "".join(f"{name:>{width + 1}}" for name, width, _ in columns)
    )


def _row(shown: Shown, columns: list[Column]) -> str:
    run = shown.run
    mark = {RunStatus.RUNNING: "R", RunStatus.FINISHED: "F", RunStatus.CRASHED: "X", RunStatus.STALLED: "S"}
    step = UNKNOWN if run.step is None else f"{run.step:,}"
    cells = "".join(f"{make(shown):>{width + 1}}" for _, width, make in columns)
    each = seconds(run.stats.get("step/seconds"))
    return f"{mark.get(run.status, '?')}  {time.strftime('%H:%M:%S')}{step:>9}{each:>10}{cells}"


def _link(shown: Shown, target: str) -> str:
    total = sum(link.bytes_per_step or 0.0 for link in shown.rates.links if link.target == target)
    return f"{size(total)}/st"


def _speed(shown: Shown, source: str, target: str) -> str:
    for link in shown.rates.links:
        if (link.source, link.target) == (source, target) and link.bytes_per_second:
            return f"{size(link.bytes_per_second)}/s"
    return UNKNOWN
