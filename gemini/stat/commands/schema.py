"""``gemini-stat schema``: the JSON Schemas of what is printed and of what a run writes."""

import argparse
import json

from gemini.stat.console import Exit, Usage
from gemini.stat.outputs import output_schema
from gemini.telemetry.schema import records_schema

HELP = "Prints the JSON Schema of --json output; with TARGET 'records', of what a run writes."


SCHEMAS = {"records": records_schema, "output": output_schema}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> Exit:
    name = options.target or "output"
    if name not in SCHEMAS:
        raise Usage(f"there are schemas of {' and '.join(SCHEMAS)}, not of {name!r}")
    print(json.dumps(SCHEMAS[name](), indent=2))
    return Exit.OK
