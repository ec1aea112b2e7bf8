"""The command ``gemini-stat``. Data go to stdout, remarks and errors to stderr."""

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from enum import IntEnum
from importlib import metadata
from typing import Any

from gemini import __version__
from gemini.stat import as_json
from gemini.stat.text import printable
from gemini.telemetry.discovery import NoRun, find_run, list_runs
from gemini.telemetry.layout import runs_folder
from gemini.telemetry.reader import RunStatus, RunView, Unreadable, read_run

_EXAMPLES = """\
examples:
  gemini-stat                  the newest live run, else the newest run
  gemini-stat 12345            the run of process 12345
  gemini-stat ls               all runs: status, step, age
  gemini-stat --json | jq .tiers.device.used_ratio
"""

_EPILOG = """\
Sizes are binary (1 GiB = 2**30 bytes). "peak" is the highest use so far; in the
bar it is the shaded part beyond what is used now.

exit codes: 0 ok, 1 internal error, 2 wrong usage, 4 no run found,
            5 the run crashed or is stalled, 6 unreadable or newer telemetry
"""


class Exit(IntEnum):
    """Exit codes. 1 is for what we did not foresee, so that scripts can tell it from an answer."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    NO_RUN = 4
    BAD_RUN = 5
    UNREADABLE = 6
    INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no reason to fail
    options = _parser().parse_args(arguments)
    try:
        code = _run(options)
        sys.stdout.flush()
    except NoRun as error:
        code = _fail(options, Exit.NO_RUN, f"no run found: {error}")
    except Unreadable as error:
        code = _fail(options, Exit.UNREADABLE, str(error))
    except BrokenPipeError:
        # The reader has seen enough. stdout goes nowhere from here on, or the interpreter's own flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.OK
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        code = _fail(options, Exit.INTERNAL, f"internal error: {type(error).__name__}: {error} (-v shows where)")
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gemini-stat",
        usage="gemini-stat [TARGET | ls] [options]",
        description=_EXAMPLES + "\nShows where a training run's memory is.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", nargs="?", help="run folder, run id or process id; 'ls': all runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-r", "--rank", type=int, metavar="N", help="of a run with several ranks, the one to show")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an internal error happened")
    parser.add_argument("-V", "--version", action="version", version=_version())
    return parser


def _version() -> str:
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    return f"gemini-stat {__version__} (Python {sys.version.split()[0]}, torch {torch})"


def _run(options: argparse.Namespace) -> Exit:
    if options.target == "ls":
        return _list(options)
    path, remark = find_run(options.target)
    run = read_run(path, options.rank)
    if options.rank is not None and run.updated is None:
        raise NoRun(f"{path} has no rank {options.rank}")
    if options.json:
        _print_json(as_json.snapshot(run))
    else:
        if remark:
            _remark(remark)
        _print_snapshot(run, options.color)
    return Exit.BAD_RUN if run.status in (RunStatus.CRASHED, RunStatus.STALLED) else Exit.OK


def _list(options: argparse.Namespace) -> Exit:
    runs = list_runs()
    if options.json:
        _print_json(as_json.listing(runs))
    elif runs:
        from gemini.stat import listing

        _print(_console(options.color), listing.render(runs))
    else:
        _remark(f"no runs in {runs_folder()}")
    return Exit.OK


def _print_snapshot(run: RunView, color: str) -> None:
    from gemini.stat import snapshot

    console = _console(color)
    _print(console, snapshot.render(run, console))


def _console(color: str) -> Any:
    # rich is imported where it is used: --json and the error paths start without it.
    from rich.console import Console

    # Only text of ours and escaped text from files is printed: no markup, no highlighting of numbers by guess.
    if color == "always":
        return Console(markup=False, highlight=False, emoji=False, force_terminal=True, no_color=False)
    on_terminal = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    wanted = color == "auto" and on_terminal and not os.environ.get("NO_COLOR")
    return Console(markup=False, highlight=False, emoji=False, color_system="auto" if wanted else None)


def _print(console: Any, renderable: Any) -> None:
    with console.capture() as capture:
        console.print(renderable)
    for line in capture.get().splitlines():
        print(line.rstrip(" "))  # rich fills columns to the edge, which a pipe should not see


def _print_json(content: dict[str, Any]) -> None:
    # ASCII only, so that no character of a file reaches the terminal as it is.
    print(json.dumps(content, indent=2, allow_nan=False))


def _fail(options: argparse.Namespace, code: Exit, message: str) -> Exit:
    if options.json:
        _print_json(as_json.failure(code, message))
    else:
        print(f"gemini-stat: {printable(message, 500)}", file=sys.stderr)
    return code


def _remark(text: str) -> None:
    print(f"gemini-stat: {printable(text)}", file=sys.stderr)
