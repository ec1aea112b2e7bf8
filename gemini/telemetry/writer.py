"""Writing a run's telemetry without ever disturbing training.

``record_step`` only puts a dict into a bounded queue; a daemon thread encodes and writes. Whatever goes wrong there (a
full disk, a vanished folder, no home) switches telemetry off with one warning. Nothing is raised, nothing blocks, and a
full queue drops records and counts them.

One ``os.write`` a record on an ``O_APPEND`` descriptor: ``kill -9`` loses what is still queued and nothing else.
"""

import atexit
import fcntl
import logging
import os
import queue
import socket
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemini.telemetry.encoding import encode
from gemini.telemetry.layout import (
    HEARTBEAT_SECONDS,
    VERSION,
    lock_file,
    older_records_file,
    records_file,
)
from gemini.telemetry.run_folder import make_run_folder, prune, write_run_file

logger = logging.getLogger(__name__)

_QUEUE_LENGTH = 256
_ROTATE_BYTES = 64 << 20
_CLOSE_SECONDS = 2.0
_MIN_INTERVAL_SECONDS = 0.05

Stats = Mapping[str, "int | float"]


class TelemetryWriter:
    """Appends what a rank does to its file in the run folder.

    Parameters
    ----------
    run_dir
        Folder of the run, made if need be. None: ``$GEMINI_MEMORY_RUN_DIR``, else a new folder below
        ``${XDG_STATE_HOME:-~/.local/state}/gemini-memory/runs``.
    rank
        Of this process; each rank has files of its own.
    facts
        What does not change: model, policy, chunk size, where the budgets come from. Anything that JSON can hold.
    min_interval_seconds
        Steps that come faster are thinned out; the last one is always written.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        rank: int = 0,
        facts: Mapping[str, Any] | None = None,
        *,
        min_interval_seconds: float = _MIN_INTERVAL_SECONDS,
    ) -> None:
        self._pid = os.getpid()
        self._min_interval = min_interval_seconds
        self._last_put = float("-inf")
        self._channel: _Channel | None = None
        try:
            self._channel = _open_channel(run_dir, rank, dict(facts or {}))
        except Exception as error:  # a broken home must not stop training
            logger.warning("telemetry is off: %s", error)
        else:
            # The thread holds the channel, not this object: when the model goes, this goes, and the run has ended.
            self._finalizer = weakref.finalize(self, self._channel.request_end, "finished", None)
            self._finalizer.atexit = False

    @property
    def run_dir(self) -> Path | None:
        """Folder of the run, or None when telemetry is off."""
        return self._channel.run if self._channel is not None and not self._channel.is_off else None

    @property
    def dropped_count(self) -> int:
        """Records lost because the thread could not keep up."""
        return self._channel.dropped if self._channel is not None else 0

    def record_step(self, stats: Stats) -> None:
        """Hand over one step's statistics: the flat keys of ``model.memory_stats()``. Takes microseconds."""
        channel = self._channel
        if channel is None or os.getpid() != self._pid:  # a forked child must not speak for its parent
            return
        now = time.monotonic()
        if now - self._last_put < self._min_interval:
            channel.pending = stats
            return
        self._last_put = now
        channel.pending = None
        channel.put("step", {"stats": dict(stats)})

    def close(self, status: str | None = None, summary: Stats | None = None) -> None:
        """Write the end record and wait for the thread, two seconds at most. Only the first call counts.

        ``status`` is ``"finished"`` or ``"crashed"``. None means finished, unless an uncaught exception is ending the
        interpreter, so this may be called by an exit handler without knowing how the script ended.
        """
        if self._channel is None or os.getpid() != self._pid:
            return
        self._finalizer.detach()
        found, error = _outcome()
        self._channel.request_end(status or found, summary, error if status is None else None)
        self._channel.join()


