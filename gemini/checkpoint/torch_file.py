"""Files of ``torch.save``: written through an `Output`, read without running code in them."""

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from gemini.errors import CheckpointError

from .output import Output

_PLAIN = (Tensor, nn.Parameter, int, float, bool, str, bytes, type(None), torch.Size, torch.dtype)
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
    """A file of ``torch.save``, in memory, that `read_torch` reads; see `plain`."""
    file = io.BytesIO()
    torch.save(plain(value, what)(), file)
    return file.getvalue()


def plain(value: Any, what: str) -> Callable[[], Any]:
    """Give a value back when it is asked for, having seen that `read_torch` will read it. No tensor is copied.

    Raises
    ------
    CheckpointError
        If the value holds more than tensors, plain values and containers of them; it says where.
    """
    if foreign := _foreign(value, what):
        raise CheckpointError(
            f"{foreign}, and only tensors, numbers, texts and containers of them can be loaded without running code"
        )
    return lambda: value


def _foreign(value: Any, where: str) -> str:
    """What in a value ``weights_only`` would not load, in words; empty if nothing."""
    if type(value) in _PLAIN:
        return ""
    if type(value) in (dict, OrderedDict):
        parts = [(key, f"a key of {where}") for key in value] + [(v, f"{where}[{k!r}]") for k, v in value.items()]
    elif type(value) in (list, tuple):
        parts = [(each, f"{where}[{index}]") for index, each in enumerate(value)]
    else:
        return "" if _loads(value) else f"{where} is of type {type(value).__name__}"
    return next((found for each, place in parts if (found := _foreign(each, place))), "")


def _loads(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # pickle, torch and the object itself each have their own
        return False
    return True


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
