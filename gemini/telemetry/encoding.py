"""Records as lines of strict JSON."""

import json
from collections.abc import Mapping
from typing import Any


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON: what JSON cannot say (NaN, infinities, foreign objects) becomes null or text."""
    try:
        text = json.dumps(record, separators=(",", ":"), allow_nan=False, default=_foreign)
    except ValueError:
        text = json.dumps(_finite(record), separators=(",", ":"), allow_nan=False, default=_foreign)
    return text.encode()


def _foreign(value: object) -> Any:
    item = getattr(value, "__index__", None) or getattr(value, "__float__", None)
    return _finite(item()) if item is not None else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
