"""Names and versions that the writer and the reader share: where runs lie and what their files are called."""

import os
from pathlib import Path

VERSION = 1
"""Major version of the records. A reader refuses a newer one; new fields and record types do not raise it."""

HEARTBEAT_SECONDS = 5.0
RUN_FILE = "run.json"

RUN_DIR_VARIABLE = "GEMINI_MEMORY_RUN_DIR"
"""Environment variable that names the folder of the run, for the writer and for ``gemini-stat`` alike."""


def runs_folder() -> Path:
    """Where runs are found: each is a folder in it, or a link to a folder that the user chose."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "gemini-memory" / "runs"


def records_file(run: Path, rank: int) -> Path:
    return run / f"rank{rank:05d}.jsonl"


def lock_file(run: Path, rank: int) -> Path:
    return run / f"rank{rank:05d}.lock"


def older_records_file(run: Path, rank: int) -> Path:
    """The generation before the present one; the one before that is gone."""
    return run / f"rank{rank:05d}.old.jsonl"
