"""``gemini-stat verify``: are the files of a checkpoint as they were written?"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemini import formats
from gemini.formats.verification import State, Tell, Verdict, Verified, find, nbytes_of, verify
from gemini.stat.console import Exit, Usage, console, is_ascii, print_json
from gemini.stat.outputs import Verification, VerifiedCheckpoint, VerifiedFile
from gemini.stat.text import printable, seconds, size
from gemini.telemetry.files import Unreadable

HELP = (
    "Compares the files of a checkpoint with their sizes and checksums: what booster.save wrote, folders in the "
    "Hugging Face layout, single files, and all checkpoints below a folder. Of files without checksums only the "
    "structure is looked at. Exits 3 if anything is damaged, 6 if something cannot be read."
)
TARGET = "PATH"
TARGET_HELP = "folder of a checkpoint or of several, or one file"

_STYLES = {State.WHOLE: "green", State.NO_CHECKSUM: "yellow", State.DAMAGED: "bold red", State.UNREADABLE: "bold red"}
_SECONDS_WITHOUT_BAR = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="only the files that something is wrong with")


def run(options: argparse.Namespace) -> Exit:
    if options.target is None:
        raise Usage("which checkpoint? Give a folder, or a file")
    path = Path(options.target)
    begin = time.monotonic()
    try:
        places = find(path)
        with _progress(sum(map(nbytes_of, places)), options) as tell:
            found = [verify(place, tell) for place in places]
    except formats.Unreadable as error:
        raise Unreadable(str(error)) from error
    except OSError as error:
        raise Unreadable(f"{error.filename or path} cannot be read: {error.strerror}") from error
    taken = time.monotonic() - begin
    bad = {State.DAMAGED: Exit.NEGATIVE, State.UNREADABLE: Exit.UNREADABLE}
    code = next((code for state, code in bad.items() if any(_has(each, state) for each in found)), Exit.OK)
    if options.json:
        print_json(Verification(str(path), code is Exit.OK, [_as_json(each) for each in found]))
    else:
        for each in found:
            _show(each, options)
        print(_summary(found, taken))
    return code


def _has(found: Verified, state: State) -> bool:
    return any(verdict.state is state for verdict in found.verdicts)


def _as_json(found: Verified) -> VerifiedCheckpoint:
    files = [VerifiedFile(v.name, v.nbytes, v.state.value, v.text) for v in found.verdicts]
    return VerifiedCheckpoint(str(found.path), found.state.value, found.id, found.nbytes, files)


def _show(found: Verified, options: argparse.Namespace) -> None:
    from rich.text import Text

    out = console(options)
    head = Text.assemble((printable(str(found.path), 500), "bold"), "  ", size(found.nbytes), "  ", _word(found.state))
    lines = [head]
    bad = [v for v in found.verdicts if v.state in (State.DAMAGED, State.UNREADABLE)]
    shown = bad if options.quiet else found.verdicts
    names = [printable(verdict.name) for verdict in shown]
    width = max(map(len, names), default=0)
    for name, verdict in zip(names, shown, strict=True):
        mark = {State.WHOLE: "ok", State.NO_CHECKSUM: "-"}.get(verdict.state, "!!" if is_ascii(options) else "✗")
        line = Text.assemble(
            f"  {mark:<3}", f"{name:<{width}}  {size(verdict.nbytes):>10}  ", (_text(verdict), _style_of(verdict))
        )
        line.stylize(_STYLES[verdict.state], 2, 5)
        lines.append(line)
    for line in lines:
        out.print(line, soft_wrap=True)


def _word(state: State) -> tuple[str, str]:
    return state.value.replace("_", " "), _STYLES[state]


def _text(verdict: Verdict) -> str:
    text = printable(verdict.text, 500)
    return f"{text}; no checksum, only its structure was looked at" if verdict.state is State.NO_CHECKSUM else text


def _style_of(verdict: Verdict) -> str:
    return "dim" if verdict.state in (State.WHOLE, State.NO_CHECKSUM) else _STYLES[verdict.state]


def _summary(found: list[Verified], taken: float) -> str:
    counts = {state: sum(each.state is state for each in found) for state in State}
    names = {State.NO_CHECKSUM: "without checksums"}
    parts = [f"{count} {names.get(state, state.value)}" for state, count in counts.items() if count]
    things = f"{len(found)} checkpoint{'s' if len(found) != 1 else ''}"
    return f"{things}, {size(sum(each.nbytes for each in found))} in {seconds(taken)}: {', '.join(parts)}"


@contextmanager
def _progress(nbytes: int, options: argparse.Namespace) -> Iterator[Tell]:
    """A bar on a terminal's stderr, for what takes long."""
    import sys

    if options.json or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = ["verifying", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()]
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=nbytes)
    begin = time.monotonic()
    has_begun = False

    def tell(done: int) -> None:
        nonlocal has_begun
        bar.advance(task, done)
        if not has_begun and time.monotonic() - begin > _SECONDS_WITHOUT_BAR:
            has_begun = True
            bar.start()

    try:
        yield tell
    finally:
        bar.stop()
