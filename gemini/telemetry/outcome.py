"""What this process is called, and how it ended."""

import sys
import threading
from pathlib import Path

from gemini.telemetry.records import EndStatus


def program() -> str:
    """The script's name, or the package's where ``python -m package`` was run."""
    path = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    return path.parent.name if path.name == "__main__.py" else path.name


def outcome() -> tuple[EndStatus, str | None]:
    """How this process ends, and the error if one ended it.

    A script that ran to its end has finished; one that an exception ended has crashed. Exit handlers run after both.

    The interpreter leaves an uncaught exception in ``sys.last_value``. Before its end, and in an interactive session,
    that may be any earlier mistake and says nothing. The main thread is marked as ended before exit handlers run.
    """
    error = getattr(sys, "last_value", None)
    if error is None or hasattr(sys, "ps1") or threading.main_thread().is_alive():
        return "finished", None
    return _crashed(error)


def outcome_of_forked() -> tuple[EndStatus, str | None]:
    """How a process ends that ``multiprocessing`` has forked: it handles the exception that ends it."""
    error = sys.exc_info()[1]
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "finished", None
    return _crashed(error)


def _crashed(error: BaseException) -> tuple[EndStatus, str | None]:
    return "crashed", f"{type(error).__name__}: {error}"[:500]
