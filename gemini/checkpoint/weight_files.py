"""Where weights are in a checkpoint: single files, and folders in the Hugging Face layout."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from torch import Tensor

from gemini.errors import CheckpointError
from gemini.sizes import parse_bytes

from ..formats import Damaged, json_file, listed, shown
from ..torch_private import metadata_of
from .match import Source
from .names import is_extra_state
from .safetensors_stream import ID_KEY, OpenFiles
from .torch_file import read_torch, verify_torch

SAFE_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
WEIGHT_NAMES = (SAFE_NAME, SAFE_NAME + INDEX_SUFFIX, TORCH_NAME, TORCH_NAME + INDEX_SUFFIX)
"""Of the file to begin with in a folder, in the order in which transformers looks."""
FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MEBI = 1 << 20
_MOST_FILES = 20_000
"""In an index. The largest models have some 200."""
_COLOSSALAI_INDEX = re.compile(r"(pytorch_model\.bin|model\.safetensors)\.index\.[^.]+\.json")
"""ColossalAI puts a prefix before the last dot."""

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
    if not path.name.endswith(INDEX_SUFFIX) and not _COLOSSALAI_INDEX.fullmatch(path.name):
        return _open(path, files)
    return read_indexed(path, read_weight_map(path), files)


def read_indexed(
    index: Path, weight_map: Mapping[str, str], files: OpenFiles, *, names_all: bool = False
) -> dict[str, Any]:
    """The tensors that an index names; every file of it is looked at.

    Parameters
    ----------
    names_all
        Whether the index has to name all tensors of its files.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, lacks a tensor, or has one that is not named and should be.
    """
    places = {name: index.parent / name for name in dict.fromkeys(weight_map.values())}
    if gone := [name for name, path in places.items() if not path.is_file()]:
        raise CheckpointError(f"{index} names files that do not exist: {listed(gone)}")
    contents = {name: _open(path, files) for name, path in places.items()}
    if lost := [f"{name} (in {file})" for name, file in weight_map.items() if name not in contents[file]]:
        raise CheckpointError(f"{index} names tensors that are not in their files: {listed(lost)}")
    others = (f"{name} (in {file})" for file in contents for name in contents[file] if weight_map.get(name) != file)
    if names_all and (unnamed := list(others)):
        raise CheckpointError(f"{index} does not name tensors that are in its files: {listed(unnamed)}")
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
    prefixed = [path for path in folder.iterdir() if _COLOSSALAI_INDEX.fullmatch(path.name)]
    if len(prefixed) == 1:
        return prefixed[0]
    if (folder / "zero_to_fp32.py").is_file():
        raise CheckpointError(
            f"{folder} is a checkpoint of DeepSpeed, which may have weights in pieces: run python zero_to_fp32.py . "
            "OUTPUT in it, and load the folder OUTPUT"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds adapters of peft and no weights of a model: load them with booster.enable_lora(model, "
            "folder) before booster.boost, or with model.load_adapter(folder, name) after it"
        )
    raise CheckpointError(f"{folder} is not a checkpoint: it has none of {', '.join(WEIGHT_NAMES)}")


def read_weight_map(index: Path) -> dict[str, str]:
    """Name -> file, from an index.

    Raises
    ------
    CheckpointError
        If it is not an index, or names files outside of its folder.
    """
    weight_map = checked_weight_map(index, read_json(index).get("weight_map"))
    if not weight_map:
        raise CheckpointError(f"{index} is not the index of a checkpoint: its weight_map names no tensors")
    return weight_map


def checked_weight_map(index: Path, weight_map: Any) -> dict[str, str]:
    """A map from names to files of the index's folder. Links in there are followed, as caches of the Hub are made so.

    Raises
    ------
    CheckpointError
        If it is something else, or names files outside of the folder.
    """
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} is not the index of a checkpoint: it has no weight_map from names to files")
    files = dict.fromkeys(weight_map.values())
    if len(files) > _MOST_FILES:
        raise CheckpointError(f"{index} names {len(files)} files; {_MOST_FILES} are allowed")
    for file in files:
        path = PurePosixPath(file)
        if not path.name or path.is_absolute() or ".." in path.parts or not file.isprintable():
            raise CheckpointError(f"{index} names a file outside of its folder: {shown(file)!r}")
        if path.suffix not in FILE_SUFFIXES:
            raise CheckpointError(f"{index} names {shown(file)!r}, which is no file of tensors")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size, as a checkpoint has it.

    Raises
    ------
    CheckpointError
        If it is something else.
    """
    try:
        return json_file.read_json(path)
    except Damaged as error:
        raise CheckpointError(str(error)) from error


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
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        file = files.open(path)
        return {name: Source.in_file(file, name) for name in file.records}
    stored = read_torch(path, verify=False)
    files.verify_later(partial(verify_torch, path))
    files.says(path, _id_of(stored))
    files.describes(metadata_of(stored))
    if isinstance(stored, dict) and "ds_version" in stored:
        stored = stored.get("module")  # DeepSpeed's states of a model; of ZeRO-3 there are no values
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        raise CheckpointError(f"{path} does not hold a state dict (a dict from names to tensors)")
    items = dict(dict.items(stored))  # an OrderedDict may come with attributes in the place of its methods
    if foreign := [n for n, v in items.items() if not isinstance(v, Tensor) and not is_extra_state(n)]:
        raise CheckpointError(
            f"{path} does not hold a state dict: {listed(foreign)} are not tensors. Load the file yourself and "
            "give the part that is one to model.load_state_dict"
        )
    return {name: value if is_extra_state(name) else Source.of(value) for name, value in items.items()}


def _id_of(stored: Any) -> Any:
    """What a state dict's metadata have in the place of an id; whatever was in the file."""
    metadata = metadata_of(stored)
    of_model = metadata.get("") if isinstance(metadata, dict) else None
    return of_model.get(ID_KEY) if isinstance(of_model, dict) else None
