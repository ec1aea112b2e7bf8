"""Starting a capped child, watching its memory from outside, and what the child itself calls.

The cap is ``RLIMIT_DATA``: every private writable page counts, used or not, and what goes beyond it is refused, as on a
machine with no more RAM. It is set by the child once it is warm (imports, a throw-away step, compiled kernels,
threads): libgomp ends a process that may not start a thread without any exception.
"""

import ctypes
import gc
import json
import os
import resource
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcome import Failure

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.001
_READY, _RESULT = "ready", "result"

# One thread and a malloc that gives back what is freed: then a peak is the same in every run.
QUIET_MALLOC = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
}


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a child, and what was seen of it after it was warm."""

    result: dict[str, Any] | None
    """What it handed to `finish`; None if it did not get there."""
    returncode: int
    errors: str
    """The end of its stderr."""
    base_data_bytes: int
    base_rss_bytes: int
    peak_data_bytes: int
    """Highest VmData seen, what was there before included."""
    peak_rss_bytes: int

    @property
    def data_growth_bytes(self) -> int:
        return self.peak_data_bytes - self.base_data_bytes

    @property
    def rss_growth_bytes(self) -> int:
        return self.peak_rss_bytes - self.base_rss_bytes


def run_child(script: str, arguments: dict[str, Any], *, timeout_seconds: float) -> Ended:
    """Run a module of ``scenarios`` as a child and poll its memory until it ends.

    Raises
    ------
    Failure
        It takes too long, or ends before it is warm.
    """
    command = [sys.executable, str(Path(__file__).parent / "scenarios" / f"{script}.py"), json.dumps(arguments)]
    paths = [str(Path(__file__).parent), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **QUIET_MALLOC, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=_ROOT, start_new_session=True
    )
    try:
        ended = _watch(process, time.monotonic() + timeout_seconds)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    if ended is None:
        raise Failure(f"{script} took longer than {timeout_seconds:.0f} s")
    return ended


def _watch(process: "subprocess.Popen[bytes]", deadline: float) -> Ended | None:
    assert process.stdout is not None and process.stderr is not None
    out, err = b"", b""
    streams = {process.stdout.fileno(): "out", process.stderr.fileno(): "err"}
    base: tuple[int, int] | None = None
    peak = (0, 0)
    while streams:
        if time.monotonic() > deadline:
            return None
        seen = memory_of(process.pid)
        peak = (max(peak[0], seen[0]), max(peak[1], seen[1]))
        ready, _, _ = select.select(list(streams), [], [], _POLL_SECONDS)
        for descriptor in ready:
            data = os.read(descriptor, 65536)
            if not data:
                del streams[descriptor]
            elif streams[descriptor] == "out":
                out += data
            else:
                err += data
        if base is None and (said := _said(out, _READY)) is not None:
            base = peak = (said["data_bytes"], said["rss_bytes"])
    process.wait()
    errors = err.decode(errors="replace")[-2000:]
    if base is None:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise Failure(f"the child ended with {process.returncode} before it was warm: {last}")
    return Ended(_said(out, _RESULT), process.returncode, errors, *base, *peak)


def _said(out: bytes, kind: str) -> dict[str, Any] | None:
    for line in out.split(b"\n")[:-1]:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict) and kind in message:
            content: dict[str, Any] = message[kind]
            return content
    return None


def memory_of(pid: int | str) -> tuple[int, int]:
    """VmData and the anonymous resident set of a process in bytes; zeros once it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    data, rss = (int(fields.get(name, "0").split()[0]) * 1024 for name in ("VmData", "RssAnon"))
    return data, rss


# -- called by the child


def arguments() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(sys.argv[1])
    return content


def ready(headroom_bytes: int | None) -> None:
    """Warm now: measure what is there, and from here on allow only so much more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    data, rss = memory_of("self")
    if headroom_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data + headroom_bytes,) * 2)
    _say(_READY, {"data_bytes": data, "rss_bytes": rss})


def finish(result: dict[str, Any]) -> None:
    """Hand the result to the parent."""
    _say(_RESULT, result)


def _say(kind: str, content: dict[str, Any]) -> None:
    print(json.dumps({kind: content}), flush=True)
