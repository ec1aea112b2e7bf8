"""``gemini-stat check``: thresholds for CI."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemini.sizes import parse_bytes
from gemini.stat.console import Exit, Usage, find, print_json
from gemini.stat.follow import Follower
from gemini.stat.outputs import Check, Checks
from gemini.stat.screen import Shown
from gemini.stat.text import percent, printable, size
from gemini.telemetry.files import number
from gemini.telemetry.layout import TIERS
from gemini.telemetry.run_status import RunStatus

HELP = "Compares a run with thresholds; exits 3 if one is violated, 5 if the run crashed or is stalled."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-peak", action="append", default=[], metavar="TIER=SIZE", help="such as host=22GiB; may be repeated"
    )
    parser.add_argument("--max-non-model", metavar="SIZE", help="highest non-model data")
    parser.add_argument("--max-rss", metavar="SIZE", help="highest RAM of the process, of what is recorded")
    parser.add_argument("--max-risk", type=float, metavar="RATIO", help="such as 0.9, of any tier")
    parser.add_argument("--min-hit-ratio", type=float, metavar="RATIO", help="share of needs met in time")
    parser.add_argument("--max-stall-ratio", type=float, metavar="RATIO", help="share of a step spent waiting")
    parser.add_argument("--max-step-seconds", type=float, metavar="S", help="the last step's time")
    parser.add_argument("--min-steps", type=int, metavar="N", help="steps done")
    parser.add_argument("--against-estimate", metavar="FILE", help="what gemini-stat estimate --json printed")
    parser.add_argument("--tolerance", type=float, default=0.05, metavar="RATIO", help="of --against-estimate (0.05)")


def run(options: argparse.Namespace) -> Exit:
    shown = Follower(find(options), options).look()
    results = list(_results(shown, options))
    if not results:
        raise Usage("nothing to check: give at least one threshold, such as --max-peak host=22GiB")
    bad = shown.run.status in (RunStatus.CRASHED, RunStatus.STALLED)
    if options.json:
        ok = all(item.ok for item in results) and not bad
        print_json(Checks(shown.run.identity.run_id, ok, shown.run.status.value, results))
    else:
        for item in results:
            print(f"{'ok  ' if item.ok else 'FAIL'}  {item.text}")
        if bad:
            print(f"FAIL  the run is {shown.run.status.value}: {printable(shown.run.reason)}")
    return Exit.BAD_RUN if bad else Exit.OK if all(item.ok for item in results) else Exit.NEGATIVE


def _results(shown: Shown, options: argparse.Namespace) -> Iterator[Check]:
    run, found = shown.run, shown.rates
    for text in options.max_peak:
        tier, _, limit = text.partition("=")
        if tier not in TIERS or not limit:
            raise Usage(f"--max-peak expects TIER=SIZE with a tier of {', '.join(TIERS)}, got {text!r}")
        yield _at_most(f"peak on {tier}", run.peaks.get(tier), _bytes(limit), size)
    if options.max_non_model is not None:
        yield _at_most("non-model data", run.stats.get("non_model/peak_bytes"), _bytes(options.max_non_model), size)
    if options.max_rss is not None:
        yield _at_most("RAM of the process", run.process.get("rss_peak_bytes"), _bytes(options.max_rss), size)
    if options.max_risk is not None:
        worst = max((risk for risk in found.risk.values() if risk is not None), default=None)
        yield _at_most("risk", worst, options.max_risk, percent)
    if options.max_stall_ratio is not None:
        yield _at_most("waiting", found.stall_ratio, options.max_stall_ratio, percent)
    if options.max_step_seconds is not None:
        yield _at_most("seconds a step", found.step_seconds, options.max_step_seconds, lambda v: f"{v:.3f}")
    if options.min_hit_ratio is not None:
        yield _at_least("hit ratio", found.hit_ratio, options.min_hit_ratio, percent)
    if options.min_steps is not None:
        yield _at_least("steps", run.step, options.min_steps, lambda v: f"{v:,.0f}")
    if options.against_estimate is not None:
        yield from _against(shown, Path(options.against_estimate), options.tolerance)


def _against(shown: Shown, file: Path, tolerance: float) -> Iterator[Check]:
    try:
        tiers = json.loads(file.read_text())["tiers"]
        expected = {tier: number(tiers[tier]["model_bytes"]) for tier in TIERS if tier in tiers}
        non_model = number(json.loads(file.read_text()).get("non_model_bytes"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Usage(f"{file} is not what gemini-stat estimate --json prints: {error!r}") from error
    measured: dict[str, float | None] = {f"model data on {tier}": shown.run.peaks.get(tier) for tier in expected}
    predicted: dict[str, float | None] = {f"model data on {tier}": value for tier, value in expected.items()}
    measured["non-model data"], predicted["non-model data"] = shown.run.stats.get("non_model/peak_bytes"), non_model
    for name, value in predicted.items():
        seen = measured[name]
        if not value and not seen:
            continue
        off = None if not value or seen is None else seen / value - 1
        ok = off is not None and abs(off) <= tolerance
        text = f"{name}: measured {size(seen)}, estimated {size(value)} ({'-' if off is None else f'{off:+.1%}'})"
        yield Check(name, seen, value, ok, text)


def _at_most(name: str, value: float | None, limit: float, show: Any) -> Check:
    ok = value is not None and value <= limit
    return _result(name, value, limit, ok, "at most", show)


def _at_least(name: str, value: float | None, limit: float, show: Any) -> Check:
    ok = value is not None and value >= limit
    return _result(name, value, limit, ok, "at least", show)


def _result(name: str, value: float | None, limit: float, ok: bool, word: str, show: Any) -> Check:
    shown = "unknown" if value is None else show(value)
    return Check(name, value, limit, ok, f"{name} {shown}, {word} {show(limit)}")


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise Usage(str(error)) from error
