"""The result of a benchmark as a file: what was asked, where and of which commit, one row of the table a line.

A line a row, so that other documents can link to the row.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--record", action="store_true", help=f"write it to {FOLDER.parent.name}/{FOLDER.name}, too")


def place(name: str) -> Path:
    """The file of the record."""
    return FOLDER / f"{name}.json"


def as_text(found: Mapping[str, Any]) -> str:
    """JSON, each member on lines of its own and each row of ``table`` on one."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_member(key, value)}" for key, value in found.items()) + "\n}\n"


def _member(key: str, value: Any) -> str:
    if key == "table":
        return "[\n" + ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value) + "\n ]"
    return json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\n ")


def write(found: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(found))
