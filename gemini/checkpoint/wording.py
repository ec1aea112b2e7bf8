"""Names from files in messages: the first few, so that a message stays readable whatever the file holds."""

from collections.abc import Collection
from itertools import islice

_SHOWN = 8
_LETTERS = 100


def listed(names: Collection[str]) -> str:
    """``a, b, c and 92 more``."""
    first = [name if len(name) <= _LETTERS else f"{name[:_LETTERS]}..." for name in islice(names, _SHOWN)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(first) + more
