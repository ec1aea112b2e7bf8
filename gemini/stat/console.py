"""Where output goes and how it looks there: exit codes, JSON, colour, plain text. Shared by all commands."""

import argparse
import json
import os
import shutil
import sys
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemini.arguments.rules import Real
from gemini.stat.text import printable
from gemini.telemetry.discovery import find_run
from gemini.telemetry.run_status import RunStatus

if TYPE_CHECKING:
    from msgspec import Struct

INTERVAL = Real(0, 86400, has_low=False)
"""Seconds between two looks."""

SCHEMA_VERSION = 1
"""Of ``--json``. Raised when a field goes or changes its meaning; fields may be added without."""


class Exit(IntEnum):
    """Exit codes. 1 is for what we did not foresee, so that scripts can tell it from an answer."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    NEGATIVE = 3
    NO_RUN = 4
    BAD_RUN = 5
    UNREADABLE = 6
    INTERRUPTED = 130
    TERMINATED = 143


class Usage(Exception):
    """The command cannot be meant like that."""


def of_run(status: RunStatus) -> Exit:
    return Exit.BAD_RUN if status in (RunStatus.CRASHED, RunStatus.STALLED) else Exit.OK


def find(options: argparse.Namespace) -> Path:
    """The run's folder; a remark on the choice goes to stderr."""
    path, note = find_run(options.target)
    if note and not options.json:
        remark(note)
    return path


def rank(text: str) -> str:
    """For argparse: a number, ``all`` or ``worst``."""
    if text in ("all", "worst") or (text.isascii() and text.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"expected a number, 'all' or 'worst', got {text!r}")


def print_json(content: "Struct") -> None:
    print(as_text(_versioned(content), indent=2))


def print_json_line(content: "Struct") -> None:
    """For streams: one object a line."""
    print(as_text(_versioned(content), separators=(",", ":")), flush=True)


def _versioned(content: "Struct") -> dict[str, Any]:
    # msgspec, too, is imported where it is used.
    from msgspec.structs import asdict

    return {"schema_version": SCHEMA_VERSION, **asdict(content)}


def as_text(content: Any, **options: Any) -> str:
    """JSON of anything with structs in it, in ASCII, so that no character of a file reaches the terminal as it is."""
    from msgspec import to_builtins

    return json.dumps(content, allow_nan=False, default=to_builtins, **options)


def remark(text: str) -> None:
    print(f"gemini-stat: {printable(text)}", file=sys.stderr)


def is_ascii(options: argparse.Namespace) -> bool:
    """True where block characters would come out as question marks, or were not asked for."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    return bool(options.ascii) or "utf" not in encoding


def console(options: argparse.Namespace, pipe_columns: int | None = None) -> Any:
    """A rich console that writes to stdout, with colour on a terminal only.

    A pipe is at least ``pipe_columns`` wide, if that is given: its reader need not be a terminal.
    """
    # rich is imported where it is used: --json and the error paths start without it.
    from rich.console import Console

    # Only text of ours and escaped text from files is printed: no markup, no highlighting of numbers by guess.
    if options.color == "always":
        made = Console(markup=False, highlight=False, emoji=False, force_terminal=True, no_color=False)
    else:
        on_terminal = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
        wanted = options.color == "auto" and on_terminal and not os.environ.get("NO_COLOR")
        wanted = wanted and os.environ.get("TERM") != "dumb"
        in_pipe = pipe_columns is not None and not sys.stdout.isatty()
        width = max(shutil.get_terminal_size().columns, pipe_columns or 0) if in_pipe else None
        made = Console(markup=False, highlight=False, emoji=False, color_system="auto" if wanted else None, width=width)
    return made


def show(shown_on: Any, renderable: Any) -> None:
    """Print without the blanks that fill a line up to its edge, which a pipe should not see."""
    with shown_on.capture() as capture:
        shown_on.print(renderable)
    for line in capture.get().splitlines():
        print(line.rstrip(" "))
