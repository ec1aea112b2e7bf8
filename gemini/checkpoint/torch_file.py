"""Files of ``torch.save``: written through an `Output`, read without running code in them."""

import io
import pickle
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


def plain_bytes(value: Any, what: str) -> bytes:
    """A file of ``torch.save``, in memory, that `read_torch` reads.

    Raises
    ------
    CheckpointError
        If the value holds more than tensors, plain values and containers of them.
    """
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{what} holds more than plain values and would not load again") from error
    return file.getvalue()


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
