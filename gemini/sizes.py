"""Sizes in bytes as people write them."""

import operator
import re

from gemini.arguments.brief import brief

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_LONGEST_TEXT = 100  # Python refuses to read numbers of thousands of digits
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
ACCEPTED = (
    'a number of bytes or a string such as "24GiB" (KiB, MiB, GiB, TiB: binary) or "24GB" (KB, MB, GB, TB: decimal)'
)


LARGEST_BYTES = 2**63 - 1
"""What the system counts with."""


def parse_bytes(size: int | str) -> int:
    """Bytes of ``24 * 2**30``, ``"24GiB"``, ``"24GB"``, ``"1.5 GiB"`` or ``"25769803776"``; fractions are rounded down.

    Raises
    ------
    ValueError
        The text is not a size, or the number is negative, or larger than `LARGEST_BYTES`.
    TypeError
        Neither an integer nor a str (a float is refused: ``24.0`` could mean bytes or GiB).
    """
    nbytes = _parsed(size) if isinstance(size, str) else _integer(size)
    if nbytes < 0:
        raise ValueError(f"expected {ACCEPTED}, got the negative number {brief(size)}")
    if nbytes > LARGEST_BYTES:
        raise ValueError(f"expected {ACCEPTED}, got {brief(size)}, which is more than any machine can have")
    return nbytes


def _integer(size: object) -> int:
    try:
        if not isinstance(size, bool):
            return operator.index(size)  # type: ignore[arg-type]  # what has no index raises, which is the question
    except TypeError:
        pass
    raise TypeError(f"expected {ACCEPTED}, got {brief(size)} of type {type(size).__name__}")


def _parsed(size: str) -> int:
    match = _SIZE.fullmatch(size)
    if match is None or match[2].upper() not in _UNITS or len(size) > _LONGEST_TEXT:
        raise ValueError(f"expected {ACCEPTED}, got {brief(size)}")
    scale = _UNITS[match[2].upper()]
    whole, _, fraction = match[1].partition(".")
    # Integer arithmetic: a float has 53 bits, too few for "0.3TiB" to come out the same everywhere.
    return int(whole) * scale + int(fraction or "0") * scale // int(10 ** len(fraction))


def format_bytes(nbytes: float) -> str:
    """``1610612736`` as ``"1.5 GiB"``: binary units, three digits or so, for people to read."""
    if nbytes < 0:
        return "-" + format_bytes(-nbytes)
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        # 1023.96 would print as "1024.0": go to the next unit instead.
        if round(value, 1) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
