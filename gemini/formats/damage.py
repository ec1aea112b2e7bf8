"""The fault of a file, in few words however large the file is."""

from collections.abc import Iterable

_LISTED = 8
_SHOWN = 120


class Damaged(Exception):
    """A file is not whole, or not what its name says. The message names the file and the fault."""


class Unreadable(Damaged):
    """The system does not let us read a file, which may be whole."""


def listed(names: Iterable[object], separator: str = ", ", limit: int = _LISTED, width: int = _SHOWN) -> str:
    """The first names, and how many more there are."""
    all_names = list(names)
    more = len(all_names) - limit
    return separator.join(shown(name, width) for name in all_names[:limit]) + (f" and {more} more" if more > 0 else "")


def shown(name: object, width: int = _SHOWN) -> str:
    """A name from a file on one line, cut off where it is long."""
    text = name[: 2 * width] if isinstance(name, str) else str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= width else f"{text[: width - 3]}..."
