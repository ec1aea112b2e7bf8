"""Where weights are in a checkpoint: single files, and folders in the Hugging Face layout."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from torch import Tensor

from gemini.errors import CheckpointError
from gemini.sizes import parse_bytes

from ..torch_private import metadata_of
from .match import Source
from .names import is_extra_state
from .safetensors_stream import ID_KEY, OpenFiles
from .torch_file import read_torch
from .wording import listed

SAFE_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
WEIGHT_NAMES = (SAFE_NAME, SAFE_NAME + INDEX_SUFFIX, TORCH_NAME, TORCH_NAME + INDEX_SUFFIX)
"""Of the file to begin with in a folder, in the order in which transformers looks."""
FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
INDEX_LIMIT_BYTES = 100_000_000
_MEBI = 1 << 20

T = TypeVar("T")


def read_sources(checkpoint: Path, files: OpenFiles) -> dict[str, Any]:
    """Every stored tensor by name, unread, and extra states.

    Parameters
    ----------
    files
        Takes the opened files; reading the sources needs them.

    Raises
    ------
    CheckpointError
        If anything that the checkpoint consists of is missing or not whole.
    """
    path = find_weights(checkpoint) if checkpoint.is_dir() else checkpoint
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if not path.name.endswith(INDEX_SUFFIX):
        return _open(path, files)
    return read_indexed(path, read_weight_map(path), files)


def read_indexed(index: Path, weight_map: Mapping[str, str], files: OpenFiles) -> dict[str, Any]:
    """The tensors that an index names; every file of it is looked at.

    Raises
    ------
    CheckpointError
        If a file is missing (all that are, are named), damaged, or lacks a tensor.
    """
    places = {name: index.parent / name for name in dict.fromkeys(weight_map.values())}
    if gone := [name for name, path in places.items() if not path.is_file()]:
        raise CheckpointError(f"{index} names files that do not exist: {listed(gone)}")
    contents = {name: _open(path, files) for name, path in places.items()}
    if lost := [f"{name} (in {file})" for name, file in weight_map.items() if name not in contents[file]]:
        raise CheckpointError(f"{index} names tensors that are not in their files: {listed(lost)}")
    return {name: contents[file][name] for name, file in weight_map.items()}


def find_weights(folder: Path) -> Path:
    """The file to begin with, in the order in which transformers looks; with a prefix, if there is only one.

    Raises
    ------
    CheckpointError
        If there is none, or it is not clear which.
    """
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    for name in WEIGHT_NAMES:
        found = sorted(path for path in folder.glob(f"*.{name}") if not path.name.startswith("."))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{folder} holds several checkpoints: give one of {', '.join(map(str, found))}")
    raise CheckpointError(f"{folder} is not a checkpoint: it has none of {', '.join(WEIGHT_NAMES)}")


def read_weight_map(index: Path) -> dict[str, str]:
    """Name -> file, from an index.

    Raises
    ------
    CheckpointError
        If it is not an index, or names files outside of its folder.
    """
    return checked_weight_map(index, read_json(index).get("weight_map"))


def checked_weight_map(index: Path, weight_map: Any) -> dict[str, str]:
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} is not the index of a checkpoint: it has no weight_map from names to files")
    for file in weight_map.values():
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\0" in file:
            raise CheckpointError(f"{index} names a file outside of its folder: {file!r}")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size."""
    try:
        if path.stat().st_size > INDEX_LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {INDEX_LIMIT_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def into_shards(items: Sequence[T], sizes: Iterable[int], limit_bytes: int) -> list[list[T]]:
    """Cut a sequence where the next item would exceed the limit; a larger item is alone."""
    shards: list[list[T]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if not shards or size > room:
            shards.append([])
            room = limit_bytes
        shards[-1].append(item)
        room -= size
    return shards


def size_limit(size_per_shard: int | str) -> int:
    """Bytes, from MiB as a number or a text such as ``"5GB"``.

    Raises
    ------
    ValueError
        If it is not positive.
    """
    limit = size_per_shard * _MEBI if isinstance(size_per_shard, int) else parse_bytes(size_per_shard)
    if limit <= 0:
        raise ValueError(f"size_per_shard must be positive, got {size_per_shard!r}")
    return limit


def shard_names(name: str, count: int) -> list[str]:
    """``model-00001-of-00003.safetensors`` and so on."""
    stem, dot, suffix = name.rpartition(".")
    return [f"{stem}-{i + 1:05d}-of-{count:05d}{dot}{suffix}" for i in range(count)]


def find_shards(folder: Path, name: str) -> list[str]:
    """Files in a folder that are named as shards of ``name`` are, whether an index names them or not."""
    stem, dot, suffix = map(re.escape, name.rpartition("."))
    pattern = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}}(-[0-9a-f]{{8}})?|-[0-9a-f]{{8}}){dot}{suffix}")
    return sorted(path.name for path in folder.iterdir() if pattern.fullmatch(path.name))


def _open(path: Path, files: OpenFiles) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        file = files.open(path)
        return {name: Source(r.shape, r.dtype, partial(file.read, name)) for name, r in file.records.items()}
    stored = read_torch(path)
    files.says(path, ((metadata_of(stored) or {}).get("") or {}).get(ID_KEY))
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise CheckpointError(f"{path} does not hold a state dict (a dict from names to tensors)")
    if foreign := [n for n, v in stored.items() if not isinstance(v, Tensor) and not is_extra_state(n)]:
        raise CheckpointError(
            f"{path} does not hold a state dict: {listed(foreign)} are not tensors. Load the file yourself and "
            "give the part that is one to model.load_state_dict"
        )
    return {name: value if is_extra_state(name) else Source.of(value) for name, value in stored.items()}
