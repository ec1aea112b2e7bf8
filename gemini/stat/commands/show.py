"""``gemini-stat [TARGET]``: the live screen on a terminal, one plain snapshot otherwise."""

import argparse
import sys

from gemini.arguments.command_line import option
from gemini.stat.console import INTERVAL, Exit, console, find, of_run, print_json, show
from gemini.stat.sight import read

HELP = "Shows where a training run's memory is: live on a terminal, once otherwise."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-1", "--once", action="store_true", help="one snapshot, also on a terminal")
    parser.add_argument(
        "-d", "--interval", type=option(INTERVAL), default=1.0, metavar="S", help="seconds between looks (1)"
    )


def run(options: argparse.Namespace) -> Exit:
    if sys.stdout.isatty() and sys.stdin.isatty() and not options.once and not options.json:
        from gemini.stat.commands import top

        return top.run(options)
    found = read(find(options), options)
    if options.json:
        from gemini.stat import as_json

        print_json(as_json.snapshot(found))
    else:
        from gemini.stat import snapshot

        out = console(options)
        show(out, snapshot.render(found, out, plain=options.ascii or out.options.ascii_only))
    return of_run(found.status)
