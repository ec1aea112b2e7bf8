"""``gemini-stat schema``: the JSON Schemas that ship with the package."""

import argparse
import json

from gemini.stat.console import Exit, Usage
from gemini.telemetry.schema import NAMES, load_schema

HELP = "Prints the JSON Schema of --json output; with TARGET 'records', of what a run writes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> Exit:
    name = options.target or "output"
    if name not in NAMES:
        raise Usage(f"there are schemas of {' and '.join(NAMES)}, not of {name!r}")
    print(json.dumps(load_schema(name), indent=2))
    return Exit.OK
