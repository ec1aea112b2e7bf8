"""JSON objects in files, and the checksum that one may hold of itself."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .blocks import FileBytes
from .damage import Damaged, shown

LIMIT_BYTES = 50_000_000
"""An index of a million tensors has less."""
CHECKSUM = "crc32"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size, in which no name appears twice.

    Raises
    ------
    Damaged
        If it is something else.
    """
    with FileBytes(path) as file:
        if file.nbytes > LIMIT_BYTES:
            raise Damaged(f"{path} is larger than {LIMIT_BYTES} bytes")
        text = file.read(0, file.nbytes, "its text")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not readable JSON ({shown(error)})") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} is not a JSON object")
    return value


def checksum_of(content: Mapping[str, Any]) -> str:
    """CRC-32 of everything in a JSON object but its checksum: 8 hex digits, whatever the spaces and the order."""
    others = {name: value for name, value in content.items() if name != CHECKSUM}
    as_read = json.loads(json.dumps(others))  # where numbers are names, they have become text before they are sorted
    text = json.dumps(as_read, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def check_checksum(path: Path, content: Mapping[str, Any]) -> bool:
    """Compare a JSON object with the checksum that it holds; False if it holds none.

    Raises
    ------
    Damaged
        If it is another one.
    """
    if CHECKSUM not in content:
        return False
    if content[CHECKSUM] != checksum_of(content):
        raise Damaged(
            f"{path} is damaged: its checksum is another one. If you have edited it, take the entry {CHECKSUM!r} out"
        )
    return True


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)!r} appears twice in one object")
    return found
