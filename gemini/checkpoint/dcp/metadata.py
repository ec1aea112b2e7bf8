"""The ``.metadata`` of `torch.distributed.checkpoint`, read without running what is in it.

It is a pickle, which in general may call anything. This one consists of a few classes that hold values, and no other
name is looked up. What they say is checked before it is used.
"""

import io
import os
import pickle
from collections.abc import Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from gemini.errors import CheckpointError
from gemini.safe_files import open_regular

from ...torch_private import checkpoint_classes

METADATA_NAME = ".metadata"
_LIMIT_BYTES = 1_000_000_000


class _Unpickler(pickle.Unpickler):
    """Knows the classes of the format, and no other name."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in (known := checkpoint_classes()):
            return known[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")


def is_checkpoint(folder: Path) -> bool:
    """True if `torch.distributed.checkpoint` would find a checkpoint in a folder."""
    return (folder / METADATA_NAME).is_file()


def read_metadata(folder: Path) -> Metadata:
    """What is stored in a folder, and where.

    Raises
    ------
    CheckpointError
        If there is no ``.metadata``, or it is damaged, or it names what is not there.
    """
    path = folder / METADATA_NAME
    try:
        with open(open_regular(path), "rb") as file:
            is_short = os.fstat(file.fileno()).st_size <= _LIMIT_BYTES
            data = file.read() if is_short else b""  # not read(limit), which takes that memory first
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not is_short:
        raise CheckpointError(f"{path} is longer than {_LIMIT_BYTES} bytes")
    try:
        found = _Unpickler(io.BytesIO(data)).load()
        _check(found, folder)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path} is not the metadata of a checkpoint: {type(error).__name__}: {error}") from error
    assert isinstance(found, Metadata)
    return found


def _check(found: Any, folder: Path) -> None:
    """Raise anything if the metadata are not what they should be."""
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise TypeError("it holds something else")
    sizes: dict[str, int] = {}
    for index, info in found.storage_data.items():
        name = _inside(info.relative_path)
        if info.__dict__.get("transform_descriptors"):
            raise ValueError(f"{index.fqn} is stored with {info.transform_descriptors}, which are not known here")
        if name not in sizes:
            sizes[name] = _size(folder / name)
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise CheckpointError(
                f"{folder / name} is cut off: {index.fqn} ends at byte {info.offset + info.length}, the file at "
                f"{sizes[name]}"
            )
    for name, stored in found.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            _check_tensor(name, stored, found.storage_data)
        elif MetadataIndex(name) not in found.storage_data:
            raise ValueError(f"{name} is stored nowhere")


def _check_tensor(name: str, stored: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]) -> None:
    if not isinstance(stored.properties.dtype, torch.dtype):
        raise TypeError(f"{name} has no dtype")
    for chunk in stored.chunks:
        sides = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        if any(offset < 0 or size < 0 or offset + size > whole for offset, size, whole in sides):
            raise ValueError(f"a part of {name} lies outside of it")
        if MetadataIndex(name, chunk.offsets) not in places:
            raise ValueError(f"a part of {name} is stored nowhere")
    if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
        raise ValueError(f"the parts of {name} are not all of it")


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"it names a file outside of its folder: {name!r}")
    return name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
