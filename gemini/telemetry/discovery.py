"""Finding runs: all of this user's, or the one that a person means."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gemini.telemetry.files import Unreadable
from gemini.telemetry.layout import RUN_DIR_VARIABLE, RUN_FILE, runs_folder
from gemini.telemetry.ranks import Ranks, read_ranks

_LISTING_TAIL_BYTES = 32 << 10  # some records are enough for one line of a list of many runs


class NoRun(Exception):
    """No run matches what was asked for."""


class UnreadableRun(NamedTuple):
    """A folder that is a run's by its files, and cannot be read."""

    path: Path
    reason: str


def list_runs(folder: Path | None = None) -> list[Ranks]:
    """Every readable run in the common folder (or in ``folder``), newest first."""
    return look_at_runs(folder)[0]


def look_at_runs(folder: Path | None = None) -> tuple[list[Ranks], list[UnreadableRun]]:
    """Every readable run, newest first, and those that cannot be read, by name."""
    runs: dict[str, Ranks] = {}
    unreadable = {}
    for path in _candidates(runs_folder() if folder is None else folder):
        try:
            run = read_ranks(path, tail_bytes=_LISTING_TAIL_BYTES)
        except (Unreadable, OSError) as error:
            unreadable[os.path.realpath(path)] = UnreadableRun(path, str(error))
            continue
        # A folder that several runs used one after another has a link for each; they all show its last run.
        runs.setdefault(os.path.realpath(path), run)
    return sorted(runs.values(), key=lambda run: run.identity.started or 0.0, reverse=True), [*unreadable.values()]


def find_run(target: str | None = None) -> tuple[Path, str]:
    """The folder of the run that ``target`` names, and a remark on the choice (empty when it was no choice).

    ``target`` is a run's folder, a folder of runs, a run id or an unambiguous beginning of one, or a process id. None
    means ``$GEMINI_MEMORY_RUN_DIR`` if that is set, else the newest live run, else the newest run.

    Raises
    ------
    NoRun
        With what was looked for, where, and what to do.
    """
    if target is None and (chosen := os.environ.get(RUN_DIR_VARIABLE)):
        if _is_run(Path(chosen)):
            return Path(chosen), f"the run in ${RUN_DIR_VARIABLE}"
        raise NoRun(f"no run in {chosen}, the folder that {RUN_DIR_VARIABLE} names")
    if target is None:
        return _newest(runs_folder())
    folder = Path(target)
    if _is_run(folder):
        return folder, ""
    if os.path.isdir(folder):
        return _newest(folder)
    by_id = runs_folder() / target
    if os.sep not in target and _is_run(by_id):
        return by_id, ""
    runs = list_runs()
    of_pid = [run for run in runs if target in {str(view.identity.pid) for view in run.views}]
    matches = of_pid or [run for run in runs if run.identity.run_id.startswith(target)]
    if len(matches) > 1 and not of_pid:
        raise NoRun(f"{target} begins {len(matches)} run ids: give more of it")
    if matches:
        return matches[0].path, ""
    raise NoRun(f"{target} is no run folder, run id or process id of a run (looked in {runs_folder()})")


def _newest(folder: Path) -> tuple[Path, str]:
    runs, unreadable = look_at_runs(folder)
    if not runs and unreadable:
        raise NoRun(f"none of {len(unreadable)} in {folder} can be read: {unreadable[0].reason}")
    if not runs:
        raise NoRun(f"no runs in {folder}; train with GeminiPlugin(), or name a run folder")
    live = [run for run in runs if run.is_live]
    if len(live) > 1:
        return live[0].path, f"the newest of {len(live)} live runs"
    return (live[0].path, "the live run") if live else (runs[0].path, "no run is live, this is the newest")


def _candidates(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except OSError:
        return
    for name in names:
        if _is_run(folder / name):
            yield folder / name


def _is_run(folder: Path) -> bool:
    """Whether there is something with the name of a run's file: a link that leads nowhere, too."""
    return os.path.lexists(folder / RUN_FILE)  # of all that this finds impossible it says False
