"""Is the process that holds a POSIX lock alive? Asking takes no lock and so cannot get in the writer's way."""

import fcntl
import os
import struct
import sys
from pathlib import Path

from gemini.safe_files import open_regular

# struct flock: Linux begins with the type, macOS ends with it. Python has no portable spelling of F_GETLK.
_LINUX = "hhqqi4x"
_MACOS = "qqihh"


def is_locked(path: Path) -> bool:
    """True while another process holds the lock.

    Never call it for a lock of this very process: a lock does not conflict with its owner, so the answer would be
    False, and closing any descriptor of the file drops the lock.
    """
    try:
        descriptor = open_regular(path)
    except OSError:
        return False
    try:
        if sys.platform == "darwin":
            answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_MACOS, 0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET))
            return bool(struct.unpack(_MACOS, answer)[3] != fcntl.F_UNLCK)
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_LINUX, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        return bool(struct.unpack(_LINUX, answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
