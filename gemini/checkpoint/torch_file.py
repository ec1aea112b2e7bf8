"""Files of ``torch.save``: written through an `Output`, read without running code in them."""

from pathlib import Path
from typing import IO, Any, cast

import torch

from gemini.errors import CheckpointError

from .output import Output

_ZIP = b"PK\x03\x04"


def write_torch(value: Any, out: Output) -> None:
    """``torch.save`` into a new file."""
    try:
        torch.save(value, cast("IO[bytes]", out))
    except BaseException:
        if out.fault is not None:
            raise out.fault from None  # torch reports a wrong position in the file instead
        raise


def read_torch(path: Path, *, mmap: bool = True) -> Any:
    """``torch.load`` on CPU with ``weights_only``: tensors, numbers, strings and containers, never code.

    Parameters
    ----------
    mmap
        Leave tensors in the file until they are used. Files in torch's format from before 1.6 are read whole.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch, zip and pickle each have their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} is not a whole torch file of tensors and plain values: {reason}") from error
