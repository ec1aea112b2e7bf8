"""The checkpoints of one folder: which are committed, how another one is, and which are removed.

::

    folder/
      latest -> checkpoint-000012        for other tools; `find` does not need it
      checkpoint-000011/
      checkpoint-000012/
      .checkpoint.saving-1f2e3d4c/       a save under way, or one that was killed: see `stage`
      .checkpoint-000010.removing-5a6b/  on its way out

One rename commits: before it everything in the stage has been forced to the disk, and nothing old goes before it has
been forced there, too. What has the name of a checkpoint is whole at any moment.
"""

import errno
import logging
import os
import re
import secrets
import shutil
from itertools import count
from pathlib import Path

from gemini.errors import CheckpointError
from gemini.formats.json_file import LIMIT_BYTES
from gemini.safe_files import read_text

from .folder import sync_file, sync_folder
from .manifest import FORMAT, MANIFEST_NAME, Manifest
from .output import failure
from .safetensors_stream import SafetensorsFile

logger = logging.getLogger(__name__)

LATEST = "latest"
STAGE_NAME = "checkpoint"
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
_REMOVING = ".removing-"


def numbered(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, from old to new."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_checkpoint(path: Path) -> bool:
    """True if this is one checkpoint, and no folder of them."""
    return (path / MANIFEST_NAME).is_file()


def refuse_committed(path: Path) -> None:
    """Refuse to write to a checkpoint, or into one, whatever links lead there: it would no longer be what it was.

    Parameters
    ----------
    path
        A folder or a file, whether it is there or not.

    Raises
    ------
    ValueError
        Naming the checkpoint, which is as it was.
    """
    folder = path.resolve() if path.is_dir() else path.parent.resolve()  # a link to a file would be replaced itself
    for each in (folder, *folder.parents):
        if is_checkpoint(each) and (_CHECKPOINT.fullmatch(each.name) or FORMAT in _text(each / MANIFEST_NAME)):
            raise ValueError(
                f"{path}: {each} is a checkpoint, and stays as it is: give a folder outside of it, such as "
                f"{each.parent / 'exported'}, or save another checkpoint with booster.save({str(each.parent)!r}, ...)"
            )


def find(path: Path) -> Path:
    """The checkpoint that ``path`` names, or the newest one in it.

    Parameters
    ----------
    path
        A checkpoint, a folder of checkpoints, or ``latest`` in one, which means the same as the folder: after a crash
        it may name the one before.

    Raises
    ------
    CheckpointError
        If there is none, or the newest one is not whole; an older one is never taken in its place.
    """
    if path.name == LATEST and not (path.is_dir() and not path.is_symlink()) and numbered(path.parent):
        path = path.parent
    if is_checkpoint(path):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder")
    found = numbered(path)
    if not found:
        raise CheckpointError(f"{path} {_instead_of_checkpoints(path)}")
    if not is_checkpoint(found[-1]):
        raise CheckpointError(
            f"{found[-1]} is not a whole checkpoint: it has no {MANIFEST_NAME}{whole_one(found[-1])}. If booster.save "
            "did not write it, give it another name"
        )
    return found[-1]


def newest(path: Path, *own: str) -> Path:
    """The newest checkpoint in a folder of them; any other path as it is.

    Parameters
    ----------
    own
        Names of files with which a folder is read by itself.

    Raises
    ------
    CheckpointError
        If the folder has both, checkpoints and such a file: either may be meant.
    """
    if not any(is_checkpoint(each) for each in numbered(path)):
        return path
    found = find(path)
    if files := [name for name in own if (path / name).is_file()]:
        raise CheckpointError(
            f"{path} has {', '.join(files)} of its own and checkpoints of booster.save, and either may be meant: give "
            f"{path / files[0]}, or the newest checkpoint, {found}. Nothing was changed"
        )
    return found


def whole_one(damaged: Path) -> str:
    """The newest checkpoint before a damaged one that is whole, as the end of a message."""
    for path in reversed([path for path in numbered(damaged.parent) if _number(path) < _number(damaged)]):
        try:
            manifest = Manifest.read(path)
            manifest.check(path)
            for name in manifest.files:
                if name.endswith(".safetensors"):
                    with SafetensorsFile(path / name) as file:
                        file.verify()
        except CheckpointError:
            continue
        return f"; {path} is whole: give it by its name to go on from there"
    return ""


def commit(stage: Path, folder: Path) -> Path:
    """Give a finished stage, in ``folder``, the name of the next checkpoint. Everything in it has been synced.

    Raises
    ------
    CheckpointError
        If the system refuses. Older checkpoints are as they were.
    """
    try:
        path = _rename(stage, folder)
    except OSError as error:
        raise failure(folder, error, "cannot be written to") from error
    try:
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"{path} is whole, but the disk did not confirm it ({error.strerror or error}): it may be gone after a "
            "power failure. Older checkpoints are as they were"
        ) from error
    return path


def point_latest(path: Path) -> bool:
    """Have ``latest`` beside a checkpoint name it. Returns whether that is on the disk; loading works without it.

    The caller has the folder's lock.
    """
    link, new = path.with_name(LATEST), path.with_name(f".{LATEST}")
    try:
        new.unlink(missing_ok=True)  # of a save that was killed
        try:
            new.symlink_to(path.name, target_is_directory=True)
        except OSError:  # a file system without links
            new.write_text(path.name + "\n")
            sync_file(new)
        os.replace(new, link)
        sync_folder(path.parent)
    except OSError as error:
        logger.warning("%s is committed, but %s could not be made to name it: %s", path, link, error.strerror or error)
        return False
    return True


def prune(folder: Path, keep: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` (None: of none), and what is left of removals that were killed.

    Folders without a manifest are not ours to remove. What cannot be removed does no harm.
    """
    ours = [path for path in numbered(folder) if is_checkpoint(path)]
    for path in ours[:-keep] if keep is not None else []:
        try:
            os.rename(path, folder / f".{path.name}{_REMOVING}{secrets.token_hex(4)}")
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error.strerror or error)
    hidden = list(folder.glob(f".*{_REMOVING}*"))
    try:
        if hidden:
            sync_folder(folder)  # else a power loss may leave a checkpoint under its old name, with files missing
    except OSError:
        return
    for left in hidden:
        shutil.rmtree(left, ignore_errors=True)


def _instead_of_checkpoints(folder: Path) -> str:
    if _CHECKPOINT.fullmatch(folder.name):
        return f"is not a whole checkpoint: it has no {MANIFEST_NAME}{whole_one(folder)}"
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "optimizer.json")
    if parts := [name for name in names if (folder / name).is_file()]:
        return f"holds no checkpoint of booster.save; load_model and load_optimizer read its {', '.join(parts)}"
    unfinished = any(folder.glob(f".{STAGE_NAME}.saving-*"))
    return f"holds no checkpoint of booster.save{'; a save into it has not ended' if unfinished else ''}"


def _rename(stage: Path, folder: Path) -> Path:
    found = numbered(folder)
    for number in count(_number(found[-1]) + 1 if found else 1):
        path = folder / f"checkpoint-{number:06d}"
        if os.path.lexists(path):  # another run's: a rename would replace an empty folder
            continue
        try:
            os.rename(stage, path)
            return path
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise AssertionError("there are numbers without end")


def _text(path: Path) -> str:
    """What a file says; empty if it cannot be read."""
    try:
        return read_text(path, LIMIT_BYTES, errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int:
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else 0
