"""Runs of which one file is not what a run writes: too large, endless, no file at all, or JSON that is hard to bear."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

GIGABYTE = 1 << 30
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07\n\r\t\x00\x9b1m\u202eevil\u2066\u2028"
    '"quoted" \\ <script>alert(1)</script><!-- =1+1 \ud800 {x="1"} %s [bold]'
)
"""A text that steers terminals, ends lines, reorders them, and is code in a page, a table and a metric."""


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(GIGABYTE)


def one_long_line(path: Path) -> None:
    """The beginning and the end of a whole record, and 1 GB between them."""
    with open(path, "wb") as file:
        file.write(b'{"v":1,"type":"step","name":"')
        file.seek(GIGABYTE)
        file.write(b'"}\n')


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def folder(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(path.parent, os.O_RDONLY)  # the path of a socket may not be long
        try:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _text(content: "str | bytes") -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def _nested(depth: int) -> str:
    return '{"v":1,"type":"step","facts":' + "[" * depth + "]" * depth + "}"


def with_facts(**facts: object) -> str:
    return json.dumps({"v": 1, "type": "start", "run_id": "x", "name": "x", "facts": facts, **facts})


KINDS: dict[str, Callable[[Path], None]] = {
    "1 GB of nothing": sparse,
    "a line of 1 GB": one_long_line,
    "a pipe": pipe,
    "a device": endless,
    "a terminal": terminal,
    "a folder": folder,
    "a socket": unix_socket,
    "a link to itself": to_itself,
    "empty": _text(""),
    "half": _text('{"v":1,"type":"st'),
    "no JSON": _text(b"\xff\xfe\x00\x01"),
    "NUL": _text(b"\0" * 4096),
    "a list": _text("[]\n"),
    "100000 brackets": _text("[" * 100_000 + "]" * 100_000 + "\n"),
    "900 brackets": _text(_nested(900) + "\n"),
    "700 brackets": _text(_nested(700) + "\n"),
    "400 brackets": _text(_nested(400) + "\n"),
    "120 brackets": _text(_nested(120) + "\n"),
    "a million lists": _text('{"v":1,"type":"step","stats":[' + "[]," * 1_000_000 + "[]]}\n"),
    "a number of 100000 digits": _text('{"v":1,"type":"step","t":' + "9" * 100_000 + "}\n"),
    "a number of 4000 digits": _text(f'{{"v":1,"type":"step","t":{"9" * 4000},"pid":{"9" * 4000}}}\n'),
    "not numbers": _text('{"v":NaN,"type":"step","t":Infinity,"started":-Infinity,"pid":1e999,"stats":{"a/b":NaN}}\n'),
    "odd numbers": _text('{"v":1,"type":"start","t":1e308,"started":-1e308,"pid":-1e18,"world_size":9e18,"rank":-1}\n'),
    "other types": _text(with_facts(pid=[1], host={}, started="x", world_size=None, restart=[], rank={}) + "\n"),
    "hostile text": _text(with_facts(run_id=HOSTILE, name=HOSTILE, host=HOSTILE, model=HOSTILE) + "\n"),
    "a newer version": _text('{"v":99,"type":"start"}\n'),
    "a huge version": _text('{"v":' + "9" * 4000 + ',"type":"start"}\n'),
    "10 million lines": _text(b"\n" * 10_000_000),
    "a million objects": _text(b"{}\n" * 1_000_000),
    "lines of one bracket": _text(b"[\n" * 2_000_000),
}


def spoil(path: Path, kind: str) -> None:
    """Put something in the place of a file."""
    path.unlink(missing_ok=True)
    KINDS[kind](path)
