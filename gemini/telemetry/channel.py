"""A rank's way into the run folder: a bounded queue, and the daemon thread that makes records of what is in it.

Whatever goes wrong on that thread (a full disk, a vanished folder) ends telemetry with one warning. A full queue drops
records and counts them.
"""

import fcntl
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemini.process_wide import at_exit, at_exit_of_forked, small_stacks
from gemini.safe_files import open_folder, open_own, opened_folder
from gemini.telemetry.encoding import as_mapping
from gemini.telemetry.job import Job, run_name
from gemini.telemetry.layout import HEARTBEAT_SECONDS, VERSION, lock_file, request_file, start_file
from gemini.telemetry.outcome import outcome, outcome_of_forked, program
from gemini.telemetry.probes import Probes
from gemini.telemetry.record_file import RecordFile
from gemini.telemetry.records import End, EndStatus, Fields, Start, Step
from gemini.telemetry.run_folder import make_run_dir, make_run_folder, prune, write_document, write_run_file

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 256
_CLOSE_SECONDS = 2.0
_POLL_SECONDS = 0.25
"""The thread looks into the queue this often. Waking it for each record would cost the training thread more than all
the rest: a system call, and a fight for the processor."""

Stats = Mapping[str, "int | float"]


class Channel:
    """The queue, the thread that empties it, and the files. Everything below ``_run`` happens on that thread."""

    def __init__(
        self,
        run: Path,
        rank: int,
        start: Start,
        probes: Mapping[str, Callable[[], Fields | None]],
        last: Callable[[], Stats | None] | None,
        lock: int,
    ) -> None:
        self.run = run
        self.rank = rank
        self.dropped = 0
        self.is_off = False
        self.is_dump_requested = False
        self._pending: Stats | Callable[[], Stats] | None = None
        self._pid = os.getpid()
        self._last = last
        self._ended = False
        # SimpleQueue, because its put may be called from a finalizer that interrupts another put.
        self._queue: queue.SimpleQueue[tuple[str | Path, float, Any]] = queue.SimpleQueue()
        self._wake_up: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._folder = open_folder(run)
        try:
            self._file = RecordFile(self._folder, rank, start)
        except OSError:
            os.close(self._folder)
            raise
        self._thread = threading.Thread(
            target=self._run, args=(probes, lock), name="gemini-memory-telemetry", daemon=True
        )
        with small_stacks():
            self._thread.start()

    def put(self, kind: str, fields: Fields | Callable[[], Fields]) -> None:
        self._put(kind, fields)

    def put_step(self, stats: Stats | Callable[[], Stats]) -> None:
        self._pending = None
        self._put("step", stats)

    def keep_step(self, stats: Stats | Callable[[], Stats]) -> None:
        """Write this step if no other one follows it."""
        self._pending = stats

    def take_dump_request(self) -> bool:
        """True once after a timeline was requested."""
        if not self.is_dump_requested:
            return False
        self.is_dump_requested = False
        return True

    def put_document(self, path: Path, content: Fields | Callable[[], Fields]) -> None:
        self._put(path, content)

    def _put(self, what: str | Path, fields: object) -> None:
        if self._ended or self.is_off:
            return
        if self._queue.qsize() >= QUEUE_LENGTH:
            self.dropped += 1
            return
        self._queue.put((what, time.time(), fields))

    def request_end(self, status: EndStatus, summary: Stats | None, error: str | None = None) -> None:
        if self._ended or os.getpid() != self._pid:
            return
        self._ended = True
        pending = self._pending if self._last is None else self._last()
        if pending is not None:
            self._queue.put(("step", time.time(), pending))
        self._pending = self._last = None
        end = End(status, dict(summary) if summary else None, error)
        self._queue.put(("end", time.time(), end))
        self._wake_up.put(None)

    def join(self) -> None:
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def _run(self, probes: Mapping[str, Callable[[], Fields | None]], lock: int) -> None:
        what: str | Path = "start"
        probe = Probes(probes)
        heartbeat = 0.0
        try:
            self._file.start()
            while what != "end":
                for kind, seen in probe.due():
                    self._file.write(kind, time.time(), seen, self.dropped)
                while not self._queue.empty():
                    what, when, fields = self._queue.get_nowait()
                    if isinstance(what, Path):
                        header = {"v": VERSION, "t": when, "rank": self.rank}
                        write_document(what, {**header, **as_mapping(_made(fields))}, self._folder)
                        continue
                    if what == "end":
                        for kind, seen in probe.due(is_last=True):
                            self._file.write(kind, when, seen, self.dropped)
                    made = _made(fields)
                    self._file.write(what, when, Step(made) if what == "step" else made, self.dropped)
                if time.monotonic() - heartbeat >= HEARTBEAT_SECONDS:
                    heartbeat = time.monotonic()
                    os.utime(lock)
                    with suppress(FileNotFoundError):
                        os.unlink(request_file(self.run).name, dir_fd=self._folder)
                        self.is_dump_requested = True
                with suppress(queue.Empty):
                    self._wake_up.get(timeout=_POLL_SECONDS if what != "end" else 0.0)
        except Exception as error:
            self.is_off = True
            logger.warning("telemetry of %s is off from here on: %s", self.run, error)
        finally:
            if _live.get(path := lock_file(self.run, self.rank)) is self:
                del _live[path]
            self._file.close()
            os.close(self._folder)
            with suppress(OSError):  # the lock last: an end record is there before it is free
                os.close(lock)


