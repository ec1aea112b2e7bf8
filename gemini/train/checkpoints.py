"""The folder of a job's checkpoints, as ``booster.save`` makes it, and what the job keeps beside weights and states.

::

    DIR/checkpoint-000003/             the newest; `latest` names it
    DIR/model.safetensors              -> latest/model.safetensors, so that ``from_pretrained(DIR)`` reads the newest
    DIR/config.json                    -> latest/config.json

Jobs once wrote a single checkpoint, its files in DIR itself with a ``training_state.json``. It can be resumed, and the
first new one takes its place.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemini.checkpoint import committed_checkpoints, find_checkpoint, load_checkpoint
from gemini.errors import CheckpointError
from gemini.safe_files import read_file

OLD_STATE_FILE = "training_state.json"
OLD_OPTIMIZER, OLD_SCHEDULE = "optimizer", "lr_scheduler.pt"
_VERSION = 2
_SHOWN = ("model.safetensors", "config.json", "generation_config.json")


def folder_of(checkpoint: Path) -> Path:
    """The folder in which a job goes on that has resumed from a checkpoint, or from the newest one of a folder."""
    if is_old(checkpoint) or not holds_checkpoints(checkpoint):
        return checkpoint
    return find_checkpoint(checkpoint).parent


def holds_checkpoints(folder: Path) -> bool:
    """True if a job has written here; also for a single checkpoint."""
    try:
        return is_old(folder) or find_checkpoint(folder).is_dir()
    except CheckpointError:
        return folder.is_dir() and bool(committed_checkpoints(folder))


def is_old(folder: Path) -> bool:
    """True if the folder itself is a checkpoint, in the old form."""
    return (folder / OLD_STATE_FILE).is_file() and not committed_checkpoints(folder)


def state(step: int, losses: list[float], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a job."""
    return {"job": "gemini.train", "version": _VERSION, "step": step, "losses": losses, "options": dict(options)}


def read_state(checkpoint: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """The same, of the newest checkpoint in a folder, or of one.

    Parameters
    ----------
    needed
        Options that must be there.

    Raises
    ------
    ValueError
        If it is no checkpoint of this job.
    CheckpointError
        If it is damaged.
    """
    if is_old(checkpoint):
        return _read_old(checkpoint / OLD_STATE_FILE, needed)
    if not holds_checkpoints(checkpoint):
        raise ValueError(f"{checkpoint} is no checkpoint of this job")
    found = load_checkpoint(checkpoint, [], rng=False)
    try:
        if found["job"] != "gemini.train" or found["version"] != _VERSION or not set(needed) <= set(found["options"]):
            raise KeyError("version")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of this job, or of another version of it: {error}") from None
    content: dict[str, Any] = found
    return content


def show_newest(folder: Path) -> None:
    """Have the folder itself look like a checkpoint of transformers, the newest one, where there are symbolic links.

    What is left of a checkpoint in the old form goes.
    """
    for name in _SHOWN:
        link, new = folder / name, folder / f".{name}"
        target = Path("latest", name)
        if not (folder / target).is_file() or (link.is_symlink() and Path(os.readlink(link)) == target):
            continue
        try:
            new.unlink(missing_ok=True)  # of a job that was killed
            new.symlink_to(target)
            os.replace(new, link)
        except OSError:
            return
    if (folder / OLD_STATE_FILE).is_file():
        shutil.rmtree(folder / OLD_OPTIMIZER, ignore_errors=True)
        for name in (OLD_SCHEDULE, OLD_STATE_FILE):
            (folder / name).unlink(missing_ok=True)


def _read_old(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(read_file(path, 1 << 20))
        if content["version"] != 1 or not set(needed) <= set(content["options"]):
            raise KeyError("version")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or from another version: {error}") from None
    return content
