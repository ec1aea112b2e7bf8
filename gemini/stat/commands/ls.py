"""``gemini-stat ls``: all runs, a line each."""

import argparse
from pathlib import Path

from gemini.stat import as_json
from gemini.stat.console import Exit, console, print_json, remark, show
from gemini.stat.outputs import Listing, UnreadableRun
from gemini.stat.sight import over
from gemini.telemetry.discovery import look_at_runs
from gemini.telemetry.layout import runs_folder

_PIPE_COLUMNS = 80
"""Enough for whole ids; a pipe has no width of its own."""

HELP = "Lists runs, newest first: of this user, or those in the folder TARGET."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> Exit:
    folder = Path(options.target) if options.target else None
    found, unreadable = look_at_runs(folder)
    runs = [over(ranks) for ranks in found]
    if options.json:
        bad = [UnreadableRun(str(run.path), run.reason) for run in unreadable]
        print_json(Listing([as_json.brief(run) for run in runs], bad))
    elif runs or unreadable:
        from gemini.stat import listing

        if runs:
            show(console(options, _PIPE_COLUMNS), listing.render(runs))
        for line in map(listing.unreadable, unreadable):
            print(line)
    else:
        remark(f"no runs in {folder or runs_folder()}")
    return Exit.OK
