"""Making the folder of a run, and keeping the number of old ones bounded."""

import os
import re
import socket
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemini.safe_files import OWN_FOLDER, make_own_folder, refuse_link, replace_file, write_draft
from gemini.telemetry.encoding import encode
from gemini.telemetry.files import read_document
from gemini.telemetry.layout import RUN_DIR_VARIABLE, RUN_FILE, runs_folder, start_file
from gemini.telemetry.liveness import is_locked

_KEEP_RUNS = 100
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
"""What may be the name of a run's folder, also where the ranks have agreed upon it."""
_RUN_ID = re.compile(r"\d{8}T\d{6}Z(-\d+){1,3}")
_OUR_FILES = re.compile(
    r"run\.json|rank\d+(\.\d+|\.old)?\.jsonl|rank\d+\.lock|rank\d+\.(start|chunks|oom|timeline)\.json|request-dump"
    r"|\.(run|rank\d+\.\w+)\.json\.\d+(\.[0-9a-f]{8})?"  # drafts that a SIGKILL has left
)


def make_run_folder(run_dir: Path | None, run_id: str, rank: int | None = None) -> tuple[Path, str]:
    """Make the folder; one that lies elsewhere gets a link among the others so that ``gemini-stat`` finds it.

    ``rank``: of a process whose fellows make the same folder under the same run id. When it begins another run, all of
    them do, and come to the same next name.
    """
    if not _NAME.fullmatch(run_id):
        raise ValueError(f"{run_id[:200]!r} is no name of a run: letters, digits, and - _ . within")
    runs = runs_folder()
    chosen = run_dir or os.environ.get(RUN_DIR_VARIABLE)
    runs_error = None
    try:
        make_own_folder(runs, ours=2)  # gemini-memory and runs
    except OSError as error:
        runs_error = error
    if chosen is None and runs_error is not None:
        raise runs_error
    run = Path(chosen).absolute() if chosen else None
    if run is not None:
        make_run_dir(run)
    for attempt in range(1, 1000):  # two runs of one process may begin in the same second
        candidate = run_id if attempt == 1 else f"{run_id}-{attempt}"
        try:
            if run is None:
                (runs / candidate).mkdir(mode=0o700)
                return runs / candidate, candidate
            (runs / candidate).symlink_to(run)
            return run, candidate
        except FileExistsError:
            if rank is not None and not _has_written(runs / candidate, candidate, rank):
                return (runs / candidate) if run is None else run, candidate
            continue
        except OSError:
            if run is None:
                raise
            return run, candidate  # no link: `gemini-stat FOLDER` still works
    raise OSError(f"no free name for {run_id} in {runs}")


def make_run_dir(run: Path) -> None:
    """Make the folder that the user chose for a run, private, unless it is there.

    It may belong to several users: `gemini.safe_files` writes only to files that are of this one alone.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        run.mkdir(mode=OWN_FOLDER)
    refuse_link(run)


def _has_written(run: Path, run_id: str, rank: int) -> bool:
    """True if this very process has written that run before."""
    try:
        start = read_document(start_file(run, rank))
        return [start[key] for key in ("run_id", "pid", "host")] == [run_id, os.getpid(), socket.gethostname()]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def write_run_file(folder: int, rank: int, content: dict[str, Any]) -> None:
    """Atomic, so that a reader never sees half of it. Rank 0 has the say; another rank writes only where none is.

    ``folder`` is a descriptor of the run's folder.
    """
    if rank == 0:
        replace_file(RUN_FILE, encode(content), folder)
        return
    draft = write_draft(RUN_FILE, encode(content), folder)
    try:
        with suppress(FileExistsError):
            os.link(draft, RUN_FILE, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.unlink(draft, dir_fd=folder)


def write_document(path: Path, content: dict[str, Any], folder: int | None = None) -> None:
    """Put a whole JSON file in place, atomically. ``folder`` is a descriptor of its folder, where there is one."""
    replace_file(path if folder is None else path.name, encode(content), folder)


def prune(mine: Set[Path], keep: int = _KEEP_RUNS) -> None:
    """Forget the oldest runs of the common folder. Folders that the user chose stay; only their links go.

    Only what we made is removed: folders named like a run, and in them files named like ours. ``mine`` are the folders
    of this process's own runs: looking at their locks would drop them.
    """
    runs = runs_folder()
    names = sorted((entry.name for entry in os.scandir(runs) if _RUN_ID.fullmatch(entry.name)), reverse=True)
    for name in names[keep:]:
        run = runs / name
        if run.resolve() in mine or any(is_locked(lock) for lock in run.glob("rank*.lock")):
            continue
        with suppress(OSError):  # another process prunes too, or the folder holds something of the user's
            if run.is_symlink():
                run.unlink()
                continue
            for file in list(run.iterdir()):
                if _OUR_FILES.fullmatch(file.name):
                    file.unlink()
            run.rmdir()
