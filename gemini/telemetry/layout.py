"""Names and versions that the writer and the reader share: where runs lie and what their files are called."""

import os
from pathlib import Path

VERSION = 1
"""Major version of the records. A reader refuses a newer one; new fields and record types do not raise it."""

TIERS = ("device", "host", "disk")
DIVIDED = "host+disk"
"""Where a home is that is divided between two of them."""
HEARTBEAT_SECONDS = 2.0
RUN_FILE = "run.json"
GENERATIONS = 8
"""Files of records kept of a rank, beside the present one."""

RUN_DIR_VARIABLE = "GEMINI_MEMORY_RUN_DIR"
"""Environment variable that names the folder of the run, for the writer and for ``gemini-stat`` alike."""


def runs_folder() -> Path:
    """Where runs are found: each is a folder in it, or a link to a folder that the user chose."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "gemini-memory" / "runs"


def disks_folder() -> Path:
    """Where it is remembered how this machine's disks are best asked, a file for each file system."""
    return runs_folder().parent / "disks"


def records_file(run: Path, rank: int) -> Path:
    return run / f"rank{rank:05d}.jsonl"


def lock_file(run: Path, rank: int) -> Path:
    return run / f"rank{rank:05d}.lock"


def older_records_file(run: Path, rank: int, generation: int = 1) -> Path:
    """What was written before the present file; generation 1 is the youngest, `GENERATIONS` the oldest that is kept."""
    return run / f"rank{rank:05d}.{generation}.jsonl"


def start_file(run: Path, rank: int) -> Path:
    """Who writes the rank's records now: its start record, found also when that is far from the file's end."""
    return run / f"rank{rank:05d}.start.json"


def chunks_file(run: Path, rank: int) -> Path:
    """Chunks, their homes and parameters, and the units: what the numbers in records refer to."""
    return run / f"rank{rank:05d}.chunks.json"


def timeline_file(run: Path, rank: int) -> Path:
    """The timeline recorded last."""
    return run / f"rank{rank:05d}.timeline.json"


def oom_file(run: Path, rank: int) -> Path:
    """The last out-of-memory error with what there was at that moment."""
    return run / f"rank{rank:05d}.oom.json"


def request_file(run: Path) -> Path:
    """Creating this file asks for a timeline of the next step; the run removes it."""
    return run / "request-dump"
