"""A run looked at again and again: what may be read each time, and what only when it has changed."""

import argparse
from pathlib import Path

from gemini.lease.machine import read_machine
from gemini.stat.rates import read_hardware
from gemini.stat.screen import Shown, gather
from gemini.stat.sight import read
from gemini.telemetry.documents import read_chunks, read_timeline
from gemini.telemetry.layout import chunks_file, timeline_file
from gemini.telemetry.records import Description, Timeline


class Follower:
    """Reads a run, as the options choose its ranks, and the documents of one rank when their files are new."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self._options = options
        self._hardware = read_hardware()
        self._chunks: Description | None = None
        self._timeline: Timeline | None = None
        self._seen: dict[Path, tuple[int, int]] = {}
        self._rank = -1

    def look(self) -> Shown:
        """All that is known now.

        Raises
        ------
        Unreadable
            The run's files are gone, damaged or too new.
        """
        sight = read(self.path, self._options)
        run = sight.run
        if run.rank != self._rank:
            self._rank, self._chunks, self._timeline = run.rank, None, None
            self._seen.clear()
        if self._is_new(chunks_file(self.path, run.rank)):
            self._chunks = read_chunks(self.path, run.rank)
        if self._is_new(timeline_file(self.path, run.rank)):
            self._timeline = read_timeline(self.path, run.rank)
        return gather(sight, self._chunks, self._timeline, self._hardware, read_machine() if run.is_live else None)

    def turn_to(self, rank: str) -> None:
        """Look at another rank from now on, or at all."""
        self._options = argparse.Namespace(**{**vars(self._options), "rank": rank})

    def _is_new(self, file: Path) -> bool:
        try:
            status = file.stat()
        except OSError:
            return self._seen.pop(file, None) is not None
        stamp = (status.st_mtime_ns, status.st_ino)
        if self._seen.get(file) == stamp:
            return False
        self._seen[file] = stamp
        return True
