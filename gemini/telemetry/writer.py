"""Writing a run's telemetry without ever disturbing training.

``record_step`` only puts a promise into a bounded queue (see `gemini.telemetry.channel`); nothing is raised, nothing
blocks.
"""

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemini.telemetry.channel import Channel, Stats, open_channel
from gemini.telemetry.job import Job, find_job
from gemini.telemetry.outcome import outcome
from gemini.telemetry.records import EndStatus, Fields

logger = logging.getLogger(__name__)

_MIN_INTERVAL_SECONDS = 0.25


class TelemetryWriter:
    """Appends what a rank does to its file in the run folder.

    Parameters
    ----------
    run_dir
        Folder of the run, made if need be. None: ``$GEMINI_MEMORY_RUN_DIR``, else a new folder below
        ``${XDG_STATE_HOME:-~/.local/state}/gemini-memory/runs``.
    job
        The processes that train together, and which of them this is: each rank has files of its own in one folder.
        None: as the launcher says.
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
        job: Job | None = None,
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
        self._channel: Channel | None = None
        try:
            self._channel = open_channel(
                run_dir, job or find_job(), dict(facts or {}), dict(probes or {}), last, is_listed
            )
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
        """True once after a timeline of the next step was requested (see `request_file`)."""
        return self._channel is not None and self._channel.take_dump_request()

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
            channel.keep_step(stats)
            return
        self._last_put = time.monotonic()
        channel.put_step(stats)

    def close(self, status: EndStatus | None = None, summary: Stats | None = None) -> None:
        """Write the end record and wait for the thread, two seconds at most. Only the first call counts.

        ``status`` is ``"finished"`` or ``"crashed"``. None means finished, unless an uncaught exception is ending the
        interpreter, so this may be called by an exit handler without knowing how the script ended.
        """
        if self._channel is None or os.getpid() != self._pid:
            return
        self._finalizer.detach()
        found, error = outcome()
        self._channel.request_end(status or found, summary, error if status is None else None)
        self._channel.join()
