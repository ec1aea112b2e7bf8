"""Which user is at the other end of a connection over loopback. Linux lists all sockets with their owners."""

import os
import socket
import struct
from pathlib import Path

from gemini.safe_files import read_text

_TABLES = ("tcp", "tcp6")
"""A socket for IPv6 may be connected to an address of IPv4, and is in the second one then."""
_MOST_BYTES = 64 << 20
_LOCAL, _REMOTE, _UID = 1, 2, 7
"""Columns."""
ROOT = 0


def is_of_this_user(connection: socket.socket, proc: Path = Path("/proc/self/net")) -> bool:
    """False if another user, who is not root, has made the connection.

    True where the system does not tell: where it does not list our own end either.
    """
    ours, theirs = connection.getsockname()[:2], connection.getpeername()[:2]
    rows = _rows(proc)
    owner = _owner(rows, theirs, ours)
    if owner is None:
        return _owner(rows, ours, theirs) is None
    return owner in (os.geteuid(), ROOT)


def _rows(proc: Path) -> list[list[str]]:
    rows = []
    for table in _TABLES:
        try:
            rows += [line.split() for line in read_text(proc / table, _MOST_BYTES).splitlines()[1:]]
        except (OSError, ValueError):
            continue
    return [row for row in rows if len(row) > _UID]


def _owner(rows: list[list[str]], local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """The owner of the socket with these two ends."""
    wanted = {pair for form in (socket.AF_INET, socket.AF_INET6) if (pair := (_hex(local, form), _hex(remote, form)))}
    return next((int(row[_UID]) for row in rows if (row[_LOCAL], row[_REMOTE]) in wanted), None)


def _hex(end: tuple[str, int], form: int) -> str:
    """An address and port as the tables have them: 32 bits at a time, as this processor orders their bytes."""
    host, port = end
    is_four = ":" not in host
    if form == socket.AF_INET:
        packed = socket.inet_aton(host) if is_four else b""
    else:
        packed = socket.inet_pton(socket.AF_INET6, f"::ffff:{host}" if is_four else host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"
