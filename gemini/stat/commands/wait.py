"""``gemini-stat wait``: block until a run has got somewhere, for scripts."""

import argparse
import time

from gemini.arguments.command_line import option
from gemini.arguments.rules import Real, Whole
from gemini.stat import as_json
from gemini.stat.console import Exit, find, print_json, remark
from gemini.stat.outputs import Waited
from gemini.stat.sight import Sight, read
from gemini.telemetry.discovery import NoRun
from gemini.telemetry.files import Unreadable
from gemini.telemetry.run_status import RunStatus

HELP = "Blocks until the run is there, steady, finished, or at a step. Exits 5 if it crashes, 3 if time is up."
_POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--state",
        choices=("started", "steady", "finished"),
        default="finished",
        help="steady: the warm-up is over, at least two steps are done (default: finished)",
    )
    group.add_argument("--step", type=option(Whole()), metavar="N", help="until step N is done")
    parser.add_argument("--timeout", type=option(Real(0)), metavar="S", help="give up after S seconds (default: never)")


def run(options: argparse.Namespace) -> Exit:
    end = None if options.timeout is None else time.monotonic() + options.timeout
    path, found = None, None
    while True:
        try:
            path = path or find(options)  # only the first time: a newer run is not the one that was meant
            found = read(path, options)
        except (NoRun, Unreadable):
            if end is None or options.target is None:
                raise  # nothing to wait for is a mistake, unless the run was named and time is bounded
        if found is not None and _is_there(found, options):
            return _answer(found, options, Exit.OK, "")
        if found is not None and found.status in (RunStatus.FINISHED, RunStatus.CRASHED):
            bad = found.status is RunStatus.CRASHED
            how = f"the run {found.status.value}" + (f": {found.reason}" if found.reason else "")
            return _answer(found, options, Exit.BAD_RUN if bad else Exit.NEGATIVE, how)
        if end is not None and time.monotonic() >= end:
            return _answer(found, options, Exit.NEGATIVE, f"not there after {options.timeout:g} s")
        time.sleep(_POLL_SECONDS)


def _is_there(found: Sight, options: argparse.Namespace) -> bool:
    step = found.step or 0
    if options.step is not None:
        return bool(step >= options.step)
    if options.state == "finished":
        return found.status is RunStatus.FINISHED
    return found.run.updated is not None if options.state == "started" else bool(step >= 2)


def _answer(found: Sight | None, options: argparse.Namespace, code: Exit, text: str) -> Exit:
    if options.json:
        print_json(Waited(code is Exit.OK, text or None, None if found is None else as_json.brief(found)))
    elif text:
        remark(text)
    return code
