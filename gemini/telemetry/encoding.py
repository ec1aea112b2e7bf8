"""Records as lines of strict JSON."""

import json
from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, Struct, to_builtins
from msgspec.json import Encoder
from msgspec.structs import asdict


def as_mapping(fields: Struct) -> dict[str, Any]:
    """The fields by name, without those that are `UNSET`."""
    return {name: value for name, value in asdict(fields).items() if value is not UNSET}


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON: what JSON cannot say (NaN, infinities, foreign objects) becomes null or text."""
    try:
        return _encoder.encode(record)
    except (TypeError, ValueError):  # a text that is not UTF-8, as names of files may be, or a key that is no text
        return json.dumps(_plain(record), separators=(",", ":"), allow_nan=False, default=_foreign).encode()


def _foreign(value: object) -> Any:
    item = getattr(value, "__index__", None) or getattr(value, "__float__", None)
    return _plain(item()) if item is not None else str(value)


_encoder = Encoder(enc_hook=_foreign)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Struct):
        return _plain(to_builtins(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