class _Channel:
    """The queue, the thread that empties it, and the files. Everything below ``_run`` happens on that thread."""

    def __init__(self, run: Path, rank: int, header: dict[str, Any], lock: int) -> None:
        self.run = run
        self.rank = rank
        self.dropped = 0
        self.is_off = False
        self.pending: Stats | None = None
        self._pid = os.getpid()
        self._header = header
        self._lock = lock
        self._ended = False
        # SimpleQueue, because its put may be called from a finalizer that interrupts another put.
        self._queue: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._file = -1
        self._good_bytes = 0
        self._open_records()
        self._thread = threading.Thread(target=self._run, name="gemini-memory-telemetry", daemon=True)
        self._thread.start()

    def put(self, kind: str, fields: dict[str, Any]) -> None:
        if self._ended or self.is_off:
            return
        if self._queue.qsize() >= _QUEUE_LENGTH:
            self.dropped += 1
            return
        self._queue.put((kind, {"t": time.time(), **fields}))

    def request_end(self, status: str, summary: Stats | None, error: str | None = None) -> None:
        if self._ended or os.getpid() != self._pid:
            return
        self._ended = True
        if self.pending is not None:
            self._queue.put(("step", {"t": time.time(), "stats": dict(self.pending)}))
        end = {"t": time.time(), "status": status, "summary": dict(summary) if summary else None, "error": error}
        self._queue.put(("end", end))

    def join(self) -> None:
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._write("start", {"t": time.time(), **self._header})
            kind = "start"
            while kind != "end":
                with suppress(queue.Empty):
                    kind, fields = self._queue.get(timeout=HEARTBEAT_SECONDS)
                    self._write(kind, fields)
                os.utime(self._lock)
        except Exception as error:
            self.is_off = True
            logger.warning("telemetry of %s is off from here on: %s", self.run, error)
        finally:
            if _live.get(path := lock_file(self.run, self.rank)) is self:
                del _live[path]
            for descriptor in (self._file, self._lock):  # the lock last: an end record is there before it is free
                with suppress(OSError):
                    os.close(descriptor)

    def _open_records(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(records_file(self.run, self.rank), flags, 0o600)
        self._good_bytes = os.fstat(self._file).st_size

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        record = {"v": VERSION, "type": kind, "rank": self.rank, "dropped": self.dropped, **fields}
        # The newline leads as well: after a predecessor's torn last line ours must start on a line of its own.
        line = (b"\n" if kind == "start" else b"") + encode(record) + b"\n"
        if self._good_bytes + len(line) > _ROTATE_BYTES and kind == "step":
            self._rotate()
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"the disk is full: {written} of {len(line)} bytes were written")
        except OSError:
            os.ftruncate(self._file, self._good_bytes)
            raise
        self._good_bytes += written

    def _rotate(self) -> None:
        os.replace(records_file(self.run, self.rank), older_records_file(self.run, self.rank))
        os.close(self._file)
        self._open_records()
        self._write("start", {"t": time.time(), **self._header})


_live: dict[Path, _Channel] = {}
"""Channels of this process by lock file. A POSIX lock belongs to the process, so within it this is what tells."""


def _open_channel(run_dir: Path | None, rank: int, facts: dict[str, Any]) -> _Channel:
    started = time.time()
    run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(started))}-{os.getpid()}"
    run, run_id = make_run_folder(run_dir, run_id)
    path = lock_file(run, rank)
    if path in _live:  # boosted again into the same folder: the newer one has it
        _live[path].request_end("finished", None)
        _live[path].join()
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"{run} is in use by another run; give each run a folder of its own") from error
        header = {
            "run_id": run_id,
            "name": _program(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "world_size": int(os.environ.get("WORLD_SIZE") or 1),
            "started": started,
        }
        write_run_file(run, rank, {"v": VERSION, "rank": rank, **header, "facts": facts})
        channel = _live[path] = _Channel(run, rank, header, lock)
        if rank == 0:
            with suppress(OSError):
                prune({lock.parent.resolve() for lock in _live})
    except BaseException:
        os.close(lock)
        raise
    return channel


def _program() -> str:
    """The script's name, or the package's where ``python -m package`` was run."""
    path = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    return path.parent.name if path.name == "__main__.py" else path.name


def _outcome() -> tuple[str, str | None]:
    """A script that ran to its end has finished; one that an exception ended has crashed. Exit handlers run after both.

    The interpreter leaves an uncaught exception in ``sys.last_value``. Before its end, and in an interactive session,
    that may be any earlier mistake and says nothing. The main thread is marked as ended before exit handlers run.
    """
    error = getattr(sys, "last_value", None)
    if error is None or hasattr(sys, "ps1") or threading.main_thread().is_alive():
        return "finished", None
    return "crashed", f"{type(error).__name__}: {error}"[:500]


def _end_all_at_exit() -> None:
    status, error = _outcome()
    for channel in list(_live.values()):
        channel.request_end(status, None, error)
    for channel in list(_live.values()):
        channel.join()


atexit.register(_end_all_at_exit)
