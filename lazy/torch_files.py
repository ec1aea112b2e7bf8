"""Tensors of a file of ``torch.save`` that are read when the tape is replayed.

``torch.load`` is let through and its result taken over. With ``mmap=True`` nothing but the structure of the file is
read at first: torch tells where in the file each storage begins. (A map would count in whole against a limit on memory;
see ``weight_files.py``.)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemini.errors import LazyInitError
from gemini.torch_private import storage_key, storage_offset_in_file

from .record import from_source
from .tape import Tape
from .weight_files import Stamp

Load = Callable[..., Any]
_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTensor:
    """A copy of a storage that ``torch.load`` has made or mapped and that nothing else refers to."""

    tensor: Tensor
    stamp: Stamp | None

    def __call__(self) -> Tensor:
        if self.stamp is not None:
            self.stamp.check()
        return self.tensor.clone()


class OpenFile:
    """A file that can be read as long as this is alive, also when its name is gone."""

    def __init__(self, descriptor: int, stamp: Stamp) -> None:
        self.descriptor = os.dup(descriptor)
        self.stamp = stamp
        weakref.finalize(self, os.close, self.descriptor)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """Reads one storage of a file."""

    file: OpenFile
    offset: int
    numel: int
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        self.file.stamp.check()
        tensor = torch.empty(self.numel, dtype=self.dtype, device="cpu")
        view, done = tensor.view(torch.uint8).numpy().data, 0
        while done < len(view):
            count = os.preadv(self.file.descriptor, [view[done:]], self.offset + done)
            if not count:
                raise LazyInitError(f"{self.file.stamp.path} ends after {self.offset + done} bytes: it was cut off")
            done += count
        return tensor


def load(tape: Tape, load: Load, f: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.load`` inside a context, with lazy tensors in the dicts, lists and tuples that it returns.

    Tensors that share a storage go on sharing it. Other objects, modules too, keep their real tensors.

    Parameters
    ----------
    load
        The original.
    """
    with tape.paused():
        found = _structure(load, f, **kwargs) if not args and _reads_late(f, **kwargs) else None
        loaded, file = found or (load(f, *args, **kwargs), None)
    stamp = Stamp.of(f) if isinstance(f, str | os.PathLike) else None
    return _Adoption(tape, stamp, file).adopt(loaded)


def _reads_late(f: Any, *, mmap: bool | None = None, map_location: Any = None, **options: Any) -> bool:
    return bool(mmap) and isinstance(f, str | os.PathLike) and map_location in ("cpu", torch.device("cpu"))


def _structure(load: Load, path: str | os.PathLike[str], **options: Any) -> tuple[Any, OpenFile] | None:
    """What a file holds, with tensors that have no memory; None if there is anything that needs its values at once."""
    try:
        with open(path, "rb") as file:
            opened = OpenFile(file.fileno(), Stamp.of(path))
            found = load(file, **{**options, "mmap": False, "map_location": "meta"})
    except Exception:  # the original will say what is wrong, or manage
        return None
    return (found, opened) if opened.stamp.is_of(opened.descriptor) and _is_in_file(found) else None


def _is_in_file(node: Any) -> bool:
    if isinstance(node, Tensor):
        is_plain = type(node) in (Tensor, nn.Parameter) and node.layout is torch.strided
        return is_plain and storage_offset_in_file(node.untyped_storage()) is not None
    if isinstance(node, dict):
        return all(map(_is_in_file, node.values()))
    if type(node) in (list, tuple):
        return all(map(_is_in_file, node))
    return isinstance(node, _PLAIN)


class _Adoption:
    """Puts lazy tensors in the place of those that ``torch.load`` has returned.

    Parameters
    ----------
    stamp
        Of the file, if it is known.
    file
        Where the values are; None: in the tensors.
    """

    def __init__(self, tape: Tape, stamp: Stamp | None, file: OpenFile | None) -> None:
        self._tape = tape
        self._stamp = stamp
        self._file = file
        self._wholes: dict[tuple[int, torch.dtype], Tensor] = {}

    def adopt(self, node: Any) -> Any:
        is_real = isinstance(node, Tensor) and not node.is_meta
        if type(node) in (Tensor, nn.Parameter) and node.layout is torch.strided and (is_real or self._file):
            lazy = self._whole(node).as_strided(node.shape, node.stride(), node.storage_offset())
            if type(node) is nn.Parameter:
                return nn.Parameter(lazy, node.requires_grad)
            return lazy.requires_grad_(node.requires_grad)
        if isinstance(node, dict):
            for key in node:
                node[key] = self.adopt(node[key])
        elif type(node) is list:
            node[:] = [self.adopt(item) for item in node]
        elif type(node) is tuple:
            return tuple(self.adopt(item) for item in node)
        return node

    def _whole(self, tensor: Tensor) -> Tensor:
        """The lazy tensor, flat, of all that the storage of a tensor holds."""
        storage = tensor.untyped_storage()
        offset = storage_offset_in_file(storage) if self._file is not None else None
        # Of one storage in the file torch makes another without memory for each tensor on it.
        key = (storage_key(storage) if offset is None else offset), tensor.dtype
        if key not in self._wholes:
            with self._tape.paused():
                flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            meta = torch.empty(flat.shape, dtype=flat.dtype, device="meta")
            source: Callable[[], Tensor] = LoadedTensor(flat, self._stamp)
            device = flat.device
            if self._file is not None and offset is not None:
                source, device = StoredTensor(self._file, offset, flat.numel(), flat.dtype), torch.device("cpu")
            self._wholes[key] = from_source(self._tape, source, meta, device)
        return self._wholes[key]
