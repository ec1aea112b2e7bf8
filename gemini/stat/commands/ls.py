"""``gemini-stat ls``: all runs, a line each."""

import argparse
from pathlib import Path

from gemini.stat import as_json
from gemini.stat.console import Exit, console, print_json, remark, show
from gemini.stat.outputs import Listing
from gemini.stat.sight import over
from gemini.telemetry.discovery import list_runs
from gemini.telemetry.layout import runs_folder

HELP = "Lists runs, newest first: of this user, or those in the folder TARGET."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> Exit:
    folder = Path(options.target) if options.target else None
    runs = [over(ranks) for ranks in list_runs(folder)]
    if options.json:
        print_json(Listing([as_json.brief(run) for run in runs]))
    elif runs:
        from gemini.stat import listing

        show(console(options), listing.render(runs))
    else:
        remark(f"no runs in {folder or runs_folder()}")
    return Exit.OK
