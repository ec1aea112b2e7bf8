"""The command ``gemini-stat``. Data go to stdout, remarks and errors to stderr."""

import argparse
import importlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import NoReturn

from gemini import __version__
from gemini.arguments.command_line import Parser, one_line
from gemini.stat.commands import MODULES, SUMMARY
from gemini.stat.console import Exit, Usage, print_json, rank
from gemini.stat.text import printable
from gemini.telemetry.discovery import NoRun
from gemini.telemetry.files import Unreadable

_EXAMPLES = """\
examples:
  gemini-stat                  the newest live run, else the newest run
  gemini-stat 12345            the run of process 12345
  gemini-stat ls               all runs: status, step, age
  gemini-stat --json | jq .tiers.device.used_ratio
"""

_EPILOG = """\
Sizes are binary (1 GiB = 2**30 bytes). Every command takes --json and --help.
All is read-only, but for lease --host, --device, --disk, which ask a run.

exit codes: 0 ok, 1 internal error, 2 wrong usage, 3 a negative answer,
            4 no run found, 5 the run crashed or is stalled,
            6 unreadable or newer telemetry, 130 interrupted, 143 terminated
"""

_WITH_VALUES = ("-r", "--rank", "--color", "-d", "--interval")
"""Options of plain ``gemini-stat`` that take a value: what follows is no command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no reason to fail
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = _command(given)
    module = importlib.import_module(MODULES[name])
    is_json = "--json" in rest
    try:
        options = _parser(name, module).parse_args(rest)
    except Usage as error:
        return int(_fail(is_json, Exit.USAGE, str(error)))
    try:
        code = module.run(options)
        sys.stdout.flush()
    except Usage as error:
        code = _fail(is_json, Exit.USAGE, str(error))
    except NoRun as error:
        code = _fail(is_json, Exit.NO_RUN, f"no run found: {error}{_meant(options.target)}")
    except Unreadable as error:
        code = _fail(is_json, Exit.UNREADABLE, str(error))
    except BrokenPipeError:
        # The reader has seen enough. stdout goes nowhere from here on, or the interpreter's own flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.OK
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        code = _fail(is_json, Exit.INTERNAL, f"internal error: {type(error).__name__}: {error} (-v shows where)")
    return int(code)


class _Parser(Parser):
    """Mistakes are told as those that a command finds: as JSON where that was asked for."""

    def error(self, message: str) -> NoReturn:
        raise Usage(one_line(message))


def _command(given: list[str]) -> tuple[str, list[str]]:
    """The command's name and the arguments without it: the first one that is no option nor an option's value."""
    skip = False
    for index, argument in enumerate(given):
        if skip:
            skip = False
        elif argument in _WITH_VALUES:
            skip = True
        elif argument == "--":
            break
        elif not argument.startswith("-"):
            if argument in MODULES and argument != "show":
                return argument, given[:index] + given[index + 1 :]
            break
    return "show", given


def _parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    is_plain = name == "show"
    about = textwrap.fill(module.HELP, 78)
    parser = _Parser(
        prog="gemini-stat" if is_plain else f"gemini-stat {name}",
        usage="gemini-stat [COMMAND] [TARGET] [options]" if is_plain else None,
        description=f"{_EXAMPLES}\n{about}\n\ncommands:\n{SUMMARY}" if is_plain else about,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    target = getattr(module, "TARGET_HELP", "run folder, run id or process id; nothing: the newest live run")
    parser.add_argument("target", metavar=getattr(module, "TARGET", "TARGET"), nargs="?", help=target)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "-r", "--rank", type=rank, metavar="N", help="of several ranks: one, 'worst', or 'all' beside each other (all)"
    )
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")
    parser.add_argument("--ascii", action="store_true", help="no block characters")
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an internal error happened")
    parser.add_argument("-V", "--version", action="version", version=_version())
    module.add_arguments(parser)
    return parser


def _version() -> str:
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    return f"gemini-stat {__version__} (Python {sys.version.split()[0]}, torch {torch})"


def _meant(target: str | None) -> str:
    import difflib

    close = difflib.get_close_matches(target or "", [name for name in MODULES if name != "show"], 1)
    return f"; did you mean gemini-stat {close[0]}?" if close else ""


def _fail(is_json: bool, code: Exit, message: str) -> Exit:
    if is_json:
        from gemini.stat.outputs import Failed, Failure

        print_json(Failed(Failure(code, message)))
    else:
        print(f"gemini-stat: {printable(message, 500)}", file=sys.stderr)
    return code
