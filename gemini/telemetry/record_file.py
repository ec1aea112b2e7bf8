"""The file that a rank's records go into: appended, rotated, and never left with a torn line by a full disk.

One ``os.write`` a record on an ``O_APPEND`` descriptor: ``kill -9`` loses what is still queued and nothing else.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from gemini.safe_files import open_own
from gemini.telemetry.encoding import as_mapping, encode
from gemini.telemetry.layout import GENERATIONS, VERSION, older_records_file, records_file
from gemini.telemetry.records import Fields, Start

ROTATE_BYTES = 64 << 20
_HERE = Path()


class RecordFile:
    """Open from the start.

    Parameters
    ----------
    run, rank
        A descriptor of the run's folder, and whose file it is.
    start
        The start record; each file begins with it, so that it can be read by itself.
    """

    def __init__(self, run: int, rank: int, start: Start) -> None:
        self._run = run
        self._rank = rank
        self._start = start
        self._file = -1
        self._good_bytes = 0
        self._open()

    def start(self, dropped: int = 0) -> None:
        """Write the start record."""
        self.write("start", time.time(), self._start, dropped)

    def write(self, kind: str, when: float, fields: Fields, dropped: int = 0) -> None:
        """Append one record.

        Raises
        ------
        OSError
            If there is no room for all of it; then nothing of it is there.
        """
        record = {"v": VERSION, "type": kind, "t": when, "rank": self._rank, "dropped": dropped, **as_mapping(fields)}
        # The newline leads as well: after a predecessor's torn last line ours must start on a line of its own.
        line = (b"\n" if kind == "start" else b"") + encode(record) + b"\n"
        if self._good_bytes + len(line) > ROTATE_BYTES and kind not in ("start", "end"):
            self._rotate(dropped)
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"the disk is full: {written} of {len(line)} bytes were written")
        except OSError:
            os.ftruncate(self._file, self._good_bytes)
            raise
        self._good_bytes += written

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._file)

    def _open(self) -> None:
        self._file = open_own(records_file(_HERE, self._rank), os.O_WRONLY | os.O_APPEND, self._run)
        self._good_bytes = os.fstat(self._file).st_size

    def _rotate(self, dropped: int) -> None:
        for generation in range(GENERATIONS - 1, 0, -1):
            with suppress(FileNotFoundError):
                self._rename(
                    older_records_file(_HERE, self._rank, generation),
                    older_records_file(_HERE, self._rank, generation + 1),
                )
        self._rename(records_file(_HERE, self._rank), older_records_file(_HERE, self._rank))
        os.close(self._file)
        self._open()
        self.start(dropped)

    def _rename(self, old: Path, new: Path) -> None:
        os.replace(old, new, src_dir_fd=self._run, dst_dir_fd=self._run)
