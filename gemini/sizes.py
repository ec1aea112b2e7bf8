"""Sizes in bytes as people write them."""

import re

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
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_ACCEPTED = (
    'a number of bytes or a string such as "24GiB" (KiB, MiB, GiB, TiB: binary) or "24GB" (KB, MB, GB, TB: decimal)'
)


def parse_bytes(size: int | str) -> int:
    """Bytes of ``24 * 2**30``, ``"24GiB"``, ``"24GB"``, ``"1.5 GiB"`` or ``"25769803776"``; fractions are rounded down.

    Raises
    ------
    ValueError
        The text is not a size, or the number is negative.
    TypeError
        Neither an int nor a str (a float is refused: ``24.0`` could mean bytes or GiB).
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"expected {_ACCEPTED}, got {size!r} of type {type(size).__name__}")
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"expected {_ACCEPTED}, got the negative number {size}")
        return size
    match = _SIZE.fullmatch(size)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"expected {_ACCEPTED}, got {size!r}")
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
