"""``gemini-stat schema``: the JSON Schemas of what is printed and of what a run writes."""

import argparse
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from gemini.stat import estimate_outputs, lease_outputs, outputs
from gemini.stat.console import SCHEMA_VERSION, Exit, Usage
from gemini.telemetry.schema import records_schema, schema
from gemini.telemetry.statistics import doc

HELP = "Prints the JSON Schema of --json output; with TARGET 'records', of what a run writes."


class Versioned(outputs.Output):
    schema_version: Annotated[Literal[1], doc("Raised when a field goes or changes its meaning.")]


OUTPUTS: Mapping[str, type[outputs.Output]] = {
    "snapshot": outputs.Snapshot,
    "ls": outputs.Listing,
    "dmon": outputs.Row,
    "chunks": outputs.ChunkTable,
    "timeline": outputs.RunMoments,
    "wait": outputs.Waited,
    "check": outputs.Checks,
    "doctor": outputs.Findings,
    "bench": estimate_outputs.Bench,
    "estimate": estimate_outputs.Estimate,
    "explain_oom": estimate_outputs.Explanation,
    "lease": lease_outputs.MachineState,
    "lease_asked": lease_outputs.LeaseAnswer,
    "export": outputs.Export,
    "report": outputs.Report,
    "serve": outputs.Address,
    "verify": outputs.Verification,
    "error": outputs.Failed,
}
"""By name in the schema."""


def output_schema() -> dict[str, Any]:
    """The schema of ``gemini-stat --json``."""
    return schema(
        f"Output of gemini-stat --json, version {SCHEMA_VERSION}",
        "One object per call (dmon: one a line). $defs has the object of each command; plain gemini-stat and top print "
        "a snapshot. Ints are bytes and counts, floats are seconds and ratios, null is unknown. Fields may be added "
        "within a version.",
        OUTPUTS,
        Versioned,
    )


SCHEMAS = {"records": records_schema, "output": output_schema}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> Exit:
    name = options.target or "output"
    if name not in SCHEMAS:
        raise Usage(f"there are schemas of {' and '.join(SCHEMAS)}, not of {name!r}")
    print(json.dumps(SCHEMAS[name](), indent=2))
    return Exit.OK
