"""``gemini-stat export``: a run in formats of other programs."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemini.arguments.command_line import option
from gemini.arguments.places import Folder, Name
from gemini.safe_files import USERS_FILE, replacing
from gemini.stat import export_formats
from gemini.stat.console import Exit, Usage, find, print_json
from gemini.stat.outputs import Export
from gemini.stat.sight import read
from gemini.stat.text import file_name
from gemini.telemetry.run_view import RunView

HELP = "Writes a run for Prometheus, as records, as a table of steps, or as a trace for ui.perfetto.dev."
FORMATS = ("prom", "jsonl", "csv", "perfetto")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="default: jsonl")
    parser.add_argument("-o", "--output", type=option(Name()), metavar="FILE", help="default: stdout")
    parser.add_argument(
        "--textfile",
        type=option(Folder()),
        metavar="FOLDER",
        help="prom, as a file for node_exporter's textfile collector",
    )


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    sight = read(path, options)
    run, views = sight.run, [sight.run] if sight.ranks is None else list(sight.ranks.views)
    ranks = [view.rank for view in views]
    if options.textfile is not None and options.format != "prom":
        raise Usage("--textfile is for --format prom")
    parts = _prom(views) if options.format == "prom" else _FORMATS[options.format](path, ranks)
    target = options.output
    if options.textfile is not None:
        target = options.textfile / f"gemini_memory_{file_name(run.identity.run_id)}.prom"
    if target is None:
        if options.json:
            raise Usage("--json tells where a file was written: give --output or --textfile")
        for part in parts:
            sys.stdout.write(part)
        return Exit.OK
    nbytes = _write(target, parts)
    if options.json:
        print_json(Export(run.identity.run_id, run.rank, str(target), nbytes, ranks))
    return Exit.OK


_FORMATS = {
    "jsonl": export_formats.as_jsonl,
    "csv": export_formats.as_csv,
    "perfetto": export_formats.as_perfetto,
}


def _prom(runs: Sequence[RunView]) -> Iterator[str]:
    from gemini.stat.metrics import exposition

    yield exposition(lambda: runs).decode()


def _write(target: Path, parts: Iterator[str]) -> int:
    """Write the file atomically, so that a scraper of the folder never sees half of it."""
    try:
        with replacing(target, mode=USERS_FILE) as file:
            for part in parts:
                file.write(part.encode())
            return file.tell()
    except OSError as error:
        raise Usage(f"{target} cannot be written: {error}") from error