def _made(fields: Any) -> Any:
    return fields() if callable(fields) else fields


_live: dict[Path, Channel] = {}
"""The channels of this process by lock file: they end with it, and a newer one for the same rank ends the older."""
"""Channels of this process by lock file. A POSIX lock belongs to the process, so within it this is what tells."""


def open_channel(
    run_dir: Path | None,
    job: Job,
    facts: dict[str, Any],
    probes: dict[str, Callable[[], Fields | None]],
    last: Callable[[], Stats | None] | None,
    is_listed: bool,
) -> Channel:
    """Make or join the run's folder, take the rank's lock and start; the parameters are those of `TelemetryWriter`.

    Raises
    ------
    OSError
        If the folder cannot be made or written, or another process has the lock.
    """
    started, rank = time.time(), job.rank
    run_id = job.run_id or run_name(started, os.getpid())
    if is_listed:
        run, run_id = make_run_folder(run_dir, run_id, job.rank if job.run_id else None)
    else:
        assert run_dir is not None
        run = run_dir
        make_run_dir(run)
    path = lock_file(run, rank)
    if path in _live:  # boosted again into the same folder: the newer one has it
        _live[path].request_end("finished", None)
        _live[path].join()
    with opened_folder(run) as folder:
        lock = open_own(path.name, os.O_RDWR, folder)
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"{run} is in use by another run; give each run a folder of its own") from error
        start = Start(
            run_id=run_id,
            name=program(),
            pid=os.getpid(),
            host=socket.gethostname(),
            world_size=job.world_size,
            started=started,
            restart=job.restart,
            attempt=job.attempt,
        )
        said = {"v": VERSION, "rank": rank, **as_mapping(start)}
        with opened_folder(run) as folder:
            write_document(start_file(run, rank), {"t": started, **said}, folder)
            write_run_file(folder, rank, {**said, "facts": facts})
        channel = _live[path] = Channel(run, rank, start, probes, last, lock)
        if rank == 0 and is_listed:
            with suppress(OSError):
                prune({lock.parent.resolve() for lock in _live})
    except BaseException:
        os.close(lock)
        raise
    return channel


def _end_all_at_exit() -> None:
    _end_all(*outcome())


def _end_all_of_forked() -> None:
    _end_all(*outcome_of_forked())


def _end_all(status: EndStatus, error: str | None) -> None:
    for channel in list(_live.values()):
        channel.request_end(status, None, error)
    for channel in list(_live.values()):
        channel.join()


at_exit(_end_all_at_exit)
at_exit_of_forked(_end_all_of_forked)
