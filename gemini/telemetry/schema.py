"""The JSON Schemas that ship with the package."""

import json
from importlib.resources import files
from typing import Any

NAMES = ("records", "output")


def load_schema(name: str) -> dict[str, Any]:
    """``"records"``: what a run writes. ``"output"``: what ``gemini-stat --json`` prints."""
    content: dict[str, Any] = json.loads(files("gemini.telemetry").joinpath(f"{name}.schema.json").read_text("utf-8"))
    return content
