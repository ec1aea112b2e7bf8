"""``gemini-stat check``: thresholds for CI."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from gemini.arguments.command_line import option
from gemini.arguments.places import Name
from gemini.arguments.rules import Real, Size, Whole
from gemini.sizes import parse_bytes
from gemini.stat.console import Exit, Usage, find, print_json
from gemini.stat.follow import Follower
from gemini.stat.outputs import Check, Checks
from gemini.stat.over_ranks import OverRanks, Spread, highest_risk, spread
from gemini.stat.rates import Rates
from gemini.stat.text import percent, printable, size
from gemini.telemetry.files import SMALL_DOCUMENT_BYTES, number, parsed
from gemini.telemetry.layout import TIERS
from gemini.telemetry.ranks import Ranks
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import RunView

Number = Callable[[RunView, Rates], float | None]
Show = Callable[[float | None], str]

HELP = "Compares a run with thresholds; exits 3 if one is violated, 5 if the run crashed or is stalled."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-peak", action="append", default=[], metavar="TIER=SIZE", help="such as host=22GiB; may be repeated"
    )
    parser.add_argument("--max-non-model", type=option(Size()), metavar="SIZE", help="highest non-model data")
    parser.add_argument(
        "--max-rss", type=option(Size()), metavar="SIZE", help="highest RAM of the process, of what is recorded"
    )
    parser.add_argument("--max-risk", type=option(Real(0)), metavar="RATIO", help="such as 0.9, of any tier")
    parser.add_argument("--min-hit-ratio", type=option(Real(0, 1)), metavar="RATIO", help="share of needs met in time")
    parser.add_argument(
        "--max-stall-ratio", type=option(Real(0)), metavar="RATIO", help="share of a step spent waiting"
    )
    parser.add_argument("--max-step-seconds", type=option(Real(0)), metavar="S", help="the last step's time")
    parser.add_argument("--min-steps", type=option(Whole()), metavar="N", help="steps done")
    parser.add_argument(
        "--against-estimate", type=option(Name()), metavar="FILE", help="what gemini-stat estimate --json printed"
    )
    parser.add_argument(
        "--tolerance", type=option(Real(0)), default=0.05, metavar="RATIO", help="of --against-estimate (0.05)"
    )


def run(options: argparse.Namespace) -> Exit:
    shown = Follower(find(options), options).look()
    over = shown.over_ranks or OverRanks(Ranks(views=(shown.run,)), [shown.rates])
    results = list(_results(over, options))
    if not results:
        raise Usage("nothing to check: give at least one threshold, such as --max-peak host=22GiB")
    sight = shown.sight
    bad = sight.status in (RunStatus.CRASHED, RunStatus.STALLED)
    if options.json:
        ok = all(item.ok for item in results) and not bad
        print_json(Checks(shown.run.identity.run_id, ok, sight.status.value, results))
    else:
        for item in results:
            print(f"{'ok  ' if item.ok else 'FAIL'}  {item.text}")
        if bad:
            print(f"FAIL  the run is {sight.status.value}: {printable(sight.reason)}")
    return Exit.BAD_RUN if bad else Exit.OK if all(item.ok for item in results) else Exit.NEGATIVE


def _results(over: OverRanks, options: argparse.Namespace) -> Iterator[Check]:
    """One for each threshold; of several ranks the one that is nearest to it counts."""

    def at_most(name: str, of: Number, limit: float, show: Show) -> Check:
        return _compared(name, spread(over.values(of)), limit, show, over, is_most=True)

    def at_least(name: str, of: Number, limit: float, show: Show) -> Check:
        return _compared(name, spread(over.values(of)), limit, show, over, is_most=False)

    for text in options.max_peak:
        tier, _, limit = text.partition("=")
        if tier not in TIERS or not limit:
            raise Usage(f"--max-peak expects TIER=SIZE with a tier of {', '.join(TIERS)}, got {text!r}")
        yield at_most(f"peak on {tier}", _peak(tier), _bytes(limit, text), size)
    if options.max_non_model is not None:
        yield at_most("non-model data", _stat("non_model/peak_bytes"), options.max_non_model, size)
    if options.max_rss is not None:
        rss: Number = lambda run, _: run.process.get("rss_peak_bytes")  # noqa: E731 - as short as the others
        yield at_most("RAM of the process", rss, options.max_rss, size)
    if options.max_risk is not None:
        yield at_most("risk", lambda _, found: highest_risk(found), options.max_risk, percent)
    if options.max_stall_ratio is not None:
        yield at_most("waiting", lambda _, found: found.stall_ratio, options.max_stall_ratio, percent)
    if options.max_step_seconds is not None:
        yield at_most("seconds a step", lambda _, found: found.step_seconds, options.max_step_seconds, _three_digits)
    if options.min_hit_ratio is not None:
        yield at_least("hit ratio", lambda _, found: found.hit_ratio, options.min_hit_ratio, percent)
    if options.min_steps is not None:
        yield at_least("steps", _stat("step/count"), options.min_steps, lambda v: f"{v:,.0f}")
    if options.against_estimate is not None:
        yield from _against(over, options.against_estimate, options.tolerance)


def _peak(tier: str) -> Number:
    return lambda run, _: run.peaks.get(tier)


def _stat(key: str) -> Number:
    return lambda run, _: run.stats.get(key)


def _three_digits(value: float | None) -> str:
    return f"{value:.3f}"


def _against(over: OverRanks, file: Path, tolerance: float) -> Iterator[Check]:
    try:
        estimate = parsed(_estimate(file))
        tiers = estimate["tiers"]
        expected = {tier: number(tiers[tier]["model_bytes"]) for tier in TIERS if tier in tiers}
        non_model = number(estimate.get("non_model_bytes"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Usage(f"{file} is not what gemini-stat estimate --json prints: {error!r}") from error
    numbers = {f"model data on {tier}": (_peak(tier), value) for tier, value in expected.items()}
    numbers["non-model data"] = (_stat("non_model/peak_bytes"), non_model)
    for name, (of, value) in numbers.items():
        found = spread(over.values(of))
        seen = None if found is None else found.max
        if not value and not seen:
            continue
        off = None if not value or seen is None else seen / value - 1
        ok = off is not None and abs(off) <= tolerance
        text = f"{name}: measured {size(seen)}, estimated {size(value)} ({'-' if off is None else f'{off:+.1%}'})"
        rank = _rank(found, over, is_most=True)
        yield Check(name, seen, value, ok, text + ("" if rank is None else f", on rank {rank}"), rank)


def _estimate(file: Path) -> bytes:
    """What is in a file that the user names; a pipe, too, as a shell makes for ``<(gemini-stat estimate --json)``."""
    with open(file, "rb") as stream:
        text = stream.read(SMALL_DOCUMENT_BYTES + 1)
    if len(text) > SMALL_DOCUMENT_BYTES:
        raise ValueError(f"it has more than {SMALL_DOCUMENT_BYTES} bytes")
    return text


def _compared(name: str, found: Spread | None, limit: float, show: Show, over: OverRanks, *, is_most: bool) -> Check:
    value = None if found is None else found.max if is_most else found.min
    ok = value is not None and (value <= limit if is_most else value >= limit)
    rank = _rank(found, over, is_most)
    text = f"{name} {'unknown' if value is None else show(value)}, {'at most' if is_most else 'at least'} {show(limit)}"
    if found is not None and rank is not None:
        text += f" (rank {rank}; min {show(found.min)}, median {show(found.median)}, max {show(found.max)})"
    return Check(name, value, limit, ok, text, rank)


def _rank(found: Spread | None, over: OverRanks, is_most: bool) -> int | None:
    """The rank that decides, where there are several."""
    if found is None or len(over.ranks.views) < 2:
        return None
    return found.max_rank if is_most else found.min_rank


def _bytes(limit: str, text: str) -> int:
    try:
        return parse_bytes(limit)
    except ValueError as error:
        raise Usage(f"--max-peak {text}: {error}") from error
