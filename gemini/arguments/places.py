"""The rules for names of files and folders. They look at the disk, and change nothing there."""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checked import NotAllowed

_SAYS = {
    errno.ELOOP: ", a loop of symbolic links",
    errno.ENAMETOOLONG: ", which is too long for a file system",
    errno.ENOTDIR: ", which is below a file",
    errno.EACCES: ", where this process may not look",
}


@dataclass(frozen=True, slots=True)
class Name:
    """What could name a file or folder, whether it is there or not."""

    allowed: str = "a path (str or os.PathLike)"

    def meant(self, value: Any) -> Path:
        return _path(value)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that can be written to, or can be made."""

    allowed: str = "a folder that can be written to, or made"

    def meant(self, value: Any) -> Path:
        path = _path(value)
        for place in (path, *path.absolute().parents):
            try:
                status = os.stat(place)
            except FileNotFoundError:
                if place.is_symlink():
                    raise NotAllowed(ValueError, f": {place} is a symbolic link to nothing") from None
                continue
            except OSError as error:
                raise NotAllowed(ValueError, _SAYS.get(error.errno or 0, f": {error.strerror}")) from None
            where = ", which" if place == path else f": {place}"
            if not stat.S_ISDIR(status.st_mode):
                what = "a file" if stat.S_ISREG(status.st_mode) else "a device or a pipe"
                raise NotAllowed(ValueError, f"{where} is {what}")
            if not os.access(place, os.W_OK | os.X_OK):
                raise NotAllowed(ValueError, f"{where} this process may not write to")
            break
        return path


@dataclass(frozen=True, slots=True)
class FileNamePart:
    """A part of the name of a file."""

    allowed: str = "a part of a file's name, without a slash"

    def meant(self, value: Any) -> str:
        if not isinstance(value, str):
            raise NotAllowed(TypeError)
        if "/" in value or "\0" in value or len(os.fsencode(value)) > 200:
            raise NotAllowed(ValueError)
        return str(value)


def _path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise NotAllowed(TypeError)
    text = os.fspath(value)
    if not text:
        raise NotAllowed(ValueError, '; "." is the current folder')
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise NotAllowed(ValueError, _SAYS[error.errno]) from None
    except ValueError:  # NUL, or a character that no name of a file can have
        raise NotAllowed(ValueError, ", which has a character that names of files cannot have") from None
    return Path(text)
