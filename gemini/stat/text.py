"""Values as text for people. Whatever comes from a file passes through :func:`printable` before it is shown."""

from gemini.sizes import format_bytes

UNKNOWN = "-"
_LONGEST_CELL = 1000
_FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""The last four are the same in full width."""


def printable(text: str, limit: int = 200) -> str:
    """``text`` without anything that could steer a terminal or reorder a line: such characters are shown as escapes."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in shown
    )


def cell(text: str) -> str:
    """A text in a table that a spreadsheet may open, which runs what begins like a formula."""
    shown = printable(text, _LONGEST_CELL)
    return f"'{shown}" if text.strip()[:1] in _FORMULAS else shown


def file_name(text: str) -> str:
    """A run id as part of a file's name, whatever is in it."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "_" for char in text)[:80] or "run"


def size(nbytes: float | None) -> str:
    return UNKNOWN if nbytes is None else format_bytes(nbytes)


def count(value: float | None) -> str:
    """``16777216`` as ``"16.8 M"``; small numbers in full."""
    if value is None:
        return UNKNOWN
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= scale:
            return f"{value / scale:.1f} {suffix}"
    return f"{value:,.0f}"


def percent(ratio: float | None, digits: int = 1) -> str:
    return UNKNOWN if ratio is None else f"{ratio * 100:.{digits}f}%"


def seconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.2f} s" if value < 100 else duration(value)


def duration(value: float | None) -> str:
    """Two units at most: ``"3d 4h"``, ``"5m 12s"``."""
    if value is None:
        return UNKNOWN
    rest = max(0, int(value))
    parts: list[str] = []
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        whole, rest = divmod(rest, length)
        if whole or parts or unit == "s":
            parts.append(f"{whole}{unit}")
    return " ".join(parts[:2])
