"""Writing a run's telemetry without ever disturbing training.

``record_step`` only puts a promise into a bounded queue; a daemon thread makes a record of it, encodes and writes.
Whatever goes wrong there (a full disk, a vanished folder, no home) switches telemetry off with one warning. Nothing is
raised, nothing blocks, and a full queue drops records and counts them.

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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemini.telemetry.encoding import encode
from gemini.telemetry.layout import (
    GENERATIONS,
    HEARTBEAT_SECONDS,
    VERSION,
    lock_file,
    older_records_file,
    records_file,
    request_file,
)
from gemini.telemetry.run_folder import make_run_folder, prune, write_document, write_run_file
from gemini.telemetry.shared_id import shared_run_id

logger = logging.getLogger(__name__)

_QUEUE_LENGTH = 256
_ROTATE_BYTES = 64 << 20
_CLOSE_SECONDS = 2.0
_MIN_INTERVAL_SECONDS = 0.25
_POLL_SECONDS = 0.25
"""The thread looks into the queue this often. Waking it for each record would cost the training thread more than all
the rest: a system call, and a fight for the processor."""
_PROBE_SECONDS = 1.0
_UNCHANGED_SECONDS = 30.0
"""A probe that says what it said before is written this often all the same."""

Stats = Mapping[str, "int | float"]
Fields = Mapping[str, Any]


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
    probes
        By record type: what to look at once a second. They are called on the telemetry thread, whatever training does
        meanwhile, and return the record's fields, or None for nothing to say.
    last
        The statistics of the step that was thinned out last, or None if it was written; asked when the run ends.
    is_listed
        False: the run gets no link among the others, and none of those is pruned.
    min_interval_seconds
        Steps that come faster are thinned out; the last one is always written.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        rank: int = 0,
        facts: Mapping[str, Any] | None = None,
        *,
        probes: Mapping[str, Callable[[], Fields | None]] | None = None,
        last: Callable[[], Stats | None] | None = None,
        is_listed: bool = True,
        min_interval_seconds: float = _MIN_INTERVAL_SECONDS,
    ) -> None:
        self._pid = os.getpid()
        self._min_interval = min_interval_seconds
        self._last_put = float("-inf")
        self._channel: _Channel | None = None
        try:
            self._channel = _open_channel(run_dir, rank, dict(facts or {}), dict(probes or {}), last, is_listed)
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

    @property
    def is_dump_requested(self) -> bool:
        """True once after somebody asked for a timeline of the next step (see `request_file`)."""
        channel = self._channel
        if channel is None or not channel.is_dump_requested:
            return False
        channel.is_dump_requested = False
        return True

    def record(self, kind: str, fields: Fields | Callable[[], Fields]) -> None:
        """Hand over a record of another type than ``step``; a callable is called on the telemetry thread."""
        if self._channel is not None and os.getpid() == self._pid:
            self._channel.put(kind, fields)

    def write_document(self, path: Callable[[Path, int], Path], content: Fields | Callable[[], Fields]) -> None:
        """Have a JSON file of the run folder replaced; ``path`` is a function of `gemini.telemetry.layout`."""
        if self._channel is not None and os.getpid() == self._pid:
            self._channel.put_document(path(self._channel.run, self._channel.rank), content)

    @property
    def is_due(self) -> bool:
        """True if a step that ends now is to be written; one that comes too soon after another is thinned out."""
        if self._channel is None or os.getpid() != self._pid:  # a forked child must not speak for its parent
            return False
        return time.monotonic() - self._last_put >= self._min_interval

    def record_step(self, stats: Stats | Callable[[], Stats]) -> None:
        """Hand over one step's statistics, the flat keys of ``model.memory_stats()``, or what makes them later on the
        telemetry thread. Takes microseconds.
        """
        channel = self._channel
        if channel is None or os.getpid() != self._pid:
            return
        if not self.is_due:
            channel.pending = stats
            return
        self._last_put = time.monotonic()
        channel.pending = None
        channel.put("step", stats)

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

    def __init__(
        self,
        run: Path,
        rank: int,
        header: dict[str, Any],
        probes: Mapping[str, Callable[[], Fields | None]],
        last: Callable[[], Stats | None] | None,
        lock: int,
    ) -> None:
        self.run = run
        self.rank = rank
        self.dropped = 0
        self.is_off = False
        self.is_dump_requested = False
        self.pending: Stats | Callable[[], Stats] | None = None
        self._pid = os.getpid()
        self._header = header
        self._probes = probes
        self._last = last
        self._lock = lock
        self._ended = False
        # SimpleQueue, because its put may be called from a finalizer that interrupts another put.
        self._queue: queue.SimpleQueue[tuple[str | Path, float, Any]] = queue.SimpleQueue()
        self._wake_up: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._file = -1
        self._good_bytes = 0
        self._open_records()
        self._thread = threading.Thread(target=self._run, name="gemini-memory-telemetry", daemon=True)
        self._thread.start()

    def put(self, kind: str, fields: Fields | Callable[[], Fields]) -> None:
        self._put(kind, fields)

    def put_document(self, path: Path, content: Fields | Callable[[], Fields]) -> None:
        self._put(path, content)

    def _put(self, what: str | Path, fields: Fields | Callable[[], Fields]) -> None:
        if self._ended or self.is_off:
            return
        if self._queue.qsize() >= _QUEUE_LENGTH:
            self.dropped += 1
            return
        self._queue.put((what, time.time(), fields))

    def request_end(self, status: str, summary: Stats | None, error: str | None = None) -> None:
        if self._ended or os.getpid() != self._pid:
            return
        self._ended = True
        pending = self.pending if self._last is None else self._last()
        if pending is not None:
            self._queue.put(("step", time.time(), pending))
        self.pending = self._last = None
        end = {"status": status, "summary": dict(summary) if summary else None, "error": error}
        self._queue.put(("end", time.time(), end))
        self._wake_up.put(None)

    def join(self) -> None:
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        what: str | Path = "start"
        probe = _Probes(self._probes)
        heartbeat = 0.0
        try:
            self._write("start", time.time(), self._header)
            while what != "end":
                for kind, seen in probe.due():
                    self._write(kind, time.time(), seen)
                while not self._queue.empty():
                    what, when, fields = self._queue.get_nowait()
                    if isinstance(what, Path):
                        write_document(what, {"v": VERSION, "t": when, "rank": self.rank, **_made(fields)})
                        continue
                    if what == "end":
                        for kind, seen in probe.due(is_last=True):
                            self._write(kind, when, seen)
                    made = _made(fields)
                    self._write(what, when, {"stats": made} if what == "step" else made)
                if time.monotonic() - heartbeat >= HEARTBEAT_SECONDS:
                    heartbeat = time.monotonic()
                    os.utime(self._lock)
                    with suppress(FileNotFoundError):
                        request_file(self.run).unlink()
                        self.is_dump_requested = True
                with suppress(queue.Empty):
                    self._wake_up.get(timeout=_POLL_SECONDS if what != "end" else 0.0)
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

    def _write(self, kind: str, when: float, fields: Fields) -> None:
        record = {"v": VERSION, "type": kind, "t": when, "rank": self.rank, "dropped": self.dropped, **fields}
        # The newline leads as well: after a predecessor's torn last line ours must start on a line of its own.
        line = (b"\n" if kind == "start" else b"") + encode(record) + b"\n"
        if self._good_bytes + len(line) > _ROTATE_BYTES and kind not in ("start", "end"):
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
        for generation in range(GENERATIONS - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(
                    older_records_file(self.run, self.rank, generation),
                    older_records_file(self.run, self.rank, generation + 1),
                )
        os.replace(records_file(self.run, self.rank), older_records_file(self.run, self.rank))
        os.close(self._file)
        self._open_records()
        self._write("start", time.time(), self._header)


class _Probes:
    """Asks the probes once a second, and passes on what is new."""

    def __init__(self, probes: Mapping[str, Callable[[], Fields | None]]) -> None:
        self._probes = probes
        self._last: dict[str, tuple[float, Fields]] = {}
        self._next = time.monotonic()

    def due(self, is_last: bool = False) -> list[tuple[str, Fields]]:
        now = time.monotonic()
        if now < self._next and not is_last:
            return []
        self._next = now + _PROBE_SECONDS
        found = []
        for kind, probe in self._probes.items():
            fields = probe()
            if fields is None:
                continue
            when, before = self._last.get(kind, (float("-inf"), None))
            if fields != before or now - when >= _UNCHANGED_SECONDS:
                self._last[kind] = (now, fields)
                found.append((kind, fields))
        return found


def _made(fields: Fields | Callable[[], Fields]) -> Fields:
    return fields() if callable(fields) else fields


_live: dict[Path, _Channel] = {}
"""Channels of this process by lock file. A POSIX lock belongs to the process, so within it this is what tells."""


def _open_channel(
    run_dir: Path | None,
    rank: int,
    facts: dict[str, Any],
    probes: dict[str, Callable[[], Fields | None]],
    last: Callable[[], Stats | None] | None,
    is_listed: bool,
) -> _Channel:
    started = time.time()
    shared = shared_run_id()
    run_id = shared or f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(started))}-{os.getpid()}"
    if is_listed:
        run, run_id = make_run_folder(run_dir, run_id, is_shared=shared is not None)
    else:
        assert run_dir is not None
        run = run_dir
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
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
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
        }
        write_run_file(run, rank, {"v": VERSION, "rank": rank, **header, "facts": facts})
        channel = _live[path] = _Channel(run, rank, header, probes, last, lock)
        if rank == 0 and is_listed:
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
