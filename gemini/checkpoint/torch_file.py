"""Files of ``torch.save``: written through an `Output`, read without running code in them."""

import io
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from gemini.errors import CheckpointError

from ..formats import Damaged, shown
from ..formats.torch_zip import check_zip, is_zip, pickle_limit, refuse_byte_arrays, verify_zip
from .output import Output

_SHORTER = "Make tensors of long lists, or save them in files of their own"
_PLAIN = (Tensor, nn.Parameter, int, float, bool, str, bytes, type(None), torch.Size, torch.dtype)


def write_torch(value: Any, out: Output) -> None:
    """``torch.save`` into a new file."""
    try:
        torch.save(value, cast("IO[bytes]", out))
    except BaseException:
        if out.fault is not None:
            raise out.fault from None  # torch reports a wrong position in the file instead
        raise
    try:
        check_zip(out.path)
    except Damaged as error:
        raise CheckpointError(f"{out.final} would not load again: {error}. {_SHORTER}") from error


def plain_bytes(value: Any, what: str) -> bytes:
    """A file of ``torch.save``, in memory, that `read_torch` reads; see `plain`."""
    file = io.BytesIO()
    torch.save(plain(value, what)(), file)
    with zipfile.ZipFile(file) as written:
        sizes = [info.file_size for info in written.infolist() if info.filename.endswith("/data.pkl")]
        if sum(sizes) > (limit := pickle_limit(len(written.infolist()))):
            raise CheckpointError(f"{what} takes {sum(sizes)} bytes without its tensors; {limit} are read. {_SHORTER}")
    return file.getvalue()


def plain(value: Any, what: str) -> Callable[[], Any]:
    """Give a value back when it is asked for, having seen that `read_torch` will read it. No tensor is copied.

    Raises
    ------
    CheckpointError
        If the value holds more than tensors, plain values and containers of them; it says where.
    """
    try:
        foreign = _foreign(value, what)
    except RecursionError:
        raise CheckpointError(f"{what} contains itself, or is nested too deeply to be saved") from None
    if foreign:
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


def read_torch(path: Path, *, mmap: bool = True, verify: bool = True) -> Any:
    """``torch.load`` on CPU with ``weights_only``: tensors, numbers, strings and containers, never code.

    Parameters
    ----------
    mmap
        Leave tensors in the file until they are used. Files in torch's format from before 1.6 are read whole.
    verify
        Call `verify_torch` first. Its checksums of names and shapes are looked at in any case.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, or holds anything else.
    """
    try:
        zipped = is_zip(path)
        if zipped:
            check_zip(path)
        else:
            refuse_byte_arrays(path)
    except Damaged as error:
        raise CheckpointError(str(error)) from error
    if verify:
        verify_torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch, zip and pickle each have their own
        raise CheckpointError(
            f"{path} is not a whole torch file of tensors and plain values: {_reason(error)}"
        ) from error


def verify_torch(path: Path) -> None:
    """Compare the checksums that a zip of ``torch.save`` has of all that is in it, which torch itself does not.

    Raises
    ------
    CheckpointError
        If one is another. Files in torch's format from before 1.6 have none.
    """
    try:
        if is_zip(path):
            verify_zip(path)
    except Damaged as error:
        raise CheckpointError(str(error)) from error


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong; its advice is to run what is in the file."""
    text = str(error).strip()
    if called := re.search(r"GLOBAL (\S+)", text):
        return f"it would run {shown(called[1])}"
    return shown(next(iter(text.splitlines()), type(error).__name__))
