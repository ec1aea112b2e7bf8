"""JSON Schemas out of structs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.json import schema_components

from gemini.telemetry.layout import TIERS
from gemini.telemetry.records import DOCUMENTS, RECORDS, DocumentHeader, Header
from gemini.telemetry.statistics import table

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def records_schema() -> dict[str, Any]:
    """The schema of what a run writes; ``$defs`` also has the documents beside the records."""
    records = definitions({kind: (Header, fields) for kind, fields in RECORDS.items()})
    for kind, content in records.items():
        if kind in RECORDS:
            content["properties"]["type"] = {"const": kind}
    records["step"]["properties"]["stats"] |= _keys()
    return {
        "$schema": _DIALECT,
        "title": "Records of a gemini-memory run, version 1",
        "description": (
            "One line of rankNNNNN.jsonl. Readers skip unknown types and fields; a new major version of `v` means that "
            "something went or changed its meaning."
        ),
        **one_of(RECORDS),
        "$defs": {**records, **definitions({name: (DocumentHeader, fields) for name, fields in DOCUMENTS.items()})},
    }


def schema(title: str, description: str, kinds: Mapping[str, type[Struct]], header: type[Struct]) -> dict[str, Any]:
    """The schema of an object of any of ``kinds``, each with the fields of ``header`` before its own."""
    found = definitions({kind: (header, fields) for kind, fields in kinds.items()})
    return {"$schema": _DIALECT, "title": title, "description": description, **one_of(kinds), "$defs": found}


def one_of(kinds: Mapping[str, object]) -> dict[str, Any]:
    return {"type": "object", "anyOf": [{"$ref": f"#/$defs/{kind}"} for kind in kinds]}


def definitions(kinds: Mapping[str, Sequence[type[Struct]]]) -> dict[str, Any]:
    """``$defs``: each kind has the fields of several structs; structs within them have entries of their own."""
    _, found = schema_components([part for parts in kinds.values() for part in parts], ref_template="#/$defs/{name}")
    merged = {kind: _merged([found[part.__name__] for part in parts]) for kind, parts in kinds.items()}
    text = json.dumps([merged, found])
    return {**merged, **{name: content for name, content in found.items() if f'"#/$defs/{name}"' in text}}


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        **parts[-1],
        "properties": {name: content for part in parts for name, content in part["properties"].items()},
        "required": [name for part in parts for name in part["required"]],
    }


def _keys() -> dict[str, Any]:
    """What the statistics of a step are, and which are always there."""
    known = {line.key: {"description": line.text, "type": ["number", "null"]} for line in table()}
    always = ["step/count", "step/seconds"]
    always += [f"{tier}/{name}_bytes" for tier in TIERS for name in ("used", "peak", "capacity")]
    return {"properties": known, "required": always}
